"""COCO: one JSON file per split, with the lists images, annotations and categories.

Each image, annotation and category is checked against a schema separately, so that one pass finds all faults.
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

# SPLIT stands for the name of a split, optionally followed by a year. The first pattern that matches is used.
_ANNOTATIONS = (
    "annotations/instances_SPLIT.json",
    "annotations/SPLIT.json",
    "instances_SPLIT.json",
    "SPLIT.json",
    "SPLIT/_annotations.coco.json",
    "SPLIT/annotations.json",
    "SPLIT/instances.json",
)
# Annotation files of a data set without splits, which becomes the training split.
_SINGLE = (
    "annotations/instances.json",
    "annotations/annotations.json",
    "_annotations.coco.json",
    "annotations.json",
    "instances.json",
)
_IMAGES = ("SPLIT", "images/SPLIT", "SPLIT/images", "images", "JPEGImages", ".")
# Finds file names without parsing the whole annotation file.
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
# Number of file names that are looked up to choose the image folder.
_NUM_PROBES = 20
# JSON allows lone surrogates, but they cannot be written as UTF-8.
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
    """Find annotation files in `annotations/`, in the folder itself and in folders named like a split.

    The images of a split may be in a folder named like the split, in `images/`, in `JPEGImages/` or beside the
    annotation file. The folder that contains the largest number of the first 20 images in the file is used.

    Raises:
        ValueError: Several files match the same split.
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
        f"{', '.join(_ANNOTATIONS)}, where SPLIT is train, val, valid or test, optionally followed by a year, and "
        f"for {', '.join(_SINGLE)}"
    )


def reads(annotations: Path) -> bool:
    """Whether the file name ends in `.json`, or the content starts like a JSON object."""
    if annotations.suffix.lower() == ".json":
        return True
    try:
        with annotations.open("rb") as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"
    except OSError:
        return False


def content_hash(split: Split) -> str:
    """Hash of the JSON file."""
    return hash_file(split.annotations)


