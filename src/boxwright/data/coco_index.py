"""Annotations as flat, memory-mapped arrays: parsed once, kept in a cache folder, shared by all that read them.

N images, M objects, Q polygons. The objects of an image lie together, in the file's order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boxwright.cache import cache_folders
from boxwright.data import voc
from boxwright.data.coco_json import RLE, Columns, read_json
from boxwright.data.dataset import Category, Mask
from boxwright.data.fault import Fault, FaultyDataError

# Part of every cache key: raise it when the arrays or what is accepted change.
_VERSION = 2
_META = "meta.json"
# Annotators round: a box may stick out of its image by this many pixels without a word.
_ROUNDING = 1.0

_Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CocoIndex:
    """All that training needs of an annotation file: objects without area are left out, others cut to their image.

    Pickles as the path of its folder: other processes map the same memory.
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


_ARRAYS = [field.name for field in fields(CocoIndex) if field.name not in ("folder", "categories", "dropped")]


@dataclass
class Reading:
    """An annotation file as read: what is sound in it, and the faults of the rest."""

    categories: list[Category]
    dropped: dict[str, int]
    file_names: list[str]
    arrays: dict[str, NDArray[Any]]
    faults: list[Fault]


def read_index(annotations: Path, cache_dir: Path | None = None) -> CocoIndex:
    """The index of a split, from the cache where it was read before.

    Args:
        annotations: COCO's JSON file, or the list of a VOC split's pictures (see `voc`).
        cache_dir: Where indexes are kept, by the hash of what they were read from. By default `BOXWRIGHT_CACHE`, else
            the user's cache folder, else (when that cannot be written) the temporary folder.

    Raises:
        FaultyDataError: The file holds something that would corrupt training.
        OSError: The file cannot be read, or no index can be written anywhere.
    """
    key = f"{content_hash(annotations)}-{_VERSION}"
    # A given folder is meant: a fault there is told, not worked around.
    folders = [cache_dir] if cache_dir else cache_folders()
    for folder in folders:
        if index := _open_if_whole(folder / "index" / key):
            return index
    reading = read_annotations(annotations)
    errors = [fault for fault in reading.faults if fault.severity == "error"]
    if errors:
        raise FaultyDataError(errors)
    for folder in folders[:-1]:
        with contextlib.suppress(OSError):  # read-only or full: try the next
            return _write_index(reading, folder / "index" / key)
    return _write_index(reading, folders[-1] / "index" / key)


def open_index(folder: Path) -> CocoIndex:
    """Map an index that is on disk.

    Raises:
        OSError: It is not there.
        ValueError: It is damaged.
        EOFError: It is damaged.
    """
    meta = json.loads((folder / _META).read_text("utf-8"))
    return CocoIndex(
        folder=folder,
        categories=tuple(Category(category["id"], category["name"]) for category in meta["categories"]),
        dropped=meta["dropped"],
        **{name: _map_array(folder / f"{name}.npy") for name in _ARRAYS},
    )


def read_annotations(annotations: Path) -> Reading:
    """Read and check an annotation file without the cache: what is sound in it, and every fault of it.

    Raises:
        OSError: The file cannot be read.
    """
    columns, faults = read_columns(annotations)
    return _Checker(str(annotations), columns, faults).run()


def read_columns(annotations: Path) -> tuple[Columns, list[Fault]]:
    """What is well-typed in a split's annotations, in either format, and the faults of the rest.

    Raises:
        OSError: A file cannot be read.
        ValueError: VOC's folders are not where they belong.
    """
    return voc.read_image_set(annotations) if voc.is_image_set(annotations) else read_json(annotations)


def _open_if_whole(folder: Path) -> CocoIndex | None:
    try:
        return open_index(folder)
    except Exception:  # whatever a damaged index makes of it: it is read anew
        return None


def _map_array(path: Path) -> NDArray[Any]:
    # A file without elements cannot be mapped.
    array = np.load(path, allow_pickle=False, mmap_mode="r" if path.stat().st_size > 128 else None)
    assert isinstance(array, np.ndarray)
    return array


def content_hash(path: Path) -> str:
    """What a file holds, in 32 letters."""
    # Half a second for COCO's 448 MB, so that no stale index is ever taken for a file that was edited.
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    if voc.is_image_set(path):
        for source in voc.source_files(path):
            content = source.read_bytes()
            digest.update(f"{source.name}\0{len(content)}\0".encode("utf-8", "surrogateescape") + content)
        return digest.hexdigest()[:32]
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()[:32]


