"""Box operations: area, IoU, box encoding and decoding, clipping. Output shapes never depend on values.

Shapes: N, M boxes. Boxes are (x1, y1, x2, y2) in continuous coordinates, with width x2 - x1. With `plus_one=1`, the
convention of Detectron and mmdetection 0.5, x2 and y2 are the last pixel inside the box, and the width is x2 - x1 + 1.

All functions keep the dtype of float32 and float64 boxes. A box with NaN affects only its own outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)
"""Upper bound of dw and dh in `decode`. The value is the same in Detectron, torchvision and mmdetection."""


def area(boxes: Tensor, plus_one: float = 0.0) -> Tensor:
    """Area of each box.

    Args:
        boxes: [..., 4] xyxy.
        plus_one: 1 if x2 and y2 are the last pixel inside the box.

    Returns:
        [...] width * height.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 + plus_one - x1) * (y2 + plus_one - y1)


def intersection(a: Tensor, b: Tensor, plus_one: float = 0.0) -> Tensor:
    """Pairwise intersection area.

    Args:
        a: [..., N, 4] xyxy.
        b: [..., M, 4] xyxy; leading dimensions broadcast with `a`.
        plus_one: 1 if x2 and y2 are the last pixel inside the box.

    Returns:
        [..., N, M] area; 0 for boxes that do not overlap.
    """
    # Each coordinate is made contiguous, since the CPU does not vectorise inner loops over stride-4 views.
    ax1, ay1, ax2, ay2 = (a[..., k].contiguous()[..., :, None] for k in range(4))
    bx1, by1, bx2, by2 = (b[..., k].contiguous()[..., None, :] for k in range(4))
    width = torch.minimum(ax2 + plus_one, bx2 + plus_one) - torch.maximum(ax1, bx1)
    height = torch.minimum(ay2 + plus_one, by2 + plus_one) - torch.maximum(ay1, by1)
    return width.clamp(min=0) * height.clamp(min=0)


def iou(a: Tensor, b: Tensor, plus_one: float = 0.0) -> Tensor:
    """Pairwise intersection over union (IoU).

    Args:
        a: [..., N, 4] xyxy.
        b: [..., M, 4] xyxy; leading dimensions broadcast with `a`.
        plus_one: 1 if x2 and y2 are the last pixel inside the box.

    Returns:
        [..., N, M] in 0..1; 0 for two boxes of zero area.
    """
    overlap = intersection(a, b, plus_one)
    union = area(a, plus_one)[..., :, None] + area(b, plus_one)[..., None, :] - overlap
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny)


def _centres_and_sizes(boxes: Tensor, plus_one: float) -> tuple[Tensor, Tensor]:
    upper_left, lower_right = boxes[..., :2], boxes[..., 2:]
    return (upper_left + lower_right) / 2, lower_right - upper_left + plus_one


def encode(boxes: Tensor, anchors: Tensor, stds: Sequence[float], plus_one: float = 0.0) -> Tensor:
    """Box regression targets: boxes as deltas relative to their anchors (R-CNN, arXiv 1311.2524, appendix C).

    Args:
        boxes: [..., 4] xyxy.
        anchors: [..., 4] xyxy, broadcast with `boxes`.
        stds: four values that divide (dx, dy, dw, dh). The stds (0.1, 0.1, 0.2, 0.2) correspond to torchvision's
            weights (10, 10, 5, 5).
        plus_one: 1 if x2 and y2 are the last pixel inside the box.

    Returns:
        [..., 4] (dx, dy, dw, dh); inf or NaN where a box or anchor has zero area.
    """
    box_centres, box_sizes = _centres_and_sizes(boxes, plus_one)
    anchor_centres, anchor_sizes = _centres_and_sizes(anchors, plus_one)
    deltas = torch.cat([(box_centres - anchor_centres) / anchor_sizes, torch.log(box_sizes / anchor_sizes)], dim=-1)
    # Dividing by Python floats avoids a host-to-device copy of a tensor of stds, and its synchronization, in each call.
    return torch.stack([delta / std for delta, std in zip(deltas.unbind(-1), stds, strict=True)], dim=-1)


def decode(
    deltas: Tensor,
    anchors: Tensor,
    stds: Sequence[float],
    max_log_scale: float = MAX_LOG_SCALE,
    plus_one: float = 0.0,
) -> Tensor:
    """Boxes from predicted deltas: the inverse of `encode`, with dw and dh clamped so that exp does not overflow.

    Args:
        deltas: [..., 4] (dx, dy, dw, dh).
        anchors: [..., 4] xyxy, broadcast with `deltas`.
        stds: the values passed to `encode`.
        max_log_scale: upper bound of dw and dh after multiplication by `stds`. With `plus_one=1`, -max_log_scale is the
            lower bound.
        plus_one: 1 if x2 and y2 are the last pixel inside, as in mmdetection 0.5: the size is x2 - x1 + 1, the centre
            is (x1 + x2) / 2, and the decoded box is centre -+ (size - 1) / 2.

    Returns:
        [..., 4] xyxy, not clipped to the image.
    """
    centres, sizes = _centres_and_sizes(anchors, plus_one)
    deltas = torch.stack([delta * std for delta, std in zip(deltas.unbind(-1), stds, strict=True)], dim=-1)
    log_scales = deltas[..., 2:].clamp(min=-max_log_scale if plus_one else None, max=max_log_scale)
    new_centres = centres + deltas[..., :2] * sizes
    half_extents = (sizes * log_scales.exp() - plus_one) / 2
    return torch.cat([new_centres - half_extents, new_centres + half_extents], dim=-1)


def clip(boxes: Tensor, image_sizes: Tensor, plus_one: float = 0.0) -> Tensor:
    """Clip boxes to their image.

    Args:
        boxes: [B, ..., 4] xyxy (or [..., 4] with one image size).
        image_sizes: [B, 2] (or [2]) height and width.
        plus_one: 1 if x2 and y2 are the last pixel inside the box.

    Returns:
        Boxes of the same shape with 0 <= x <= width - plus_one and 0 <= y <= height - plus_one. Infinite coordinates
        become NaN, so that clipping does not make a box out of one that is not finite.
    """
    limits = image_sizes.flip(-1).to(boxes.dtype) - plus_one
    limits = torch.cat([limits, limits], dim=-1)
    limits = limits.reshape(limits.shape[:-1] + (1,) * (boxes.ndim - limits.ndim) + (4,))
    return torch.where(boxes.isinf(), torch.nan, torch.minimum(boxes.clamp(min=0), limits))
