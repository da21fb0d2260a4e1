"""Columns that the reader of every format fills: one entry per image, category and annotation.

`reading.check_columns` checks the columns against each other and converts them to the arrays of an `AnnotationIndex`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta, Struct

from boxwright.data.formats.fault import Fault
from boxwright.data.masks import rle

# Integers that every JSON reader represents exactly (up to 2^53) and that evaluation accepts.
Id = Annotated[int, Meta(ge=0, le=2**53)]
Length = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Run = Annotated[int, Meta(ge=0, le=2**31 - 1)]

NO_SEGMENTATION, POLYGONS, RLE = 0, 1, 2
"""Values of the column `segmentation`."""


class RunLengths(Struct):
    """Run-length encoded mask, as in a COCO file."""

    size: tuple[Run, Run]
    counts: str | list[Run]


class Annotation(Struct):
    """One object, with the fields and types of a COCO file."""

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
    """The entries of a split that match the schema, in file order. Ids may be unknown, and numbers may be NaN."""

    image_ids: array[int] = field(default_factory=_integers)
    image_sizes: array[int] = field(default_factory=_integers)
    """(height, width) of each image, concatenated."""
    file_names: list[str] = field(default_factory=list)
    category_ids: array[int] = field(default_factory=_integers)
    category_names: list[str] = field(default_factory=list)
    annotation_ids: array[int] = field(default_factory=_integers)
    annotation_images: array[int] = field(default_factory=_integers)
    annotation_categories: array[int] = field(default_factory=_integers)
    bboxes: array[float] = field(default_factory=_reals)
    """x, y, width and height of each annotation, concatenated."""
    areas: array[float] = field(default_factory=_reals)
    crowd: array[int] = field(default_factory=lambda: array("b"))
    segmentation: array[int] = field(default_factory=lambda: array("b"))
    polygon_ends: array[int] = field(default_factory=_integers)
    """For each annotation, the cumulative number of polygons up to and including this annotation."""
    point_ends: array[int] = field(default_factory=_integers)
    """For each polygon, the cumulative number of coordinates up to and including this polygon."""
    points: array[float] = field(default_factory=lambda: array("f"))
    rle_ends: array[int] = field(default_factory=_integers)
    """For each annotation, the cumulative number of characters up to and including this annotation."""
    rle_sizes: array[int] = field(default_factory=_integers)
    """(height, width) of the run-length mask of each annotation, concatenated; 0 for an annotation without one."""
    rle_characters: bytearray = field(default_factory=bytearray)
    refused_images: set[int] = field(default_factory=set)
    """Ids of images that do not match the schema. They have a fault, so their annotations do not get another one."""
    refused_categories: set[int] = field(default_factory=set)
    """Ids of categories that do not match the schema."""
    places: list[tuple[str, str]] = field(default_factory=list)
    """`Fault.file` and `Fault.object` for faults of each annotation; empty for the annotation file and the id."""
    stated_boxes: array[float] = field(default_factory=_reals)
    """Box of each annotation as the file states it, four numbers, for messages; empty if the file states `bboxes`."""
    box_form: str = "bbox is [x, y, width, height] in pixels"
    """Description of a box in the format, for messages."""


def add_annotation(columns: Columns, annotation: Annotation, file: str, faults: list[Fault]) -> None:
    """Append an object to the columns, and append the faults of its mask.

    Args:
        columns: Columns to append to.
        annotation: The object.
        file: Annotation file of the object, for faults.
        faults: List to which faults are appended.
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
                Fault(
                    file, f"annotation {annotation.id}", f"`segmentation`: {error}", "Correct or remove `segmentation`"
                )
            )
    elif segmentation:
        for polygon in segmentation:
            if len(polygon) < 6 or len(polygon) % 2:
                what = f"`segmentation` has a polygon of {len(polygon)} numbers, expected x, y of at least 3 points"
                fix = "Correct the polygon; training ignores it"
                faults.append(Fault(file, f"annotation {annotation.id}", what, fix, "dropped"))
                continue
            kind = POLYGONS
            columns.points.fromlist(polygon)
            columns.point_ends.append(len(columns.points))
    columns.segmentation.append(kind)
    columns.rle_sizes.extend(size)
    columns.polygon_ends.append(len(columns.point_ends))
    columns.rle_ends.append(len(columns.rle_characters))


def _rle_characters(mask: RunLengths) -> bytes:
    """The runs of a mask in the compressed form."""
    if isinstance(mask.counts, str):
        characters = mask.counts.encode()
        runs = rle.decompress(characters)
    else:
        runs = np.asarray(mask.counts, np.int64)
        characters = rle.compress(runs)
    height, width = mask.size
    if len(runs) and runs.min() < 0:
        raise ValueError(f"expected runs of at least 0 pixels, got {runs.min()}")
    if runs.sum() != height * width:
        raise ValueError(f"expected runs of {height} x {width} = {height * width} pixels in total, got {runs.sum()}")
    return characters
