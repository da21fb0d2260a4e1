"""Parts from outside the package can be trained, saved, loaded in a fresh process and used for prediction there.

Every part is in `stranger/`, which stands for a package that depends on Boxwright. Nothing in it edits or patches the
package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import boxwright
from boxwright.data.buckets import Resize
from boxwright.data.loader import EvaluationLoader
from boxwright.detectors.rcnn import faster_rcnn, mask_rcnn
from boxwright.evaluation.evaluate import evaluate
from boxwright.training.experiment import SGD, Experiment
from boxwright.training.loop import Training
from extension.stranger.backbones import LowRankConv2d, PlainFPN, lora_resnet_fpn, pruned_resnet_fpn, small_resnet_fpn
from extension.stranger.dataset import Discs
from extension.stranger.fcos import fcos_r18_fpn_small
from extension.stranger.heads import CosineBoxHead, faster_rcnn_with_gn_rpn, log_iou_loss
from factory import SMALL_BOX, SMALL_MASK, SMALL_RPN
from training.fakes import FakeImages
from training.runs import start_python

BOX = replace(SMALL_BOX, score_threshold=0.0)
SMALL = partial(faster_rcnn, rpn=SMALL_RPN, box=BOX)
MODELS: dict[str, Callable[..., nn.Module]] = {
    "hand-written backbone": partial(SMALL, backbone=partial(PlainFPN, width=8)),
    "backbone as a bare class": partial(SMALL, backbone=PlainFPN),
    "LoRA": partial(SMALL, backbone=lora_resnet_fpn),
    "pruning": partial(SMALL, backbone=pruned_resnet_fpn),
    "RPN with GroupNorm": partial(faster_rcnn_with_gn_rpn, backbone=small_resnet_fpn, rpn=SMALL_RPN, box=BOX),
    "box head subclass": partial(SMALL, backbone=small_resnet_fpn, box_head=partial(CosineBoxHead, dropout=0.1)),
    "GIoU loss": partial(SMALL, backbone=small_resnet_fpn, box=replace(BOX, box_loss="giou")),
    "box loss function": partial(
        mask_rcnn,
        rpn=replace(SMALL_RPN, box_loss="ciou"),
        mask=SMALL_MASK,
        backbone=small_resnet_fpn,
        box=replace(BOX, box_loss=log_iou_loss),
    ),
    "FCOS": fcos_r18_fpn_small().model,
}
LOAD = """
import json, sys
import numpy as np
import boxwright
image = np.load({image!r})
for name, run in json.loads({runs!r}).items():
    prediction = boxwright.load(run, trusted_modules=["extension.stranger"]).predict(image)
    print(json.dumps([name, prediction.boxes.tolist(), prediction.scores.tolist(), prediction.labels.tolist()]))
