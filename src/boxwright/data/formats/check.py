"""Check a data set in one pass: annotations, file names and image files."""

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
    """Find all faults of a split. Every image is decoded.

    Args:
        annotations: Annotations of the split, in any of `formats`.
        images: Image folder; file names are relative to it.
        max_pixels: Maximum number of pixels per image; a larger image is a fault.
        progress: Called after each image with the number of checked images and the number of all images.

    Raises:
        OSError: The annotations or the image folder cannot be read.
        ValueError: The annotations are not in a known format, or the image folder does not exist.
    """
    reading = read_annotations(annotations, images)
    sizes = reading.arrays["image_sizes"].tolist()
    ids = reading.arrays["image_ids"].tolist()
    name_faults = file_faults(images, reading.file_names, ids)
    readable = [row for row in range(len(ids)) if row not in name_faults]

    def check_image(row: int) -> Fault | None:
        return _image_fault(images / reading.file_names[row], ids[row], tuple(sizes[row]), max_pixels)

    image_faults = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, fault in enumerate(pool.map(check_image, readable), 1):
            if fault:
                image_faults.append(fault)
            if progress:
                progress(done, len(readable))
    return [*reading.faults, *name_faults.values(), *image_faults]


def file_faults(folder: Path, file_names: Sequence[str], image_ids: Sequence[int]) -> dict[int, Fault]:
    """Find images whose file is missing or outside the image folder. Lists directories; does not open files.

    Returns:
        Faults by the row of the image in `file_names`.

    Raises:
        ValueError: The image folder does not exist.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: there is no such image folder. Use the folder to which the file names in the annotations are "
            "relative"
        )
    rows_of_parent: dict[str, list[int]] = {}
    faults = {}
    for row, name in enumerate(file_names):
        path = PurePath(name)
        if path.is_absolute() or path.drive or ".." in path.parts or "\0" in name:
            what = f"the file name {name!r} leads out of the image folder"
            fix = "Write a path relative to the image folder, without .."
            faults[row] = Fault(str(folder), f"image {image_ids[row]}", what, fix)
        else:
            rows_of_parent.setdefault(name.rpartition("/")[0], []).append(row)
    for parent, rows in rows_of_parent.items():
        links = _list_folder(folder / parent)
        parent_leaves = not lies_within(folder / parent, folder)
        for row in rows:
            name = file_names[row]
            base = name.rpartition("/")[2]
            # A broken link counts as a missing file.
            if base not in links or (links[base] and not os.path.exists(folder / name)):  # noqa: PTH110 (never raises)
                hint = ". Separate folders by / instead of a backslash" if "\\" in name else ""
                what, fix = "the file is missing", f"Add the file, correct `file_name`, or remove the image{hint}"
            elif parent_leaves or (links[base] and not lies_within(folder / name, folder)):
                what = "the file is a link that leads out of the image folder"
                fix = "Copy the file into the image folder, or use an image folder that contains both link and file"
            else:
                continue
            faults[row] = Fault(str(folder / name), f"image {image_ids[row]}", what, fix)
    return dict(sorted(faults.items()))


def size_fault(path: Path, image_id: int, stated: tuple[int, int], actual: tuple[int, int]) -> Fault:
    """The fault of an image whose (height, width) differs from the annotations."""
    what = "the file has {} x {} pixels, the annotations state {} x {}".format(*actual[::-1], *stated[::-1])
    fix = "Correct `width` and `height`, or replace the file"
    if stated == actual[::-1]:
        fix += ". If the file has an EXIF orientation, size and boxes must match the upright image"
    return Fault(str(path), f"image {image_id}", what, fix)


def decode_fault(path: Path, image_id: int, error: ValueError) -> Fault:
    """The fault of an image that `decode_image` cannot decode."""
    what = str(error).removeprefix(f"{path}: ")
    return Fault(str(path), f"image {image_id}", what, "Replace the file, or remove the image")


def _list_folder(folder: Path) -> dict[str, bool]:
    """For each entry of a folder, whether it is a link; empty if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries}
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return {}
        raise


def lies_within(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or is inside it, after following all links."""
    # Path.resolve raises for a loop of links.
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _image_fault(path: Path, image_id: int, stated: tuple[int, int], max_pixels: int) -> Fault | None:
    try:
        actual = decode_image(path, max_pixels=max_pixels).shape[:2]
    except ValueError as error:
        return decode_fault(path, image_id, error)
    return size_fault(path, image_id, stated, actual) if actual != stated else None
