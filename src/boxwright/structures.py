"""The four things that travel through a detector, each a padded tensor structure of a shape that data never changes.

B images, G object slots, P proposals, D detections; H x W is the canvas, the padded shape that a batch's images share.
Boxes are continuous (x1, y1, x2, y2) in pixels of the canvas, and `valid` alone says which slots are real: what a
padded slot holds is undefined (NaN included) and must never reach a result.
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
    """Masks of the objects of `Targets`, each a grid of M x M cells on a frame of its own."""

    bitmaps: Tensor
    """[B, G, M, M] uint8, the share of each cell that the object covers, in 255ths."""
    frames: Tensor
    """[B, G, 4] float32, xyxy in pixels of the canvas, where the grid lies; may reach beyond the picture."""
    valid: Tensor
    """[B, G] bool, the slots that hold a mask: not those of crowd regions, nor of objects annotated by a box alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Ground truth, padded to G objects an image."""

    boxes: Tensor
    """[B, G, 4] float32, xyxy in pixels of the canvas."""
    labels: Tensor
    """[B, G] int64, 0 <= label < num_classes; there is no background label."""
    valid: Tensor
    """[B, G] bool, the slots that hold an object."""
    crowd: Tensor
    """[B, G] bool, crowd regions: never learnt as an object; anchors and proposals inside are ignored."""
    masks: MaskGrids | None = None
    """The objects' masks; None where no part of the detector learns them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposals:
    """Class-agnostic boxes worth a second look, best first."""

    boxes: Tensor
    """[B, P, 4] float32, xyxy in pixels of the canvas."""
    scores: Tensor
    """[B, P] float32, objectness in 0..1, falling along P."""
    valid: Tensor
    """[B, P] bool, the slots that hold a proposal."""
    sources: Tensor
    """[B, P] int64 in 0..2^31 - 1, what each was made from (its anchor), by which sampling knows it in any order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Images on one canvas, with what is needed to learn from them and to bring boxes back to the files' own pixels."""

    images: Tensor
    """[B, 3, H, W] uint8 RGB, channels last in memory from the loader; pixels outside `image_sizes` are undefined."""
    image_sizes: Tensor
    """[B, 2] int64, (height, width) of the picture in the upper left of the canvas."""
    original_sizes: Tensor
    """[B, 2] int64, (height, width) of the picture in its file, EXIF orientation applied."""
    transforms: Tensor
    """[B, 2, 3] float32, affine from continuous pixel coordinates of the file to those of the canvas."""
    image_ids: Tensor
    """[B] int64, the annotation file's image ids."""
    seeds: Tensor
    """[B] int64, what random sampling for this image draws from: a function of run seed, epoch and image alone."""
    targets: Targets | None = None
    """Ground truth; None where only detections are wanted."""
    proposals: Proposals | None = None
    """Boxes that were computed before, for detectors without a network of their own for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """What a detector found, best first."""

    boxes: Tensor
    """[B, D, 4] float32, xyxy in pixels of the canvas."""
    scores: Tensor
    """[B, D] float32 in 0..1, falling along D."""
    labels: Tensor
    """[B, D] int64, 0 <= label < num_classes (always 0 where the detector is class-agnostic)."""
    valid: Tensor
    """[B, D] bool, the slots that hold a detection."""
    masks: Tensor | None = None
    """[B, D, S, S] float32 in 0..1, the probability that the object covers a cell of an S x S grid on its box."""


for _structure in (MaskGrids, Targets, Batch, Proposals, Detections):
    register_dataclass(_structure)


def map_tensors(structure: Structure, function: Callable[[Tensor], Tensor]) -> Structure:
    """The same structure with `function` applied to every tensor in it, nested ones included."""
    changed: dict[str, Any] = {}
    for field in fields(structure):
        value = getattr(structure, field.name)
        if value is not None:
            changed[field.name] = function(value) if isinstance(value, Tensor) else map_tensors(value, function)
    return replace(structure, **changed)


def to_device(structure: Structure, device: torch.device | str) -> Structure:
    """The structure with every tensor on `device`; copies from pinned memory do not block the host."""
    return map_tensors(structure, lambda tensor: tensor.to(device, non_blocking=True))


def pin_memory(structure: Structure) -> Structure:
    """The structure with every tensor in page-locked memory."""
    return map_tensors(structure, Tensor.pin_memory)


def take_slots(values: Tensor, indices: Tensor) -> Tensor:
    """Pick slots of each image.

    Args:
        values: [B, N, ...] anything.
        indices: [B, S] int64, 0 <= index < N.

    Returns:
        [B, S, ...] where row s of image b is `values[b, indices[b, s]]`.
    """
    extra = values.shape[2:]
    index = indices.reshape(*indices.shape, *(1,) * len(extra)).expand(*indices.shape, *extra)
    return values.gather(1, index)
