"""The annotation index: flat arrays that are built once, cached on disk, and memory-mapped by all processes.

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

# Part of every cache key. Increase it when the arrays or the accepted entries change.
_VERSION = 3
_META = "meta.json"

_Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AnnotationIndex:
    """Annotations of a split, without objects that have no area inside their image; boxes are clipped to the image.

    An index is pickled as the path of its folder, so that all processes map the same memory.
    """

    folder: Path
    """Folder of the arrays, one .npy file per field."""
    categories: tuple[Category, ...]
    """Categories sorted by id; a label is an index into this tuple."""
    dropped: dict[str, int]
    """Number of annotations that training ignores or clips, by kind of fault."""
    image_ids: _Ints
    """[N] int64."""
    image_sizes: NDArray[np.int32]
    """[N, 2] int32, (height, width) from the annotations."""
    file_name_bytes: NDArray[np.uint8]
    """All file names in UTF-8, concatenated."""
    file_name_offsets: _Ints
    """[N + 1] int64, start of each file name in `file_name_bytes`, and the total length at the end."""
    object_offsets: _Ints
    """[N + 1] int64, index of the first object of each image, and M at the end."""
    boxes: NDArray[np.float32]
    """[M, 4] float32 xyxy in pixels of the file, inside the image."""
    labels: NDArray[np.int32]
    """[M] int32, indices into `categories`."""
    crowd: NDArray[np.bool_]
    """[M] bool, crowd regions."""
    areas: NDArray[np.float64]
    """[M] float64, `area` of the annotations; for an annotation without it, the area of its box before clipping."""
    annotation_ids: _Ints
    """[M] int64."""
    segmentation: NDArray[np.int8]
    """[M] int8, 0 for no mask, 1 for polygons, 2 for run lengths."""
    polygon_ranges: _Ints
    """[M, 2] int64, index of the first polygon of each object, and one past the last."""
    point_offsets: _Ints
    """[Q + 1] int64, start of each polygon in `points`, and the total length at the end."""
    points: NDArray[np.float32]
    """float32, coordinates x, y, x, y, ... of all polygons in pixels of the file."""
    rle_ranges: _Ints
    """[M, 2] int64, start and end of the run lengths of each object in `rle_bytes`."""
    rle_bytes: NDArray[np.uint8]
    """Run lengths in COCO's compressed form (converted if necessary). Each mask has the size of its image."""

    def __len__(self) -> int:
        """The number of images."""
        return len(self.image_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_index, (self.folder,)

    def file_name(self, row: int) -> str:
        """File name of the image in a row."""
        start, end = self.file_name_offsets[row : row + 2]
        return self.file_name_bytes[start:end].tobytes().decode()

    def objects(self, row: int) -> slice:
        """Rows of the objects of the image in a row."""
        start, end = self.object_offsets[row : row + 2]
        return slice(int(start), int(end))

    def polygons(self, object_row: int) -> list[NDArray[np.float32]]:
        """Polygons of an object, each [points, 2] float32 (x, y); empty unless `segmentation` is 1."""
        first, last = self.polygon_ranges[object_row]
        ends = self.point_offsets[first : last + 1]
        return [self.points[start:end].reshape(-1, 2) for start, end in pairwise(ends)]

    def rle(self, object_row: int) -> bytes:
        """Run lengths of an object in COCO's compressed form; empty unless `segmentation` is 2."""
        start, end = self.rle_ranges[object_row]
        return self.rle_bytes[start:end].tobytes()

    def mask(self, object_row: int) -> Mask:
        """Mask of an object, or None for an object without a mask."""
        return self.rle(object_row) or self.polygons(object_row) or None

    @property
    def has_mask(self) -> NDArray[np.bool_]:
        """[M] bool, objects that have a mask to train on, which crowd regions never have."""
        lengths = np.diff(self.polygon_ranges)[:, 0] + np.diff(self.rle_ranges)[:, 0]
        return (lengths > 0) & ~self.crowd


_ARRAYS = [field.name for field in fields(AnnotationIndex) if field.name not in ("folder", "categories", "dropped")]


def build_index(form: Format, split: Split, cache_dir: Path | None = None) -> AnnotationIndex:
    """The annotation index of a split, from the cache or newly built. See `boxwright.data.formats.read_index`."""
    key = hashlib.sha256(f"{_VERSION} {form.name} {form.content_hash(split)}".encode()).hexdigest()[:32]
    # For a folder that the user selected, there is no fallback: if it cannot be written, the error is raised.
    folders = [cache_dir] if cache_dir else cache_folders()
    for folder in folders:
        if index := _open_if_whole(folder / "index" / key):
            return index
    reading = check_columns(str(split.annotations), *form.read(split))
    errors = [fault for fault in reading.faults if fault.severity == "error"]
    if errors:
        raise FaultyDataError(errors)
    for folder in folders[:-1]:
        with contextlib.suppress(OSError):  # read-only or full: try the next folder
            return _write_index(reading, folder / "index" / key)
    return _write_index(reading, folders[-1] / "index" / key)


def open_index(folder: Path) -> AnnotationIndex:
    """Open an index on disk and memory-map its arrays.

    Raises:
        OSError: The index is missing or incomplete.
        ValueError: The index is damaged.
        EOFError: The index is damaged.
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
    except Exception:  # any error of a damaged index: build it again
        return None


def _map_array(path: Path) -> NDArray[Any]:
    # An array without elements cannot be memory-mapped; its file has only a header of 128 bytes.
    array = np.load(path, allow_pickle=False, mmap_mode="r" if path.stat().st_size > 128 else None)
    assert isinstance(array, np.ndarray)
    return array


def _write_index(reading: Reading, folder: Path) -> AnnotationIndex:
    """Write an index under a temporary name, then rename it: several processes may build it at the same time."""
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
            # Another process finished first, or a damaged index has this name.
            if index := _open_if_whole(folder):
                return index
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return open_index(folder)
