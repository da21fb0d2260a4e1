from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from boxwright.backbones.backbone import CAFFE, PYTORCH
from boxwright.backbones.resnet import Bottleneck
from boxwright.detectors.detector import Detector
from boxwright.recipes import built_in_recipes, find_recipe
from boxwright.training.experiment import StepSchedule, arguments_of, build, from_json, to_json
from boxwright.training.settings import describe

RECIPES = built_in_recipes()


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def built(name: str, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return build(RECIPES[name]().model, num_classes=num_classes)


def theirs(depth: int) -> FasterRCNN:
    with torch.device("meta"):
        if depth == 50:
            return fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
        backbone = resnet_fpn_backbone(backbone_name=f"resnet{depth}", weights=None, norm_layer=nn.BatchNorm2d)
        return FasterRCNN(backbone, num_classes=91)


def test_names_are_the_2018_toolbox_s_and_small_ones() -> None:
    assert sorted(RECIPES) == sorted(
        [
            f"{family}_{rest}"
            for family in ("rpn", "faster_rcnn", "mask_rcnn")
            for rest in (
                "r50_fpn_1x",
                "r50_fpn_2x",
                "r50_caffe_fpn_1x",
                "r101_fpn_1x",
                "r101_fpn_2x",
                "r101_caffe_fpn_1x",
                "r18_fpn_small",
            )
        ]
        + ["mask_rcnn_r18_fpn_dense"]
        + [
            f"{family}_{rest}"
            for family in ("cascade_rcnn", "cascade_mask_rcnn")
            for rest in (
                "r50_fpn_1x",
                "r50_fpn_20e",
                "r50_caffe_fpn_1x",
                "r101_fpn_1x",
                "r101_fpn_20e",
                "r18_fpn_small",
            )
        ]
    )


@pytest.mark.parametrize("name", RECIPES)
def test_builds_and_says_how_to_run_it(name: str) -> None:
    model = built(name, 3)
    assert isinstance(model, Detector)
    doc = RECIPES[name].__doc__
    assert doc is not None
    assert f"boxwright train {name} --data" in doc
    assert "Ours: not yet measured." in doc or "docs/benchmarks/" in doc, (
        "say where its figures were measured, or that none were"
    )


@pytest.mark.parametrize("name", RECIPES)
def test_goes_through_json(name: str) -> None:
    experiment = RECIPES[name]()
    page = to_json(experiment)
    again = from_json(json.loads(json.dumps(page)))
    assert to_json(again) == page
    assert replace(again, model=experiment.model) == experiment
    assert describe(again) == describe(experiment)


@pytest.mark.parametrize("name", RECIPES)
def test_is_what_its_name_says(name: str) -> None:
    experiment = RECIPES[name]()
    model = arguments_of(experiment.model)
    caffe = "_caffe_" in name
    assert f"_r{model['backbone'].keywords['depth']}_" in name
    assert model["pixel_stats"] == (CAFFE if caffe else PYTORCH)
    if name.endswith(("_small", "_dense")):
        return
    block = built(name, 80).get_submodule("backbone.body.layer2.0")
    assert isinstance(block, Bottleneck)
    assert block.conv1.stride == ((2, 2) if caffe else (1, 1))
    epochs, falls = {"1x": (12, (8, 11)), "2x": (24, (16, 22)), "20e": (20, (16, 19))}[name.rpartition("_")[2]]
    assert experiment.epochs == epochs
    assert experiment.schedule == StepSchedule(epochs=falls)
    assert (experiment.optimizer.lr, experiment.batch_size, experiment.clip_norm) == (0.02, 16, 35.0)


@pytest.mark.parametrize("depth", [50, 101])
def test_faster_rcnn_has_torchvision_s_parameters(depth: int) -> None:
    ours, other = built(f"faster_rcnn_r{depth}_fpn_1x", 90), theirs(depth)
    # torchvision's box head also has deltas for background, which we have not.
    background_deltas = 4 * (1024 + 1)
    # Where its batch norms are frozen ones, scale and bias are buffers.
    scales = sum(
        module.weight.numel() * 2 for module in other.modules() if isinstance(module, torchvision.ops.FrozenBatchNorm2d)
    )
    assert num_parameters(ours) == num_parameters(other) + scales - background_deltas


def test_mask_rcnn_has_torchvision_s_parameters() -> None:
    ours = built("mask_rcnn_r50_fpn_1x", 90)
    with torch.device("meta"):
        other = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    # torchvision's mask head also has logits for background, which we have not.
    background_logits = 256 + 1
    theirs_in_all = num_parameters(other.roi_heads.mask_head) + num_parameters(other.roi_heads.mask_predictor)
    assert num_parameters(ours.mask_head) == theirs_in_all - background_logits
    assert num_parameters(ours) - num_parameters(ours.mask_head) == num_parameters(built("faster_rcnn_r50_fpn_1x", 90))


@pytest.mark.parametrize("depth", [50, 101])
def test_rpn_has_torchvision_s_parameters(depth: int) -> None:
    ours, other = built(f"rpn_r{depth}_fpn_1x", 1), theirs(depth)
    assert num_parameters(ours.rpn) == num_parameters(other.rpn)
    assert num_parameters(ours.backbone) == num_parameters(built(f"faster_rcnn_r{depth}_fpn_1x", 1).backbone)


def test_cascades_have_the_published_numbers_of_parameters() -> None:
    """Those of the later 2018 toolbox for R-50-FPN and 80 classes, in millions: 69.17 and 77.1; frozen ones apart."""
    box, with_masks = (built(f"{family}_r50_fpn_1x", 80) for family in ("cascade_rcnn", "cascade_mask_rcnn"))
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6 for model in (box, with_masks)]
    assert trained == pytest.approx([69.17, 77.10], abs=0.005)
    # By hand: three stages of two layers, 80 classes and background, one box.
    stage = (256 * 7 * 7 + 1) * 1024 + (1024 + 1) * 1024 + (1024 + 1) * 81 + (1024 + 1) * 4
    assert num_parameters(box.box_heads) == 3 * stage
    # Four convolutions, a deconvolution of 2 x 2, a mask a class.
    mask = 4 * (256 * 3 * 3 + 1) * 256 + (256 * 2 * 2 + 1) * 256 + (256 + 1) * 80
    assert num_parameters(with_masks.mask_heads) == 3 * mask
    shared = num_parameters(built("faster_rcnn_r50_fpn_1x", 80).backbone)
    assert num_parameters(box.backbone) == num_parameters(with_masks.backbone) == shared


