"""Which object each anchor or proposal answers for, decided by IoU.

B images, G object slots, N candidates: anchors that all images share, or each image's proposals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from boxwright.geometry.boxes import area, intersection
from boxwright.structures import Targets

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1

# How many IoUs exist at a time. On the CPU a piece should stay in the cache; elsewhere it only bounds memory.
CPU_PIECE, PIECE = 2**18, 2**24


@dataclass(frozen=True, slots=True)
class Matches:
    """What `match` decides for every candidate."""

    labels: Tensor
    """[B, N] int64: 1 positive, 0 negative, -1 ignored."""
    matched: Tensor
    """[B, N] int64, slot of the object that a positive candidate answers for; 0 for all others."""


@torch.no_grad()
def match(
    candidates: Tensor,
    targets: Targets,
    *,
    positive_iou: float,
    negative_iou: float,
    low_quality: float | None = None,
    crowd_ioa: float = 0.7,
    candidates_valid: Tensor | None = None,
    plus_one: float = 0.0,
) -> Matches:
    """Label candidates by the IoU with the object that they overlap most, the lowest slot where two are level.

    A candidate is positive from `positive_iou`, negative below `negative_iou` and ignored between. This is Faster
    R-CNN's rule (arXiv 1506.01497, section 3.1.2); with `low_quality=0.0` and a positive IoU of every object with some
    candidate it equals torchvision's Matcher with `allow_low_quality_matches`, with None the one without. In an image
    without objects all candidates are negative.

    Args:
        candidates: [N, 4] for all images or [B, N, 4], xyxy in pixels of the canvas.
        targets: ground truth; invalid slots may hold anything, NaN included.
        positive_iou: least IoU of a positive.
        negative_iou: IoU that negatives stay below.
        low_quality: also makes positive the candidates that overlap an object more than any other candidate does (all
            of them where several are level), if that IoU is above 0 and at least this. Such a candidate still answers
            for the object that it overlaps most itself, as in torchvision and Detectron. None for no such rule.
        crowd_ioa: from this share of its area inside a crowd region a candidate is ignored, unless it is positive.
            Crowd regions are never matched.
        candidates_valid: [B, N] or [N] bool, the others being ignored and no object's best; None for all.
        plus_one: 1 for the 2018 geometry.

    Returns:
        Labels and matched slots.
    """
    real = targets.valid[..., None]
    objects = torch.where(real, targets.boxes, torch.zeros_like(targets.boxes))
    crowd = (targets.valid & targets.crowd).to(objects.dtype)[..., None]
    candidates = candidates if candidates.ndim == 3 else candidates[None]
    # Clamped, so that two boxes without area have an IoU of 0 instead of 0 / 0.
    areas = area(candidates, plus_one).clamp(min=torch.finfo(candidates.dtype).tiny)
    # What may not match has an infinite area here, and therefore an IoU of exactly 0: cheaper than masking every IoU.
    object_areas = area(objects, plus_one)[..., None].masked_fill(~real | targets.crowd[..., None], torch.inf)
    if candidates_valid is not None:
        areas = torch.where(candidates_valid, areas, torch.inf)
        candidates = torch.where(candidates_valid[..., None], candidates, torch.zeros_like(candidates))

    def overlaps(boxes: Tensor, areas: Tensor) -> tuple[Tensor, Tensor]:
        shared = intersection(objects, boxes, plus_one)
        return shared, shared / (object_areas + areas[:, None] - shared)

    num_slots = objects.shape[0] * objects.shape[1]
    length = max(1, (CPU_PIECE if candidates.device.type == "cpu" else PIECE) // num_slots)
    pieces = list(zip(candidates.split(length, 1), areas.split(length, 1), strict=True))
    slot_order = torch.arange(objects.shape[1], 0, -1, device=objects.device, dtype=objects.dtype)[:, None]
    best, matched, best_of_object, in_crowd = [], [], [], []
    for piece in pieces:
        shared, iou = overlaps(*piece)
        best.append(iou.amax(1))
        # The first slot that holds the maximum; max(1) would say the same three times slower on the CPU.
        first = torch.where(iou == best[-1][:, None], slot_order, 0.0).amax(1)
        matched.append(objects.shape[1] - first.to(torch.int64))
        in_crowd.append((shared * crowd).amax(1) >= crowd_ioa * piece[1])
        best_of_object.append(iou.amax(2))
    best_iou = torch.cat(best, 1)
    positive = best_iou >= positive_iou
    if low_quality is not None:
        # Best over all pieces, hence a second pass over them.
        goal = torch.stack(best_of_object).amax(0)[..., None]
        goal = torch.where((goal > 0) & (goal >= low_quality), goal, torch.inf)
        positive = positive | torch.cat([(overlaps(*piece)[1] - goal).amax(1) >= 0 for piece in pieces], 1)
    negative = (best_iou < negative_iou) & ~torch.cat(in_crowd, 1)
    if candidates_valid is not None:
        negative = negative & candidates_valid
    labels = torch.where(positive, POSITIVE, torch.where(negative, NEGATIVE, IGNORED))
    return Matches(labels=labels, matched=torch.where(positive, torch.cat(matched, 1), 0))
