"""Tensor structures that are passed through a detector. They are padded, so their shapes do not depend on data.

B images, G object slots, P proposals, D detections; H x W is the canvas, the padded shape of all images of a batch.
Boxes are continuous (x1, y1, x2, y2) in pixels of the canvas. `valid` marks the slots that are in use. The values in
unused slots are undefined (possibly NaN) and must never affect a result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

Structure = TypeVar("Structure", bound="Batch | Targets | MaskGrids | Proposals | Detections")


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskGrids:
    """Masks of the objects of `Targets`: grids of M x M cells, each on its own frame."""

    bitmaps: Tensor
    """[B, G, M, M] uint8, fraction of each cell that the object covers, times 255."""
    frames: Tensor
    """[B, G, 4] float32, xyxy of the grids in pixels of the canvas; a frame may extend beyond the image."""
    valid: Tensor
    """[B, G] bool, slots that hold a mask. Crowd regions and objects without a segmentation have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Ground truth, padded to G object slots per image."""

    boxes: Tensor
    """[B, G, 4] float32, xyxy in pixels of the canvas."""
    labels: Tensor
    """[B, G] int64, 0 <= label < num_classes; there is no background label."""
    valid: Tensor
    """[B, G] bool, slots that hold an object."""
    crowd: Tensor
    """[B, G] bool, crowd regions. They are never targets; anchors and proposals inside them are ignored."""
    masks: MaskGrids | None = None
    """Masks of the objects; None if no part of the detector is trained on masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposals:
    """Class-agnostic region proposals, best first."""

    boxes: Tensor
    """[B, P, 4] float32, xyxy in pixels of the canvas."""
    scores: Tensor
    """[B, P] float32, objectness in 0..1, descending along P."""
    valid: Tensor
    """[B, P] bool, slots that hold a proposal."""
    sources: Tensor
    """[B, P] int64 in 0..2^31 - 1, index of the anchor that a proposal comes from. Sampling identifies a proposal by
    its source, so that samples do not depend on the order of the proposals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Images on a common canvas, with targets for training and the transforms between image file and canvas."""

    images: Tensor
    """[B, 3, H, W] uint8 RGB, channels last in memory from the loader; pixels outside `image_sizes` are undefined."""
    image_sizes: Tensor
    """[B, 2] int64, (height, width) of the image, which is in the upper left corner of the canvas."""
    original_sizes: Tensor
    """[B, 2] int64, (height, width) of the image in its file, after EXIF orientation."""
    transforms: Tensor
    """[B, 2, 3] float32, affine transform from continuous pixel coordinates of the file to those on the canvas."""
    image_ids: Tensor
    """[B] int64, image ids of the annotation file."""
    seeds: Tensor
    """[B] int64, seeds for random sampling; each is a function of the run's seed, the epoch and the image only."""
    targets: Targets | None = None
    """Ground truth; None for inference."""
    proposals: Proposals | None = None
    """Precomputed proposals, for detectors without an RPN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """Detections of a detector, best first."""

    boxes: Tensor
    """[B, D, 4] float32, xyxy in pixels of the canvas."""
    scores: Tensor
    """[B, D] float32 in 0..1, descending along D."""
    labels: Tensor
    """[B, D] int64, 0 <= label < num_classes (always 0 if the detector is class-agnostic)."""
    valid: Tensor
    """[B, D] bool, slots that hold a detection."""
    masks: Tensor | None = None
    """[B, D, S, S] float32 in 0..1, probability that the object covers each cell of an S x S grid on its box."""


for _structure in (MaskGrids, Targets, Batch, Proposals, Detections):
    register_dataclass(_structure)


def map_tensors(structure: Structure, function: Callable[[Tensor], Tensor]) -> Structure:
    """Apply `function` to every tensor of a structure, including nested structures, and return the new structure."""
    changed: dict[str, Any] = {}
    for field in fields(structure):
        value = getattr(structure, field.name)
        if value is not None:
            changed[field.name] = function(value) if isinstance(value, Tensor) else map_tensors(value, function)
    return replace(structure, **changed)


def to_device(structure: Structure, device: torch.device | str) -> Structure:
    """Move a structure to `device`. Copies from pinned memory do not block the host."""
    return map_tensors(structure, lambda tensor: tensor.to(device, non_blocking=True))


def pin_memory(structure: Structure) -> Structure:
    """Copy a structure to pinned (page-locked) memory."""
    return map_tensors(structure, Tensor.pin_memory)


def take_slots(values: Tensor, indices: Tensor) -> Tensor:
    """Gather slots of each image.

    Args:
        values: [B, N, ...] of any dtype.
        indices: [B, S] int64, 0 <= index < N.

    Returns:
        [B, S, ...] where row s of image b is `values[b, indices[b, s]]`.
    """
    extra = values.shape[2:]
    index = indices.reshape(*indices.shape, *(1,) * len(extra)).expand(*indices.shape, *extra)
    return values.gather(1, index)
