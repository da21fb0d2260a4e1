"""Greedy non-maximum suppression (NMS) of many images and groups at once, in shapes that data never changes.

B images, N candidates. A group is what boxes compete within: a class, or a pyramid level of proposals.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import torchvision
from torch import Tensor

from boxwright.checks import check_count, check_number

_WORTH_A_THREAD = 512
"""Boxes of a group that take torchvision's kernel longer, about a millisecond, than it takes to start a thread."""


def nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    valid: Tensor,
    *,
    iou_threshold: float,
    max_keep: int,
    plus_one: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Keep each box that no better kept box of its group overlaps too much, and of all those the best `max_keep`.

    Equals torchvision's `nms` run on each group alone. Boxes are never moved apart by group, as `batched_nms` does,
    which costs float32 digits. Of equal scores the lower index is the better. Groups do not affect the order.

    On the CPU torchvision's kernel does the work, large groups side by side in as many threads as PyTorch has; on CUDA
    a Triton kernel does, without the host waiting for it.

    Args:
        boxes: [B, N, 4] xyxy; invalid slots may hold anything, NaN included.
        scores: [B, N] of any range. A candidate whose score or box is not finite takes no part.
        groups: [B, N] int64, any numbers.
        valid: [B, N] bool, the slots that take part.
        iou_threshold: boxes of IoU strictly above this suppress each other.
        max_keep: K, the number of slots in the answer; it may exceed N.
        plus_one: 1 for the 2018 geometry.

    Returns:
        indices: [B, K] int64, the kept candidates by falling score, then zeros.
        kept: [B, K] bool, the slots of `indices` that are in use.
    """
    check_number("iou_threshold", iou_threshold, 0, 1)
    check_count("max_keep", max_keep, least=0)
    boxes, scores = boxes.detach(), scores.detach()
    valid = valid & finite_candidates(boxes, scores)
    indices, kept = grouped_nms(boxes, scores, groups, valid, float(iou_threshold), max_keep, float(plus_one))
    return indices, kept


def finite_candidates(boxes: Tensor, scores: Tensor) -> Tensor:
    """[B, N] bool, whether the box [B, N, 4] and the score [B, N] are finite."""
    return boxes.abs().amax(-1).isfinite() & scores.isfinite()  # all(-1) over four flags takes three times as long


@torch.library.custom_op("boxwright::nms", mutates_args=(), device_types="cpu")
def grouped_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, max_keep: int, plus_one: float
) -> tuple[Tensor, Tensor]:
    """`nms` as one opaque operator; this body is its CPU form, where shapes may depend on data."""
    indices = groups.new_zeros((len(boxes), max_keep))
    kept = valid.new_zeros((len(boxes), max_keep))
    for image in range(len(boxes)):
        candidates = valid[image].nonzero().squeeze(1)
        order = scores[image, candidates].argsort(stable=True, descending=True)
        candidates = candidates[order]
        found = _greedy(
            _with_last_pixel(boxes[image, candidates], plus_one),
            groups[image, candidates],
            iou_threshold,
            max_keep,
        )
        indices[image, : len(found)] = candidates[found]
        kept[image, : len(found)] = True
    return indices, kept


@grouped_nms.register_kernel("cuda")
def _(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, max_keep: int, plus_one: float
) -> tuple[Tensor, Tensor]:
    from boxwright.ops.nms_triton import greedy_nms  # Here, for installations without Triton.

    return greedy_nms(_with_last_pixel(boxes, plus_one), scores, groups, valid, iou_threshold, max_keep)


@grouped_nms.register_fake
def _(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, max_keep: int, plus_one: float
) -> tuple[Tensor, Tensor]:
    return groups.new_empty((boxes.shape[0], max_keep)), valid.new_empty((boxes.shape[0], max_keep))


def _with_last_pixel(boxes: Tensor, plus_one: float) -> Tensor:
    """Boxes whose plain IoU is the IoU of `boxes` in the geometry that adds `plus_one` to widths and heights."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] + plus_one], -1) if plus_one else boxes


def _greedy(boxes: Tensor, groups: Tensor, iou_threshold: float, max_keep: int) -> Tensor:
    """Places of the first `max_keep` survivors among candidates that are sorted by falling score.

    Whether a box survives depends on better survivors alone. So the list is taken piece by piece, each together with
    the survivors before it, until enough survive: seldom more than the first pieces of a long list. How long a piece
    has to be follows from how many survived in the one before.
    """
    found = torch.zeros(0, dtype=torch.int64)
    start, length = 0, max(1024, max_keep + max_keep // 4)
    while start < len(boxes) and len(found) < max_keep:
        num_before = len(found)
        places = torch.cat([found, torch.arange(start, min(start + length, len(boxes)))])
        found = places[_survivors(boxes[places], groups[places], iou_threshold)]
        start += length
        # Of worse boxes fewer survive, so four times as many are taken as it would be at the rate of this piece.
        num_survivors = max(1, len(found) - num_before)
        length = max(1024, 4 * length * (max_keep - len(found)) // num_survivors)
    return found[:max_keep]


def _survivors(boxes: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Places, rising, of all boxes that survive within their group; the input is sorted by falling score."""
    by_group = groups.argsort(stable=True)
    sizes = groups[by_group].unique_consecutive(return_counts=True)[1].tolist()
    falling = torch.arange(len(boxes), 0, -1, dtype=boxes.dtype)  # Scores enough: the order is settled.

    def within(members: Tensor) -> Tensor:
        best: Tensor = torchvision.ops.nms(members, falling[: len(members)], iou_threshold)
        return best

    members = boxes[by_group].split(sizes)
    num_threads = min(torch.get_num_threads(), sum(size >= _WORTH_A_THREAD for size in sizes))
    if num_threads > 1:
        with ThreadPoolExecutor(num_threads) as threads:
            kept = list(threads.map(within, members))
    else:
        kept = list(map(within, members))
    survivors = [places[best] for places, best in zip(by_group.split(sizes), kept, strict=True)]
    return torch.cat(survivors).sort().values
