"""A user's module: parts of models that are classes, and detectors without parts of Boxwright."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from boxwright.backbones.fpn import FPN
from boxwright.detectors.detector import Detector
from boxwright.detectors.rcnn import RCNN, faster_rcnn
from boxwright.heads.box_head import BoxHead
from boxwright.heads.rpn_head import RPNHead
from boxwright.structures import Batch, Detections
from boxwright.training.experiment import Experiment


class Body(nn.Module):
    """Maps at strides 4 to 16, each from one convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels, self.strides = [width, 2 * width, 4 * width], [4, 8, 16]
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.stages = nn.ModuleList(nn.Conv2d(c, 2 * c, 2, stride=2) for c in self.channels[:-1])

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images).relu()]
        for stage in self.stages:
            maps.append(stage(maps[-1]).relu())
        return maps


class ScaledBoxHead(BoxHead):
    """A box head with an additional parameter and an additional setting."""

    def __init__(self, *arguments: Any, extra: int = 2) -> None:
        super().__init__(*arguments)
        self.scale = nn.Parameter(torch.full((extra,), 1.0))

    def forward(self, features: Any, boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(features, boxes, valid)
        return logits * self.scale.mean(), deltas


class PlainRPN(RPNHead):
    """An RPN head given as a bare class."""


class PlainDetector(nn.Module):
    """A detector with only the members that every detector must have."""

    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.max_detections = 1
        self.layer = nn.Linear(3, width)
        self.score = nn.Linear(width, num_classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.score(self.layer(batch.images.float().mean((2, 3)) / 255).relu())

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return {"class": self(batch).square().mean()}

    def detect(self, batch: Batch) -> Detections:
        scores, labels = self(batch).sigmoid().max(1, keepdim=True)
        boxes = torch.tensor([2.0, 3.0, 20.0, 30.0], device=scores.device).expand(len(scores), 1, 4)
        return Detections(boxes=boxes, scores=scores, labels=labels, valid=torch.ones_like(labels, dtype=torch.bool))


class DerivedDetector(Detector, PlainDetector):
    """`PlainDetector` as a subclass of `Detector`."""

    losses = PlainDetector.losses
    detect = PlainDetector.detect


def rcnn_of_parts(**settings: Any) -> Callable[..., RCNN]:
    """A Faster R-CNN whose backbone and heads are this module's classes."""
    return partial(
        faster_rcnn,
        backbone=partial(FPN, body=partial(Body, width=4), channels=8),
        rpn_head=PlainRPN,
        box_head=partial(ScaledBoxHead, extra=3),
        **settings,
    )


@dataclass(frozen=True)
class Doubled:
    """Settings whose constructor doubles `number`, so that a round trip through JSON changes them."""

    number: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "number", 2 * self.number)


def doubled_detector(num_classes: int, *, options: Doubled) -> PlainDetector:
    """Build a `PlainDetector` of width `options.number`."""
    return PlainDetector(num_classes, options.number)


class AgnosticDetector(PlainDetector):
    """A class-agnostic detector that is not a `proposal_network`."""

    class_agnostic = True

    def __init__(self, num_classes: int) -> None:
        super().__init__(1)


def experiment_of_a_lambda() -> Experiment:
    """A recipe with a lambda as backbone, whose weights could not be loaded."""
    return Experiment(model=partial(faster_rcnn, backbone=lambda: Body(4)))
