"""RoIAlign on GPUs as two Triton kernels: each output cell reads its own level, all channels of a position at once.

The plain implementation, `pool_every_level`, pools all boxes once per level, in float32 and channel by channel. Here
one program computes one output cell of one box, from channels-last feature maps in their own precision. The gradient is
accumulated by atomic additions in float32, so the order of its sums is not deterministic, as in torchvision. Only
`roi_align.py` imports this module, and only on request, because CPU installations may lack Triton. With
TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly; the tests use this to compare them with the plain
implementation.

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
"""Number of feature map arguments of the kernels; boxes are pooled from P2 to P6 at most."""
MAX_BLOCK = 256
"""Maximum number of channels per program; the feature pyramids in the papers have 256 channels."""
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
    """`pool_own_level` for at most `MAX_LEVELS` levels, whose strides double from level to level."""
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
    """Gradient of `pool` with respect to the features, L of [B, C, H_l, W_l] (channels last), from [B, P, C, S, S]."""
    cells = gradient.permute(0, 1, 3, 4, 2).contiguous()
    num_images, channels = len(level), cells.shape[4]
    # One allocation is zeroed by one kernel. It is copied at the end, because outputs of an operator must not share
    # memory.
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
    """Run a kernel with one program per output cell and block of channels.

    Args:
        kernel: `_pool_kernel` or `_backward_kernel`.
        rows: L of [B, H_l, W_l, C], contiguous; read by `_pool_kernel`, accumulated by `_backward_kernel`.
        boxes: [B, P, 4].
        level: [B, P].
        cells: [B, P, S, S, C], contiguous; written by `_pool_kernel`, read by `_backward_kernel`.
        strides: stride of each level.
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


# Do not specialise on these values: another canvas or another number of boxes must not compile a kernel again.
_SIZES = [f"{side}{level}" for side in ("height", "width") for level in range(MAX_LEVELS)]
_SIZES += ["num_boxes", "num_levels", "finest_stride", "size"]


@triton.jit(do_not_specialize=_SIZES)
def _pool_kernel(  # type: ignore[no-untyped-def]
    map0, map1, map2, map3, map4, height0, height1, height2, height3, height4, width0, width1, width2, width3, width4,
    boxes, levels, cells, num_boxes, channels, num_levels, finest_stride, size,
    SHIFT: tl.constexpr, WIDEN: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per output cell and block of channels: the mean of the samples of the cell."""
    cell = tl.program_id(0).to(tl.int64)
    box = cell // (size * size)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    level = tl.load(levels + box)
    source = _value_of_level(level, map0, map1, map2, map3, map4)
    height = _value_of_level(level, height0, height1, height2, height3, height4)
    width = _value_of_level(level, width0, width1, width2, width3, width4)
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
    """One program per output cell and block of channels: adds the cell's gradient to the features that it read."""
    cell = tl.program_id(0).to(tl.int64)
    box = cell // (size * size)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    level = tl.load(levels + box)
    target = _value_of_level(level, map0, map1, map2, map3, map4)
    height = _value_of_level(level, height0, height1, height2, height3, height4)
    width = _value_of_level(level, width0, width1, width2, width3, width4)
    target += (box // num_boxes) * height * width * channels
    stride = (finest_stride << tl.minimum(level, num_levels - 1)).to(tl.float32)
    row, column = (cell // size) % size, cell % size
    y, step_y, count_y = _along_a_side(boxes + box * 4 + 1, row, stride, size, SHIFT, WIDEN, SAMPLES)
    x, step_x, count_x = _along_a_side(boxes + box * 4, column, stride, size, SHIFT, WIDEN, SAMPLES)
    count_y = tl.where(level < num_levels, count_y, 0)

    gradient = tl.load(cells + cell * channels + lane, mask=lane < channels, other=0.0).to(target.dtype.element_ty)
    share = gradient / tl.maximum(count_y * count_x, 1).to(tl.float32)
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
def _value_of_level(level, value0, value1, value2, value3, value4):  # type: ignore[no-untyped-def]
    """Value for a level; the last value for boxes without a level, which read and write nothing."""
    value = tl.where(level == 0, value0, value1)
    value = tl.where(level < 2, value, value2)
    value = tl.where(level < 3, value, value3)
    return tl.where(level < 4, value, value4)


@triton.jit
def _along_a_side(  # type: ignore[no-untyped-def]
    corner, cell, stride, size, SHIFT: tl.constexpr, WIDEN: tl.constexpr, SAMPLES: tl.constexpr
):
    """Start and length of an output cell along one side, in feature cells, and its number of samples."""
    start = tl.load(corner) / stride - SHIFT
    side = tl.load(corner + 2) / stride - SHIFT - start
    if WIDEN:
        side = tl.maximum(side, 1.0)
    step = side / size
    count = tl.maximum(tl.ceil(step), 0.0).to(tl.int32) if SAMPLES == 0 else tl.full([], SAMPLES, tl.int32)
    return start + cell.to(tl.float32) * step, step, count


@triton.jit
def _neighbours(at, length):  # type: ignore[no-untyped-def]
    """Indices of a sample's two neighbours, weight of the second, and whether the sample is close enough to the map."""
    used = (at >= -1) & (at <= length)
    at = tl.where(used, tl.minimum(tl.maximum(at, 0.0), (length - 1).to(tl.float32)), 0.0)
    low = at.to(tl.int32)
    return low, tl.minimum(low + 1, length - 1), at - low.to(tl.float32), used
