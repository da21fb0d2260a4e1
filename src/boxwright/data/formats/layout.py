"""Finds the annotation files and image folders of a data set by the names that people usually give them."""

from __future__ import annotations

import json
import mmap
import re
from itertools import islice
from pathlib import Path
from typing import NamedTuple


class Split(NamedTuple):
    """One part of a data set."""

    annotations: Path
    """The COCO JSON file, or the list of a VOC split's pictures."""
    images: Path
    """The folder that its file names start from."""


_SPLITS = {"train": "train|training", "val": "val|valid|validation", "test": "test|testing"}
# SPLIT is a split's name, perhaps with a year behind it. The first pattern that finds something wins.
_ANNOTATIONS = (
    "annotations/instances_SPLIT.json",
    "annotations/SPLIT.json",
    "instances_SPLIT.json",
    "SPLIT.json",
    "SPLIT/_annotations.coco.json",
    "SPLIT/annotations.json",
    "SPLIT/instances.json",
)
# A data set in one piece, which is taken as the training split.
_SINGLE = (
    "annotations/instances.json",
    "annotations/annotations.json",
    "_annotations.coco.json",
    "annotations.json",
    "instances.json",
)
# Where none of these is there. VOC's `trainval` overlaps the splits beside it: it is taken only where it stands alone.
_VOC_LISTS = "ImageSets/Main/SPLIT.txt"
_IMAGES = ("SPLIT", "images/SPLIT", "SPLIT/images", "images", "JPEGImages", ".")

_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')
_NUM_PROBES = 20


def find_layout(folder: Path) -> dict[str, Split]:
    """The splits of the COCO or VOC data set in a folder: of "train", "val" and "test" those that are there.

    Annotation files may lie under `annotations/`, in the folder itself, or beside the images; images in a folder named
    like the split, under `images/`, in `JPEGImages/`, or beside the annotation file. Where there are none, VOC's lists
    `ImageSets/Main/SPLIT.txt` are taken, with pictures in `JPEGImages/` (`voc` says what else belongs to them).

    Raises:
        ValueError: There is no such folder, nothing is recognised (the message says what was looked for), or several
            files could be one split.
    """
    if not folder.is_dir():
        what = "it is a file: give its folder, or it and its image folder by their paths"
        raise ValueError(f"{folder}: {what if folder.exists() else 'there is no such folder'}")
    files = {path.relative_to(folder).as_posix(): path for path in (*folder.glob("*.json"), *folder.glob("*/*.json"))}
    layout = {}
    for split, names in _SPLITS.items():
        if found := _find_split(folder, files, split, names):
            layout[split] = found
    single = [files[name] for name in _SINGLE if name in files]
    if not layout and len(single) > 1:
        raise _ambiguous(folder, [path.relative_to(folder).as_posix() for path in single], "train")
    if not layout and single:
        layout["train"] = Split(single[0], _find_images(folder, single[0], "train"))
    layout = layout or _find_voc(folder)
    if not layout:
        raise ValueError(
            f"{folder}: no COCO or VOC data set was recognised. Looked for {', '.join(_ANNOTATIONS)} with train, "
            f"val, valid or test (a year may follow) as SPLIT, for {', '.join(_SINGLE)}, and for {_VOC_LISTS} with "
            "train, val, test or trainval. Rename the files, or give the annotation file and the image folder by their "
            "paths"
        )
    return layout


def _find_split(folder: Path, files: dict[str, Path], split: str, names: str) -> Split | None:
    for pattern in _ANNOTATIONS:
        wanted = re.compile(re.escape(pattern).replace("SPLIT", rf"(?P<name>(?:{names})(?:[-_.]?\d+)*)"))
        found = [match for match in map(wanted.fullmatch, files) if match]
        if len(found) > 1:
            raise _ambiguous(folder, [match.string for match in found], split)
        if found:
            annotations = files[found[0].string]
            return Split(annotations, _find_images(folder, annotations, found[0]["name"]))
    return None


def _find_voc(folder: Path) -> dict[str, Split]:
    lists = {split: folder / _VOC_LISTS.replace("SPLIT", split) for split in (*_SPLITS, "trainval")}
    there = {split: path for split, path in lists.items() if path.is_file()}
    trainval = there.pop("trainval", None)
    if trainval and not there.keys() & {"train", "val"}:
        there["train"] = trainval
    return {split: Split(there[split], folder / "JPEGImages") for split in _SPLITS if split in there}


def _ambiguous(folder: Path, names: list[str], split: str) -> ValueError:
    return ValueError(
        f"{folder}: each of {', '.join(sorted(names))} could be the {split} split: give the annotation file and the "
        "image folder by their paths"
    )


def _find_images(folder: Path, annotations: Path, name: str) -> Path:
    """The folder that holds the first images of the annotation file, or else the first folder that could."""
    folders = [folder / place.replace("SPLIT", name) for place in _IMAGES]
    folders = [place for place in (annotations.parent, *folders) if place.is_dir()]
    file_names = _first_file_names(annotations)
    # max takes the first of equals, so the more special folder; where no image is found, the check will name them all.
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
        except ValueError:  # noqa: PERF203, at most 20; a name that is no JSON is the check's to report
            continue
    return names


def _is_file(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except (OSError, ValueError):
        return False
