"""Faster R-CNN equals torchvision's with the same weights on the same real images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models.detection import FasterRCNN

from boxwright.backbones.fpn import resnet_fpn
from boxwright.detectors.rcnn import RCNN, faster_rcnn
from boxwright.geometry.conventions import TORCHVISION
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.structures import Batch
from parity.peer import (
    EVERYTHING,
    NUM_CLASSES,
    converted,
    converted_gradients,
    in_float64,
    peer_faster_rcnn,
    peer_inputs,
    real_batch,
)


@pytest.fixture(scope="module")
def batch(data_dir: Path) -> Batch:
    return real_batch(data_dir)


@pytest.fixture(scope="module")
def peer(batch: Batch) -> FasterRCNN:
    return peer_faster_rcnn(batch)


@pytest.fixture(scope="module")
def detector(peer: FasterRCNN) -> RCNN:
    detector = faster_rcnn(
        backbone=resnet_fpn(depth=50, frozen_stages=0, train_norm_affine=False),
        num_classes=NUM_CLASSES,
        conventions=TORCHVISION,
        rpn=RPNConfig(
            border=None,
            low_quality=0.0,
            test_pre_nms_per_level=1000,
            test_num_proposals=1000,
        ),
        box=BoxConfig(num_sampled=EVERYTHING, smooth_l1_beta=1 / 9),
    )
    detector = in_float64(detector)
    missing, unexpected = detector.load_state_dict(converted(peer.state_dict()), strict=False)
    assert not unexpected
    assert not missing
    return detector


@torch.inference_mode()
def test_detections_equal(batch: Batch, peer: FasterRCNN, detector: RCNN) -> None:
    expected = peer.eval()(peer_inputs(batch)[0])
    actual = detector.detect(batch)
    for index, theirs in enumerate(expected):
        valid = actual.valid[index]
        assert len(theirs["boxes"]) == valid.sum() > 50, "too few detections for a meaningful comparison"
        assert len(theirs["labels"].unique()) > 3
        assert (actual.scores[index][valid] - theirs["scores"]).abs().max() < 1e-9
        assert (actual.boxes[index][valid] - theirs["boxes"]).abs().max() < 1e-7
        assert torch.equal(actual.labels[index][valid] + 1, theirs["labels"])


def test_losses_and_gradients_equal(batch: Batch, peer: FasterRCNN, detector: RCNN) -> None:
    peer.train().backbone.eval()
    expected = peer(*peer_inputs(batch))
    actual = detector.losses(batch)
    names = {
        "rpn_objectness": "loss_objectness",
        "rpn_box": "loss_rpn_box_reg",
        "box_class": "loss_classifier",
        "box_regression": "loss_box_reg",
    }
    for ours, theirs in names.items():
        assert actual[ours].item() == pytest.approx(expected[theirs].item(), rel=1e-6), ours
        assert actual[ours] > 0
    sum(expected.values()).backward()
    sum(actual.values()).backward()
    gradients = converted_gradients(peer)
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
            assert error < 1e-6, f"{name}: {error:.1e}"
