"""A small untrained detector in a run folder, for tests of what happens after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from boxwright.backbones.fpn import resnet_fpn
from boxwright.data.buckets import Resize
from boxwright.data.dataset import Category
from boxwright.detectors.proposal_network import proposal_network
from boxwright.detectors.rcnn import RCNN, faster_rcnn
from boxwright.heads.box_head import BoxConfig
from boxwright.recipes.common import SMALL_RPN, small
from boxwright.structures import Batch, Detections
from boxwright.training.experiment import build, to_json
from boxwright.weights.ours import save_weights

BACKBONE = partial(resnet_fpn, depth=18, norm="gn", frozen_stages=0, channels=16, fpn_norm="gn")
DETECT = RCNN.detect


def detect_with_masks(self: RCNN, batch: Batch) -> Detections:
    """Replacement of `RCNN.detect` that adds a mask to each box: its inscribed ellipse."""
    detections = DETECT(self, batch)
    coordinates = torch.linspace(-1, 1, 28)
    ellipse = (1.5 - (coordinates[:, None] ** 2 + coordinates**2)).clamp(0, 1)
    return replace(detections, masks=ellipse.expand(*detections.valid.shape, 28, 28))


def small_run(
    folder: Path, categories: Sequence[Category], *, proposals: bool = False, max_detections: int = 100
) -> Path:
    """Write `weights.safetensors` to a run folder and return the folder."""
    box = BoxConfig(width=32, score_threshold=0.0, max_detections=max_detections)
    model = (
        partial(proposal_network, backbone=BACKBONE, rpn=SMALL_RPN)
        if proposals
        else partial(faster_rcnn, backbone=BACKBONE, rpn=SMALL_RPN, box=box)
    )
    experiment = replace(small(model), resize=Resize(short=96, long=160))
    torch.manual_seed(0)
    detector = build(experiment.model, num_classes=len(categories))
    metadata = {
        "experiment": to_json(experiment),
        "categories": [{"id": category.id, "name": category.name} for category in categories],
        "versions": {"boxwright": "0"},
        "step": 12,
    }
    save_weights(folder / "weights.safetensors", detector.state_dict(), metadata)
    return folder