def read(split: Split) -> tuple[Columns, list[Fault]]:
    """Read the JSON file of a split.

    Returns:
        The entries that match the schema, and at least one fault for each other entry.

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
            what, fix = f"`file_name` {image.file_name!a} is not valid Unicode", "Write the name of the image file"
            faults.append(Fault(str(path), f"image {image.id}", what, fix))
            columns.refused_images.add(image.id)
            continue
        columns.image_ids.append(image.id)
        columns.image_sizes.extend((image.height, image.width))
        columns.file_names.append(image.file_name)
    for category in _entries(path, "category", file.categories, _Category, faults, columns.refused_categories):
        if _LONE_SURROGATE.search(category.name):
            what = f"`name` {category.name!a} is not valid Unicode"
            faults.append(Fault(str(path), f"category {category.id}", what, "Correct the name"))
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
        f"{folder}: several files match the {split} split: {', '.join(sorted(names))}. Use the paths of the "
        "annotation file and the image folder"
    )


def _find_images(folder: Path, annotations: Path, name: str) -> Path:
    """The folder that contains the largest number of the first images in the file; for a tie, the most specific one."""
    folders = [folder / place.replace("SPLIT", name) for place in _IMAGES]
    folders = [place for place in (annotations.parent, *folders) if place.is_dir()]
    file_names = _first_file_names(annotations)
    # `max` returns the first maximum, which is the most specific folder. Missing images are reported later.
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
        except ValueError:  # noqa: PERF203 (at most 20 names; `read` reports invalid ones)
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
        # The json module is slower, but it reads the NaN and Infinity that json.dump writes, so that the faults can
        # name the objects that contain them. It also reports the line and column of a syntax error.
        try:
            return msgspec.convert(json.loads(data), _TolerantFile)
        except RecursionError:
            raise ValueError("nested too deeply") from error


def _file_fault(path: Path, error: ValueError) -> Fault:
    if isinstance(error, json.JSONDecodeError):
        if not error.doc[error.pos :].strip() or "Unterminated" in error.msg:
            return Fault(str(path), "file", f"the JSON is truncated: {error}", "Copy or export the file again")
        return Fault(str(path), "file", f"not valid JSON: {error}", "Correct the file, or export it again")
    if isinstance(error, msgspec.ValidationError):
        fix = "Use a JSON object with the lists images, annotations and categories. A COCO results file cannot be used"
        return Fault(str(path), "file", f"not COCO annotations: {error}", fix)
    return Fault(str(path), "file", f"not valid JSON: {error}", "Export the file again as UTF-8 JSON")


def _entries(
    path: Path, noun: str, entries: Sequence[Any], kind: type[_Entry], faults: list[Fault], refused: set[int]
) -> Iterator[_Entry]:
    """Yield the entries that match the schema. For other entries, add faults to `faults` and the id to `refused`."""
    decode = msgspec.json.Decoder(kind).decode

    def convert(entry: Any) -> _Entry:
        return msgspec.convert(entry, kind)

    read: Callable[[Any], _Entry] = decode if entries and isinstance(entries[0], msgspec.Raw) else convert
    for position, entry in enumerate(entries):
        try:
            result = read(entry)
        except ValueError as error:  # noqa: PERF203 (each entry is checked separately)
            field_faults = list(_entry_faults(path, noun, position, entry, kind))
            # No field fault: for example 1e400, which the json module reads as infinity, a valid float.
            entry_fault = Fault(str(path), f"{noun} number {position + 1} of the file", str(error), "Correct the entry")
            faults += field_faults or [entry_fault]
            refused.update(_integer_ids(entry))
        else:
            yield result


def _integer_ids(entry: Any) -> Iterator[int]:
    """The id of an entry, if it is an integer."""
    with contextlib.suppress(ValueError):
        entry = json.loads(bytes(entry)) if isinstance(entry, msgspec.Raw) else entry
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            yield entry["id"]


def _entry_faults(path: Path, noun: str, position: int, entry: Any, kind: type[Struct]) -> Iterator[Fault]:
    """A fault for each field that does not match the schema."""
    place = f"{noun} number {position + 1} of the file"
    if isinstance(entry, msgspec.Raw):
        try:
            entry = json.loads(bytes(entry))
        except ValueError as error:
            yield Fault(str(path), place, f"cannot be read: {error}", "Export the file again as UTF-8 JSON")
            return
    if not isinstance(entry, dict):
        what = f"expected a JSON object, got {json.dumps(entry)[:40]}"
        yield Fault(str(path), place, what, "Correct or remove the entry")
        return
    name = f"{noun} {json.dumps(entry['id'])}" if "id" in entry else place
    for known in msgspec.structs.fields(kind):
        if known.name not in entry:
            if known.required:
                yield Fault(str(path), name, f"`{known.name}` is missing", f"Add `{known.name}`")
            continue
        try:
            msgspec.convert(entry[known.name], known.type)
        except ValueError as error:
            where = re.search(r" - at `\$(.*)`$", str(error))
            inner = where.group(1) if where else ""
            problem = str(error)[: where.start()] if where else str(error)
            value = json.dumps(entry[known.name])
            value = value if len(value) <= 40 else value[:40] + "..."
            what = f"`{known.name}{inner}`: {problem} ({known.name} is {value})"
            yield Fault(str(path), name, what, _fix(problem))


def _fix(problem: str) -> str:
    """How to fix a field, from the message of msgspec."""
    if "Expected `int`, got" in problem:
        return "Write an integer without quotes, decimal point or exponent"
    if "Expected `int` >= 0" in problem or f"<= {2**53}" in problem:
        return "Use ids from 0 to 2^53, also where annotations refer to them"
    if "Expected `float`, got" in problem:
        return "Write a number without quotes"
    if "length" in problem:
        return "`bbox` is [x, y, width, height], `segmentation.size` is [height, width], and names are not empty"
    return "Write the field as the COCO format defines it"
