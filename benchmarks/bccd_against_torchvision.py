"""The small Faster R-CNN trained by torchvision's detector: same architecture, first weights, pictures and schedule.

    boxwright train faster_rcnn_r18_fpn_small --data bccd --out runs/ours
    boxwright train benchmarks.bccd_against_torchvision:experiment --data bccd --out runs/torchvision

The second run differs from the first by all that lies between pixels and losses: torchvision's anchors, matching,
sampling, RoIAlign, losses and post-processing. `--set seed=1` and so on repeats both. Figures: docs/benchmarks/bccd.md.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from boxwright.benchmark.torchvision_peer import TorchvisionDetector, torchvision_peer
from boxwright.recipes.faster_rcnn import faster_rcnn_r18_fpn_small
from boxwright.training.experiment import Experiment, build


def experiment() -> Experiment:
    """The small recipe with torchvision's model in it."""
    return replace(faster_rcnn_r18_fpn_small(), model=partial(torchvision_small))


def torchvision_small(*, num_classes: int) -> TorchvisionDetector:
    """Torchvision's detector with the small recipe's sizes and the weights that the recipe would start from."""
    model = faster_rcnn_r18_fpn_small().model
    return torchvision_peer(model, build(model, num_classes=num_classes))
