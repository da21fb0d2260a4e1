"""RoIAlign on CPUs: a sparse matrix of bilinear weights times the features, with one row of channels per position.

An output cell averages samples, and a sample interpolates four positions. A cell is therefore a short weighted sum of
rows of [positions, channels], which PyTorch calls an embedding bag; the gradient uses the transposed matrix. Both read
and write whole rows on all threads, whereas a kernel that loops over channels accesses memory value by value.

B images, P boxes, L levels, C channels, S = output_size, n boxes of a level; a cell reads t positions along each side.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """Pool each box on its own level only, as one opaque operator in which shapes may depend on data.

    Args:
        features: L of [B, C, H_l, W_l]; features in channels-last memory format are not copied.
        boxes: [B, P, 4] finite, continuous xyxy in pixels of the canvas.
        level: [B, P] int64, index into `features`, or L for boxes that are not pooled.
        strides: stride of each of the L levels.
        output_size: S.
        sampling_ratio: as in `multilevel_roi_align`.
        aligned: as in `multilevel_roi_align`.
        keep_narrow: whether unaligned pooling keeps boxes that are narrower than a feature cell.

    Returns:
        [B, P, C, S, S] in channels-last memory format; 0 for boxes that are not pooled.
    """
    pooled = None
    # Start with the level that has the most boxes: its output becomes the result (zero rows for all other boxes), and
    # the remaining levels are written into it.
    for index in level.flatten().bincount(minlength=len(features))[: len(features)].argsort(descending=True).tolist():
        feature = features[index]
        rows = feature.permute(0, 2, 3, 1).flatten(0, 2)
        shape = feature.shape[2], feature.shape[3]
        for members, places, weights in _sums(
            boxes, level == index, shape, strides[index], output_size, sampling_ratio, aligned, keep_narrow
        ):
            weights = weights.to(rows.dtype)
            if pooled is None:
                pooled = _product_in_place(places, weights, rows, members, level.numel())
            else:
                sums = F.embedding_bag(places, rows, mode="sum", per_sample_weights=weights)
                pooled[members] = sums.view(len(members), *pooled.shape[1:])
    if pooled is None:
        pooled = features[0].new_zeros((level.numel(), output_size**2, features[0].shape[1]))
    cells = (*level.shape, output_size, output_size, features[0].shape[1])
    return pooled.view(cells).permute(0, 1, 4, 2, 3)


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
) -> list[Tensor]:
    """Gradient of `pool_own_level` with respect to the features, L of [B, C, H_l, W_l], from [B, P, C, S, S]."""
    num_images, _, channels, size, _ = gradient.shape
    cells = gradient.permute(0, 1, 3, 4, 2).flatten(0, 1)
    gradients = []
    for index, (height, width, stride) in enumerate(zip(heights, widths, strides, strict=True)):
        num_rows = num_images * height * width
        rows = None
        for members, places, weights in _sums(
            boxes, level == index, (height, width), stride, size, sampling_ratio, aligned, keep_narrow
        ):
            box_gradients = cells[members].flatten(0, 2)
            sums = _transposed_product(box_gradients, places, weights.to(box_gradients.dtype), num_rows)
            rows = sums if rows is None else rows.add_(sums)
        rows = gradient.new_zeros((num_rows, channels)) if rows is None else rows
        gradients.append(rows.view(num_images, height, width, channels).permute(0, 3, 1, 2))
    return gradients


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
) -> list[Tensor]:
    num_images, channels = gradient.shape[0], gradient.shape[2]
    return [
        gradient.new_empty((num_images, height, width, channels)).permute(0, 3, 1, 2)
        for height, width in zip(heights, widths, strict=True)
    ]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, level, strides, _, *options = inputs
    ctx.save_for_backward(boxes, level)
    ctx.heights, ctx.widths = [feature.shape[2] for feature in features], [feature.shape[3] for feature in features]
    ctx.strides, ctx.options = strides, options


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    boxes, level = ctx.saved_tensors
    gradients = pool_own_level_backward(gradient, boxes, level, ctx.heights, ctx.widths, ctx.strides, *ctx.options)
    return gradients, *(None,) * 7


pool_own_level.register_autograd(_backward, setup_context=_save_for_backward)


def _product_in_place(places: Tensor, weights: Tensor, rows: Tensor, members: Tensor, num_boxes: int) -> Tensor:
    """[num_boxes, S * S, C]: for `members`, the sums of `weights[i, j] * rows[places[i, j]]` over j, else 0.

    The cells of other boxes are empty bags, so the sums do not have to be copied to their boxes afterwards.
    """
    num_cells = len(places) // len(members)
    reads = members.new_zeros(num_boxes).index_fill(0, members, places.shape[1]).repeat_interleave(num_cells)
    offsets = (reads.cumsum(0) - reads).int()
    sums = F.embedding_bag(places.flatten(), rows, offsets, mode="sum", per_sample_weights=weights.flatten())
    return sums.unflatten(0, (num_boxes, num_cells))


def _transposed_product(cells: Tensor, places: Tensor, weights: Tensor, num_rows: int) -> Tensor:
    """[num_rows, C] where row r is the sum of `weights[i, j] * cells[i]` over all (i, j) with `places[i, j] == r`."""
    sorted_places, order = places.flatten().sort()
    offsets = torch.searchsorted(sorted_places, torch.arange(num_rows, dtype=places.dtype), out_int32=True)
    cell = torch.div(order, places.shape[1], rounding_mode="floor").int()
    return F.embedding_bag(cell, cells, offsets, mode="sum", per_sample_weights=weights.flatten()[order])


def _sums(
    boxes: Tensor,
    here: Tensor,
    shape: tuple[int, int],
    stride: int,
    size: int,
    sampling_ratio: int,
    aligned: bool,
    keep_narrow: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Express the output cells of one level's boxes as weighted sums of feature rows.

    Args:
        boxes: [B, P, 4] xyxy in pixels of the canvas.
        here: [B, P] bool, boxes of this level.
        shape: (height, width) of the level.
        stride: stride of the level.
        size: S.
        sampling_ratio: as in `multilevel_roi_align`.
        aligned: as in `multilevel_roi_align`.
        keep_narrow: as in `pool_own_level`.

    Yields:
        members: [n] int64, indices of boxes in the flattened [B * P] order.
        places: [n * S * S, t * t] int32, indices of feature rows in [B * height * width, C].
        weights: [n * S * S, t * t] float32 or float64.
    """
    members = here.flatten().nonzero().squeeze(1)
    if not len(members):
        return
    corners = boxes.flatten(0, 1)[members] / stride - (0.5 if aligned else 0.0)
    start, sides = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not (aligned or keep_narrow):
        sides = sides.clamp(min=1)
    samples = torch.full_like(sides, sampling_ratio) if sampling_ratio else (sides / size).ceil().clamp(min=0)
    max_samples = samples.amax(1).clamp(min=1)  # A box with a side of 0 gets one sample, with weight 0.
    for count in max_samples.unique().int().tolist():
        group = (max_samples == count).nonzero().squeeze(1)
        columns, column_weights = _along_a_side(
            start[group, 0], sides[group, 0], samples[group, 0], count, size, shape[1]
        )
        rows, row_weights = _along_a_side(start[group, 1], sides[group, 1], samples[group, 1], count, size, shape[0])
        image = torch.div(members[group], here.shape[1], rounding_mode="floor").int()
        first = (image[:, None, None] * shape[0] + rows) * shape[1]
        places = first[:, :, None, :, None] + columns[:, None, :, None, :]
        weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        yield members[group], places.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)


