"""Soft non-maximum suppression (Soft-NMS): overlapped boxes lose score instead of going.

B images, N candidates, K kept. A group is what boxes compete within, such as a class.

Source: Bodla et al., Soft-NMS (2017), figure 2 and equations 2 and 3.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from boxwright.checks import check_choice, check_count, check_number
from boxwright.ops.nms import finite_candidates

Decay = Literal["linear", "gaussian"]


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    valid: Tensor,
    *,
    decay: Decay,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    max_keep: int,
    plus_one: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the best box, lower the scores of the others of its group, and so on, until `max_keep` are taken.

    A box taken keeps the score that it has then. Every other box of the group has its score multiplied, u being the
    IoU of the two, by 1 - u where u is above `iou_threshold` ("linear") or by exp(-u^2 / sigma) whatever u is
    ("gaussian"). Scores only fall, so that taking the best of all groups at a time gives what running each group alone
    and sorting would. Of equal scores the lower index is the better.

    On the CPU each round touches one group alone; on CUDA all candidates, but in static shapes and without the host
    waiting for anything.

    Args:
        boxes: [B, N, 4] xyxy; invalid slots may hold anything, NaN included.
        scores: [B, N] at least 0. A candidate whose score or box is not finite takes no part.
        groups: [B, N] int64, any numbers.
        valid: [B, N] bool, the slots that take part.
        decay: how scores fall.
        iou_threshold: of "linear"; "gaussian" has none.
        sigma: of "gaussian", the larger the gentler; "linear" has none.
        min_score: at least 0; a box is left out once its score is not above this, and then lowers none.
        max_keep: K, the number of slots in the answer; it may exceed N.
        plus_one: 1 for the 2018 geometry.

    Returns:
        indices: [B, K] int64, the kept candidates by falling lowered score, then zeros.
        lowered: [B, K] their lowered scores, then zeros.
        kept: [B, K] bool, the slots that are in use.
    """
    check_choice("decay", decay, get_args(Decay))
    check_number("iou_threshold", iou_threshold, 0, 1)
    check_number("sigma", sigma, 0, above=True)
    check_number("min_score", min_score, 0)
    check_count("max_keep", max_keep, least=0)
    boxes, scores = boxes.detach(), scores.detach()
    indices, lowered, kept = grouped_soft_nms(
        boxes,
        scores,
        groups,
        valid & finite_candidates(boxes, scores),
        decay == "gaussian",
        float(iou_threshold),
        float(sigma),
        float(min_score),
        max_keep,
        float(plus_one),
    )
    return indices, lowered, kept


