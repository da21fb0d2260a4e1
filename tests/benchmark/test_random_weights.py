"""With calibrated random weights, a detector does about as much work as a trained detector."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from boxwright.backbones.fpn import resnet_fpn
from boxwright.benchmark.random_weights import settle
from boxwright.detectors.rcnn import mask_rcnn
from boxwright.detectors.retinanet import RetinaNet, retinanet
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


def passing(detector: nn.Module, batch: Batch) -> float:
    """Number of (box, class) pairs with a score above 0.05, per proposal (R-CNN) or per image (RetinaNet)."""
    features = detector.backbone(detector.normalize(batch.images, batch.image_sizes))
    if isinstance(detector, RetinaNet):
        scores = torch.cat(detector.head(features, batch.images.shape[-2:]).logits, 1).sigmoid()
        return (scores > 0.05).sum().item() / len(batch.images)
    proposals = detector.rpn.proposals(
        detector.rpn(features, batch.images.shape[-2:]), batch.image_sizes, training=False
    )
    logits, _ = detector.box_head(features, proposals.boxes, proposals.valid)
    return (logits.softmax(-1)[..., :-1][proposals.valid] > 0.05).sum().item() / proposals.valid.sum().item()


@pytest.mark.parametrize(("kind", "least", "most"), [("mask_rcnn", 0.05, 1.0), ("retinanet", 5, 500)])
@torch.no_grad()
def test_a_few_scores_pass_the_threshold(kind: str, least: float, most: float, batch: Batch) -> None:
    detector = built(kind).eval()
    assert not least < passing(detector, batch) < most, "untrained weights already pass, so the test is not meaningful"
    settle(detector, batch)
    assert least < passing(detector, batch) < most
    assert detector.detect(batch).valid.any(1).all()


def test_calibrated_weights_give_moderate_losses_and_finite_gradients(batch: Batch) -> None:
    detector = built("mask_rcnn")
    settle(detector, batch)
    losses = detector.losses(batch)
    assert all(0 <= loss < 10 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)
