"""Annotations as flat, memory-mapped arrays: parsed once, kept in a cache folder, shared by all processes.

N images, M objects, Q polygons. The objects of an image are contiguous, in the order of the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boxwright.cache import cache_folders
from boxwright.data.dataset import Category, Mask
from boxwright.data.formats.fault import FaultyDataError
from boxwright.data.formats.format import Format, Split
from boxwright.data.formats.reading import Reading, check_columns

# Part of every cache key: increase it when the arrays or the accepted entries change.
_VERSION = 3
_META = "meta.json"

_Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AnnotationIndex:
    """Everything that training needs of a split. Objects without area are left out, boxes are clipped to their image.

    It pickles as the path of its folder, so other processes map the same memory.
    """

    folder: Path
    """Where the arrays lie, one .npy file a field."""
    categories: tuple[Category, ...]
    """By rising id; a label is the position here."""
    dropped: dict[str, int]
    """What training leaves out or changes, counted by what it is."""
    image_ids: _Ints
    """[N] int64."""
    image_sizes: NDArray[np.int32]
    """[N, 2] int32, (height, width) as the annotation file states."""
    file_name_bytes: NDArray[np.uint8]
    """All file names in UTF-8, one after the other."""
    file_name_offsets: _Ints
    """[N + 1] int64, where each file name starts and ends."""
    object_offsets: _Ints
    """[N + 1] int64, the first object of each image and one past its last."""
    boxes: NDArray[np.float32]
    """[M, 4] float32 xyxy in pixels of the file, inside the image."""
    labels: NDArray[np.int32]
    """[M] int32, position in `categories`."""
    crowd: NDArray[np.bool_]
    """[M] bool."""
    areas: NDArray[np.float64]
    """[M] float64, as annotated; that of the annotated box where the file has none."""
    annotation_ids: _Ints
    """[M] int64."""
    segmentation: NDArray[np.int8]
    """[M] int8, 0 no mask, 1 polygons, 2 run lengths."""
    polygon_ranges: _Ints
    """[M, 2] int64, the first polygon of each object and one past its last."""
    point_offsets: _Ints
    """[Q + 1] int64, where each polygon's coordinates start and end in `points`."""
    points: NDArray[np.float32]
    """x, y, x, y, ... of all polygons, float32, pixels of the file."""
    rle_ranges: _Ints
    """[M, 2] int64, where each object's run lengths start and end in `rle_bytes`."""
    rle_bytes: NDArray[np.uint8]
    """Run lengths in COCO's compressed form, whichever form the file has; their size is the image's."""

    def __len__(self) -> int:
        """The number of images."""
        return len(self.image_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_index, (self.folder,)

    def file_name(self, row: int) -> str:
        """The file name of an image, by its row."""
        start, end = self.file_name_offsets[row : row + 2]
        return self.file_name_bytes[start:end].tobytes().decode()

    def objects(self, row: int) -> slice:
        """The rows of an image's objects, by the image's row."""
        start, end = self.object_offsets[row : row + 2]
        return slice(int(start), int(end))

    def polygons(self, object_row: int) -> list[NDArray[np.float32]]:
        """An object's polygons, each [points, 2] float32 (x, y); none unless `segmentation` is 1."""
        first, last = self.polygon_ranges[object_row]
        ends = self.point_offsets[first : last + 1]
        return [self.points[start:end].reshape(-1, 2) for start, end in pairwise(ends)]

    def rle(self, object_row: int) -> bytes:
        """An object's mask in COCO's compressed form; empty unless `segmentation` is 2."""
        start, end = self.rle_ranges[object_row]
        return self.rle_bytes[start:end].tobytes()

    def mask(self, object_row: int) -> Mask:
        """An object's mask, or None where it has none."""
        return self.rle(object_row) or self.polygons(object_row) or None

    @property
    def has_mask(self) -> NDArray[np.bool_]:
        """[M] bool, the objects that have a mask; what crowd regions have is none to learn."""
        lengths = np.diff(self.polygon_ranges)[:, 0] + np.diff(self.rle_ranges)[:, 0]
        return (lengths > 0) & ~self.crowd


_ARRAYS = [field.name for field in fields(AnnotationIndex) if field.name not in ("folder", "categories", "dropped")]


def build_index(form: Format, split: Split, cache_dir: Path | None = None) -> AnnotationIndex:
    """The index of a split, from the cache if it was built before. See `boxwright.data.formats.read_index`."""
    key = hashlib.sha256(f"{_VERSION} {form.name} {form.content_hash(split)}".encode()).hexdigest()[:32]
    # A folder that the user names is the only one: an error there is raised, not worked around.
    folders = [cache_dir] if cache_dir else cache_folders()
    for folder in folders:
        if index := _open_if_whole(folder / "index" / key):
            return index
    reading = check_columns(str(split.annotations), *form.read(split))
    errors = [fault for fault in reading.faults if fault.severity == "error"]
    if errors:
        raise FaultyDataError(errors)
    for folder in folders[:-1]:
        with contextlib.suppress(OSError):  # read-only or full: try the next
            return _write_index(reading, folder / "index" / key)
    return _write_index(reading, folders[-1] / "index" / key)


def open_index(folder: Path) -> AnnotationIndex:
    """Map an index on disk.

    Raises:
        OSError: It is not there.
        ValueError: It is damaged.
        EOFError: It is damaged.
    """
    meta = json.loads((folder / _META).read_text("utf-8"))
    return AnnotationIndex(
        folder=folder,
        categories=tuple(Category(category["id"], category["name"]) for category in meta["categories"]),
        dropped=meta["dropped"],
        **{name: _map_array(folder / f"{name}.npy") for name in _ARRAYS},
    )


def _open_if_whole(folder: Path) -> AnnotationIndex | None:
    try:
        return open_index(folder)
    except Exception:  # whatever a damaged index raises: the annotations are read again
        return None


def _map_array(path: Path) -> NDArray[Any]:
    # A file without elements cannot be mapped.
    array = np.load(path, allow_pickle=False, mmap_mode="r" if path.stat().st_size > 128 else None)
    assert isinstance(array, np.ndarray)
    return array


def _write_index(reading: Reading, folder: Path) -> AnnotationIndex:
    """Write the index under a temporary name and rename it when complete: two processes may do so at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name in _ARRAYS:
            np.save(draft / f"{name}.npy", reading.arrays[name], allow_pickle=False)
        categories = [{"id": category.id, "name": category.name} for category in reading.categories]
        meta = {"categories": categories, "dropped": reading.dropped}
        (draft / _META).write_text(json.dumps(meta), "utf-8")
        try:
            draft.rename(folder)
        except OSError:
            # Another process was faster, or a damaged index exists under this name.
            if index := _open_if_whole(folder):
                return index
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return open_index(folder)
