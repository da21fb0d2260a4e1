"""GPU implementation of `nms`: one Triton kernel, so that the host does not wait for the number of survivors.

Only `nms.py` imports this module, and only for tensors on a GPU, because CPU installations may lack Triton. With
TRITON_INTERPRET=1 the kernel runs on CPU tensors, slowly; the tests use this to compare it with the CPU implementation.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
NUM_WARPS = 8


def greedy_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, max_keep: int
) -> tuple[Tensor, Tensor]:
    """`nms` for boxes whose IoU is computed without `plus_one`."""
    num_images, num_candidates = valid.shape
    # Invalid candidates rank below every valid one, so the valid candidates come first in the sorted list.
    ranked = torch.where(valid, scores.float().clamp(min=torch.finfo(torch.float32).min), -torch.inf)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    sorted_boxes = boxes.float().gather(1, order[..., None].expand(-1, -1, 4))
    sorted_groups = groups.gather(1, order)
    indices = groups.new_zeros((num_images, max_keep))
    num_kept = groups.new_zeros(num_images)
    with torch.cuda.device_of(boxes):
        # Fused multiply-adds would round IoUs differently from the CPU and change the survivors at the threshold.
        _greedy_kernel[(num_images,)](
            sorted_boxes,
            sorted_groups,
            order,
            valid.sum(1),
            indices,
            num_kept,
            num_candidates,
            max_keep,
            _round_down(iou_threshold),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return indices, torch.arange(max_keep, device=valid.device) < num_kept[:, None]


def _round_down(threshold: float) -> float:
    """Round so that a float32 IoU is above the result exactly if it is above `threshold`, as in torchvision."""
    rounded = np.float32(threshold)
    return float(np.nextafter(rounded, np.float32(-np.inf)) if float(rounded) > threshold else rounded)


@triton.jit
def _greedy_kernel(  # type: ignore[no-untyped-def]
    boxes, groups, order, num_valid, indices, num_kept, num_candidates, max_keep, iou_threshold, BLOCK: tl.constexpr
):
    """One program per image: processes candidates in blocks, best first, and drops those that a survivor suppresses.

    Survivors are moved to the front of `boxes` and `groups`, over candidates that are already processed. `count` is the
    number of survivors.
    """
    image = tl.program_id(0).to(tl.int64)
    boxes += image * num_candidates * 4
    groups += image * num_candidates
    order += image * num_candidates
    indices += image * max_keep
    total = tl.load(num_valid + image)
    lane = tl.arange(0, BLOCK)
    start = 0
    count = 0
    while (start < total) & (count < max_keep):
        position = start + lane
        in_range = position < total
        x1, y1, x2, y2, group = _load(boxes, groups, position, in_range)

        # Compare with the survivors of earlier blocks.
        candidate = in_range
        for first in range(0, count, BLOCK):
            earlier = first + lane
            kx1, ky1, kx2, ky2, kept_group = _load(boxes, groups, earlier, earlier < count)
            overlap = _overlap(kx1, ky1, kx2, ky2, kept_group, x1, y1, x2, y2, group, iou_threshold)
            overlap = overlap & (earlier < count)[:, None]
            candidate = candidate & (tl.max(overlap.to(tl.int32), axis=0) == 0)

        # Compare within the block. The survivors are the only set in which no member is beaten by a better member, and
        # every other candidate is. Starting with all candidates, each round settles at least the best unsettled one.
        beats = _overlap(x1, y1, x2, y2, group, x1, y1, x2, y2, group, iou_threshold)
        beats = beats & (lane[:, None] < lane[None, :])
        alive = candidate
        changes = 1
        while changes > 0:
            beaten = tl.max((beats & alive[:, None]).to(tl.int32), axis=0)
            still = candidate & (beaten == 0)
            changes = tl.sum((still != alive).to(tl.int32), axis=0)
            alive = still

        slot = count + tl.cumsum(alive.to(tl.int32), axis=0) - 1
        alive = alive & (slot < max_keep)
        tl.debug_barrier()  # All threads must have read this block before survivors overwrite it.
        tl.store(boxes + slot * 4, x1, mask=alive)
        tl.store(boxes + slot * 4 + 1, y1, mask=alive)
        tl.store(boxes + slot * 4 + 2, x2, mask=alive)
        tl.store(boxes + slot * 4 + 3, y2, mask=alive)
        tl.store(groups + slot, group, mask=alive)
        tl.store(indices + slot, tl.load(order + position, mask=alive, other=0), mask=alive)
        tl.debug_barrier()  # All threads must see the survivors before they process the next block.
        count += tl.sum(alive.to(tl.int32), axis=0)
        start += BLOCK
    tl.store(num_kept + image, count)


@triton.jit
def _load(boxes, groups, position, mask):  # type: ignore[no-untyped-def]
    x1 = tl.load(boxes + position * 4, mask=mask, other=0.0)
    y1 = tl.load(boxes + position * 4 + 1, mask=mask, other=0.0)
    x2 = tl.load(boxes + position * 4 + 2, mask=mask, other=0.0)
    y2 = tl.load(boxes + position * 4 + 3, mask=mask, other=0.0)
    return x1, y1, x2, y2, tl.load(groups + position, mask=mask, other=0)


@triton.jit
def _overlap(  # type: ignore[no-untyped-def]
    ax1, ay1, ax2, ay2, a_group, bx1, by1, bx2, by2, b_group, iou_threshold
):
    """[A, B] whether two boxes share a group and have an IoU above the threshold, rounded as in torchvision."""
    width = tl.minimum(ax2[:, None], bx2[None, :]) - tl.maximum(ax1[:, None], bx1[None, :])
    height = tl.minimum(ay2[:, None], by2[None, :]) - tl.maximum(ay1[:, None], by1[None, :])
    shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    area_a = (ax2 - ax1) * (ay2 - ay1)
    area_b = (bx2 - bx1) * (by2 - by1)
    iou = tl.math.div_rn(shared, area_a[:, None] + area_b[None, :] - shared)
    return (a_group[:, None] == b_group[None, :]) & (iou > iou_threshold)
