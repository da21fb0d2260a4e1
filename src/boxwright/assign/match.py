"""Match anchors or proposals to ground-truth objects by IoU.

B images, G object slots, N candidates: anchors that all images share, or each image's proposals.

Neither the memory nor a compiled graph grows with B x G x N. `compare` goes through the pairs in tiles, and `match`
calls it as one opaque operator: traced, its tiles would be thousands of nodes (3,529 at B = 16, G = 128 and 268,569
anchors), and the compiler would merge the IoUs of its two passes into a matrix that lives between them (2.2 GB there).
Eager and compiled code then also round IoUs alike, which matters where candidates tie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from boxwright.geometry.boxes import area, intersection
from boxwright.structures import Targets

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1

# Number of IoUs in a tile. On the CPU a tile should fit into the cache; on a GPU it only bounds memory.
CPU_TILE, TILE = 2**17, 2**24
# Objects of a tile: few, so that rows of candidates stay long and fast where an image holds thousands.
TILE_OBJECTS = 128


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
        candidates: [N, 4] for all images or [B, N, 4], xyxy in pixels of the canvas. Boxes with a NaN or an
            infinite area are ignored, as if `candidates_valid` were False.
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
    num_images, num_candidates = len(targets.valid), candidates.shape[-2]
    if 0 in (*targets.valid.shape, num_candidates):
        labels = targets.labels.new_full((num_images, num_candidates), NEGATIVE)
        if candidates_valid is not None:
            labels = torch.where(candidates_valid, labels, IGNORED)
        return Matches(labels=labels, matched=torch.zeros_like(labels))
    real = targets.valid[..., None]
    objects = torch.where(real, targets.boxes, torch.zeros_like(targets.boxes))
    crowd = (targets.valid & targets.crowd).to(objects.dtype)
    candidates = candidates if candidates.ndim == 3 else candidates[None]
    # Clamped, so that two boxes without area have an IoU of 0 instead of 0 / 0.
    areas = area(candidates, plus_one).clamp(min=torch.finfo(candidates.dtype).tiny)
    # An infinite coordinate that leaves the area finite inverts the box: it has no area, and overlaps nothing.
    finite = areas.isfinite()
    candidates_valid = finite if candidates_valid is None else candidates_valid & finite
    # What may not match has an infinite area here, and therefore an IoU of exactly 0: cheaper than masking every IoU.
    object_areas = area(objects, plus_one).masked_fill(~targets.valid | targets.crowd, torch.inf)
    areas = torch.where(candidates_valid, areas, torch.inf)
    candidates = torch.where(candidates_valid[..., None], candidates, torch.zeros_like(candidates))

    best_iou, matched, in_crowd, best_of_object = compare_all(
        candidates, areas, objects, object_areas, crowd, plus_one, crowd_ioa, low_quality
    )
    positive = (best_iou >= positive_iou) | best_of_object
    negative = (best_iou < negative_iou) & ~in_crowd & candidates_valid
    labels = torch.where(positive, POSITIVE, torch.where(negative, NEGATIVE, IGNORED))
    return Matches(labels=labels, matched=torch.where(positive, matched, 0))


def compare(
    candidates: Tensor,
    areas: Tensor,
    objects: Tensor,
    object_areas: Tensor,
    crowd: Tensor,
    plus_one: float,
    crowd_ioa: float,
    low_quality: float | None,
    tile: int,
    *,
    skip_idle: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `match` needs to know of all pairs, tile by tile, so that they never exist at once.

    Args:
        candidates: [B or 1, N, 4] finite xyxy.
        areas: [B or 1, N], infinite for candidates that match nothing.
        objects: [B, G, 4] finite xyxy.
        object_areas: [B, G], infinite for objects that match nothing.
        crowd: [B, G] 1 for crowd regions, else 0.
        plus_one: as in `match`.
        crowd_ioa: as in `match`.
        low_quality: as in `match`.
        tile: IoUs that exist at a time.
        skip_idle: whether to look at numbers to find work that changes nothing, which is free on a CPU.

    Returns:
        best_iou: [B, N] each candidate's highest IoU with an object.
        matched: [B, N] int64, the first object that has it.
        in_crowd: [B, N] bool, whether a crowd region holds the candidate.
        best_of_object: [B, N] bool, whether some object's best candidate it is; False without `low_quality`.
    """
    num_images, num_objects = objects.shape[:2]
    width = min(num_objects, TILE_OBJECTS)
    length = max(1, tile // (num_images * width))
    rows = list(zip(*(t.split(width, 1) for t in (objects, object_areas, crowd)), strict=True))
    columns = list(zip(candidates.split(length, 1), areas.split(length, 1), strict=True))
    slot_order = torch.arange(width, 0, -1, device=objects.device, dtype=objects.dtype)[:, None]
    any_crowd = not skip_idle or bool(crowd.any())
    reach: list[list[Tensor]] = [[] for _ in rows]
    summaries = []
    for boxes, box_areas in columns:
        summary: tuple[Tensor, Tensor, Tensor] | None = None
        for row, (members, member_areas, member_crowd) in enumerate(rows):
            shared, iou = _overlaps(members, member_areas, boxes, box_areas, plus_one)
            best = iou.amax(1)
            # The first slot that holds the maximum; max(1) would say the same three times slower on the CPU.
            first = torch.where(iou == best[:, None], slot_order[: iou.shape[1]], 0.0).amax(1)
            first = row * width + (width - first).to(torch.int64)
            if any_crowd:
                in_crowd = (shared * member_crowd[..., None]).amax(1) >= crowd_ioa * box_areas
            else:
                in_crowd = torch.zeros_like(best, dtype=torch.bool)
            if summary is not None:
                higher = best > summary[0]
                best, first = torch.where(higher, best, summary[0]), torch.where(higher, first, summary[1])
                in_crowd = in_crowd | summary[2]
            summary = best, first, in_crowd
            if low_quality is not None:
                reach[row].append(iou.amax(2))
        assert summary is not None
        summaries.append(summary)
    best_iou, matched, held = (torch.cat(pieces, 1) for pieces in zip(*summaries, strict=True))
    if low_quality is None:
        return best_iou, matched, held, torch.zeros_like(held)
    goals = [torch.stack(own).amax(0) for own in reach]
    goals = [torch.where((goal > 0) & (goal >= low_quality), goal, torch.inf) for goal in goals]
    # An object's best IoU is known after all tiles only, so that a second pass compares with it.
    best_of_object = []
    for column, (boxes, box_areas) in enumerate(columns):
        reached = None
        for row, ((members, member_areas, _), goal) in enumerate(zip(rows, goals, strict=True)):
            if skip_idle and not (reach[row][column] >= goal).any():
                continue
            _, iou = _overlaps(members, member_areas, boxes, box_areas, plus_one)
            here = (iou - goal[..., None]).amax(1) >= 0
            reached = here if reached is None else reached | here
        best_of_object.append(torch.zeros_like(held[:, : boxes.shape[1]]) if reached is None else reached)
    return best_iou, matched, held, torch.cat(best_of_object, 1)


def _overlaps(
    objects: Tensor, object_areas: Tensor, candidates: Tensor, areas: Tensor, plus_one: float
) -> tuple[Tensor, Tensor]:
    """[B, G, N] shared areas and IoUs of all pairs."""
    shared = intersection(objects, candidates, plus_one)
    return shared, shared / (object_areas[..., None] + areas[:, None] - shared)


@torch.library.custom_op("boxwright::match", mutates_args=())
def compare_all(
    candidates: Tensor,
    areas: Tensor,
    objects: Tensor,
    object_areas: Tensor,
    crowd: Tensor,
    plus_one: float,
    crowd_ioa: float,
    low_quality: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`compare` as one opaque operator, with tiles of the device's size."""
    if candidates.device.type != "cpu":
        return compare(candidates, areas, objects, object_areas, crowd, plus_one, crowd_ioa, low_quality, TILE)
    # Leave out the slots that are empty in all images.
    used = (object_areas.isfinite() | (crowd > 0)).any(0).nonzero().squeeze(1)
    if not len(used):
        used = used.new_zeros(1)
    objects, object_areas, crowd = objects[:, used], object_areas[:, used], crowd[:, used]
    best_iou, matched, in_crowd, best_of_object = compare(
        candidates, areas, objects, object_areas, crowd, plus_one, crowd_ioa, low_quality, CPU_TILE, skip_idle=True
    )
    return best_iou, used[matched], in_crowd, best_of_object


@compare_all.register_fake
def _(
    candidates: Tensor,
    areas: Tensor,
    objects: Tensor,
    object_areas: Tensor,
    crowd: Tensor,
    plus_one: float,
    crowd_ioa: float,
    low_quality: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = objects.shape[0], candidates.shape[1]
    flags = crowd.new_empty(shape, dtype=torch.bool)
    return areas.new_empty(shape), crowd.new_empty(shape, dtype=torch.int64), flags, torch.empty_like(flags)
