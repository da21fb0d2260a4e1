"""RoIAlign for GPUs as two Triton kernels: each cell of a box reads its own level, all channels of a position at once.

`pool_every_level` is the plain form: it goes over all boxes once a level, in float32, each channel apart. Here a
program computes one cell of one box from the maps as they lie in memory, channels last and in their own precision, and
the gradient goes back with atomic additions in float32, so that the order of those sums is not fixed, as in
torchvision. Only `roi_align.py` imports this, and only where it is asked for: installations for CPUs may lack Triton.
Under TRITON_INTERPRET=1 it runs on CPU tensors, slowly, which is how the tests compare it with the plain form.

B images, P boxes, L levels, C channels, S = output_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from boxwright.ops.roi_align import pooling_dtype

MAX_LEVELS = 5
"""As many maps as the kernels have arguments for; a pyramid's boxes lie on P2 to P6 at most."""
MAX_BLOCK = 256
"""Channels of a program; the pyramids of the papers have as many."""
NUM_WARPS = 2


def pool(
    features: list[Tensor],
    boxes: Tensor,
    level: Tensor,
    strides: list[int],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
    keep_narrow: bool,
) -> Tensor:
    """What `pool_own_level` does, for at most `MAX_LEVELS` levels whose strides double from one to the next."""
    rows = [feature.permute(0, 2, 3, 1).contiguous() for feature in features]
    channels = features[0].shape[1]
    pooled = rows[0].new_empty((*level.shape, output_size, output_size, channels))
    _launch(_pool_kernel, rows, boxes, level, pooled, strides, sampling_ratio, aligned, keep_narrow)
    return pooled.permute(0, 1, 4, 2, 3)


