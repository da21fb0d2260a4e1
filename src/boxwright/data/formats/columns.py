"""The columns that every format's reader fills: one entry per image, category and annotation.

`index` checks the columns against each other and turns them into an `AnnotationIndex`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta, Struct

from boxwright.data.formats.fault import Fault
from boxwright.data.masks import rle

# Whole numbers that JSON readers represent exactly and that evaluation accepts.
Id = Annotated[int, Meta(ge=0, le=2**53)]
Length = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Run = Annotated[int, Meta(ge=0, le=2**31 - 1)]

NO_SEGMENTATION, POLYGONS, RLE = 0, 1, 2


class RunLengths(Struct):
    """A run-length mask as a COCO file writes it."""

    size: tuple[Run, Run]
    counts: str | list[Run]


class Annotation(Struct):
    """One object, with the fields and types that a COCO file gives it."""

    id: Id
    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: Literal[0, 1] = 0
    segmentation: list[list[float]] | RunLengths | None = None


def _integers() -> array[int]:
    return array("q")


def _reals() -> array[float]:
    return array("d")


@dataclass
class Columns:
    """The well-typed entries of a split, in the order of the file. Ids may be unknown and numbers NaN."""

    image_ids: array[int] = field(default_factory=_integers)
    image_sizes: array[int] = field(default_factory=_integers)
    """(height, width) of each image, one after the other."""
    file_names: list[str] = field(default_factory=list)
    category_ids: array[int] = field(default_factory=_integers)
    category_names: list[str] = field(default_factory=list)
    annotation_ids: array[int] = field(default_factory=_integers)
    annotation_images: array[int] = field(default_factory=_integers)
    annotation_categories: array[int] = field(default_factory=_integers)
    bboxes: array[float] = field(default_factory=_reals)
    """x, y, width and height of each annotation, one after the other."""
    areas: array[float] = field(default_factory=_reals)
    crowd: array[int] = field(default_factory=lambda: array("b"))
    segmentation: array[int] = field(default_factory=lambda: array("b"))
    polygon_ends: array[int] = field(default_factory=_integers)
    """For each annotation, the number of polygons up to and with its own."""
    point_ends: array[int] = field(default_factory=_integers)
    """For each polygon, the number of coordinates up to and with its own."""
    points: array[float] = field(default_factory=lambda: array("f"))
    rle_ends: array[int] = field(default_factory=_integers)
    """For each annotation, the number of characters up to and with its own."""
    rle_sizes: array[int] = field(default_factory=_integers)
    """(height, width) of each annotation's run-length mask, 0 where it has none."""
    rle_characters: bytearray = field(default_factory=bytearray)
    refused_images: set[int] = field(default_factory=set)
    """Ids of images that are there but not well-typed: the annotations that name them are not to blame."""
    refused_categories: set[int] = field(default_factory=set)
    """Likewise of categories."""
    places: list[tuple[str, str]] = field(default_factory=list)
    """File and object that faults of each annotation name; empty where that is the annotation file and the id."""
    stated_boxes: array[float] = field(default_factory=_reals)
    """Four numbers for each annotation as its format has them, for messages; empty where those are `bboxes`."""
    box_form: str = "bbox is [x, y, width, height] in pixels"
    """How the format writes a box."""


def add_annotation(columns: Columns, annotation: Annotation, file: str, faults: list[Fault]) -> None:
    """Append an object, and the faults of its mask.

    Args:
        columns: What it is appended to.
        annotation: The object.
        file: Where it is from, for faults.
        faults: What its faults are appended to.
    """
    columns.annotation_ids.append(annotation.id)
    columns.annotation_images.append(annotation.image_id)
    columns.annotation_categories.append(annotation.category_id)
    columns.bboxes.extend(annotation.bbox)
    area = annotation.area
    columns.areas.append(annotation.bbox[2] * annotation.bbox[3] if area is None else area)
    columns.crowd.append(annotation.iscrowd)
    segmentation = annotation.segmentation
    kind, size = NO_SEGMENTATION, (0, 0)
    if isinstance(segmentation, RunLengths):
        kind, size = RLE, segmentation.size
        try:
            columns.rle_characters += _rle_characters(segmentation)
        except ValueError as error:
            faults.append(
                Fault(file, f"annotation {annotation.id}", f"`segmentation`: {error}", "correct or remove its mask")
            )
    elif segmentation:
        for polygon in segmentation:
            if len(polygon) < 6 or len(polygon) % 2:
                what = f"a polygon of {len(polygon)} numbers"
                mend = "a polygon is x, y of three or more points: correct it; training leaves it out"
                faults.append(Fault(file, f"annotation {annotation.id}", what, mend, "dropped"))
                continue
            kind = POLYGONS
            columns.points.fromlist(polygon)
            columns.point_ends.append(len(columns.points))
    columns.segmentation.append(kind)
    columns.rle_sizes.extend(size)
    columns.polygon_ends.append(len(columns.point_ends))
    columns.rle_ends.append(len(columns.rle_characters))


def _rle_characters(mask: RunLengths) -> bytes:
    """The mask's runs in the compressed form, whichever it was written in."""
    if isinstance(mask.counts, str):
        characters = mask.counts.encode()
        runs = rle.decompress(characters)
    else:
        runs = np.asarray(mask.counts, np.int64)
        characters = rle.compress(runs)
    height, width = mask.size
    if len(runs) and runs.min() < 0:
        raise ValueError("a run of less than no pixels")
    if runs.sum() != height * width:
        raise ValueError(f"runs of {runs.sum()} pixels in all for a mask of {height} x {width}")
    return characters
