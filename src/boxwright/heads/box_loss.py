"""Box regression loss of the RPN, the box head and the RetinaNet head.

Shapes: ... stands for any leading dimensions, such as B images and S sampled boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from boxwright.geometry import boxes as box_geometry
from boxwright.losses import at_least_float32, ciou_loss, diou_loss, giou_loss, smooth_l1

BoxLossName = Literal["smooth_l1", "giou", "diou", "ciou"]
BoxLoss = BoxLossName | Callable[..., Tensor]
"""Name of a box loss, or a function `(predictions, targets) -> losses` that maps decoded boxes, [..., 4] xyxy in
pixels, to one loss per box, [...]. An experiment can be saved only if the function is defined at the top of an
importable module."""


def box_regression_loss(
    kind: BoxLoss,
    deltas: Tensor,
    references: Tensor,
    matched_boxes: Tensor,
    positive: Tensor,
    *,
    stds: Sequence[float],
    smooth_l1_beta: float,
    plus_one: float,
) -> Tensor:
    """Losses of predicted boxes, 0 where `positive` is False.

    Smooth L1 compares box deltas and is summed over the four deltas. Every other loss compares decoded boxes.

    Args:
        kind: name of the loss, or a loss function.
        deltas: [..., 4] predicted box deltas.
        references: [..., 4] xyxy, the anchors or proposals that the deltas refer to; broadcast with `deltas`.
        matched_boxes: [..., 4] xyxy, the ground truth box of each positive.
        positive: [...] bool; elsewhere the other arguments may have any value, including NaN.
        stds: standard deviations of the deltas, see `boxes.encode`.
        smooth_l1_beta: see `losses.smooth_l1`.
        plus_one: 1 for the box geometry of mmdetection 0.5 (2018), else 0; see `geometry.boxes`.
    """
    mask = positive[..., None]
    if kind == "smooth_l1":
        matched_boxes = torch.where(mask, matched_boxes, references)
        targets = box_geometry.encode(matched_boxes, references, stds, plus_one=plus_one)
        return smooth_l1(deltas, targets, smooth_l1_beta, mask).sum(-1)
    # Mask before decoding: exp() of padding may overflow.
    deltas = torch.where(mask, at_least_float32(deltas), 0.0)
    references, matched_boxes = torch.where(mask, references, 0.0), torch.where(mask, matched_boxes, 0.0)
    predictions = box_geometry.decode(deltas, references, stds, plus_one=plus_one)
    if plus_one:  # x2 and y2 are the last pixel inside the box, but the losses expect the edges of the box.
        predictions, matched_boxes = _with_last_pixel(predictions, plus_one), _with_last_pixel(matched_boxes, plus_one)
    losses = _FUNCTIONS[kind](predictions, matched_boxes) if isinstance(kind, str) else kind(predictions, matched_boxes)
    if losses.shape != positive.shape:
        raise ValueError(
            f"box_loss: expected one loss per box, shape {list(positive.shape)}, got {list(losses.shape)} from "
            f"{getattr(kind, '__name__', kind)}. Return losses without reducing them."
        )
    return torch.where(positive, losses, 0.0)


_FUNCTIONS = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}


def _with_last_pixel(boxes: Tensor, plus_one: float) -> Tensor:
    return torch.cat([boxes[..., :2], boxes[..., 2:] + plus_one], dim=-1)


def check_box_loss(box_loss: BoxLoss) -> None:
    """Check the `box_loss` field of a configuration.

    Raises:
        ValueError: `box_loss` is neither the name of a loss nor a function.
    """
    if not callable(box_loss) and box_loss not in get_args(BoxLossName):
        names = ", ".join(get_args(BoxLossName))
        raise ValueError(f"box_loss: expected one of {names} or a function of (predictions, targets), got {box_loss!r}")
