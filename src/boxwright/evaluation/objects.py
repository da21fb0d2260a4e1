"""Read the objects of a data set for evaluation, from its annotation file or from its samples.

K objects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np

from boxwright.data.concat import ConcatDataset
from boxwright.data.dataset import Dataset, DatasetInfo, Mask, Sample
from boxwright.data.formats import read_columns
from boxwright.data.formats.columns import POLYGONS, RLE, Columns
from boxwright.data.masks import rle

COORDINATE_DECIMALS = 3
"""Number of decimals to which polygon coordinates are rounded."""


@dataclass(frozen=True, kw_only=True)
class Objects:
    """The K objects of a data set."""

    images: list[dict[str, Any]]
    """hotcoco's entry of each image: id, file_name, height, width."""
    categories: list[dict[str, Any]]
    """hotcoco's entry of each category: id, name."""
    columns: dict[str, np.ndarray]
    """hotcoco's columns of the objects: image_ids, category_ids, boxes (x, y, width, height), ids, area, iscrowd."""
    masks: Callable[[], Sequence[Any]]
    """Returns K masks, as polygons or run lengths, or None for objects without; called only if masks are evaluated."""

    def index(self, *, with_masks: bool = False) -> hotcoco.COCO:
        """Convert to hotcoco. With masks, an object without a mask becomes a crowd region of the shape of its box."""
        columns: dict[str, Any] = self.columns
        if with_masks:
            masks = self.masks()
            outlines = [
                _outline(box) if mask is None else mask
                for mask, box in zip(masks, columns["boxes"].tolist(), strict=True)
            ]
            without = np.array([mask is None for mask in masks], dtype=bool)
            columns = {**columns, "iscrowd": columns["iscrowd"].astype(bool) | without, "segmentation": outlines}
        return hotcoco.COCO.from_arrays(images=self.images, categories=self.categories, **columns)


def read_objects(dataset: Dataset) -> Objects:
    """Read the objects of a data set, from its annotations (`annotations`) if it has any, else from its samples.

    The objects of a `ConcatDataset` are read from its parts. Objects from annotations are as annotated, whereas samples
    are preprocessed for training.

    Raises:
        ValueError: Two images have the same id, or a mask of a sample does not fit its image.
    """
    info = DatasetInfo(dataset)
    if info.annotations is not None:
        objects = _from_file(info.annotations, info.images)
    elif isinstance(dataset, ConcatDataset):
        objects = _from_parts(dataset)
    else:
        objects = _from_samples(dataset)
    for image_id, count in Counter(image["id"] for image in objects.images).most_common(1):
        if count > 1:
            raise ValueError(
                f"{count} images have the image id {image_id}. Give each image its own id (a RepeatDataset is for "
                "training: evaluate on the data set that it repeats)."
            )
    return objects


def _outline(box: Sequence[float]) -> list[list[float]]:
    """Convert a box (x, y, width, height) to a polygon."""
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def _from_file(annotations: Path, image_folder: Path | None) -> Objects:
    """Read ground truth from annotations in any supported format, with the same reader as for training.

    hotcoco's own reader rejects files that the training accepts: with a byte order mark, a licence that is not a
    number, or custom fields with names that COCO uses differently.
    """
    columns, _ = read_columns(annotations, image_folder)
    images = [
        {"id": image_id, "file_name": name, "height": height, "width": width}
        for image_id, name, (height, width) in zip(
            columns.image_ids, columns.file_names, np.asarray(columns.image_sizes).reshape(-1, 2).tolist(), strict=True
        )
    ]
    pairs = zip(columns.category_ids, columns.category_names, strict=True)
    return Objects(
        images=images,
        categories=[{"id": category_id, "name": name} for category_id, name in pairs],
        columns={
            "image_ids": np.asarray(columns.annotation_images),
            "category_ids": np.asarray(columns.annotation_categories),
            "boxes": np.asarray(columns.bboxes).reshape(-1, 4),
            "ids": np.asarray(columns.annotation_ids),
            "area": np.asarray(columns.areas),
            "iscrowd": np.asarray(columns.crowd),
        },
        masks=partial(_masks_of, columns),
    )


def _masks_of(columns: Columns) -> list[Any]:
    """Polygons or run lengths of each annotation; None for an annotation without a mask."""
    # The columns are float32. Files have about two decimals, which rounding restores exactly.
    points = np.asarray(columns.points).astype(np.float64).round(COORDINATE_DECIMALS).tolist()
    point_ends, polygon_ends = [0, *columns.point_ends], [0, *columns.polygon_ends]
    rle_ends, sizes = [0, *columns.rle_ends], np.asarray(columns.rle_sizes).reshape(-1, 2).tolist()
    masks: list[Any] = []
    for row, kind in enumerate(columns.segmentation):
        if kind == POLYGONS:
            ends = point_ends[polygon_ends[row] : polygon_ends[row + 1] + 1]
            masks.append([points[start:end] for start, end in pairwise(ends)])
        elif kind == RLE:
            characters = columns.rle_characters[rle_ends[row] : rle_ends[row + 1]]
            masks.append({"size": sizes[row], "counts": characters.decode()})
        else:
            masks.append(None)
    return masks