def pool_backward(
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
    """L of [B, C, H_l, W_l], channels last, from [B, P, C, S, S]: the gradient of `pool`."""
    cells = gradient.permute(0, 1, 3, 4, 2).contiguous()
    num_images, channels = len(level), cells.shape[4]
    # One block of memory, so that it is filled with zeros at once. An operator's results may not share memory, though.
    sizes = [num_images * height * width * channels for height, width in zip(heights, widths, strict=True)]
    sums = cells.new_zeros(sum(sizes), dtype=pooling_dtype(cells))
    rows = [
        part.view(num_images, height, width, channels)
        for part, height, width in zip(sums.split(sizes), heights, widths, strict=True)
    ]
    _launch(_backward_kernel, rows, boxes, level, cells, strides, sampling_ratio, aligned, keep_narrow)
    return [row.to(cells.dtype, copy=True).permute(0, 3, 1, 2) for row in rows]


def _launch(
    kernel: triton.JITFunction,
    rows: Sequence[Tensor],
    boxes: Tensor,
    level: Tensor,
    cells: Tensor,
    strides: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    keep_narrow: bool,
) -> None:
    """Run a kernel once a cell.

    Args:
        kernel: either one.
        rows: L of [B, H_l, W_l, C], contiguous; read by the one, added to by the other.
        boxes: [B, P, 4].
        level: [B, P].
        cells: [B, P, S, S, C], contiguous; written by the one, read by the other.
        strides: of the levels.
        sampling_ratio: as in `multilevel_roi_align`.
        aligned: as in `multilevel_roi_align`.
        keep_narrow: as in `pool_own_level`.
    """
    assert len(rows) <= MAX_LEVELS
    assert list(strides) == [strides[0] << index for index in range(len(rows))]
    num_cells, channels = cells[..., 0].numel(), cells.shape[-1]
    if not num_cells:
        return
    spare = [rows[0]] * (MAX_LEVELS - len(rows))
    maps = [*rows, *spare]
    block = min(triton.next_power_of_2(channels), MAX_BLOCK)
    with torch.cuda.device_of(cells):
        kernel[(num_cells, triton.cdiv(channels, block))](
            *maps,
            *(part.shape[1] for part in maps),
            *(part.shape[2] for part in maps),
            boxes.float().contiguous(),
            level.contiguous(),
            cells,
            level.shape[1],
            channels,
            len(rows),
            strides[0],
            cells.shape[2],
            SHIFT=0.5 if aligned else 0.0,
            WIDEN=not (aligned or keep_narrow),
            SAMPLES=sampling_ratio,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )


# No kernel is compiled anew for another canvas or another number of boxes.
_SIZES = [f"{side}{level}" for side in ("height", "width") for level in range(MAX_LEVELS)]
_SIZES += ["num_boxes", "num_levels", "finest_stride", "size"]


@triton.jit(do_not_specialize=_SIZES)
def _pool_kernel(  # type: ignore[no-untyped-def]
    map0, map1, map2, map3, map4, height0, height1, height2, height3, height4, width0, width1, width2, width3, width4,
    boxes, levels, cells, num_boxes, channels, num_levels, finest_stride, size,
    SHIFT: tl.constexpr, WIDEN: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a cell of a box and a block of channels: the mean of the cell's samples."""
    cell = tl.program_id(0).to(tl.int64)
    box = cell // (size * size)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    level = tl.load(levels + box)
    source = _chosen(level, map0, map1, map2, map3, map4)
    height = _chosen(level, height0, height1, height2, height3, height4)
    width = _chosen(level, width0, width1, width2, width3, width4)
    source += (box // num_boxes) * height * width * channels
    stride = (finest_stride << tl.minimum(level, num_levels - 1)).to(tl.float32)
    row, column = (cell // size) % size, cell % size
    y, step_y, count_y = _along_a_side(boxes + box * 4 + 1, row, stride, size, SHIFT, WIDEN, SAMPLES)
    x, step_x, count_x = _along_a_side(boxes + box * 4, column, stride, size, SHIFT, WIDEN, SAMPLES)
    count_y = tl.where(level < num_levels, count_y, 0)

    WIDE: tl.constexpr = tl.float64 if source.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK], dtype=WIDE)
    for down in range(count_y):
        top, bottom, lower, used_y = _neighbours(y + (down + 0.5) * step_y / count_y, height)
        for right in range(count_x):
            first, last, later, used_x = _neighbours(x + (right + 0.5) * step_x / count_x, width)
            mask = lane < tl.where(used_y & used_x, channels, 0)
            upper_row, lower_row = source + top * width * channels + lane, source + bottom * width * channels + lane
            total += (1 - lower) * (1 - later) * tl.load(upper_row + first * channels, mask=mask, other=0.0).to(WIDE)
            total += (1 - lower) * later * tl.load(upper_row + last * channels, mask=mask, other=0.0).to(WIDE)
            total += lower * (1 - later) * tl.load(lower_row + first * channels, mask=mask, other=0.0).to(WIDE)
            total += lower * later * tl.load(lower_row + last * channels, mask=mask, other=0.0).to(WIDE)
    mean = total / tl.maximum(count_y * count_x, 1).to(tl.float32)
    tl.store(cells + cell * channels + lane, mean.to(cells.dtype.element_ty), mask=lane < channels)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(  # type: ignore[no-untyped-def]
    map0, map1, map2, map3, map4, height0, height1, height2, height3, height4, width0, width1, width2, width3, width4,
    boxes, levels, cells, num_boxes, channels, num_levels, finest_stride, size,
    SHIFT: tl.constexpr, WIDEN: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a cell of a box and a block of channels: adds the cell's gradient where the cell was read."""
    cell = tl.program_id(0).to(tl.int64)
    box = cell // (size * size)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    level = tl.load(levels + box)
    target = _chosen(level, map0, map1, map2, map3, map4)
    height = _chosen(level, height0, height1, height2, height3, height4)
    width = _chosen(level, width0, width1, width2, width3, width4)
    target += (box // num_boxes) * height * width * channels
    stride = (finest_stride << tl.minimum(level, num_levels - 1)).to(tl.float32)
    row, column = (cell // size) % size, cell % size
    y, step_y, count_y = _along_a_side(boxes + box * 4 + 1, row, stride, size, SHIFT, WIDEN, SAMPLES)
    x, step_x, count_x = _along_a_side(boxes + box * 4, column, stride, size, SHIFT, WIDEN, SAMPLES)
    count_y = tl.where(level < num_levels, count_y, 0)

    given = tl.load(cells + cell * channels + lane, mask=lane < channels, other=0.0).to(target.dtype.element_ty)
    share = given / tl.maximum(count_y * count_x, 1).to(tl.float32)
    for down in range(count_y):
        top, bottom, lower, used_y = _neighbours(y + (down + 0.5) * step_y / count_y, height)
        for right in range(count_x):
            first, last, later, used_x = _neighbours(x + (right + 0.5) * step_x / count_x, width)
            mask = lane < tl.where(used_y & used_x, channels, 0)
            upper_row, lower_row = target + top * width * channels + lane, target + bottom * width * channels + lane
            tl.atomic_add(upper_row + first * channels, (1 - lower) * (1 - later) * share, mask=mask, sem="relaxed")
            tl.atomic_add(upper_row + last * channels, (1 - lower) * later * share, mask=mask, sem="relaxed")
            tl.atomic_add(lower_row + first * channels, lower * (1 - later) * share, mask=mask, sem="relaxed")
            tl.atomic_add(lower_row + last * channels, lower * later * share, mask=mask, sem="relaxed")


@triton.jit
def _chosen(level, value0, value1, value2, value3, value4):  # type: ignore[no-untyped-def]
    """The value of a level; the last for boxes that have none, which read and write nothing of it."""
    value = tl.where(level == 0, value0, value1)
    value = tl.where(level < 2, value, value2)
    value = tl.where(level < 3, value, value3)
    return tl.where(level < 4, value, value4)


@triton.jit
def _along_a_side(  # type: ignore[no-untyped-def]
    corner, cell, stride, size, SHIFT: tl.constexpr, WIDEN: tl.constexpr, SAMPLES: tl.constexpr
):
    """Where a cell begins along one side, its length, both in feature cells, and how many samples it takes."""
    start = tl.load(corner) / stride - SHIFT
    side = tl.load(corner + 2) / stride - SHIFT - start
    if WIDEN:
        side = tl.maximum(side, 1.0)
    step = side / size
    count = tl.maximum(tl.ceil(step), 0.0).to(tl.int32) if SAMPLES == 0 else tl.full([], SAMPLES, tl.int32)
    return start + cell.to(tl.float32) * step, step, count


@triton.jit
def _neighbours(at, length):  # type: ignore[no-untyped-def]
    """The two features beside a sample, the share of the second, and whether the sample is taken at all."""
    used = (at >= -1) & (at <= length)
    at = tl.where(used, tl.minimum(tl.maximum(at, 0.0), (length - 1).to(tl.float32)), 0.0)
    low = at.to(tl.int32)
    return low, tl.minimum(low + 1, length - 1), at - low.to(tl.float32), used
