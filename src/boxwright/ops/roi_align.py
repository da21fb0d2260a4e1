"""RoIAlign (arXiv 1703.06870) over a feature pyramid (arXiv 1612.03144): each box is pooled from the level of its size.

B images, P boxes, L levels, C channels, S = output_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align

from boxwright.geometry.boxes import area
from boxwright.ops.roi_align_cpu import pool_own_level, pool_own_level_backward

FAR_OUTSIDE = -1e6
"""Where boxes go that must not be pooled: samples outside the picture read nothing, give 0 and have no gradient."""

TRITON = False
"""Whether GPUs pool with `roi_align_triton`. Off: it was interpreted and compiled, and has not run on a card yet;
`python -m benchmarks.gpu` compares it with `pool_every_level` there."""


def multilevel_roi_align(
    features: list[Tensor],
    boxes: Tensor,
    valid: Tensor,
    *,
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int = 2,
    aligned: bool = True,
    plus_one: float = 0.0,
    pool_plus_one: bool = True,
    level_epsilon: float = 1e-6,
    canonical_size: int = 224,
    canonical_level: int = 4,
) -> Tensor:
    """Pool an S x S grid of features for every box, from the one level that FPN's eq. 1 gives for the box's size.

    With `aligned=False, plus_one=0` this equals torchvision's `MultiScaleRoIAlign`. Gradients flow to the features
    alone, not to the boxes.

    Args:
        features: L of [B, C, H_l, W_l], finest first, all of one dtype; half precision is summed in float32.
        boxes: [B, P, 4] xyxy in pixels of the canvas.
        valid: [B, P] bool; other slots may hold anything, NaN included, and no gradient flows back from them. Boxes
            that are not finite count as invalid.
        strides: pixels a cell of each level, powers of two, each twice the one before.
        output_size: S.
        sampling_ratio: samples along each side of a grid cell; 0 for as many as feature cells, rounded up.
        aligned: whether a feature sits in the middle of its cell (the half pixel of Detectron2) or at its corner.
        plus_one: 1 for the 2018 geometry: x2 and y2 name the last pixel inside. Its RoIAlign, which is never aligned,
            also keeps boxes narrower than a feature cell as they are, where torchvision's unaligned form widens them.
        pool_plus_one: whether that holds for the pooling too, or for the choice of the level alone.
        level_epsilon: added to the level before rounding down.
        canonical_size: side of the square box that belongs to `canonical_level`.
        canonical_level: log2 of the stride of that level.

    Returns:
        [B, P, C, S, S] in the dtype of `features`; zeros for invalid slots.

    Raises:
        ValueError: There are no feature maps.
    """
    if not features:
        raise ValueError("RoIAlign got no feature maps to pool from: give one for each stride")
    assert len(features) == len(strides)
    finest, coarsest = round(math.log2(strides[0])), round(math.log2(strides[-1]))
    valid = valid & boxes.isfinite().all(-1)
    boxes = torch.where(valid[..., None], boxes.detach(), 0.0)
    level = canonical_level + (area(boxes, plus_one).clamp(min=0).sqrt() / canonical_size).log2() + level_epsilon
    level = torch.where(valid, level.floor().clamp(finest, coarsest).to(torch.int64) - finest, len(features))
    longer = plus_one > 0 and pool_plus_one
    if longer:
        boxes = torch.cat([boxes[..., :2], torch.maximum(boxes[..., 2:] + plus_one, boxes[..., :2])], -1)
    arguments = (list(strides), output_size, sampling_ratio, aligned, not aligned and longer)
    if boxes.device.type == "cpu" or TRITON:
        return pool_own_level(features, boxes, level, *arguments)
    return pool_every_level(features, boxes, level, *arguments)


@pool_own_level.register_kernel("cuda")
def _(*arguments: Any) -> Tensor:
    from boxwright.ops.roi_align_triton import pool  # Here, for installations without Triton.

    return pool(*arguments)


@pool_own_level_backward.register_kernel("cuda")
def _(*arguments: Any) -> list[Tensor]:
    from boxwright.ops.roi_align_triton import pool_backward  # As above.

    return pool_backward(*arguments)


def pool_every_level(
    features: list[Tensor],
    boxes: Tensor,
    level: Tensor,
    strides: list[int],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    keep_narrow: bool,
) -> Tensor:
    """All boxes on all levels, in static shapes: the form for GPUs, where a box out of sight costs next to nothing.

    Arguments and result are those of `pool_own_level`.
    """
    dtype = pooling_dtype(features[0])
    pooled = features[0].new_zeros((level.numel(), features[0].shape[1], output_size, output_size), dtype=dtype)
    for index, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        here = torch.where((level == index)[..., None], boxes, FAR_OUTSIDE)
        rois = _rois(here, stride, keep_narrow).flatten(0, 1).to(dtype)
        pooled = pooled + roi_align(
            feature.to(dtype), rois, output_size, 1 / stride, sampling_ratio, aligned or keep_narrow
        )
    return pooled.to(features[0].dtype).unflatten(0, level.shape)


def pooling_dtype(tensor: Tensor) -> torch.dtype:
    """What sums of a tensor's numbers are made in: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _rois(boxes: Tensor, stride: int, keep_narrow: bool) -> Tensor:
    """[B, P, 5] what torchvision's roi_align takes: image index and box."""
    if keep_narrow:
        # Only torchvision's aligned form leaves narrow boxes alone; this undoes its shift by half a feature cell.
        boxes = boxes + 0.5 * stride
    image = torch.arange(boxes.shape[0], dtype=boxes.dtype, device=boxes.device)
    return torch.cat([image[:, None, None].expand(*boxes.shape[:2], 1), boxes], -1)