"""


def experiment_for(model: Callable[..., nn.Module]) -> Experiment:
    """An experiment of two steps of two images."""
    return Experiment(
        model=model, resize=Resize(64, 64), optimizer=SGD(lr=0.002), epochs=1, batch_size=2, images_per_device=2
    )


def train_two_steps(model: Callable[..., nn.Module], out: Path) -> nn.Module:
    """Train in the run folder `out` and return the detector."""
    training = Training(experiment_for(model), FakeImages(4), out, num_workers=0)
    training.run()
    assert training.step == 2
    return training.detector


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 255, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: folder / name.replace(" ", "_") for name in MODELS}


@pytest.fixture(scope="module")
def trained(runs: dict[str, Path]) -> dict[str, nn.Module]:
    return {name: train_two_steps(model, runs[name]) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def predictions_elsewhere(
    trained: dict[str, nn.Module], runs: dict[str, Path], image: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """Predictions of a fresh process with the saved weights."""
    file = tmp_path_factory.mktemp("image") / "image.npy"
    np.save(file, image)
    names = json.dumps({name: str(run) for name, run in runs.items()})
    output, errors = start_python(LOAD.format(image=str(file), runs=names)).communicate(timeout=300)
    return {(line := json.loads(text))[0]: line[1:] for text in output.splitlines()} or {"errors": [errors]}


@pytest.mark.parametrize("name", MODELS)
def test_part_from_outside_predicts_the_same_in_a_fresh_process(
    name: str, predictions_elsewhere: dict[str, list[Any]], runs: dict[str, Path], image: np.ndarray
) -> None:
    assert name in predictions_elsewhere, predictions_elsewhere.get("errors")
    here = boxwright.load(runs[name], trusted_modules=["extension.stranger"]).predict(image)
    boxes, scores, labels = predictions_elsewhere[name]
    assert len(here) > 0
    np.testing.assert_allclose(here.boxes, np.reshape(boxes, (-1, 4)), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(here.scores, scores, rtol=1e-4)
    assert here.labels.tolist() == labels


@pytest.mark.parametrize("name", MODELS)
def test_part_from_outside_is_refused_unless_its_module_is_trusted(
    name: str, trained: dict[str, nn.Module], runs: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=r"extension\.stranger"):
        boxwright.load(runs[name])


def test_forward_hooks_of_a_hand_written_backbone_fire_in_training_and_prediction(
    tmp_path: Path, image: np.ndarray
) -> None:
    calls: list[str] = []
    training = Training(experiment_for(MODELS["hand-written backbone"]), FakeImages(4), tmp_path, num_workers=0)
    leaves = {name: layer for name, layer in training.detector.named_modules() if not list(layer.children())}
    backbone = {
        name: layer
        for name, layer in leaves.items()
        if name.startswith("backbone.") and not isinstance(layer, nn.ModuleList)
    }
    for name, layer in backbone.items():
        layer.register_forward_hook(lambda layer, inputs, output, name=name: calls.append(name))
    training.run()
    assert {name: calls.count(name) for name in backbone} == dict.fromkeys(backbone, 2)
    predictor = boxwright.load(tmp_path, trusted_modules=["extension.stranger"])
    for name in backbone:
        predictor.detector.get_submodule(name).register_forward_hook(
            lambda layer, inputs, output, name=name: calls.append(name)
        )
    predictor.predict(image)
    assert {name: calls.count(name) for name in backbone} == dict.fromkeys(backbone, 3)


def test_lora_trains_its_updates_and_leaves_the_frozen_weights(trained: dict[str, nn.Module]) -> None:
    torch.manual_seed(Experiment.seed)
    start = MODELS["LoRA"].func(**{**MODELS["LoRA"].keywords, "backbone": lora_resnet_fpn()}, num_classes=2)  # type: ignore[attr-defined]
    layers = {name: layer for name, layer in trained["LoRA"].named_modules() if isinstance(layer, LowRankConv2d)}
    assert layers
    for name, layer in layers.items():
        before: Any = start.get_submodule(name)
        assert torch.equal(layer.base.weight, before.base.weight)
        assert not torch.equal(layer.up.weight, before.up.weight)
        assert not torch.equal(layer.down.weight, before.down.weight)


def test_pruned_weights_stay_pruned(trained: dict[str, nn.Module]) -> None:
    conv: Any = trained["pruning"].get_submodule("backbone.body.layer2.0.conv1")
    half = conv.weight.numel() // 2
    assert int((conv.weight == 0).sum()) == half
    assert (conv.weight_orig != 0).sum() > half


def test_dataset_class_with_three_members_trains_and_is_evaluated(tmp_path: Path) -> None:
    dataset, experiment = Discs(4), experiment_for(MODELS["FCOS"])
    training = Training(experiment, dataset, tmp_path, num_workers=0)
    training.run()
    batches = EvaluationLoader(dataset, batch_size=2, resize=experiment.resize, num_workers=0)
    results, metrics = evaluate(training.detector, dataset, batches, device="cpu")
    assert sorted(results.evaluated.tolist()) == list(range(len(dataset)))
    assert 0 <= metrics.summary["AP"] <= 1
