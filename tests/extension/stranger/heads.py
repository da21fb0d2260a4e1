"""Heads of an outside package: a box head that is a class, an RPN with another convolution, a box loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxwright.detectors.rcnn import RCNN, faster_rcnn
from boxwright.geometry.conventions import MODERN, Conventions
from boxwright.heads.box_head import BoxConfig, BoxHead


class CosineLinear(nn.Linear):
    """Cosine similarity to a prototype per class, times a learned scale."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1)) + self.bias


class CosineBoxHead(BoxHead):
    """A box head whose classifier compares directions only (few-shot detection, Wang et al., 2020)."""

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        num_classes: int,
        config: BoxConfig = BoxConfig(),
        conventions: Conventions = MODERN,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(channels, strides, num_classes, config, conventions)
        self.class_logits = CosineLinear(self.class_logits.in_features, num_classes + 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Sequence[Tensor], boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """See `BoxHead.forward`."""
        return super().forward([self.dropout(feature) for feature in features], boxes, valid)


def faster_rcnn_with_gn_rpn(**arguments: Any) -> RCNN:
    """A Faster R-CNN whose RPN convolution is followed by GroupNorm."""
    detector = faster_rcnn(**arguments)
    assert detector.rpn is not None
    conv: Any = detector.rpn.conv
    detector.rpn.conv = nn.Sequential(conv, nn.GroupNorm(8, conv.out_channels))
    return detector


def log_iou_loss(pred_boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """Minus the logarithm of the IoU (UnitBox, Yu et al., 2016); [..., 4] xyxy -> [...]."""
    sides = torch.minimum(pred_boxes[..., 2:], target_boxes[..., 2:]) - torch.maximum(
        pred_boxes[..., :2], target_boxes[..., :2]
    )
    overlap = sides.clamp(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (pred_boxes, target_boxes)]
    return -((overlap + 1) / (areas[0] + areas[1] - overlap + 1)).log()
