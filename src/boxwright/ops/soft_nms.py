"""Soft non-maximum suppression (Soft-NMS): overlapping boxes get lower scores instead of being removed.

B images, N candidates, K kept boxes. Boxes lower each other's scores only within a group, such as a class.

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
    """Repeatedly keep the best box and lower the scores of the other boxes of its group, until `max_keep` are kept.

    The output score of a box is its score at the moment it is kept. Let u be the IoU of another box of the group with
    the kept box. The score of the other box is multiplied by 1 - u if u is above `iou_threshold` ("linear"), or by
    exp(-u^2 / sigma) for any u ("gaussian"). Scores only decrease, so selecting the best box over all groups gives the
    same result as processing each group separately and sorting. Of equal scores the lower index ranks first.

    Each round keeps one box per image. On a CPU a round updates only the group of the kept box. On CUDA it updates all
    candidates, with static shapes and without synchronising with the host.

    Args:
        boxes: [B, N, 4] xyxy; invalid slots may have any value, including NaN.
        scores: [B, N] at least 0. Candidates with a non-finite score or box are treated as invalid.
        groups: [B, N] int64, any values.
        valid: [B, N] bool, slots that hold a candidate.
        decay: "linear" or "gaussian".
        iou_threshold: IoU threshold of "linear"; not used by "gaussian".
        sigma: sigma of "gaussian": the larger, the less scores decrease; not used by "linear".
        min_score: at least 0. A box whose score is at most this is discarded, and lowers no other score.
        max_keep: K, the number of output slots; it may exceed N.
        plus_one: 1 for the box geometry of mmdetection 0.5 (2018), else 0.

    Returns:
        indices: [B, K] int64, kept candidates by descending lowered score, padded with 0.
        lowered: [B, K] lowered scores, padded with 0.
        kept: [B, K] bool, slots that are in use.
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
    """`soft_nms` as one opaque operator. This body is the CPU implementation, in which shapes may depend on data."""
    indices = groups.new_zeros((len(boxes), max_keep))
    lowered = scores.new_zeros((len(boxes), max_keep))
    kept = valid.new_zeros((len(boxes), max_keep))
    for image in range(len(boxes)):
        candidates = (valid[image] & (scores[image] > min_score)).nonzero().squeeze(1)
        # Sort stably by group, so that a group is a slice in which the first of equal scores has the lowest index.
        candidates = candidates[groups[image, candidates].argsort(stable=True)]
        sizes = groups[image, candidates].unique_consecutive(return_counts=True)[1].numpy()
        kept_rows, kept_scores = _one_group_per_round(
            boxes[image, candidates].numpy(),
            scores[image, candidates].numpy(),
            candidates.numpy(),
            np.concatenate([[0], sizes.cumsum()]),
            (gaussian, iou_threshold, sigma),
            min_score,
            max_keep,
            plus_one,
        )
        indices[image, : len(kept_rows)] = candidates[kept_rows]
        lowered[image, : len(kept_rows)] = torch.tensor(kept_scores, dtype=scores.dtype)
        kept[image, : len(kept_rows)] = True
    return indices, lowered, kept


def _one_group_per_round(
    boxes: np.ndarray,
    scores: np.ndarray,
    candidates: np.ndarray,
    bounds: np.ndarray,
    decay: tuple[bool, float, float],
    min_score: float,
    max_keep: int,
    plus_one: float,
) -> tuple[list[int], list[float]]:
    """Indices of the kept rows, in order, and their scores; group g is rows bounds[g] to bounds[g + 1]."""
    gaussian, iou_threshold, sigma = decay
    x1, y1, x2, y2 = np.ascontiguousarray(boxes.T)
    x2, y2 = x2 + plus_one, y2 + plus_one
    areas = np.maximum((x2 - x1) * (y2 - y1), np.finfo(boxes.dtype).tiny)
    remaining = scores.copy()
    leaders = np.array([start + remaining[start:end].argmax() for start, end in pairwise(bounds)], dtype=np.int64)
    kept_rows: list[int] = []
    kept_scores: list[float] = []
    while len(kept_rows) < max_keep and len(leaders):
        level = np.flatnonzero(remaining[leaders] == remaining[leaders].max())
        group = level[candidates[leaders[level]].argmin()]
        row = leaders[group]
        if not remaining[row] > min_score:
            break
        kept_rows.append(int(row))
        kept_scores.append(float(remaining[row]))
        span = slice(bounds[group], bounds[group + 1])
        width = np.maximum(np.minimum(x2[span], x2[row]) - np.maximum(x1[span], x1[row]), 0)
        height = np.maximum(np.minimum(y2[span], y2[row]) - np.maximum(y1[span], y1[row]), 0)
        shared = width * height
        overlap = shared / (areas[span] + areas[row] - shared)
        remaining[span] *= np.exp(overlap * overlap / -sigma) if gaussian else 1 - overlap * (overlap > iou_threshold)
        remaining[row] = 0
        leaders[group] = span.start + remaining[span].argmax()
    return kept_rows, kept_scores


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
    """Implementation with static shapes for CUDA; it runs on any device."""
    num_images, num_boxes = scores.shape
    indices = groups.new_zeros((max_keep, num_images))
    lowered = scores.new_zeros((max_keep, num_images))
    # A score of 0 means removed: it is above no `min_score`, and stays 0 under multiplication.
    remaining = torch.where(valid, scores, 0.0)
    x1, y1, x2, y2 = torch.where(valid[..., None], boxes, 0.0).permute(2, 0, 1).contiguous()
    x2, y2 = x2 + plus_one, y2 + plus_one
    areas = ((x2 - x1) * (y2 - y1)).clamp(min=torch.finfo(boxes.dtype).tiny)
    order = torch.arange(num_boxes, device=boxes.device)
    for place in range(min(max_keep, num_boxes)):
        best = remaining.amax(1, keepdim=True)
        # Lowest index of the maximum. argmax does not guarantee which of equal values it returns.
        index = torch.where(remaining == best, order, num_boxes).amin(1, keepdim=True)
        indices[place], lowered[place] = index[:, 0], best[:, 0]
        best_x1, best_y1, best_x2, best_y2, best_area = (values.gather(1, index) for values in (x1, y1, x2, y2, areas))
        width = (torch.minimum(x2, best_x2) - torch.maximum(x1, best_x1)).clamp_(min=0)
        height = (torch.minimum(y2, best_y2) - torch.maximum(y1, best_y1)).clamp_(min=0)
        shared = width.mul_(height)
        overlap = shared / (areas + best_area - shared)
        factor = (overlap.square_() / -sigma).exp_() if gaussian else 1 - overlap * (overlap > iou_threshold)
        remaining = torch.where(groups == groups.gather(1, index), remaining * factor, remaining).scatter_(
            1, index, 0.0
        )
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
