"""Checks that all formats share: ids, references, NaN, mask sizes and boxes outside their image."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boxwright.data.dataset import Category
from boxwright.data.formats.columns import RLE, Columns
from boxwright.data.formats.fault import Fault

# Boxes are often rounded: a box may extend this many pixels beyond its image without a fault.
_ROUNDING = 1.0

_Ints = NDArray[np.int64]


@dataclass
class Reading:
    """The valid annotations of a split, and all faults."""

    categories: list[Category]
    """Categories sorted by id."""
    dropped: dict[str, int]
    """See `AnnotationIndex.dropped`."""
    file_names: list[str]
    """File names of the images, relative to the image folder."""
    arrays: dict[str, NDArray[Any]]
    """Arrays of an `AnnotationIndex`, by the name of the field."""
    faults: list[Fault]
    """All faults of the annotations."""


def check_columns(file: str, columns: Columns, faults: list[Fault]) -> Reading:
    """Check the columns of a split against each other, and build the arrays of an `AnnotationIndex`.

    Args:
        file: Annotation file, for messages.
        columns: Entries that match the schema, from `Format.read`.
        faults: Faults from `Format.read`; further faults are appended.
    """
    return _Checker(file, columns, faults).run()


class _Checker:
    """Check columns against each other, and build the arrays of the index from the valid entries."""

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
                self._add_fault("file", "no images", "Add entries to `images`")
            if not len(category_ids):
                self._add_fault("file", "no categories", "Add entries to `categories`")
        self._duplicates("image", image_ids)
        self._duplicates("category", category_ids)
        self._duplicates("annotation", np.asarray(columns.annotation_ids))
        sizes = np.asarray(columns.image_sizes).reshape(-1, 2)
        images, image_known = _positions_of(np.asarray(columns.annotation_images), image_ids)
        labels, category_known = _positions_of(np.asarray(columns.annotation_categories), np.sort(category_ids))
        for row in np.flatnonzero(~image_known).tolist():
            self._unknown(row, "image", columns.annotation_images[row], columns.refused_images)
        for row in np.flatnonzero(~category_known).tolist():
            self._unknown(row, "category", columns.annotation_categories[row], columns.refused_categories)
        finite = self._finite()
        self._mask_sizes(images, sizes, image_known)
        valid = image_known & category_known & finite
        boxes, has_area = self._boxes(images, sizes, valid)
        rows = np.flatnonzero(valid & has_area)
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
        categories = [Category(columns.category_ids[row], columns.category_names[row]) for row in order]
        return Reading(categories, dict(self.dropped), columns.file_names, arrays, self.faults)

    def _add_fault(self, place: str, what: str, fix: str) -> None:
        self.faults.append(Fault(self.file, place, what, fix))

    def _add_annotation_fault(self, row: int, what: str, fix: str, severity: Any = "error") -> None:
        columns = self.columns
        file, place = self.file, f"annotation {columns.annotation_ids[row]} (image {columns.annotation_images[row]})"
        if columns.places:
            file, place = columns.places[row]
        self.faults.append(Fault(file, place, what, fix, severity))

    def _duplicates(self, noun: str, ids: _Ints) -> None:
        values, counts = np.unique(ids, return_counts=True)
        for value, count in zip(values[counts > 1], counts[counts > 1], strict=True):
            self._add_fault(f"{noun} {value}", f"{count} entries have this id", "Give each entry a different id")

    def _unknown(self, row: int, noun: str, value: int, refused: set[int]) -> None:
        if value in refused:  # the entry exists, and its own fault is reported
            return
        self._add_annotation_fault(
            row, f"there is no {noun} with the id {value}", f"Correct `{noun}_id`, or add the {noun}"
        )

    def _finite(self) -> NDArray[np.bool_]:
        """Whether box, area and polygons of each annotation are finite."""
        columns = self.columns
        num_polygons = np.asarray(columns.polygon_ends)
        bad_points = np.flatnonzero(~np.isfinite(np.asarray(columns.points)))
        bad_polygons = np.searchsorted(np.asarray(columns.point_ends), bad_points, side="right")
        outline = np.ones(len(num_polygons), bool)
        outline[np.searchsorted(num_polygons, bad_polygons, side="right")] = False
        finite_by_field = {
            "bbox": np.isfinite(np.asarray(columns.bboxes)).reshape(-1, 4).all(1),
            "area": np.isfinite(np.asarray(columns.areas)),
            "segmentation": outline,
        }
        # The area may be computed from the box, so only the box gets a fault.
        finite_by_field["area"] |= ~finite_by_field["bbox"]
        for name, finite in finite_by_field.items():
            for row in np.flatnonzero(~finite).tolist():
                what = f"`{name}` contains NaN or infinity"
                self._add_annotation_fault(row, what, f"Correct `{name}`, or remove the annotation")
        return finite_by_field["bbox"] & finite_by_field["area"] & finite_by_field["segmentation"]

    def _mask_sizes(self, images: _Ints, sizes: _Ints, image_known: NDArray[np.bool_]) -> None:
        mask_sizes = np.asarray(self.columns.rle_sizes).reshape(-1, 2)
        rows = np.flatnonzero((np.asarray(self.columns.segmentation) == RLE) & image_known)
        for row in rows[(mask_sizes[rows] != sizes[images[rows]]).any(1)].tolist():
            mask_size, image_size = mask_sizes[row].tolist(), sizes[images[row]].tolist()
            what = f"`segmentation.size` is {mask_size}, [height, width] of the image is {image_size}"
            self._add_annotation_fault(row, what, "Correct `segmentation.size`, or `height` and `width` of the image")

    def _boxes(
        self, images: _Ints, sizes: _Ints, valid: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Boxes as xyxy clipped to the image, and whether each clipped box has an area."""
        bboxes = np.where(valid[:, None], np.asarray(self.columns.bboxes).reshape(-1, 4), 0)
        stated = np.asarray(self.columns.stated_boxes or self.columns.bboxes).reshape(-1, 4)
        limits = np.zeros((len(bboxes), 2))
        limits[valid] = sizes[images[valid], ::-1]
        with np.errstate(over="ignore"):  # x + width may overflow to infinity, which is outside the image
            corners = np.stack([bboxes[:, :2], bboxes[:, :2] + bboxes[:, 2:]], 1)
        inside = np.clip(corners, 0, limits[:, None]).astype(np.float32)
        flat = valid & (bboxes[:, 2:] <= 0).any(1)
        outside = valid & ~flat & (inside[:, 0] >= inside[:, 1]).any(1)
        beyond = (np.abs(corners - inside) > _ROUNDING).any((1, 2))
        clipped = valid & ~flat & ~outside & beyond
        kinds: list[tuple[NDArray[np.bool_], str, str, Any]] = [
            (flat, "boxes without area", "has no area", "dropped"),
            (outside, "boxes outside their image", "is outside its image of {width:g} x {height:g} pixels", "dropped"),
            (
                clipped,
                "boxes clipped to their image",
                "extends beyond its image of {width:g} x {height:g} pixels",
                "clipped",
            ),
        ]
        for selected, key, problem, severity in kinds:
            for row in np.flatnonzero(selected).tolist():
                box = ", ".join(f"{value:g}" for value in stated[row])
                width, height = limits[row]
                effect = "training clips it" if severity == "clipped" else "training ignores the object"
                self._add_annotation_fault(
                    row,
                    f"the box [{box}] {problem.format(width=width, height=height)}",
                    f"Correct the box ({self.columns.box_form}); {effect}",
                    severity,
                )
            if selected.any():
                self.dropped[key] = int(selected.sum())
        return inside.reshape(-1, 4), ~flat & ~outside


def _positions_of(values: _Ints, ids: _Ints) -> tuple[_Ints, NDArray[np.bool_]]:
    """Index of each value in `ids` (0 for a value that `ids` does not contain), and whether `ids` contains it."""
    if not len(ids):
        return np.zeros(len(values), np.int64), np.zeros(len(values), bool)
    order = np.argsort(ids, kind="stable")
    positions = order[np.searchsorted(ids, values, sorter=order).clip(max=len(ids) - 1)]
    known = ids[positions] == values
    return np.where(known, positions, 0), known


def _offsets(lengths: Any) -> _Ints:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)
