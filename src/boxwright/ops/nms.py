"""Greedy non-maximum suppression (NMS) of many images and groups at once; output shapes do not depend on data.

B images, N candidates. Boxes suppress each other only within a group: a class, or a pyramid level of proposals.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import torchvision
from torch import Tensor

from boxwright.checks import check_count, check_number

_MIN_GROUP_FOR_THREAD = 512
"""Group size from which a thread pays off: torchvision's kernel takes about a millisecond, longer than the start of a
thread."""


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
    """Keep each box whose IoU with every higher-scoring kept box of its group is at most the threshold.

    At most the `max_keep` best boxes are kept. The result equals torchvision's `nms` applied to each group separately.
    Boxes are not shifted by group as in `batched_nms`, which loses float32 precision. Of equal scores the lower index
    ranks first. Groups do not affect the order of the output.

    On a CPU, torchvision's kernel is applied to each group; large groups run in parallel in up to
    `torch.get_num_threads()` threads. On CUDA, a Triton kernel runs without synchronising with the host.

    Args:
        boxes: [B, N, 4] xyxy; invalid slots may have any value, including NaN.
        scores: [B, N] in any range. Candidates with a non-finite score or box are treated as invalid.
        groups: [B, N] int64, any values.
        valid: [B, N] bool, slots that hold a candidate.
        iou_threshold: NMS IoU threshold: boxes with an IoU strictly above it suppress each other.
        max_keep: K, the number of output slots; it may exceed N.
        plus_one: 1 for the box geometry of mmdetection 0.5 (2018), else 0.

    Returns:
        indices: [B, K] int64, kept candidates by descending score, padded with 0.
        kept: [B, K] bool, entries of `indices` that are in use.
    """
    check_number("iou_threshold", iou_threshold, 0, 1)
    check_count("max_keep", max_keep, least=0)
    boxes, scores = boxes.detach(), scores.detach()
    valid = valid & finite_candidates(boxes, scores)
    indices, kept = grouped_nms(boxes, scores, groups, valid, float(iou_threshold), max_keep, float(plus_one))
    return indices, kept


def finite_candidates(boxes: Tensor, scores: Tensor) -> Tensor:
    """[B, N] bool, whether both the box, [B, N, 4], and the score, [B, N], are finite."""
    return boxes.abs().amax(-1).isfinite() & scores.isfinite()  # isfinite().all(-1) takes three times as long


@torch.library.custom_op("boxwright::nms", mutates_args=(), device_types="cpu")
def grouped_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, max_keep: int, plus_one: float
) -> tuple[Tensor, Tensor]:
    """`nms` as one opaque operator. This body is the CPU implementation, in which shapes may depend on data."""
    indices = groups.new_zeros((len(boxes), max_keep))
    kept = valid.new_zeros((len(boxes), max_keep))
    for image in range(len(boxes)):
        candidates = valid[image].nonzero().squeeze(1)
        order = scores[image, candidates].argsort(stable=True, descending=True)
        candidates = candidates[order]
        survivors = _greedy(
            _with_last_pixel(boxes[image, candidates], plus_one),
            groups[image, candidates],
            iou_threshold,
            max_keep,
        )
        indices[image, : len(survivors)] = candidates[survivors]
        kept[image, : len(survivors)] = True
    return indices, kept


@grouped_nms.register_kernel("cuda")
def _(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, max_keep: int, plus_one: float
) -> tuple[Tensor, Tensor]:
    from boxwright.ops.nms_triton import greedy_nms  # Imported here because Triton may not be installed.

    return greedy_nms(_with_last_pixel(boxes, plus_one), scores, groups, valid, iou_threshold, max_keep)


@grouped_nms.register_fake
def _(
    boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, iou_threshold: float, max_keep: int, plus_one: float
) -> tuple[Tensor, Tensor]:
    return groups.new_empty((boxes.shape[0], max_keep)), valid.new_empty((boxes.shape[0], max_keep))


def _with_last_pixel(boxes: Tensor, plus_one: float) -> Tensor:
    """Add `plus_one` to x2 and y2, so that the plain IoU equals the IoU in the geometry with `plus_one`."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] + plus_one], -1) if plus_one else boxes


def _greedy(boxes: Tensor, groups: Tensor, iou_threshold: float, max_keep: int) -> Tensor:
    """Indices of the first `max_keep` survivors among candidates sorted by descending score.

    Whether a box survives depends only on higher-scoring survivors. The list is therefore processed in chunks, each
    together with the survivors so far, until enough boxes survive. A long list seldom needs more than its first chunks.
    The length of a chunk is estimated from the number of survivors of the previous chunk.
    """
    survivors = torch.zeros(0, dtype=torch.int64)
    start, length = 0, max(1024, max_keep + max_keep // 4)
    while start < len(boxes) and len(survivors) < max_keep:
        num_before = len(survivors)
        rows = torch.cat([survivors, torch.arange(start, min(start + length, len(boxes)))])
        survivors = rows[_survivors(boxes[rows], groups[rows], iou_threshold)]
        start += length
        # Fewer of the lower-scoring boxes survive, so take four times the length that this chunk's survival rate
        # implies.
        num_survivors = max(1, len(survivors) - num_before)
        length = max(1024, 4 * length * (max_keep - len(survivors)) // num_survivors)
    return survivors[:max_keep]


def _survivors(boxes: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Ascending indices of all boxes that survive within their group; the input is sorted by descending score."""
    by_group = groups.argsort(stable=True)
    sizes = groups[by_group].unique_consecutive(return_counts=True)[1].tolist()
    descending = torch.arange(
        len(boxes), 0, -1, dtype=boxes.dtype
    )  # Any descending scores: the boxes are sorted already.

    def within(members: Tensor) -> Tensor:
        best: Tensor = torchvision.ops.nms(members, descending[: len(members)], iou_threshold)
        return best

    members = boxes[by_group].split(sizes)
    num_threads = min(torch.get_num_threads(), sum(size >= _MIN_GROUP_FOR_THREAD for size in sizes))
    if num_threads > 1:
        with ThreadPoolExecutor(num_threads) as threads:
            kept = list(threads.map(within, members))
    else:
        kept = list(map(within, members))
    survivors = [rows[best] for rows, best in zip(by_group.split(sizes), kept, strict=True)]
    return torch.cat(survivors).sort().values