def _along_a_side(
    start: Tensor, side: Tensor, samples: Tensor, count: int, size: int, length: int
) -> tuple[Tensor, Tensor]:
    """Positions and weights that the output cells read along one side of their boxes.

    Args:
        start: [n] start of the box, in feature cells.
        side: [n] length of the side, in feature cells.
        samples: [n] number of samples per output cell, at max_samples `count`.
        count: number of sample slots per output cell.
        size: S, number of output cells along the side.
        length: number of features along the side of the map.

    Returns:
        places: [n, S, t] int32, t = 2 * count: positions of the features, in pairs of the two neighbours of a sample.
        weights: [n, S, t] weights; 0 for unused sample slots and samples more than one feature outside the map.
    """
    cell, sample = torch.arange(size, dtype=start.dtype)[:, None], torch.arange(count, dtype=start.dtype)
    start, step, samples = (value[:, None, None] for value in (start, side / size, samples))
    at = start + cell * step + (sample + 0.5) * step / samples.clamp(min=1)  # Order of operations as in torchvision.
    used = (sample < samples) & (at >= -1) & (at <= length)
    at = at.clamp(0, length - 1)
    low = at.int()
    upper_share = at - low
    weights = torch.stack([1 - upper_share, upper_share], -1) * (used / samples.clamp(min=1))[..., None]
    return torch.stack([low, (low + 1).clamp(max=length - 1)], -1).flatten(2), weights.flatten(2)
