"""Match anchors or proposals to ground-truth objects by IoU.

B images, G object slots, N candidates: anchors that all images share, or the proposals of each image.

The [B, G, N] matrix of IoUs is never stored: `compare` computes it in tiles, in two passes. `match` calls `compare`
through a custom operator. Otherwise `torch.compile` would unroll the tiles and store the matrix between the passes
(3,529 graph nodes and 2.2 GB at B = 16, G = 128, N = 268,569). The operator also gives equal IoUs in eager and compiled
mode, so that ties are resolved in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from boxwright.geometry.boxes import area, intersection
from boxwright.structures import Targets

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1

# Number of IoUs per tile. On a CPU a tile should fit into the cache; on a GPU the tile size only bounds memory.
CPU_TILE, TILE = 2**17, 2**24
# Maximum number of objects per tile. It is low so that a tile has long, fast rows of candidates even if an image has
# thousands of objects.
TILE_OBJECTS = 128


@dataclass(frozen=True, slots=True)
class Matches:
    """Labels and matched objects of all candidates."""

    labels: Tensor
    """[B, N] int64: 1 positive, 0 negative, -1 ignored."""
    matched: Tensor
    """[B, N] int64, slot of the object that a positive candidate is matched to; 0 for all other candidates."""


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
    """Label each candidate by its highest IoU with an object; of equal IoUs the lowest object slot counts.

    A candidate is positive if this IoU is at least `positive_iou`, negative if it is below `negative_iou`, and ignored
    otherwise. This is the rule of Faster R-CNN (arXiv 1506.01497, section 3.1.2). With `low_quality=0.0`, and if every
    object has a positive IoU with some candidate, it equals torchvision's Matcher with
    `allow_low_quality_matches=True`; with `low_quality=None` it equals the Matcher with
    `allow_low_quality_matches=False`. In an image without objects all candidates are negative.

    Args:
        candidates: [N, 4] for all images or [B, N, 4], xyxy in pixels of the canvas. Boxes with a NaN or an
            infinite area are ignored, as if `candidates_valid` were False.
        targets: ground truth; invalid slots may have any value, including NaN.
        positive_iou: IoU threshold for positives (inclusive).
        negative_iou: IoU threshold for negatives (exclusive).
        low_quality: minimum IoU of low-quality matches: the candidates with the highest IoU with an object (all of them
            in a tie) are also positive if that IoU is above 0 and at least `low_quality`. Such a candidate is still
            matched to the object with which it has the highest IoU itself, as in torchvision and Detectron. None
            disables low-quality matches.
        crowd_ioa: a candidate is ignored, unless it is positive, if at least this fraction of its area is inside a
            crowd region. Crowd regions are never matched.
        candidates_valid: [B, N] or [N] bool. Invalid candidates are ignored, and are not considered as the best
            candidate of an object. None if all are valid.
        plus_one: 1 for the box geometry of mmdetection 0.5 (2018), else 0.

    Returns:
        Labels and matched slots.
    """
    num_images, num_candidates = len(targets.valid), candidates.shape[-2]
    if 0 in (*targets.valid.shape, num_candidates):
        labels = targets.labels.new_full((num_images, num_candidates), NEGATIVE)
        if candidates_valid is not None:
            labels = torch.where(candidates_valid, labels, IGNORED)
        return Matches(labels=labels, matched=torch.zeros_like(labels))
    is_object = targets.valid[..., None]
    objects = torch.where(is_object, targets.boxes, torch.zeros_like(targets.boxes))
    crowd = (targets.valid & targets.crowd).to(objects.dtype)
    candidates = candidates if candidates.ndim == 3 else candidates[None]
    # Clamp, so that two boxes without area have an IoU of 0 instead of 0 / 0.
    areas = area(candidates, plus_one).clamp(min=torch.finfo(candidates.dtype).tiny)
    # An infinite coordinate that leaves the area finite inverts the box: it has no area, and overlaps nothing.
    finite = areas.isfinite()
    candidates_valid = finite if candidates_valid is None else candidates_valid & finite
    # An infinite area makes the IoU exactly 0 for slots that must not match. This is cheaper than masking every IoU.
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
    """Compute for `match` the best IoUs over all pairs, tile by tile, so that the pairs never exist at once.

    Args:
        candidates: [B or 1, N, 4] finite xyxy.
        areas: [B or 1, N], infinite for candidates that must not match.
        objects: [B, G, 4] finite xyxy.
        object_areas: [B, G], infinite for objects that must not match.
        crowd: [B, G] 1 for crowd regions, else 0.
        plus_one: as in `match`.
        crowd_ioa: as in `match`.
        low_quality: as in `match`.
        tile: maximum number of IoUs that exist at the same time.
        skip_idle: whether to read values in order to skip tiles that cannot change the result. Reading is free on a
            CPU.

    Returns:
        best_iou: [B, N] highest IoU of each candidate with an object.
        matched: [B, N] int64, first object slot with this IoU.
        in_crowd: [B, N] bool, whether `crowd_ioa` of the candidate's area is inside a crowd region.
        best_of_object: [B, N] bool, whether the candidate is the best of some object; False without `low_quality`.
    """
    num_images, num_objects = objects.shape[:2]
    width = min(num_objects, TILE_OBJECTS)
    length = max(1, tile // (num_images * width))
    rows = list(zip(*(t.split(width, 1) for t in (objects, object_areas, crowd)), strict=True))
    columns = list(zip(candidates.split(length, 1), areas.split(length, 1), strict=True))
    slot_order = torch.arange(width, 0, -1, device=objects.device, dtype=objects.dtype)[:, None]
    any_crowd = not skip_idle or bool(crowd.any())
    tile_best: list[list[Tensor]] = [[] for _ in rows]
    summaries = []
    for boxes, box_areas in columns:
        summary: tuple[Tensor, Tensor, Tensor] | None = None
        for row, (members, member_areas, member_crowd) in enumerate(rows):
            shared, iou = _overlaps(members, member_areas, boxes, box_areas, plus_one)
            best = iou.amax(1)
            # First slot with the maximum. max(1) gives the same result, but is three times slower on a CPU.
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
                tile_best[row].append(iou.amax(2))
        assert summary is not None
        summaries.append(summary)
    best_iou, matched, in_crowd = (torch.cat(pieces, 1) for pieces in zip(*summaries, strict=True))
    if low_quality is None:
        return best_iou, matched, in_crowd, torch.zeros_like(in_crowd)
    object_best = [torch.stack(pieces).amax(0) for pieces in tile_best]
    object_best = [
        torch.where((best_iou_of_object > 0) & (best_iou_of_object >= low_quality), best_iou_of_object, torch.inf)
        for best_iou_of_object in object_best
    ]
    # The best IoU of an object is known only after all tiles, so a second pass finds the candidates that have it.
    best_of_object = []
    for column, (boxes, box_areas) in enumerate(columns):
        reached = None
        for row, ((members, member_areas, _), best_iou_of_object) in enumerate(zip(rows, object_best, strict=True)):
            if skip_idle and not (tile_best[row][column] >= best_iou_of_object).any():
                continue
            _, iou = _overlaps(members, member_areas, boxes, box_areas, plus_one)
            here = (iou - best_iou_of_object[..., None]).amax(1) >= 0
            reached = here if reached is None else reached | here
        best_of_object.append(torch.zeros_like(in_crowd[:, : boxes.shape[1]]) if reached is None else reached)
    return best_iou, matched, in_crowd, torch.cat(best_of_object, 1)


def _overlaps(
    objects: Tensor, object_areas: Tensor, candidates: Tensor, areas: Tensor, plus_one: float
) -> tuple[Tensor, Tensor]:
    """[B, G, N] intersection areas and IoUs of all pairs."""
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
    """`compare` as one opaque operator, with the tile size for the device."""
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
