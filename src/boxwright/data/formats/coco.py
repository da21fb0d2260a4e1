"""A COCO annotation file read into columns, with everything that is wrong with it.

Each image, annotation and category is checked for itself against a typed schema, so that one reading finds all faults.
"""

from __future__ import annotations

import contextlib
import json
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct

from boxwright.data.formats.fault import Fault
from boxwright.data.masks import rle

# What JSON readers hold exactly, and what evaluation takes.
_Id = Annotated[int, Meta(ge=0, le=2**53)]
_Length = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Run = Annotated[int, Meta(ge=0, le=2**31 - 1)]

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

NO_SEGMENTATION, POLYGONS, RLE = 0, 1, 2


class _Image(Struct):
    id: _Id
    file_name: Annotated[str, Meta(min_length=1)]
    width: _Length
    height: _Length


class _Category(Struct):
    id: _Id
    name: Annotated[str, Meta(min_length=1)]


class _Rle(Struct):
    size: tuple[_Run, _Run]
    counts: str | list[_Run]


class Annotation(Struct):
    """One object as COCO has it."""

    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: Literal[0, 1] = 0
    segmentation: list[list[float]] | _Rle | None = None


class _File(Struct):
    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw]


class _TolerantFile(Struct):
    images: list[Any]
    annotations: list[Any]
    categories: list[Any]


_Entry = TypeVar("_Entry", bound=Struct)


def _integers() -> array[int]:
    return array("q")


def _reals() -> array[float]:
    return array("d")


@dataclass
class Columns:
    """What is well-typed in an annotation file, in the file's order; ids may still be unknown and numbers NaN."""

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


def read_json(path: Path) -> tuple[Columns, list[Fault]]:
    """All entries of an annotation file that have the right types, and a fault for each that has not.

    Raises:
        OSError: The file cannot be read.
    """
    columns = Columns()
    faults: list[Fault] = []
    try:
        file = _parse(path.read_bytes())
    except ValueError as error:
        return columns, [_file_fault(path, error)]
    for image in _entries(path, "image", file.images, _Image, faults, columns.refused_images):
        if _LONE_SURROGATE.search(image.file_name):
            what, mend = f"`file_name` {image.file_name!a} is no valid Unicode", "write it as the file is named"
            faults.append(Fault(str(path), f"image {image.id}", what, mend))
            columns.refused_images.add(image.id)
            continue
        columns.image_ids.append(image.id)
        columns.image_sizes.extend((image.height, image.width))
        columns.file_names.append(image.file_name)
    for category in _entries(path, "category", file.categories, _Category, faults, columns.refused_categories):
        if _LONE_SURROGATE.search(category.name):
            what = f"`name` {category.name!a} is no valid Unicode"
            faults.append(Fault(str(path), f"category {category.id}", what, "correct it"))
            columns.refused_categories.add(category.id)
            continue
        columns.category_ids.append(category.id)
        columns.category_names.append(category.name)
    for annotation in _entries(path, "annotation", file.annotations, Annotation, faults, set()):
        add_annotation(columns, annotation, str(path), faults)
    return columns, faults


def _parse(data: bytes) -> _File | _TolerantFile:
    try:
        return msgspec.json.decode(data, type=_File)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, RecursionError) as error:
        # Python's own reader is slower, but takes the NaN and Infinity that Python's own writer leaves, so that
        # the objects that hold them can be named; and it tells line and column where the file breaks off.
        try:
            return msgspec.convert(json.loads(data), _TolerantFile)
        except RecursionError:
            raise ValueError("nested too deeply") from error


def _file_fault(path: Path, error: ValueError) -> Fault:
    if isinstance(error, json.JSONDecodeError):
        if not error.doc[error.pos :].strip() or "Unterminated" in error.msg:
            return Fault(str(path), "file", f"cut short: {error}", "copy or export it again")
        return Fault(str(path), "file", f"no valid JSON: {error}", "correct it there, or export it again")
    if isinstance(error, msgspec.ValidationError):
        mend = "a COCO file is an object that holds the lists images, annotations and categories; results files are not"
        return Fault(str(path), "file", f"no COCO annotations: {error}", mend)
    return Fault(str(path), "file", f"no valid JSON: {error}", "export it again as UTF-8 JSON")


def _entries(
    path: Path, noun: str, entries: Sequence[Any], kind: type[_Entry], faults: list[Fault], refused: set[int]
) -> Iterator[_Entry]:
    """The entries that fit the schema; adds the faults of those that do not, and their ids where they have one."""
    decode = msgspec.json.Decoder(kind).decode

    def convert(entry: Any) -> _Entry:
        return msgspec.convert(entry, kind)

    read: Callable[[Any], _Entry] = decode if entries and isinstance(entries[0], msgspec.Raw) else convert
    for position, entry in enumerate(entries):
        try:
            result = read(entry)
        except ValueError as error:  # noqa: PERF203, each entry is to be judged for itself
            found = list(_entry_faults(path, noun, position, entry, kind))
            # Such as a number too large for any type, which Python's own reader takes for infinity.
            unexplained = Fault(str(path), f"{noun} number {position + 1} of the file", str(error), "correct it")
            faults += found or [unexplained]
            refused.update(_whole_ids(entry))
        else:
            yield result


def _whole_ids(entry: Any) -> Iterator[int]:
    """The id of an entry, if it has one that is a whole number."""
    with contextlib.suppress(ValueError):
        entry = json.loads(bytes(entry)) if isinstance(entry, msgspec.Raw) else entry
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            yield entry["id"]


def _entry_faults(path: Path, noun: str, position: int, entry: Any, kind: type[Struct]) -> Iterator[Fault]:
    """Every field that does not fit the schema."""
    place = f"{noun} number {position + 1} of the file"
    if isinstance(entry, msgspec.Raw):
        try:
            entry = json.loads(bytes(entry))
        except ValueError as error:
            yield Fault(str(path), place, f"cannot be read: {error}", "export it again as UTF-8 JSON")
            return
    if not isinstance(entry, dict):
        yield Fault(str(path), place, f"is no object but {json.dumps(entry)[:40]}", "make it an object, or remove it")
        return
    name = f"{noun} {json.dumps(entry['id'])}" if "id" in entry else place
    for known in msgspec.structs.fields(kind):
        if known.name not in entry:
            if known.required:
                yield Fault(str(path), name, f"`{known.name}` is missing", "add it")
            continue
        try:
            msgspec.convert(entry[known.name], known.type)
        except ValueError as error:
            where = re.search(r" - at `\$(.*)`$", str(error))
            inner = where.group(1) if where else ""
            told = str(error)[: where.start()] if where else str(error)
            value = json.dumps(entry[known.name])
            value = value if len(value) <= 40 else value[:40] + "..."
            yield Fault(str(path), name, f"`{known.name}{inner}`: {told} ({known.name} is {value})", _mend(told))


def _mend(told: str) -> str:
    if "Expected `int`, got" in told:
        return "write a whole number, without quotes, point or exponent"
    if "Expected `int` >= 0" in told or f"<= {2**53}" in told:
        return "ids are whole numbers from 0 to 2^53: number anew, in the annotations too"
    if "Expected `float`, got" in told:
        return "write a number, without quotes"
    if "length" in told:
        return "bbox is [x, y, width, height] and segmentation.size [height, width]; a name is not empty"
    return "write it as the COCO format has it"


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
    if isinstance(segmentation, _Rle):
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


def _rle_characters(mask: _Rle) -> bytes:
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
