"""COCO: one JSON file per split, with the lists images, annotations and categories.

Each image, annotation and category is checked against a typed schema on its own, so that one pass finds all faults.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from boxwright.cache import hash_file
from boxwright.data.formats.columns import Annotation, Columns, Id, Length, add_annotation
from boxwright.data.formats.fault import Fault
from boxwright.data.formats.format import SPLIT_NAMES, NoMatch, Split

name = "COCO"

# SPLIT is the name of a split, possibly followed by a year. The first pattern with a match wins.
_ANNOTATIONS = (
    "annotations/instances_SPLIT.json",
    "annotations/SPLIT.json",
    "instances_SPLIT.json",
    "SPLIT.json",
    "SPLIT/_annotations.coco.json",
    "SPLIT/annotations.json",
    "SPLIT/instances.json",
)
# A data set without splits, used as the training split.
_SINGLE = (
    "annotations/instances.json",
    "annotations/annotations.json",
    "_annotations.coco.json",
    "annotations.json",
    "instances.json",
)
_IMAGES = ("SPLIT", "images/SPLIT", "SPLIT/images", "images", "JPEGImages", ".")
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
_NUM_PROBES = 20
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class _Image(Struct):
    id: Id
    file_name: Annotated[str, Meta(min_length=1)]
    width: Length
    height: Length


class _Category(Struct):
    id: Id
    name: Annotated[str, Meta(min_length=1)]


class _File(Struct):
    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw]


class _TolerantFile(Struct):
    images: list[Any]
    annotations: list[Any]
    categories: list[Any]


_Entry = TypeVar("_Entry", bound=Struct)


def detect(folder: Path) -> dict[str, Split] | NoMatch:
    """Find annotation files under `annotations/`, in the folder itself or in folders of splits.

    The images of a split may be in a folder named like the split, in `images/`, in `JPEGImages/` or beside the
    annotation file: the folder that holds most of the first images in the file is used.

    Raises:
        ValueError: Several files could be one split.
    """
    files = {path.relative_to(folder).as_posix(): path for path in (*folder.glob("*.json"), *folder.glob("*/*.json"))}
    splits = {}
    for split, names in SPLIT_NAMES.items():
        if match := _find_split(folder, files, split, names):
            splits[split] = match
    single = [files[path] for path in _SINGLE if path in files]
    if not splits and len(single) > 1:
        raise _ambiguous(folder, [path.relative_to(folder).as_posix() for path in single], "train")
    if not splits and single:
        splits["train"] = Split(single[0], _find_images(folder, single[0], "train"))
    if splits:
        return splits
    return NoMatch(
        f"{', '.join(_ANNOTATIONS)} with train, val, valid or test (a year may follow) as SPLIT, and for "
        f"{', '.join(_SINGLE)}"
    )


def reads(annotations: Path) -> bool:
    """Whether a path ends in `.json`, or is a file that starts like a JSON object."""
    if annotations.suffix.lower() == ".json":
        return True
    try:
        with annotations.open("rb") as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"
    except OSError:
        return False


def content_hash(split: Split) -> str:
    """The hash of the JSON file."""
    return hash_file(split.annotations)


def read(split: Split) -> tuple[Columns, list[Fault]]:
    """The entries of the JSON file that have the right types, and a fault for each of the others.

    Raises:
        OSError: The file cannot be read.
    """
    path = split.annotations
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


def _find_split(folder: Path, files: dict[str, Path], split: str, names: str) -> Split | None:
    for pattern in _ANNOTATIONS:
        expression = re.compile(re.escape(pattern).replace("SPLIT", rf"(?P<name>(?:{names})(?:[-_.]?\d+)*)"))
        matches = [match for match in map(expression.fullmatch, files) if match]
        if len(matches) > 1:
            raise _ambiguous(folder, [match.string for match in matches], split)
        if matches:
            annotations = files[matches[0].string]
            return Split(annotations, _find_images(folder, annotations, matches[0]["name"]))
    return None


def _ambiguous(folder: Path, names: list[str], split: str) -> ValueError:
    return ValueError(
        f"{folder}: each of {', '.join(sorted(names))} could be the {split} split: give the annotation file and the "
        "image folder by their paths"
    )


def _find_images(folder: Path, annotations: Path, name: str) -> Path:
    """The folder that holds most of the first images in the file; without any image, the most specific folder."""
    folders = [folder / place.replace("SPLIT", name) for place in _IMAGES]
    folders = [place for place in (annotations.parent, *folders) if place.is_dir()]
    file_names = _first_file_names(annotations)
    # max returns the first of equals: the most specific folder. If no image exists, the check reports all of them.
    return max(folders[1:] + folders[:1], key=lambda place: sum(_is_file(place, name) for name in file_names))


def _first_file_names(annotations: Path) -> list[str]:
    if annotations.stat().st_size == 0:
        return []
    with annotations.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        quoted = [match[1] for match in islice(_FILE_NAME.finditer(text), _NUM_PROBES)]
    names = []
    for word in quoted:
        try:
            names.append(json.loads(word))
        except ValueError:  # noqa: PERF203, at most 20; the reader reports names that are not valid JSON
            continue
    return names


def _is_file(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except (OSError, ValueError):
        return False


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
