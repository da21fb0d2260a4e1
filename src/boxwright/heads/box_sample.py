"""Candidates for the losses of the second stage (proposals and ground-truth boxes), and the boxes sampled from them.

B images, P proposals, G object slots, N = P + G candidates, S sampled boxes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from boxwright.assign.match import Matches, match
from boxwright.assign.sample import Sampled
from boxwright.structures import Proposals, Targets, take_slots

FIRST_OBJECT_SOURCE = 2**31
"""Source number of the first ground-truth box; all sources of proposals are smaller."""


class SampledBoxes(NamedTuple):
    """The boxes that the losses of the second stage are computed on."""

    boxes: Tensor
    """[B, S, 4] float32, xyxy in pixels of the canvas; positives come first."""
    matched: Tensor
    """[B, S] int64, slot of the matched object for positives, else 0."""
    positive: Tensor
    """[B, S] bool, slots that hold a positive; these are the first slots."""
    valid: Tensor
    """[B, S] bool, slots that hold a box."""
    sources: Tensor
    """[B, S] int64, source of the proposal, or `FIRST_OBJECT_SOURCE` + object slot for a ground-truth box."""


class Candidates(NamedTuple):
    """The boxes that can be sampled: proposals and ground-truth boxes."""

    boxes: Tensor
    """[B, N, 4] float32, xyxy in pixels of the canvas; proposals first, then objects; 0 in invalid slots."""
    valid: Tensor
    """[B, N] bool, slots that hold a finite box; crowd regions are not valid."""
    sources: Tensor
    """[B, N] int64, as in `SampledBoxes`."""
    matches: Matches
    """Labels and matched objects of the candidates."""


def candidates(proposals: Proposals, targets: Targets, *, positive_iou: float, plus_one: float) -> Candidates:
    """Concatenate proposals and ground-truth boxes, and match them with the objects.

    Args:
        proposals: P slots per image.
        targets: ground truth.
        positive_iou: IoU threshold for positives; boxes below it are negative.
        plus_one: 1 if widths and heights are x2 - x1 + 1 and y2 - y1 + 1, else 0.
    """
    boxes = torch.cat([proposals.boxes, targets.boxes], 1)
    valid = torch.cat([proposals.valid, targets.valid & ~targets.crowd], 1) & boxes.isfinite().all(-1)
    boxes = torch.where(valid[..., None], boxes, 0.0)
    object_sources = FIRST_OBJECT_SOURCE + torch.arange(targets.labels.shape[1], device=boxes.device)
    sources = torch.cat([proposals.sources, object_sources.expand_as(targets.labels)], 1)
    matches = match(
        boxes,
        targets,
        positive_iou=positive_iou,
        negative_iou=positive_iou,
        low_quality=None,
        candidates_valid=valid,
        plus_one=plus_one,
    )
    return Candidates(boxes, valid, sources, matches)


def gather_sampled(pool: Candidates, sampled: Sampled) -> SampledBoxes:
    """Gather the sampled candidates."""
    return SampledBoxes(
        boxes=take_slots(pool.boxes, sampled.indices),
        matched=torch.where(sampled.positive, take_slots(pool.matches.matched, sampled.indices), 0),
        positive=sampled.positive,
        valid=sampled.valid,
        sources=take_slots(pool.sources, sampled.indices),
    )
