"""The GPU form of `nms`: one Triton kernel, so that the host never waits to learn how many boxes survive.

Only `nms.py` imports this, and only for tensors on a GPU: installations for CPUs may lack Triton. Under
TRITON_INTERPRET=1 it runs on CPU tensors, slowly, which is how the tests compare it with the CPU form.
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
    """What `nms` does, for `boxes` in plain geometry."""
    num_images, num_candidates = valid.shape
    # Below every valid score, so that the valid candidates are the head of the sorted list.
    ranked = torch.where(valid, scores.float().clamp(min=torch.finfo(torch.float32).min), -torch.inf)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    sorted_boxes = boxes.float().gather(1, order[..., None].expand(-1, -1, 4))
    sorted_groups = groups.gather(1, order)
    indices = groups.new_zeros((num_images, max_keep))
    num_kept = groups.new_zeros(num_images)
    with torch.cuda.device_of(boxes):
        # Fused multiply-adds would round IoUs otherwise than the CPU does, and change what survives at the threshold.
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
    """The float32 above which exactly those float32 lie that are above `threshold`, as torchvision compares on CPUs."""
    rounded = np.float32(threshold)
    return float(np.nextafter(rounded, np.float32(-np.inf)) if float(rounded) > threshold else rounded)


@triton.jit
def _greedy_kernel(  # type: ignore[no-untyped-def]
    boxes, groups, order, num_valid, indices, num_kept, num_candidates, max_keep, iou_threshold, BLOCK: tl.constexpr
):
    """One program an image: takes candidates block by block, best first, and drops those that a survivor suppresses.

    Survivors move to the front of `boxes` and `groups`, over candidates that were looked at before; their number is
    `count`.
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
        place = start + lane
        real = place < total
        x1, y1, x2, y2, group = _load(boxes, groups, place, real)

        # Against the survivors of earlier blocks.
        candidate = real
        for first in range(0, count, BLOCK):
            earlier = first + lane
            kx1, ky1, kx2, ky2, kept_group = _load(boxes, groups, earlier, earlier < count)
            overlap = _overlap(kx1, ky1, kx2, ky2, kept_group, x1, y1, x2, y2, group, iou_threshold)
            overlap = overlap & (earlier < count)[:, None]
            candidate = candidate & (tl.max(overlap.to(tl.int32), axis=0) == 0)

        # Within the block. What survives is the only set of which each member is beaten by no better member and each
        # other candidate by one. Starting from all, every round settles at least the best that is not settled yet.
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
        tl.debug_barrier()  # All threads have read this block before survivors are written over it.
        tl.store(boxes + slot * 4, x1, mask=alive)
        tl.store(boxes + slot * 4 + 1, y1, mask=alive)
        tl.store(boxes + slot * 4 + 2, x2, mask=alive)
        tl.store(boxes + slot * 4 + 3, y2, mask=alive)
        tl.store(groups + slot, group, mask=alive)
        tl.store(indices + slot, tl.load(order + place, mask=alive, other=0), mask=alive)
        tl.debug_barrier()  # All threads see the survivors before the next block is compared with them.
        count += tl.sum(alive.to(tl.int32), axis=0)
        start += BLOCK
    tl.store(num_kept + image, count)


@triton.jit
def _load(boxes, groups, place, mask):  # type: ignore[no-untyped-def]
    x1 = tl.load(boxes + place * 4, mask=mask, other=0.0)
    y1 = tl.load(boxes + place * 4 + 1, mask=mask, other=0.0)
    x2 = tl.load(boxes + place * 4 + 2, mask=mask, other=0.0)
    y2 = tl.load(boxes + place * 4 + 3, mask=mask, other=0.0)
    return x1, y1, x2, y2, tl.load(groups + place, mask=mask, other=0)


@triton.jit
def _overlap(  # type: ignore[no-untyped-def]
    ax1, ay1, ax2, ay2, a_group, bx1, by1, bx2, by2, b_group, iou_threshold
):
    """[A, B] whether boxes share a group and their IoU is above the threshold, rounded as torchvision rounds it."""
    width = tl.minimum(ax2[:, None], bx2[None, :]) - tl.maximum(ax1[:, None], bx1[None, :])
    height = tl.minimum(ay2[:, None], by2[None, :]) - tl.maximum(ay1[:, None], by1[None, :])
    shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    area_a = (ax2 - ax1) * (ay2 - ay1)
    area_b = (bx2 - bx1) * (by2 - by1)
    iou = tl.math.div_rn(shared, area_a[:, None] + area_b[None, :] - shared)
    return (a_group[:, None] == b_group[None, :]) & (iou > iou_threshold)
