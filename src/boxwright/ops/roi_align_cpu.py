"""RoIAlign for CPUs: a sparse matrix of bilinear weights times the features, each position's channels being one row.

A cell of a box's grid averages samples, and a sample mixes four positions. So a cell is a short weighted sum of rows of
[positions, channels], which PyTorch calls an embedding bag, and the gradient is the same with the transposed matrix.
Both read and write whole rows on all threads; a kernel that goes channel by channel touches memory in single numbers.

B images, P boxes, L levels, C channels, S = output_size, n boxes; a cell reads t positions along a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Each box on its level only, as one opaque operator in which shapes may depend on data.

    Args:
        features: L of [B, C, H_l, W_l]; channels-last ones are read where they lie.
        boxes: [B, P, 4] finite, continuous xyxy in pixels of the canvas.
        level: [B, P] int64, index into `features`, or L for boxes that are not pooled.
        strides: L.
        output_size: S.
        sampling_ratio: as in `multilevel_roi_align`.
        aligned: as in `multilevel_roi_align`.
        keep_narrow: where not aligned, leave boxes narrower than a feature cell as they are.

    Returns:
        [B, P, C, S, S], zeros for boxes that are not pooled; in memory the channels come last.
    """
    dtype = pooling_dtype(features[0])
    # One bag over all levels: its result is the answer in the boxes' own order, which costs more to copy than the maps.
    rows = torch.cat([feature.permute(0, 2, 3, 1).flatten(0, 2) for feature in features]).to(dtype)
    heights, widths = [feature.shape[2] for feature in features], [feature.shape[3] for feature in features]
    places, weights, counts = _entries(
        boxes, level, heights, widths, strides, output_size, sampling_ratio, aligned, keep_narrow
    )
    offsets = counts.cumsum(0) - counts
    cells = F.embedding_bag(places, rows, offsets.int(), mode="sum", per_sample_weights=weights.to(dtype))
    cells = cells.to(features[0].dtype).view(*level.shape, output_size, output_size, -1)
    return cells.permute(0, 1, 4, 2, 3)


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
    cells = features[0].new_empty((*level.shape, output_size, output_size, features[0].shape[1]))
    return cells.permute(0, 1, 4, 2, 3)


@torch.library.custom_op("boxwright::roi_align_backward", mutates_args=(), device_types="cpu")
def pool_own_level_backward(
    gradient: Tensor,
    boxes: Tensor,
    level: Tensor,
    heights: list[int],
    widths: list[int],
    strides: list[int],
    sampling_ratio: int,
    aligned: bool,
    keep_narrow: bool,
) -> Tensor:
    """The gradient of `pool_own_level` from that of its result, [B, P, C, S, S].

    Returns:
        [R, C], for each level in turn the rows of [B, H_l, W_l, C]: an operator's results may not share memory.
    """
    dtype = pooling_dtype(gradient)
    places, weights, counts = _entries(
        boxes, level, heights, widths, strides, gradient.shape[-1], sampling_ratio, aligned, keep_narrow
    )
    cells = gradient.permute(0, 1, 3, 4, 2).flatten(0, 3).to(dtype)
    # The transposed sums: for each row the cells that read it.
    sorted_places, order = places.sort()
    num_rows = sum(_rows_of_levels(len(level), heights, widths))
    offsets = torch.searchsorted(sorted_places, torch.arange(num_rows, dtype=places.dtype), out_int32=True)
    cell = torch.repeat_interleave(counts, output_size=len(places)).int()[order]
    rows = F.embedding_bag(cell, cells, offsets, mode="sum", per_sample_weights=weights.to(dtype)[order])
    return rows.to(gradient.dtype)


@pool_own_level_backward.register_fake
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
) -> Tensor:
    return gradient.new_empty((sum(_rows_of_levels(len(level), heights, widths)), gradient.shape[2]))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, level, strides, _, *options = inputs
    ctx.save_for_backward(boxes, level)
    ctx.heights, ctx.widths = [feature.shape[2] for feature in features], [feature.shape[3] for feature in features]
    ctx.strides, ctx.options = strides, options


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    boxes, level = ctx.saved_tensors
    rows = pool_own_level_backward(gradient, boxes, level, ctx.heights, ctx.widths, ctx.strides, *ctx.options)
    gradients = [
        part.view(len(level), height, width, -1).permute(0, 3, 1, 2)
        for part, height, width in zip(
            rows.split(_rows_of_levels(len(level), ctx.heights, ctx.widths)), ctx.heights, ctx.widths, strict=True
        )
    ]
    return gradients, *(None,) * 7


pool_own_level.register_autograd(_backward, setup_context=_save_for_backward)


