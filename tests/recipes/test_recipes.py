from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import (
    FasterRCNN,
    fasterrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
    retinanet_resnet50_fpn_v2,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from boxwright.backbones.backbone import CAFFE, PYTORCH
from boxwright.backbones.resnet import Bottleneck
from boxwright.detectors.detector import Detector
from boxwright.layers.norm import FrozenBatchNorm2d
from boxwright.recipes import built_in_recipes, find_recipe
from boxwright.training.experiment import StepSchedule, arguments_of, build, from_json, to_json
from boxwright.training.settings import describe

RECIPES = built_in_recipes()


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def build_recipe(name: str, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return build(RECIPES[name]().model, num_classes=num_classes)


def torchvision_model(depth: int) -> FasterRCNN:
    with torch.device("meta"):
        if depth == 50:
            return fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
        backbone = resnet_fpn_backbone(backbone_name=f"resnet{depth}", weights=None, norm_layer=nn.BatchNorm2d)
        return FasterRCNN(backbone, num_classes=91)


BODIES = {"r50": (50, 1, 64), "r101": (101, 1, 64), "x101_32x4d": (101, 32, 4), "x101_64x4d": (101, 64, 4)}
"""Depth, number of groups and width per group, by the part of a recipe name."""


FAMILIES = ("rpn", "fast_rcnn", "fast_mask_rcnn", "faster_rcnn", "mask_rcnn", "retinanet")


def test_names_are_those_of_mmdetection_0_5_and_small_ones() -> None:
    rests = (
        *(f"{body}_fpn_{times}" for body in BODIES for times in ("1x", "2x")),
        "r50_caffe_fpn_1x",
        "r101_caffe_fpn_1x",
        "r18_fpn_small",
    )
    expected = [f"{family}_{rest}" for family in FAMILIES for rest in rests]
    cascades = ("r50_fpn_1x", "r50_fpn_20e", "r50_caffe_fpn_1x", "r101_fpn_1x", "r101_fpn_20e", "r18_fpn_small")
    expected += [f"{family}_{rest}" for family in ("cascade_rcnn", "cascade_mask_rcnn") for rest in cascades]
    assert sorted(RECIPES) == sorted([*expected, "mask_rcnn_r18_fpn_dense"])


@pytest.mark.parametrize("name", RECIPES)
def test_builds_and_documents_its_command(name: str) -> None:
    model = build_recipe(name, 3)
    assert isinstance(model, Detector)
    doc = RECIPES[name].__doc__
    assert doc is not None
    assert f"boxwright train {name} --data" in doc
    assert "Boxwright: not measured yet." in doc or "docs/benchmarks/" in doc, (
        "the docstring needs the page of its measurements, or: Boxwright: not measured yet."
    )


@pytest.mark.parametrize("name", RECIPES)
def test_json_round_trip(name: str) -> None:
    experiment = RECIPES[name]()
    data = to_json(experiment)
    again = from_json(json.loads(json.dumps(data)))
    assert to_json(again) == data
    assert replace(again, model=experiment.model) == experiment
    assert describe(again) == describe(experiment)


@pytest.mark.parametrize("name", RECIPES)
def test_has_the_settings_in_its_name(name: str) -> None:
    experiment = RECIPES[name]()
    model = arguments_of(experiment.model)
    caffe = "_caffe_" in name
    backbone = arguments_of(model["backbone"])
    assert model["pixel_stats"] == (CAFFE if caffe else PYTORCH)
    if "_r18_" in name:
        assert backbone["depth"] == 18
        return
    body = re.findall(r"_([rx]\d+(?:_\d+x\d+d)?)_", name)
    assert (backbone["depth"], backbone["groups"], backbone["width_per_group"]) == BODIES[body[0]]
    block = build_recipe(name, 80).get_submodule("backbone.body.layer2.0")
    assert isinstance(block, Bottleneck)
    assert block.conv1.stride == ((2, 2) if caffe else (1, 1))
    epochs, drops = {"1x": (12, (8, 11)), "2x": (24, (16, 22)), "20e": (20, (16, 19))}[name.rpartition("_")[2]]
    assert experiment.epochs == epochs
    assert experiment.schedule == StepSchedule(epochs=drops)
    rate = 0.01 if name.startswith("retinanet") else 0.02
    assert (experiment.optimizer.lr, experiment.batch_size, experiment.clip_norm) == (rate, 16, 35.0)


@pytest.mark.parametrize("depth", [50, 101])
def test_faster_rcnn_has_torchvision_s_parameters(depth: int) -> None:
    ours, other = build_recipe(f"faster_rcnn_r{depth}_fpn_1x", 90), torchvision_model(depth)
    # torchvision's box head also has box deltas for the background; ours has none.
    background_deltas = 4 * (1024 + 1)
    # In frozen batch norm layers of torchvision, scale and bias are buffers.
    scales = sum(
        module.weight.numel() * 2 for module in other.modules() if isinstance(module, torchvision.ops.FrozenBatchNorm2d)
    )
    assert num_parameters(ours) == num_parameters(other) + scales - background_deltas


def test_retinanet_has_torchvision_s_parameters() -> None:
    with torch.device("meta"):
        other = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
        trained_statistics = retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=91)
    ours = build_recipe("retinanet_r50_fpn_1x", 91)
    assert num_parameters(ours.head) == num_parameters(other.head)
    # Published with the weights of torchvision, for 91 classes; scale and bias of batch norm are buffers there.
    scales = sum(m.weight.numel() * 2 for m in ours.modules() if isinstance(m, FrozenBatchNorm2d))
    from_c5 = (2048 - 256) * 256 * 9  # our P6 is computed from C5, torchvision's from P5
    assert num_parameters(ours) == 34_014_999 + scales + from_c5
    # The second version of torchvision also computes P6 from C5.
    assert num_parameters(ours.backbone) == num_parameters(trained_statistics.backbone)


def test_mask_rcnn_has_torchvision_s_parameters() -> None:
    ours = build_recipe("mask_rcnn_r50_fpn_1x", 90)
    with torch.device("meta"):
        other = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    # torchvision's mask head also has logits for the background; ours has none.
    background_logits = 256 + 1
    num_torchvision = num_parameters(other.roi_heads.mask_head) + num_parameters(other.roi_heads.mask_predictor)
    assert num_parameters(ours.mask_head) == num_torchvision - background_logits
    assert num_parameters(ours) - num_parameters(ours.mask_head) == num_parameters(
        build_recipe("faster_rcnn_r50_fpn_1x", 90)
    )


@pytest.mark.parametrize("depth", [50, 101])
def test_rpn_has_torchvision_s_parameters(depth: int) -> None:
    ours, other = build_recipe(f"rpn_r{depth}_fpn_1x", 1), torchvision_model(depth)
    assert num_parameters(ours.rpn) == num_parameters(other.rpn)
    assert num_parameters(ours.backbone) == num_parameters(build_recipe(f"faster_rcnn_r{depth}_fpn_1x", 1).backbone)


@pytest.mark.parametrize("depth", [50, 101])
def test_fast_rcnn_is_faster_rcnn_without_its_rpn(depth: int) -> None:
    fast, faster = build_recipe(f"fast_rcnn_r{depth}_fpn_1x", 80), build_recipe(f"faster_rcnn_r{depth}_fpn_1x", 80)
    assert num_parameters(fast) == num_parameters(faster) - num_parameters(faster.rpn)
    assert set(fast.state_dict()) == {name for name in faster.state_dict() if not name.startswith("rpn.")}


@pytest.mark.parametrize("depth", [50, 101])
def test_fast_mask_rcnn_is_mask_rcnn_without_its_rpn(depth: int) -> None:
    fast, whole = build_recipe(f"fast_mask_rcnn_r{depth}_fpn_1x", 80), build_recipe(f"mask_rcnn_r{depth}_fpn_1x", 80)
    assert num_parameters(fast) == num_parameters(whole) - num_parameters(whole.rpn)
    assert set(fast.state_dict()) == {name for name in whole.state_dict() if not name.startswith("rpn.")}


def test_fast_rcnn_documents_how_to_compute_its_proposals() -> None:
    for name in (name for name in RECIPES if name.startswith(("fast_rcnn_", "fast_mask_rcnn_"))):
        doc = RECIPES[name].__doc__
        assert "boxwright propose runs/rpn_" in doc
        assert "--proposals" in doc


PUBLISHED = {
    "retinanet_r50_fpn_1x": 37.7,
    "retinanet_r101_fpn_1x": 56.7,
    "retinanet_x101_32x4d_fpn_1x": 56.4,
    "retinanet_x101_64x4d_fpn_1x": 95.5,
    "mask_rcnn_r50_fpn_1x": 44.2,
    "mask_rcnn_r101_fpn_1x": 63.2,
    "mask_rcnn_x101_32x4d_fpn_1x": 62.8,
    "mask_rcnn_x101_64x4d_fpn_1x": 101.9,
}
"""Millions of trainable parameters with 80 classes: Wang et al., Pyramid Vision Transformer (2021), tables 3 and 4."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_number_of_parameters(name: str) -> None:
    trained = sum(parameter.numel() for parameter in build_recipe(name, 80).parameters() if parameter.requires_grad)
    assert round(trained / 1e6, 1) == PUBLISHED[name]


def test_cascades_have_the_published_numbers_of_parameters() -> None:
    """Later versions of mmdetection have 69.17 and 77.1 million trainable parameters with R-50-FPN and 80 classes."""
    box, with_masks = (build_recipe(f"{family}_r50_fpn_1x", 80) for family in ("cascade_rcnn", "cascade_mask_rcnn"))
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6 for model in (box, with_masks)]
    assert trained == pytest.approx([69.17, 77.10], abs=0.005)
    # Computed by hand: three stages with two fully connected layers, 80 classes and background, and one box.
    stage = (256 * 7 * 7 + 1) * 1024 + (1024 + 1) * 1024 + (1024 + 1) * 81 + (1024 + 1) * 4
    assert num_parameters(box.box_heads) == 3 * stage
    # Four convolutions, a 2x2 deconvolution, and one mask per class.
    mask = 4 * (256 * 3 * 3 + 1) * 256 + (256 * 2 * 2 + 1) * 256 + (256 + 1) * 80
    assert num_parameters(with_masks.mask_heads) == 3 * mask
    shared = num_parameters(build_recipe("faster_rcnn_r50_fpn_1x", 80).backbone)
    assert num_parameters(box.backbone) == num_parameters(with_masks.backbone) == shared


def test_small_ones_train_everything() -> None:
    for name in (name for name in RECIPES if name.endswith(("_small", "_dense"))):
        assert all(parameter.requires_grad for parameter in build_recipe(name, 3).parameters())


def test_find_recipe() -> None:
    assert find_recipe("rpn_r50_fpn_1x") is RECIPES["rpn_r50_fpn_1x"]
    assert find_recipe("boxwright.recipes.rpn:rpn_r50_fpn_1x") is RECIPES["rpn_r50_fpn_1x"]


def test_find_recipe_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ("retinanet", r"there are (retinanet_\w+(, )?)+ \(for your own recipe"),
        ("no_such_package.recipes:mine", "no module 'no_such_package'"),
        ("boxwright.recipes.rpn:one_x", "has no function 'one_x'"),
        (":mine", "expected the name of a built-in recipe, or package.module:function"),
        (
            "boxwright.recipes.common:one_x",
            "is not a recipe: a recipe must be callable without arguments .missing .* 'model'",
        ),
    ],
)
def test_errors_for_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_recipe(name)
