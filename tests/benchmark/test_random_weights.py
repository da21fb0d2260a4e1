"""Settled random weights give a detector the work that a trained one has."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from boxwright.backbones.fpn import resnet_fpn
from boxwright.benchmark.random_weights import settle
from boxwright.detectors.rcnn import mask_rcnn
from boxwright.detectors.retinanet import retinanet
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.structures import Batch
from factory import random_batch

CLASSES = 80


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    backbone = partial(resnet_fpn, depth=18, channels=32)
    if kind == "retinanet":
        return retinanet(backbone=backbone(out_stages=(3, 4, 5), extra="c5"), num_classes=CLASSES)
    return mask_rcnn(
        backbone=backbone(),
        num_classes=CLASSES,
        rpn=RPNConfig(num_proposals=200, test_num_proposals=200),
        box=BoxConfig(num_sampled=64, max_detections=50),
    )


@pytest.fixture(scope="module")
def batch() -> Batch:
    torch.manual_seed(1)
    return random_batch(canvas=(192, 256), num_classes=CLASSES)


@pytest.mark.parametrize("kind", ["mask_rcnn", "retinanet"])
@torch.no_grad()
def test_some_scores_pass_the_threshold_and_not_by_a_mile(kind: str, batch: Batch) -> None:
    detector = built(kind).eval()
    fresh = detector.detect(batch)
    # Frozen norms without statistics let everything grow, a fresh RetinaNet's prior lets nothing pass.
    assert not fresh.valid.any() or fresh.scores[fresh.valid].median() > 0.9
    settle(detector, batch)
    found = detector.detect(batch)
    assert (found.valid.sum(1) >= 5).all()
    assert 0.05 < found.scores[found.valid].median() < 0.5


def test_losses_and_gradients_are_those_of_a_start(batch: Batch) -> None:
    detector = built("mask_rcnn")
    settle(detector, batch)
    losses = detector.losses(batch)
    assert all(0 <= loss < 10 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)
