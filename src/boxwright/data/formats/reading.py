"""Checks that all formats share: ids, references, NaN, mask sizes and boxes outside their images.

N images, M objects, Q polygons. The objects of an image are contiguous, in the order of the file.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boxwright.data.dataset import Category
from boxwright.data.formats.columns import RLE, Columns
from boxwright.data.formats.fault import Fault

# Annotators round: a box may exceed its image by this many pixels without a fault.
_ROUNDING = 1.0

_Ints = NDArray[np.int64]


@dataclass
class Reading:
    """The annotations of a split: everything that is sound, and the faults of the rest."""

    categories: list[Category]
    dropped: dict[str, int]
    file_names: list[str]
    arrays: dict[str, NDArray[Any]]
    faults: list[Fault]


def check_columns(file: str, columns: Columns, faults: list[Fault]) -> Reading:
    """Check the columns of a split against each other, and build the arrays of an `AnnotationIndex`.

    Args:
        file: The annotation file, for messages.
        columns: The well-typed entries, as a format reads them.
        faults: The faults that the format found; those found here are added.
    """
    return _Checker(file, columns, faults).run()


class _Checker:
    """Checks columns against each other and builds the arrays of the index from the sound entries."""

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
        if value in refused:  # the entry exists and has a fault of its own
            return
        self._blame(row, f"there is no {noun} with the id {value}", f"correct `{noun}_id`, or add the {noun}")

    def _finite(self) -> NDArray[np.bool_]:
        """Which annotations have finite numbers only."""
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
        # An area computed from a bad box is not a second fault.
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
        """Boxes as xyxy clipped to the image, and whether any area is left."""
        bboxes = np.where(sound[:, None], np.asarray(self.columns.bboxes).reshape(-1, 4), 0)
        stated = np.asarray(self.columns.stated_boxes or self.columns.bboxes).reshape(-1, 4)
        limits = np.zeros((len(bboxes), 2))
        limits[sound] = sizes[images[sound], ::-1]
        with np.errstate(over="ignore"):  # a corner at infinity is outside the image
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