@torch.library.custom_op("boxwright::soft_nms", mutates_args=(), device_types="cpu")
def grouped_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    valid: Tensor,
    gaussian: bool,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    max_keep: int,
    plus_one: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`soft_nms` as one opaque operator; this body is its CPU form, where shapes may depend on data."""
    indices = groups.new_zeros((len(boxes), max_keep))
    lowered = scores.new_zeros((len(boxes), max_keep))
    kept = valid.new_zeros((len(boxes), max_keep))
    for image in range(len(boxes)):
        candidates = (valid[image] & (scores[image] > min_score)).nonzero().squeeze(1)
        # A stable order by group, so that a group is a slice in which the first of equal scores has the lower index.
        candidates = candidates[groups[image, candidates].argsort(stable=True)]
        sizes = groups[image, candidates].unique_consecutive(return_counts=True)[1].numpy()
        found, final = _one_group_a_round(
            boxes[image, candidates].numpy(),
            scores[image, candidates].numpy(),
            candidates.numpy(),
            np.concatenate([[0], sizes.cumsum()]),
            (gaussian, iou_threshold, sigma),
            min_score,
            max_keep,
            plus_one,
        )
        indices[image, : len(found)] = candidates[found]
        lowered[image, : len(found)] = torch.tensor(final, dtype=scores.dtype)
        kept[image, : len(found)] = True
    return indices, lowered, kept


def _one_group_a_round(
    boxes: np.ndarray,
    scores: np.ndarray,
    candidates: np.ndarray,
    bounds: np.ndarray,
    decay: tuple[bool, float, float],
    min_score: float,
    max_keep: int,
    plus_one: float,
) -> tuple[list[int], list[float]]:
    """Rows taken, in order, with their scores then; group g is the rows from bounds[g] to bounds[g + 1]."""
    gaussian, iou_threshold, sigma = decay
    x1, y1, x2, y2 = np.ascontiguousarray(boxes.T)
    x2, y2 = x2 + plus_one, y2 + plus_one
    areas = np.maximum((x2 - x1) * (y2 - y1), np.finfo(boxes.dtype).tiny)
    left = scores.copy()
    leaders = np.array([start + left[start:end].argmax() for start, end in pairwise(bounds)], dtype=np.int64)
    found: list[int] = []
    final: list[float] = []
    while len(found) < max_keep and len(leaders):
        level = np.flatnonzero(left[leaders] == left[leaders].max())
        group = level[candidates[leaders[level]].argmin()]
        row = leaders[group]
        if not left[row] > min_score:
            break
        found.append(int(row))
        final.append(float(left[row]))
        span = slice(bounds[group], bounds[group + 1])
        width = np.maximum(np.minimum(x2[span], x2[row]) - np.maximum(x1[span], x1[row]), 0)
        height = np.maximum(np.minimum(y2[span], y2[row]) - np.maximum(y1[span], y1[row]), 0)
        shared = width * height
        overlap = shared / (areas[span] + areas[row] - shared)
        left[span] *= np.exp(overlap * overlap / -sigma) if gaussian else 1 - overlap * (overlap > iou_threshold)
        left[row] = 0
        leaders[group] = span.start + left[span].argmax()
    return found, final


@grouped_soft_nms.register_kernel("cuda")
def every_box_a_round(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    valid: Tensor,
    gaussian: bool,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    max_keep: int,
    plus_one: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The form of static shapes, for CUDA; it runs on any device."""
    num_images, num_boxes = scores.shape
    indices = groups.new_zeros((max_keep, num_images))
    lowered = scores.new_zeros((max_keep, num_images))
    # A score of 0 is out of the race: not above any bound, and no multiplication brings it back.
    left = torch.where(valid, scores, 0.0)
    x1, y1, x2, y2 = torch.where(valid[..., None], boxes, 0.0).permute(2, 0, 1).contiguous()
    x2, y2 = x2 + plus_one, y2 + plus_one
    areas = ((x2 - x1) * (y2 - y1)).clamp(min=torch.finfo(boxes.dtype).tiny)
    order = torch.arange(num_boxes, device=boxes.device)
    for place in range(min(max_keep, num_boxes)):
        best = left.amax(1, keepdim=True)
        # The first of equals on every device, which argmax promises on none.
        index = torch.where(left == best, order, num_boxes).amin(1, keepdim=True)
        indices[place], lowered[place] = index[:, 0], best[:, 0]
        own_x1, own_y1, own_x2, own_y2, own_area = (values.gather(1, index) for values in (x1, y1, x2, y2, areas))
        width = (torch.minimum(x2, own_x2) - torch.maximum(x1, own_x1)).clamp_(min=0)
        height = (torch.minimum(y2, own_y2) - torch.maximum(y1, own_y1)).clamp_(min=0)
        shared = width.mul_(height)
        overlap = shared / (areas + own_area - shared)
        factor = (overlap.square_() / -sigma).exp_() if gaussian else 1 - overlap * (overlap > iou_threshold)
        left = torch.where(groups == groups.gather(1, index), left * factor, left).scatter_(1, index, 0.0)
    kept = lowered > min_score
    return (
        torch.where(kept, indices, 0).T.contiguous(),
        torch.where(kept, lowered, 0.0).T.contiguous(),
        kept.T.contiguous(),
    )


@grouped_soft_nms.register_fake
def _(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    valid: Tensor,
    gaussian: bool,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    max_keep: int,
    plus_one: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (scores.shape[0], max_keep)
    return groups.new_empty(shape), scores.new_empty(shape), valid.new_empty(shape)
