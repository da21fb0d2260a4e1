"""Box arithmetic: areas, overlaps, the R-CNN box coder, clipping. Shapes never depend on values.

N, M boxes. Boxes are continuous (x1, y1, x2, y2): a box is x2 - x1 wide. `plus_one=1` selects the geometry of the 2018
toolbox instead, where x2 and y2 name the last pixel inside the box, which is therefore x2 - x1 + 1 wide.
Every function keeps the dtype of float32 and float64 boxes and hands NaN through in its own row and column only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)
"""How much larger, in log scale, a decoded box may be than its anchor; R-CNN code bases share this number."""


def area(boxes: Tensor, plus_one: float = 0.0) -> Tensor:
    """Areas of boxes.

    Args:
        boxes: [..., 4] xyxy.
        plus_one: 1 for the 2018 geometry.

    Returns:
        [...] width x height.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 + plus_one - x1) * (y2 + plus_one - y1)


def intersection(a: Tensor, b: Tensor, plus_one: float = 0.0) -> Tensor:
    """Area that each box of `a` shares with each box of `b`.

    Args:
        a: [..., N, 4] xyxy.
        b: [..., M, 4] xyxy; leading dimensions broadcast with those of `a`.
        plus_one: 1 for the 2018 geometry.

    Returns:
        [..., N, M] shared area, 0 where boxes do not touch.
    """
    # One contiguous vector a coordinate: inner loops over stride-4 views do not vectorise on the CPU.
    ax1, ay1, ax2, ay2 = (a[..., k].contiguous()[..., :, None] for k in range(4))
    bx1, by1, bx2, by2 = (b[..., k].contiguous()[..., None, :] for k in range(4))
    width = torch.minimum(ax2 + plus_one, bx2 + plus_one) - torch.maximum(ax1, bx1)
    height = torch.minimum(ay2 + plus_one, by2 + plus_one) - torch.maximum(ay1, by1)
    return width.clamp(min=0) * height.clamp(min=0)


def iou(a: Tensor, b: Tensor, plus_one: float = 0.0) -> Tensor:
    """Intersection over union of each box of `a` with each box of `b`.

    Args:
        a: [..., N, 4] xyxy.
        b: [..., M, 4] xyxy; leading dimensions broadcast with those of `a`.
        plus_one: 1 for the 2018 geometry.

    Returns:
        [..., N, M] in 0..1; 0 for two boxes without area.
    """
    shared = intersection(a, b, plus_one)
    union = area(a, plus_one)[..., :, None] + area(b, plus_one)[..., None, :] - shared
    return shared / union.clamp(min=torch.finfo(union.dtype).tiny)


def _centres_and_sizes(boxes: Tensor, plus_one: float) -> tuple[Tensor, Tensor]:
    upper_left, lower_right = boxes[..., :2], boxes[..., 2:]
    return (upper_left + lower_right) / 2, lower_right - upper_left + plus_one


def encode(boxes: Tensor, anchors: Tensor, stds: Sequence[float], plus_one: float = 0.0) -> Tensor:
    """What a detector learns to predict: boxes as offsets from their anchors (R-CNN, arXiv 1311.2524, appendix C).

    Args:
        boxes: [..., 4] xyxy.
        anchors: [..., 4] xyxy, broadcast with `boxes`.
        stds: four numbers that the offsets are divided by, (0.1, 0.1, 0.2, 0.2) being torchvision's
            weights (10, 10, 5, 5).
        plus_one: 1 for the 2018 geometry.

    Returns:
        [..., 4] (dx, dy, dw, dh); not finite where a box or anchor has no area.
    """
    box_centres, box_sizes = _centres_and_sizes(boxes, plus_one)
    anchor_centres, anchor_sizes = _centres_and_sizes(anchors, plus_one)
    deltas = torch.cat([(box_centres - anchor_centres) / anchor_sizes, torch.log(box_sizes / anchor_sizes)], dim=-1)
    # Python numbers: a tensor of stds made here would be copied to the GPU, and waited for, on every call.
    return torch.stack([delta / std for delta, std in zip(deltas.unbind(-1), stds, strict=True)], dim=-1)


def decode(
    deltas: Tensor,
    anchors: Tensor,
    stds: Sequence[float],
    max_log_scale: float = MAX_LOG_SCALE,
    plus_one: float = 0.0,
) -> Tensor:
    """The inverse of `encode`, with growth bounded so that a wild prediction cannot overflow.

    Args:
        deltas: [..., 4] (dx, dy, dw, dh).
        anchors: [..., 4] xyxy, broadcast with `deltas`.
        stds: as given to `encode`.
        max_log_scale: upper bound on dw and dh after multiplying by `stds`. The 2018 geometry bounds shrinking too.
        plus_one: 1 for the 2018 geometry, as in mmdetection 0.5: sizes count x2 - x1 + 1 pixels, centres are
            (x1 + x2) / 2, so a decoded box is centre -+ (size - 1) / 2.

    Returns:
        [..., 4] xyxy, not clipped to any image.
    """
    centres, sizes = _centres_and_sizes(anchors, plus_one)
    deltas = torch.stack([delta * std for delta, std in zip(deltas.unbind(-1), stds, strict=True)], dim=-1)
    log_scales = deltas[..., 2:].clamp(min=-max_log_scale if plus_one else None, max=max_log_scale)
    new_centres = centres + deltas[..., :2] * sizes
    reach = (sizes * log_scales.exp() - plus_one) / 2
    return torch.cat([new_centres - reach, new_centres + reach], dim=-1)


def clip(boxes: Tensor, image_sizes: Tensor, plus_one: float = 0.0) -> Tensor:
    """Boxes cut at the edges of their image.

    Args:
        boxes: [B, ..., 4] xyxy (or [..., 4] with one image size).
        image_sizes: [B, 2] (or [2]) height and width.
        plus_one: 1 for the 2018 geometry, whose last pixel is at width - 1.

    Returns:
        Boxes of the same shape with 0 <= x <= width - plus_one, and y likewise. Infinite coordinates become NaN, so
        that clipping does not make a box out of one that is not finite.
    """
    limits = image_sizes.flip(-1).to(boxes.dtype) - plus_one
    limits = torch.cat([limits, limits], dim=-1)
    limits = limits.reshape(limits.shape[:-1] + (1,) * (boxes.ndim - limits.ndim) + (4,))
    return torch.where(boxes.isinf(), torch.nan, torch.minimum(boxes.clamp(min=0), limits))
