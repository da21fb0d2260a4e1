"""Train torchvision's equivalent of the small Faster R-CNN: same architecture, initial weights, images and schedule.

    boxwright train faster_rcnn_r18_fpn_small --data bccd --out runs/ours
    boxwright train benchmarks.bccd_against_torchvision:experiment --data bccd --out runs/torchvision

The second run uses torchvision's anchors, matching, sampling, RoIAlign, losses and post-processing; everything else is
the same in both runs. Repeat both with `--set seed=1` and so on. Results: docs/benchmarks/bccd.md.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from boxwright.benchmark.torchvision_peer import TorchvisionDetector, torchvision_peer
from boxwright.recipes.faster_rcnn import faster_rcnn_r18_fpn_small
from boxwright.training.experiment import Experiment, build


def experiment() -> Experiment:
    """The small recipe with torchvision's model."""
    return replace(faster_rcnn_r18_fpn_small(), model=partial(torchvision_small))


def torchvision_small(*, num_classes: int) -> TorchvisionDetector:
    """Torchvision's detector with the architecture and the initial weights of the small recipe."""
    model = faster_rcnn_r18_fpn_small().model
    return torchvision_peer(model, build(model, num_classes=num_classes))
