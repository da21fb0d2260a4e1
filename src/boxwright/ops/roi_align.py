"""RoIAlign (arXiv 1703.06870) on a feature pyramid (arXiv 1612.03144): a box is pooled from the level for its size.

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
"""Coordinate to which boxes are moved that must not be pooled: samples outside the image give 0 and have no
gradient."""

TRITON = False
"""Whether GPUs pool with `roi_align_triton`. It is off because the kernels were compiled and interpreted, but have not
run on a GPU yet; `python -m benchmarks.gpu` compares them with `pool_every_level`."""


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
    """Pool S x S features for every box from one pyramid level, which the size of the box determines (FPN, eq. 1).

    With `aligned=False, plus_one=0` this equals torchvision's `MultiScaleRoIAlign`. Gradients flow to the features, not
    to the boxes.

    Args:
        features: L of [B, C, H_l, W_l], finest first, all of one dtype; sums of half-precision features are in float32.
        boxes: [B, P, 4] xyxy in pixels of the canvas.
        valid: [B, P] bool; other slots may have any value, including NaN, and get no gradient. Boxes that are not
            finite are treated as invalid.
        strides: stride of each level in pixels, powers of two, each twice the previous one.
        output_size: S.
        sampling_ratio: number of sampling points per side of an output cell; 0 for the number of features that the cell
            spans, rounded up.
        aligned: whether the coordinate of a feature is the centre of its cell (Detectron2's half-pixel shift) or the
            corner.
        plus_one: 1 for the box geometry of mmdetection 0.5 (2018), in which x2 and y2 are the last pixel inside, else
            0. The RoIAlign of mmdetection 0.5, which is never aligned, also keeps boxes narrower than one feature cell,
            whereas torchvision's unaligned RoIAlign widens them.
        pool_plus_one: whether `plus_one` applies to the pooling too, or only to the choice of the level.
        level_epsilon: value added to the level before rounding down.
        canonical_size: side of the square box that is assigned to `canonical_level`.
        canonical_level: log2 of the stride of the level for boxes of `canonical_size`.

    Returns:
        [B, P, C, S, S] in the dtype of `features`; 0 for invalid slots.

    Raises:
        ValueError: there are no feature maps.
    """
    if not features:
        raise ValueError("RoIAlign: expected one feature map per stride, got no feature maps")
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
    from boxwright.ops.roi_align_triton import pool  # Imported here because Triton may not be installed.

    return pool(*arguments)


@pool_own_level_backward.register_kernel("cuda")
def _(*arguments: Any) -> list[Tensor]:
    from boxwright.ops.roi_align_triton import pool_backward  # Imported here because Triton may not be installed.

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
    """Pool all boxes on all levels, with static shapes. On GPUs, pooling a box outside the map costs next to nothing.

    Arguments and result are the same as for `pool_own_level`.
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
    """Dtype in which values of a tensor are summed: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _rois(boxes: Tensor, stride: int, keep_narrow: bool) -> Tensor:
    """[B, P, 5] RoIs in the format of torchvision's roi_align: image index and box."""
    if keep_narrow:
        # Only torchvision's aligned RoIAlign keeps narrow boxes; this cancels its shift by half a feature cell.
        boxes = boxes + 0.5 * stride
    image = torch.arange(boxes.shape[0], dtype=boxes.dtype, device=boxes.device)
    return torch.cat([image[:, None, None].expand(*boxes.shape[:2], 1), boxes], -1)