def _from_parts(dataset: ConcatDataset) -> Objects:
    """Ground truth of a concatenation: ground truth of the parts, with the concatenation's image ids and labels."""
    images: list[dict[str, Any]] = []
    selected: list[tuple[Objects, np.ndarray]] = []
    columns: list[dict[str, np.ndarray]] = []
    joined_ids = np.array([category.id for category in dataset.categories], dtype=np.int64)
    image_ids = np.split(dataset.image_ids, np.cumsum([len(part) for part in dataset.parts])[:-1])
    for part, labels, shift, ids in zip(
        dataset.parts, dataset.part_labels, dataset.part_shifts, image_ids, strict=True
    ):
        objects = read_objects(part)
        # A file may contain images that the part omits, and another part may have their ids.
        part_ids = set((ids - shift).tolist())
        images += [{**image, "id": image["id"] + int(shift)} for image in objects.images if image["id"] in part_ids]
        categories = {category.id: joined_ids[label] for category, label in zip(part.categories, labels, strict=True)}
        kept = np.isin(objects.columns["image_ids"], ids - shift)
        kept &= np.isin(objects.columns["category_ids"], list(categories))
        rows = np.flatnonzero(kept)
        part_columns = {name: column[rows] for name, column in objects.columns.items()}
        part_columns["image_ids"] = part_columns["image_ids"] + shift
        category_ids = [categories[i] for i in part_columns["category_ids"].tolist()]
        part_columns["category_ids"] = np.array(category_ids, np.int64)
        columns.append(part_columns)
        selected.append((objects, rows))
    merged = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
    return Objects(
        images=images,
        categories=[{"id": category.id, "name": category.name} for category in dataset.categories],
        columns={**merged, "ids": np.arange(1, len(merged["boxes"]) + 1)},
        masks=partial(_masks_of_parts, selected),
    )


def _masks_of_parts(selected: Sequence[tuple[Objects, np.ndarray]]) -> list[Any]:
    """Masks of the selected objects (rows, [k] int) of each part."""
    selected_masks: list[Any] = []
    for objects, rows in selected:
        masks = objects.masks()
        selected_masks += [masks[row] for row in rows.tolist()]
    return selected_masks


def _from_samples(dataset: Dataset) -> Objects:
    """Ground truth from one pass over the samples. The area of an object is the area of its mask, else of its box."""
    images, image_ids, boxes, labels, crowd = [], [], [], [], []
    masks: list[dict[str, Any] | None] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        height, width = sample.image.shape[:2]
        images.append({"id": int(sample.image_id), "file_name": sample.file_name, "height": height, "width": width})
        image_ids.append(np.full(len(sample.boxes), sample.image_id, dtype=np.int64))
        boxes.append(sample.boxes)
        labels.append(sample.labels)
        crowd.append(sample.crowd)
        masks += _sample_masks(sample)
    corners = np.concatenate([np.zeros((0, 4)), *boxes]).astype(np.float64)
    sides = corners[:, 2:] - corners[:, :2]
    area = sides.prod(axis=1)
    with_mask = np.flatnonzero([mask is not None for mask in masks])
    runs: list[Any] = [mask for mask in masks if mask is not None]
    area[with_mask] = hotcoco.mask.area(runs)
    category_ids = np.array([category.id for category in dataset.categories], dtype=np.int64)
    return Objects(
        images=images,
        categories=[{"id": category.id, "name": category.name} for category in dataset.categories],
        columns={
            "image_ids": np.concatenate([np.zeros(0, np.int64), *image_ids]),
            "category_ids": category_ids[np.concatenate([np.zeros(0, np.int64), *labels])],
            "boxes": np.concatenate([corners[:, :2], sides], axis=1),
            "ids": np.arange(1, len(corners) + 1),
            "area": area,
            "iscrowd": np.concatenate([np.zeros(0, bool), *crowd]),
        },
        masks=lambda: masks,
    )


def _sample_masks(sample: Sample) -> list[dict[str, Any] | None]:
    """Masks of a sample as compressed run lengths, which are small enough to keep for a whole data set.

    Raises:
        ValueError: There are more or fewer masks than objects, or a mask does not have the size of the image.
    """
    if sample.masks is None:
        return [None] * len(sample.boxes)
    if len(sample.masks) != len(sample.boxes):
        raise ValueError(
            f"{sample.file_name}: {len(sample.masks)} masks for {len(sample.boxes)} objects. Give each object a "
            "mask or None."
        )
    runs: list[dict[str, Any] | None] = []
    try:
        runs.extend(_mask_runs(mask, sample.image.shape[:2]) for mask in sample.masks)
    except ValueError as error:
        raise ValueError(f"{sample.file_name}: invalid mask of object {len(runs)}: {error}") from error
    return runs


def _mask_runs(mask: Mask, image_size: tuple[int, int]) -> dict[str, Any] | None:
    """Convert a mask to COCO's compressed run lengths, rasterised as in the COCO API; None for no mask."""
    height, width = image_size
    if mask is None:
        return None
    if isinstance(mask, bytes):
        if (total := int(rle.decompress(mask).sum())) != height * width:
            raise ValueError(
                f"run lengths of {total} pixels, expected {height * width} (image of {height} x {width}). Encode the "
                "mask at the size of the image."
            )
        counts = mask
    elif isinstance(mask, np.ndarray):
        if mask.shape != image_size:
            raise ValueError(f"shape {mask.shape} differs from the image's {image_size}")
        counts = hotcoco.mask.encode(np.asfortranarray(mask != 0, np.uint8))["counts"]
    else:
        points = [np.asarray(polygon, np.float64).round(COORDINATE_DECIMALS) for polygon in mask if len(polygon) >= 3]
        if not points:
            return None
        polygons = [polygon.ravel().tolist() for polygon in points]
        counts = hotcoco.mask.merge(hotcoco.mask.frPyObjects(polygons, height, width))["counts"]
    return {"size": [height, width], "counts": counts.decode()}
