"""Imported checkpoints of torchvision's v2 models reproduce torchvision's detections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import detection

import boxwright
from boxwright.backbones.backbone import PYTORCH
from boxwright.data.dataset import Category
from boxwright.detectors.detector import Detector
from boxwright.importers.convert import convert
from boxwright.structures import Batch
from boxwright.weights.foreign import read_foreign
from importers.reference import compare, to_detections
from parity.peer import EVERYTHING, NUM_CLASSES, SHORT_SIDE, peer_inputs, real_batch

MODELS = {
    "faster_rcnn": detection.fasterrcnn_resnet50_fpn_v2,
    "mask_rcnn": detection.maskrcnn_resnet50_fpn_v2,
    "retinanet": detection.retinanet_resnet50_fpn_v2,
}
FIRST_LABEL = {"faster_rcnn": 1, "mask_rcnn": 1, "retinanet": 0}
NUM_PROPOSALS = 100
"""In inference. The convolutions of the box head would be slow for torchvision's default of 1000 proposals."""


@pytest.fixture(scope="module")
def batch(data_dir: Path) -> Batch:
    return real_batch(data_dir)


@torch.no_grad()
def v2_model(kind: str, batch: Batch) -> Any:
    """A model with random weights that preserve the scale of activations, spread the scores and use every norm."""
    torch.manual_seed(3)
    retina = kind == "retinanet"
    settings: dict[str, Any] = {} if retina else {"rpn_post_nms_top_n_test": NUM_PROPOSALS}
    model = MODELS[kind](
        weights=None,
        weights_backbone=None,
        num_classes=NUM_CLASSES + FIRST_LABEL[kind],
        min_size=SHORT_SIDE,
        max_size=EVERYTHING,
        # Boxwright's pixel statistics, so that both models round alike.
        image_mean=PYTORCH.mean,
        image_std=PYTORCH.std,
        **settings,
    ).eval()
    for name, module in model.named_modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            low, high = (0.1, 0.3) if name.endswith("bn3") else (0.5, 1.5)
            nn.init.uniform_(module.weight, low, high)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.train()
    if retina:
        model.head.classification_head.cls_logits.weight.mul_(5)
    else:
        for conv in model.rpn.head.conv:
            conv[0].weight.mul_(3)
        model.rpn.head.cls_logits.weight.mul_(10)
        model.rpn.head.bbox_pred.weight.mul_(2)
        model.roi_heads.box_predictor.cls_score.weight.mul_(4)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(2)
    # Skip postprocessing: masks are compared before pasting, because torchvision pastes differently.
    model.transform.postprocess = lambda detections, *_: detections
    model(peer_inputs(batch, dtype=torch.float32)[0])
    return model.eval()


def converted(model: nn.Module, kind: str, folder: Path) -> Detector:
    torch.save(model.state_dict(), folder / "theirs.pth")
    names = [Category(number, f"thing {number}") for number in range(NUM_CLASSES)]
    changes = () if kind == "retinanet" else (f"model.rpn.test_num_proposals={NUM_PROPOSALS}",)
    imported = convert(read_foreign(folder / "theirs.pth"), categories=names, changes=changes)
    assert set(imported.unused) == {name for name in model.state_dict() if name.endswith("num_batches_tracked")}
    imported.save(folder / "ours.safetensors")
    return boxwright.load(folder / "ours.safetensors").detector


@pytest.mark.parametrize("kind", MODELS)
@torch.inference_mode()
def test_detections_equal_torchvisions(kind: str, batch: Batch, tmp_path: Path) -> None:
    peer = v2_model(kind, batch)
    detections = converted(peer, kind, tmp_path).detect(batch)
    for image, expected in enumerate(peer(peer_inputs(batch, dtype=torch.float32)[0])):
        valid = detections.valid[image]
        assert valid.sum() == len(expected["scores"]) > 50, "too few detections for a meaningful comparison"
        assert len(set(expected["labels"].tolist())) > 3
        actual = {name: getattr(detections, name)[image, valid] for name in ("boxes", "scores", "labels")}
        if kind == "mask_rcnn":
            assert expected["masks"].std() > 0.1, "the masks are too uniform for a meaningful comparison"
            actual["masks"] = detections.masks[image, valid]
        differences = compare(to_detections(actual), to_detections(expected, FIRST_LABEL[kind]))
        assert differences.boxes < 1e-2
        assert differences.scores < 1e-4
        assert differences.masks < 1e-3
