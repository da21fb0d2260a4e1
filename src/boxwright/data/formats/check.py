"""Finds everything that is wrong with a data set in one pass: annotations, file names and image files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

from boxwright.data.decode import MAX_PIXELS, decode_image
from boxwright.data.formats import read_annotations
from boxwright.data.formats.fault import Fault


def check(
    annotations: Path,
    images: Path,
    *,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Fault]:
    """Find all faults of a data set. Every image is decoded.

    Args:
        annotations: The split's annotations, in any of `formats`.
        images: The image folder; file names are relative to it.
        max_pixels: An image with more pixels is a fault.
        progress: Called with the number of images checked so far, and the number of images.

    Raises:
        OSError: The annotations or the image folder cannot be read.
        ValueError: The annotations are in no known format, or there is no such image folder.
    """
    reading = read_annotations(annotations, images)
    sizes = reading.arrays["image_sizes"].tolist()
    ids = reading.arrays["image_ids"].tolist()
    name_faults = file_faults(images, reading.file_names, ids)
    readable = [row for row in range(len(ids)) if row not in name_faults]

    def check_picture(row: int) -> Fault | None:
        return _picture_fault(images / reading.file_names[row], ids[row], tuple(sizes[row]), max_pixels)

    picture_faults = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, fault in enumerate(pool.map(check_picture, readable), 1):
            if fault:
                picture_faults.append(fault)
            if progress:
                progress(done, len(readable))
    return [*reading.faults, *name_faults.values(), *picture_faults]


def file_faults(folder: Path, file_names: Sequence[str], image_ids: Sequence[int]) -> dict[int, Fault]:
    """Images whose file is not there or lies outside the folder, by their row; reads directories, no files.

    Raises:
        ValueError: The folder is not there.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such image folder: give the one that the file names start from")
    rows_of_parent: dict[str, list[int]] = {}
    faults = {}
    for row, name in enumerate(file_names):
        path = PurePath(name)
        if path.is_absolute() or path.drive or ".." in path.parts or "\0" in name:
            what = f"its file name {name!r} leaves the image folder"
            mend = "give it relative to the image folder, without .."
            faults[row] = Fault(str(folder), f"image {image_ids[row]}", what, mend)
        else:
            rows_of_parent.setdefault(name.rpartition("/")[0], []).append(row)
    for parent, rows in rows_of_parent.items():
        links = _list_folder(folder / parent)
        leaves = not lies_within(folder / parent, folder)
        for row in rows:
            name = file_names[row]
            base = name.rpartition("/")[2]
            # A link that leads nowhere is a file that is not there.
            if base not in links or (links[base] and not os.path.exists(folder / name)):  # noqa: PTH110, never raises
                hint = "; folders are parted by /, not by a backslash" if "\\" in name else ""
                what, mend = "is missing", f"add the file, correct `file_name`, or remove the image{hint}"
            elif leaves or (links[base] and not lies_within(folder / name, folder)):
                what = "is a link that leaves the image folder"
                mend = "copy the file here, or give the folder that holds both as the image folder"
            else:
                continue
            faults[row] = Fault(str(folder / name), f"image {image_ids[row]}", what, mend)
    return dict(sorted(faults.items()))


def size_fault(path: Path, image_id: int, stated: tuple[int, int], found: tuple[int, int]) -> Fault:
    """The fault of a picture whose (height, width) is not what the annotation file states."""
    what = "its file holds {} x {} pixels, the annotation file states {} x {}".format(*found[::-1], *stated[::-1])
    mend = "correct `width` and `height`, or put the right file there"
    if stated == found[::-1]:
        mend += "; if EXIF orientation turns it, the boxes must fit the upright picture"
    return Fault(str(path), f"image {image_id}", what, mend)


def decode_fault(path: Path, image_id: int, error: ValueError) -> Fault:
    """The fault of a picture that `decode_image` refuses."""
    what = str(error).removeprefix(f"{path}: ")
    return Fault(str(path), f"image {image_id}", what, "replace the file, or remove the image")


def _list_folder(folder: Path) -> dict[str, bool]:
    """Whether it is a link, for each name in a folder; empty if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries}
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return {}
        raise


def lies_within(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, after all links are followed."""
    # Path.resolve would raise for links in a circle.
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _picture_fault(path: Path, image_id: int, stated: tuple[int, int], max_pixels: int) -> Fault | None:
    try:
        found = decode_image(path, max_pixels=max_pixels).shape[:2]
    except ValueError as error:
        return decode_fault(path, image_id, error)
    return size_fault(path, image_id, stated, found) if found != stated else None