def test_small_ones_train_everything() -> None:
    for name in (name for name in RECIPES if name.endswith(("_small", "_dense"))):
        assert all(parameter.requires_grad for parameter in built(name, 3).parameters())


def test_find_recipe() -> None:
    assert find_recipe("rpn_r50_fpn_1x") is RECIPES["rpn_r50_fpn_1x"]
    assert find_recipe("boxwright.recipes.rpn:rpn_r50_fpn_1x") is RECIPES["rpn_r50_fpn_1x"]


def test_find_recipe_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes_of_mine.py").write_text("def small():\n    return 3\n")
    (tmp_path / "recipes_broken.py").write_text("import a_module_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_recipe("recipes_of_mine:small")() == 3
    with pytest.raises(ValueError, match="did you mean 'small'"):
        find_recipe("recipes_of_mine:smal")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        find_recipe("recipes_broken:small")
    sys.modules.pop("recipes_of_mine", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("faster_rcnn_r50_fpn_1", "did you mean 'faster_rcnn_r50_fpn_1x'"),
        ("one_x", "there are"),
        ("no_such_package.recipes:mine", "no module 'no_such_package'"),
        ("boxwright.recipes.rpn:one_x", "has no function 'one_x'"),
        (":mine", "give a built-in one, or package.module:function"),
        ("boxwright.recipes.common:one_x", "no recipe, which takes no arguments: missing .* 'model'"),
    ],
)
def test_unknown_names_give_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_recipe(name)
