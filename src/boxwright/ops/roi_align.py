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

FAR_OUTSIDE = -1e6
"""Where boxes go that must not be pooled: samples outside the picture read nothing, give 0 and have no gradient."""


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
        features: L of [B, C, H_l, W_l], finest first, all of one dtype; half precision is pooled in float32.
        boxes: [B, P, 4] xyxy in pixels of the canvas.
        valid: [B, P] bool; the boxes of other slots may hold anything, NaN included, and nothing flows back from them.
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
    """
    assert len(features) == len(strides)
    finest, coarsest = round(math.log2(strides[0])), round(math.log2(strides[-1]))
    boxes = torch.where(valid[..., None], boxes.detach(), 0.0)
    level = canonical_level + (area(boxes, plus_one).clamp(min=0).sqrt() / canonical_size).log2() + level_epsilon
    level = torch.where(valid, level.floor().clamp(finest, coarsest).to(torch.int64) - finest, len(features))
    longer = plus_one > 0 and pool_plus_one
    if longer:
        boxes = torch.cat([boxes[..., :2], torch.maximum(boxes[..., 2:] + plus_one, boxes[..., :2])], -1)
    arguments = (list(strides), output_size, sampling_ratio, aligned, not aligned and longer)
    if boxes.device.type == "cpu":
        return pool_own_level(features, boxes, level, *arguments)
    return pool_every_level(features, boxes, level, *arguments)


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
    dtype = _pooling_dtype(features[0])
    pooled = features[0].new_zeros((level.numel(), features[0].shape[1], output_size, output_size), dtype=dtype)
    for index, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        here = torch.where((level == index)[..., None], boxes, FAR_OUTSIDE)
        rois = _rois(here, stride, keep_narrow).flatten(0, 1).to(dtype)
        pooled = pooled + roi_align(
            feature.to(dtype), rois, output_size, 1 / stride, sampling_ratio, aligned or keep_narrow
        )
    return pooled.to(features[0].dtype).unflatten(0, level.shape)


@torch.library.custom_op("boxwright::roi_align", mutates_args=(), device_types="cpu")
def pool_own_level(
    features: list[Tensor],
    boxes: Tensor,
    level: Tensor,
    strides: list[int],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    keep_narrow: bool,
) -> Tensor:
    """Each box on its level only, as one opaque operator in which shapes may depend on data: the form for CPUs.

    Args:
        features: L of [B, C, H_l, W_l].
        boxes: [B, P, 4] finite, continuous xyxy in pixels of the canvas.
        level: [B, P] int64, index into `features`, or L for boxes that are not pooled.
        strides: L.
        output_size: S.
        sampling_ratio: as in `multilevel_roi_align`.
        aligned: as in `multilevel_roi_align`.
        keep_narrow: where not aligned, leave boxes narrower than a feature cell as they are.

    Returns:
        [B, P, C, S, S], zeros for boxes that are not pooled.
    """
    dtype = _pooling_dtype(features[0])
    channels = features[0].shape[1]
    pooled = features[0].new_zeros((level.numel(), channels, output_size, output_size))
    for index, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        members = (level.flatten() == index).nonzero().squeeze(1)
        if len(members):
            rois = _rois(boxes, stride, keep_narrow).flatten(0, 1)[members].to(dtype)
            pooled[members] = roi_align(
                feature.to(dtype), rois, output_size, 1 / stride, sampling_ratio, aligned or keep_narrow
            ).to(pooled.dtype)
    return pooled.view(*level.shape, channels, output_size, output_size)


@pool_own_level.register_fake
def _(
    features: list[Tensor],
    boxes: Tensor,
    level: Tensor,
    strides: list[int],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    keep_narrow: bool,
) -> Tensor:
    return features[0].new_empty((*level.shape, features[0].shape[1], output_size, output_size))


@torch.library.custom_op("boxwright::roi_align_backward", mutates_args=(), device_types="cpu")
def _pool_own_level_backward(
    gradient: Tensor,
    boxes: Tensor,
    level: Tensor,
    heights: list[int],
    widths: list[int],
    strides: list[int],
    sampling_ratio: int,
    aligned: bool,
    keep_narrow: bool,
) -> list[Tensor]:
    dtype = _pooling_dtype(gradient)
    num_images, _, channels, size, _ = gradient.shape
    flat = gradient.flatten(0, 1)
    gradients = []
    for index, (height, width, stride) in enumerate(zip(heights, widths, strides, strict=True)):
        members = (level.flatten() == index).nonzero().squeeze(1)
        gradients.append(
            torch.ops.torchvision._roi_align_backward(
                flat[members].to(dtype),
                _rois(boxes, stride, keep_narrow).flatten(0, 1)[members].to(dtype),
                1 / stride,
                size,
                size,
                num_images,
                channels,
                height,
                width,
                sampling_ratio,
                aligned or keep_narrow,
            ).to(gradient.dtype)
        )
    return gradients


@_pool_own_level_backward.register_fake
def _(
    gradient: Tensor,
    boxes: Tensor,
    level: Tensor,
    heights: list[int],
    widths: list[int],
    strides: list[int],
    sampling_ratio: int,
    aligned: bool,
    keep_narrow: bool,
) -> list[Tensor]:
    shape = gradient.shape[0], gradient.shape[2]
    return [gradient.new_empty((*shape, height, width)) for height, width in zip(heights, widths, strict=True)]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, level, strides, _, *options = inputs
    ctx.save_for_backward(boxes, level)
    ctx.heights, ctx.widths = [feature.shape[2] for feature in features], [feature.shape[3] for feature in features]
    ctx.strides, ctx.options = strides, options


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    boxes, level = ctx.saved_tensors
    gradients = _pool_own_level_backward(gradient, boxes, level, ctx.heights, ctx.widths, ctx.strides, *ctx.options)
    return gradients, *(None,) * 7


pool_own_level.register_autograd(_backward, setup_context=_save_for_backward)


def _rois(boxes: Tensor, stride: int, keep_narrow: bool) -> Tensor:
    """[B, P, 5] what torchvision's roi_align takes: image index and box."""
    if keep_narrow:
        # Only torchvision's aligned form leaves narrow boxes alone; this undoes its shift by half a feature cell.
        boxes = boxes + 0.5 * stride
    image = torch.arange(boxes.shape[0], dtype=boxes.dtype, device=boxes.device)
    return torch.cat([image[:, None, None].expand(*boxes.shape[:2], 1), boxes], -1)


def _pooling_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
