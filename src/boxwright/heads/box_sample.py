"""Which boxes the losses of the second stage look at, among the proposals and the ground truth itself.

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
"""Ground truth boxes join the proposals with numbers of their own, above all of the proposals' sources."""


class SampledBoxes(NamedTuple):
    """What the losses of the second stage look at."""

    boxes: Tensor
    """[B, S, 4] float32, xyxy in pixels of the canvas; positives come first."""
    matched: Tensor
    """[B, S] int64, the object slot of each positive, else 0."""
    positive: Tensor
    """[B, S] bool, the slots that hold a box of an object, the first ones."""
    valid: Tensor
    """[B, S] bool, the slots that hold a box."""
    sources: Tensor
    """[B, S] int64, the proposal's source, or `FIRST_OBJECT_SOURCE` + slot for a box that is ground truth itself."""


class Candidates(NamedTuple):
    """What may be sampled."""

    boxes: Tensor
    """[B, N, 4] float32, xyxy in pixels of the canvas; proposals, then objects; 0 in invalid slots."""
    valid: Tensor
    """[B, N] bool, the slots that hold a finite box; crowd regions do not count."""
    sources: Tensor
    """[B, N] int64, as in `SampledBoxes`."""
    matches: Matches
    """Their labels and the objects that they belong to."""


def candidates(proposals: Proposals, targets: Targets, *, positive_iou: float, plus_one: float) -> Candidates:
    """Proposals and ground truth in one, matched with the objects.

    Args:
        proposals: P slots an image.
        targets: ground truth.
        positive_iou: a box with at least this IoU with an object is positive, any other negative.
        plus_one: what widths and heights add.
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


def taken(found: Candidates, sampled: Sampled) -> SampledBoxes:
    """The candidates that were sampled."""
    return SampledBoxes(
        boxes=take_slots(found.boxes, sampled.indices),
        matched=torch.where(sampled.positive, take_slots(found.matches.matched, sampled.indices), 0),
        positive=sampled.positive,
        valid=sampled.valid,
        sources=take_slots(found.sources, sampled.indices),
    )