def pooling_dtype(tensor: Tensor) -> torch.dtype:
    """What sums of a tensor's numbers are made in: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _rows_of_levels(num_images: int, heights: Sequence[int], widths: Sequence[int]) -> list[int]:
    """Positions of each level."""
    return [num_images * height * width for height, width in zip(heights, widths, strict=True)]


def _entries(
    boxes: Tensor,
    level: Tensor,
    heights: list[int],
    widths: list[int],
    strides: list[int],
    size: int,
    sampling_ratio: int,
    aligned: bool,
    keep_narrow: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix that features are multiplied with, row by row: a cell of a box each, in the boxes' order.

    Args:
        boxes: [B, P, 4] xyxy in pixels of the canvas.
        level: [B, P] of 0 to L, L for boxes that are not pooled.
        heights: L.
        widths: L.
        strides: L.
        size: S.
        sampling_ratio: samples along each side of a cell; 0 for as many as feature cells, rounded up.
        aligned: whether a feature sits in the middle of its cell.
        keep_narrow: where not aligned, leave boxes narrower than a feature cell as they are.

    Returns:
        places: [E] int32, rows of the features, all levels after each other.
        weights: [E] in the dtype of `boxes`.
        counts: [B * P * S * S] int64, how many of the E are of each cell.
    """
    num_levels = len(strides)
    pooled = (level.flatten() < num_levels).nonzero().squeeze(1)
    own_level = level.flatten()[pooled]
    image = torch.div(pooled, level.shape[1], rounding_mode="floor").int()
    height, width = (torch.tensor(sides, dtype=torch.int32)[own_level] for sides in (heights, widths))
    rows_before = torch.tensor([0, *_rows_of_levels(len(level), heights, widths)[:-1]]).cumsum(0).int()[own_level]

    corners = boxes.flatten(0, 1)[pooled] / torch.tensor(strides, dtype=boxes.dtype)[own_level, None]
    corners = corners - (0.5 if aligned else 0.0)
    start, sides = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not (aligned or keep_narrow):
        sides = sides.clamp(min=1)
    samples = torch.full_like(sides, sampling_ratio) if sampling_ratio else (sides / size).ceil().clamp(min=0)
    most = samples.amax(1).clamp(min=1).long()  # A box without a side takes one, which weighs nothing.

    groups = most.unique().tolist()
    found = []
    for count in groups:
        own = slice(None) if len(groups) == 1 else (most == count).nonzero().squeeze(1)
        columns, column_weights = _along_a_side(start[own, 0], sides[own, 0], samples[own, 0], count, size, width[own])
        rows, row_weights = _along_a_side(start[own, 1], sides[own, 1], samples[own, 1], count, size, height[own])
        first = (image * height)[own, None, None] + rows
        first = rows_before[own, None, None] + first * width[own, None, None]
        places = first[:, :, None, :, None] + columns[:, None, :, None, :]
        weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        found.append((own, places.flatten(1), weights.flatten(1)))
    reads = 4 * most**2
    counts = reads.new_zeros(level.numel()).index_copy(0, pooled, reads).repeat_interleave(size**2)
    if len(found) == 1:
        _, places, weights = found[0]
        return places.flatten(), weights.flatten(), counts
    lengths = reads * size**2
    begin = lengths.cumsum(0) - lengths
    all_places, all_weights = image.new_empty(int(lengths.sum())), boxes.new_empty(int(lengths.sum()))
    for own, places, weights in found:
        where = begin[own, None] + torch.arange(places.shape[1])
        all_places[where], all_weights[where] = places, weights
    return all_places, all_weights, counts


def _along_a_side(
    start: Tensor, side: Tensor, samples: Tensor, count: int, size: int, length: Tensor
) -> tuple[Tensor, Tensor]:
    """What the cells along one side of boxes read.

    Args:
        start: [n] where the box begins, in feature cells.
        side: [n] its length.
        samples: [n] how many samples a cell takes, at most `count`.
        count: samples that there is room for.
        size: S, cells along the side.
        length: [n] int32, features along it.

    Returns:
        places: [n, S, t] int32, t = 2 * count, the features read, each sample's two together.
        weights: [n, S, t] their shares; 0 for samples that are not taken or lie more than a feature outside.
    """
    cell, sample = torch.arange(size, dtype=start.dtype)[:, None], torch.arange(count, dtype=start.dtype)
    start, step, samples, length = (value[:, None, None] for value in (start, side / size, samples, length))
    at = start + cell * step + (sample + 0.5) * step / samples.clamp(min=1)  # Rounded as torchvision rounds it.
    used = (sample < samples) & (at >= -1) & (at <= length)
    at = at.clamp(min=0).minimum(length - 1)
    low = at.int()
    upper_share = at - low
    weights = torch.stack([1 - upper_share, upper_share], -1) * (used / samples.clamp(min=1))[..., None]
    return torch.stack([low, (low + 1).minimum(length - 1)], -1).flatten(2), weights.flatten(2)
