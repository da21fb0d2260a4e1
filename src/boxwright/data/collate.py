"""Collate samples into a padded batch.

B images, G object slots, P proposals, M cells per side of a mask grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from boxwright.data.buckets import Canvas
from boxwright.data.dataset import Mask, Sample
from boxwright.data.masks.mask_grid import GRID_SIZE, Grid, mask_grid
from boxwright.data.placement import Placement, place_boxes, place_image, place_mask
from boxwright.data.proposals import ImageProposals
from boxwright.structures import Batch, MaskGrids, Proposals, Targets

MIN_SLOTS = 8


@dataclass(frozen=True)
class PlacedSample:
    """A sample, its placement on the canvas, its seed for random sampling and, optionally, its proposals."""

    sample: Sample
    placement: Placement
    seed: int
    proposals: ImageProposals | None = None


def slots_for(max_objects: int) -> int:
    """Number of object slots of a data set: the smallest of 8, 16, 32, ... that is at least `max_objects`."""
    slots = MIN_SLOTS
    while slots < max_objects:
        slots *= 2
    return slots


def collate(
    placed: Iterable[PlacedSample],
    batch_size: int,
    canvas: Canvas,
    slots: int | None,
    proposal_slots: int | None = None,
    *,
    masks: bool = False,
) -> Batch:
    """Place samples on the canvases of one batch, and pad them.

    Args:
        placed: B samples, consumed one by one, so that a generator needs memory for only one decoded image.
        batch_size: B.
        canvas: (height, width) of the canvas.
        slots: G, or None for a batch without targets.
        proposal_slots: P, or None for a batch without proposals.
        masks: Whether the targets include masks, M x M bytes per slot.

    Returns:
        Batch whose padding is 0, in images and targets. Images are in channels-last memory format, in which decoders
        write and convolutions are fastest.

    Raises:
        ValueError: An image is not uint8 [H, W, 3], does not fit the canvas, or has more objects than slots, or a mask
            is invalid.
    """
    images = _canvases(batch_size, canvas)
    pixels = images.numpy()
    sizes, originals = np.zeros((2, batch_size, 2), np.int64)
    transforms = np.zeros((batch_size, 2, 3), np.float32)
    image_ids, seeds = np.zeros((2, batch_size), np.int64)
    boxes = np.zeros((batch_size, slots or 0, 4), np.float32)
    labels = np.zeros((batch_size, slots or 0), np.int64)
    valid, crowd, has_mask = np.zeros((3, batch_size, slots or 0), bool)
    mask_slots = (slots or 0) if masks else 0
    bitmaps = np.zeros((batch_size, mask_slots, GRID_SIZE, GRID_SIZE), np.uint8)
    frames = np.zeros((batch_size, mask_slots, 4), np.float32)
    proposals = None if proposal_slots is None else _no_proposals(batch_size, proposal_slots)
    for b, item in enumerate(placed):
        sample, placement = item.sample, item.placement
        height, width = placement.size
        if sample.image.dtype != np.uint8 or sample.image.shape[2:] != (3,):
            raise ValueError(
                f"{sample.file_name}: expected uint8 [H, W, 3] in RGB order, got {sample.image.dtype} "
                f"{list(sample.image.shape)}. Remove transforms that convert to float: the detector normalises pixels"
            )
        if height > canvas[0] or width > canvas[1]:
            file_height, file_width = sample.image.shape[:2]
            raise ValueError(
                f"{sample.file_name}: the file has {file_width} x {file_height} pixels, which differs from width and "
                "height in the data set. Correct width and height in its annotation"
            )
        place_image(sample.image, placement, pixels[b])
        pixels[b, height:], pixels[b, :height, width:] = 0, 0
        sizes[b], originals[b] = placement.size, sample.image.shape[:2]
        transforms[b], image_ids[b], seeds[b] = placement.matrix, sample.image_id, item.seed
        if slots is not None:
            placed_boxes, keep = _placed_boxes(sample, placement)
            count = int(keep.sum())
            if count > slots:
                raise ValueError(
                    f"{sample.file_name}: {count} objects exceed the {slots} slots for the data set's max_objects. "
                    "Correct max_objects"
                )
            boxes[b, :count], labels[b, :count] = placed_boxes[keep], sample.labels[keep]
            valid[b, :count], crowd[b, :count] = True, sample.crowd[keep]
            for slot, index in enumerate(np.flatnonzero(keep).tolist() if masks else ()):
                grid = _grid_of(sample, index)
                if grid is not None:
                    bitmaps[b, slot], frames[b, slot] = place_mask(grid, placement)
                    has_mask[b, slot] = True
        if proposals is not None and item.proposals is not None:
            _write_proposals(proposals, b, item.proposals, placement)
    targets = None
    if slots is not None:
        targets = Targets(
            boxes=torch.from_numpy(boxes),
            labels=torch.from_numpy(labels),
            valid=torch.from_numpy(valid),
            crowd=torch.from_numpy(crowd),
            masks=MaskGrids(
                bitmaps=torch.from_numpy(bitmaps), frames=torch.from_numpy(frames), valid=torch.from_numpy(has_mask)
            )
            if masks
            else None,
        )
    return Batch(
        images=images.permute(0, 3, 1, 2),
        image_sizes=torch.from_numpy(sizes),
        original_sizes=torch.from_numpy(originals),
        transforms=torch.from_numpy(transforms),
        image_ids=torch.from_numpy(image_ids),
        seeds=torch.from_numpy(seeds),
        targets=targets,
        proposals=proposals,
    )


def _canvases(batch_size: int, canvas: Canvas) -> Tensor:
    """uint8 [B, H, W, 3], uninitialised. In a worker it is allocated in shared memory, so that it is never copied."""
    shape = (batch_size, *canvas, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    shared = torch.UntypedStorage._new_shared(math.prod(shape))  # as in torch's default_collate
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)


def _no_proposals(batch_size: int, slots: int) -> Proposals:
    return Proposals(
        boxes=torch.zeros(batch_size, slots, 4),
        scores=torch.zeros(batch_size, slots),
        valid=torch.zeros(batch_size, slots, dtype=torch.bool),
        sources=torch.arange(slots).repeat(batch_size, 1),
    )


def _write_proposals(proposals: Proposals, image: int, file_proposals: ImageProposals, placement: Placement) -> None:
    """Write the proposals of an image, each to the slot of its index. Proposals outside the canvas are invalid."""
    boxes, visible = place_boxes(file_proposals.boxes, placement, min_visible=0.0)
    keep, count = torch.from_numpy(visible), len(boxes)
    proposals.boxes[image, :count] = torch.where(keep[:, None], torch.from_numpy(boxes), 0.0)
    proposals.scores[image, :count] = torch.where(keep, torch.tensor(file_proposals.scores), 0.0)
    proposals.valid[image, :count] = keep


def _placed_boxes(sample: Sample, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """Apply `place_boxes` to the boxes of a sample, with its masks if the placement changes the boxes' shape."""
    if placement.keeps_boxes or sample.masks is None:
        return place_boxes(sample.boxes, placement)
    _require_a_mask_per_box(sample, sample.masks)
    try:
        return place_boxes(sample.boxes, placement, masks=sample.masks)
    except ValueError as error:
        raise ValueError(f"{sample.file_name}: invalid mask: {error}") from error


def _require_a_mask_per_box(sample: Sample, masks: Sequence[Mask]) -> None:
    if len(masks) != len(sample.boxes):
        raise ValueError(
            f"{sample.file_name}: {len(masks)} masks for {len(sample.boxes)} boxes. A transform that drops a box must "
            "drop its mask too; use None for an object without a mask"
        )


def _grid_of(sample: Sample, index: int) -> Grid | None:
    """Mask grid of an object of a sample; None if the object has no mask to train on."""
    if sample.masks is None or sample.crowd[index]:
        return None
    _require_a_mask_per_box(sample, sample.masks)
    try:
        height, width = sample.image.shape[:2]
        return mask_grid(sample.masks[index], (height, width))
    except ValueError as error:
        raise ValueError(f"{sample.file_name}: mask of object {index}: {error}") from error