def _write_index(reading: Reading, folder: Path) -> CocoIndex:
    """Write the index under another name and rename it when it is whole: two processes may do so at once."""
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
            # Another process was quicker, or a damaged index is in the way.
            if index := _open_if_whole(folder):
                return index
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return open_index(folder)


class _Checker:
    """Checks columns against each other and makes the index's arrays of what is sound."""

    def __init__(self, file: str, columns: Columns, faults: list[Fault]) -> None:
        self.file = file
        self.columns = columns
        self.faults = faults
        self.dropped: Counter[str] = Counter()

    def run(self) -> Reading:
        columns = self.columns
        broken_polygons = sum(fault.severity == "dropped" for fault in self.faults)
        if broken_polygons:
            self.dropped["polygons with fewer than three points"] = broken_polygons
        image_ids = np.asarray(columns.image_ids)
        category_ids = np.asarray(columns.category_ids)
        if not self.faults:
            if not len(image_ids):
                self._add("file", "it has no images", "add what `images` should hold")
            if not len(category_ids):
                self._add("file", "it has no categories", "add what `categories` should hold")
        self._duplicates("image", image_ids)
        self._duplicates("category", category_ids)
        self._duplicates("annotation", np.asarray(columns.annotation_ids))
        sizes = np.asarray(columns.image_sizes).reshape(-1, 2)
        images, image_known = _find(np.asarray(columns.annotation_images), image_ids)
        labels, category_known = _find(np.asarray(columns.annotation_categories), np.sort(category_ids))
        for row in np.flatnonzero(~image_known).tolist():
            self._unknown(row, "image", columns.annotation_images[row], columns.refused_images)
        for row in np.flatnonzero(~category_known).tolist():
            self._unknown(row, "category", columns.annotation_categories[row], columns.refused_categories)
        finite = self._finite()
        self._mask_sizes(images, sizes, image_known)
        sound = image_known & category_known & finite
        boxes, has_area = self._boxes(images, sizes, sound)
        rows = np.flatnonzero(sound & has_area)
        rows = rows[np.argsort(images[rows], kind="stable")]
        names = [name.encode() for name in columns.file_names]
        order = np.argsort(category_ids)
        polygon_ends, rle_ends = np.asarray(columns.polygon_ends), np.asarray(columns.rle_ends)
        arrays: dict[str, NDArray[Any]] = {
            "image_ids": image_ids,
            "image_sizes": sizes.astype(np.int32),
            "file_name_bytes": np.frombuffer(b"".join(names), np.uint8),
            "file_name_offsets": _offsets([len(name) for name in names]),
            "object_offsets": _offsets(np.bincount(images[rows], minlength=len(image_ids))),
            "boxes": boxes[rows],
            "labels": labels[rows].astype(np.int32),
            "crowd": np.asarray(columns.crowd).astype(bool)[rows],
            "areas": np.asarray(columns.areas)[rows],
            "annotation_ids": np.asarray(columns.annotation_ids)[rows],
            "segmentation": np.asarray(columns.segmentation)[rows],
            "polygon_ranges": np.column_stack([polygon_ends - np.diff(polygon_ends, prepend=0), polygon_ends])[rows],
            "point_offsets": np.concatenate([[0], np.asarray(columns.point_ends)]),
            "points": np.asarray(columns.points),
            "rle_ranges": np.column_stack([rle_ends - np.diff(rle_ends, prepend=0), rle_ends])[rows],
            "rle_bytes": np.frombuffer(bytes(columns.rle_characters), np.uint8),
        }
        categories = [Category(columns.category_ids[place], columns.category_names[place]) for place in order]
        return Reading(categories, dict(self.dropped), columns.file_names, arrays, self.faults)

    def _add(self, place: str, what: str, mend: str, severity: Any = "error") -> None:
        self.faults.append(Fault(self.file, place, what, mend, severity))

    def _blame(self, row: int, what: str, mend: str, severity: Any = "error") -> None:
        """Add a fault of an annotation."""
        columns = self.columns
        file, place = self.file, f"annotation {columns.annotation_ids[row]} (image {columns.annotation_images[row]})"
        if columns.places:
            file, place = columns.places[row]
        self.faults.append(Fault(file, place, what, mend, severity))

    def _duplicates(self, noun: str, ids: _Ints) -> None:
        values, counts = np.unique(ids, return_counts=True)
        for value, count in zip(values[counts > 1], counts[counts > 1], strict=True):
            self._add(f"{noun} {value}", f"{count} of them have this id", "give each its own")

    def _unknown(self, row: int, noun: str, value: int, refused: set[int]) -> None:
        if value in refused:  # it is there, and its own fault is told
            return
        self._blame(row, f"there is no {noun} with the id {value}", f"correct `{noun}_id`, or add the {noun}")

    def _finite(self) -> NDArray[np.bool_]:
        """Which annotations hold neither NaN nor infinity."""
        columns = self.columns
        num_polygons = np.asarray(columns.polygon_ends)
        bad_points = np.flatnonzero(~np.isfinite(np.asarray(columns.points)))
        bad_polygons = np.searchsorted(np.asarray(columns.point_ends), bad_points, side="right")
        outline = np.ones(len(num_polygons), bool)
        outline[np.searchsorted(num_polygons, bad_polygons, side="right")] = False
        numbers = {
            "bbox": np.isfinite(np.asarray(columns.bboxes)).reshape(-1, 4).all(1),
            "area": np.isfinite(np.asarray(columns.areas)),
            "segmentation": outline,
        }
        # An area that was made from the box is no second fault.
        numbers["area"] |= ~numbers["bbox"]
        for name, finite in numbers.items():
            for row in np.flatnonzero(~finite).tolist():
                self._blame(row, f"`{name}` holds NaN or infinity", "correct it, or remove the annotation")
        return numbers["bbox"] & numbers["area"] & numbers["segmentation"]

    def _mask_sizes(self, images: _Ints, sizes: _Ints, image_known: NDArray[np.bool_]) -> None:
        mask_sizes = np.asarray(self.columns.rle_sizes).reshape(-1, 2)
        rows = np.flatnonzero((np.asarray(self.columns.segmentation) == RLE) & image_known)
        for row in rows[(mask_sizes[rows] != sizes[images[rows]]).any(1)].tolist():
            what = "its mask is {} x {} pixels, its image {} x {}".format(*mask_sizes[row], *sizes[images[row]])
            self._blame(row, what, "make both [height, width] of the image")

    def _boxes(
        self, images: _Ints, sizes: _Ints, sound: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Xyxy cut to the image, and whether anything with an area is left."""
        bboxes = np.where(sound[:, None], np.asarray(self.columns.bboxes).reshape(-1, 4), 0)
        stated = np.asarray(self.columns.stated_boxes or self.columns.bboxes).reshape(-1, 4)
        limits = np.zeros((len(bboxes), 2))
        limits[sound] = sizes[images[sound], ::-1]
        with np.errstate(over="ignore"):  # a corner at infinity is beyond the image like any other
            corners = np.stack([bboxes[:, :2], bboxes[:, :2] + bboxes[:, 2:]], 1)
        inside = np.clip(corners, 0, limits[:, None]).astype(np.float32)
        flat = sound & (bboxes[:, 2:] <= 0).any(1)
        outside = sound & ~flat & (inside[:, 0] >= inside[:, 1]).any(1)
        beyond = (np.abs(corners - inside) > _ROUNDING).any((1, 2))
        cut = sound & ~flat & ~outside & beyond
        kinds: list[tuple[NDArray[np.bool_], str, str, Any]] = [
            (flat, "boxes without area", "has no area in its image", "dropped"),
            (outside, "boxes outside their image", "lies outside its image", "dropped"),
            (cut, "boxes cut to their image", "reaches beyond its image", "clipped"),
        ]
        for chosen, key, what, severity in kinds:
            for row in np.flatnonzero(chosen).tolist():
                box = ", ".join(f"{value:g}" for value in stated[row])
                width, height = limits[row]
                done = "training cuts it" if severity == "clipped" else "training leaves it out"
                self._blame(
                    row,
                    f"its box [{box}] {what} of {width:g} x {height:g} pixels",
                    f"{self.columns.box_form}: correct it; {done}",
                    severity,
                )
            if chosen.any():
                self.dropped[key] = int(chosen.sum())
        return inside.reshape(-1, 4), ~flat & ~outside


def _find(values: _Ints, ids: _Ints) -> tuple[_Ints, NDArray[np.bool_]]:
    """The position of each value in `ids` (0 where it is not), and whether it is there."""
    if not len(ids):
        return np.zeros(len(values), np.int64), np.zeros(len(values), bool)
    order = np.argsort(ids, kind="stable")
    positions = order[np.searchsorted(ids, values, sorter=order).clip(max=len(ids) - 1)]
    known = ids[positions] == values
    return np.where(known, positions, 0), known


def _offsets(lengths: Any) -> _Ints:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)
