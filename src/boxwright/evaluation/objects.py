"""The objects of a data set as measuring needs them, of annotation files and of any other data set.

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
"""Of the corners of annotated polygons."""


@dataclass(frozen=True, kw_only=True)
class Objects:
    """The objects of a data set, K of them."""

    images: list[dict[str, Any]]
    """Hotcoco's entry of each picture: id, file_name, height, width."""
    categories: list[dict[str, Any]]
    """Hotcoco's entry of each class: id, name."""
    columns: dict[str, np.ndarray]
    """What hotcoco takes for each object: image_ids, category_ids, boxes (x, y, width, height), ids, area, iscrowd."""
    masks: Callable[[], Sequence[Any]]
    """Gives K masks as polygons or runs, None where there is none; called only where masks are measured."""

    def index(self, *, with_masks: bool = False) -> hotcoco.COCO:
        """Hotcoco's form of them; with masks, objects without one are crowd regions of their boxes' shape."""
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
    """The objects of a data set: of its annotation file (`annotations`) where it has one, else of its samples.

    Those of a `ConcatDataset` are its parts', each read so. What is in a file stays as annotated, where samples hold
    what training makes of it.

    Raises:
        ValueError: Two pictures have the same id, or a sample's mask does not fit its picture.
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
                f"{count} pictures have the image id {image_id}, so that their objects cannot be told apart: give each "
                "its own (a RepeatDataset is for training: measure on what it repeats)"
            )
    return objects


def _outline(box: Sequence[float]) -> list[list[float]]:
    """A box (x, y, width, height) as a polygon."""
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def _from_file(annotations: Path, image_folder: Path | None) -> Objects:
    """Ground truth from annotations in any known format, read as training reads them.

    hotcoco's own reader refuses what training takes: a byte order mark, a licence that is no number, fields of one's
    own that COCO uses otherwise.
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
    """Each annotation's polygons or runs, None where it has none."""
    # The columns are float32; files have two decimals or so, which come back to the last digit.
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
    """Ground truth of joined data sets: each part's own, under the joined image ids and classes."""
    images: list[dict[str, Any]] = []
    chosen: list[tuple[Objects, np.ndarray]] = []
    columns: list[dict[str, np.ndarray]] = []
    joined_ids = np.array([category.id for category in dataset.categories], dtype=np.int64)
    image_ids = np.split(dataset.image_ids, np.cumsum([len(part) for part in dataset.parts])[:-1])
    for part, labels, shift, ids in zip(
        dataset.parts, dataset.part_labels, dataset.part_shifts, image_ids, strict=True
    ):
        objects = read_objects(part)
        # A file may hold pictures that the part leaves out, whose ids another part may have.
        own = set((ids - shift).tolist())
        images += [{**image, "id": image["id"] + int(shift)} for image in objects.images if image["id"] in own]
        categories = {category.id: joined_ids[label] for category, label in zip(part.categories, labels, strict=True)}
        kept = np.isin(objects.columns["image_ids"], ids - shift)
        kept &= np.isin(objects.columns["category_ids"], list(categories))
        rows = np.flatnonzero(kept)
        own_columns = {name: column[rows] for name, column in objects.columns.items()}
        own_columns["image_ids"] = own_columns["image_ids"] + shift
        own_columns["category_ids"] = np.array([categories[i] for i in own_columns["category_ids"].tolist()], np.int64)
        columns.append(own_columns)
        chosen.append((objects, rows))
    together = {name: np.concatenate([each[name] for each in columns]) for name in columns[0]}
    return Objects(
        images=images,
        categories=[{"id": category.id, "name": category.name} for category in dataset.categories],
        columns={**together, "ids": np.arange(1, len(together["boxes"]) + 1)},
        masks=partial(_masks_of_parts, chosen),
    )


def _masks_of_parts(chosen: Sequence[tuple[Objects, np.ndarray]]) -> list[Any]:
    """The masks of some objects (rows, [k] int) of each part."""
    found: list[Any] = []
    for objects, rows in chosen:
        masks = objects.masks()
        found += [masks[row] for row in rows.tolist()]
    return found


def _from_samples(dataset: Dataset) -> Objects:
    """Ground truth from one pass over the samples; an area is its mask's, or its box's where there is no mask."""
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
    """A sample's masks as compressed runs, which are the only form that a whole data set's memory allows.

    Raises:
        ValueError: There are more or fewer masks than objects, or one is not of the picture's size.
    """
    if sample.masks is None:
        return [None] * len(sample.boxes)
    if len(sample.masks) != len(sample.boxes):
        raise ValueError(
            f"{sample.file_name}: {len(sample.masks)} masks for {len(sample.boxes)} objects: give each object one, or "
            "None"
        )
    try:
        return [_mask_runs(mask, sample.image.shape[:2]) for mask in sample.masks]
    except ValueError as error:
        raise ValueError(f"{sample.file_name}: a mask does not fit: {error}") from error


def _mask_runs(mask: Mask, image_size: tuple[int, int]) -> dict[str, Any] | None:
    """A mask as COCO writes compressed runs, rasterised as the COCO API does it; None where there is none."""
    height, width = image_size
    if mask is None:
        return None
    if isinstance(mask, bytes):
        if (total := int(rle.decompress(mask).sum())) != height * width:
            raise ValueError(f"its run lengths add up to {total} pixels, the picture has {height} x {width}")
        counts = mask
    elif isinstance(mask, np.ndarray):
        if mask.shape != image_size:
            raise ValueError(f"its shape is {mask.shape}, that of the picture {image_size}: make both the same")
        counts = hotcoco.mask.encode(np.asfortranarray(mask != 0, np.uint8))["counts"]
    else:
        points = [np.asarray(polygon, np.float64).round(COORDINATE_DECIMALS) for polygon in mask if len(polygon) >= 3]
        if not points:
            return None
        polygons = [polygon.ravel().tolist() for polygon in points]
        counts = hotcoco.mask.merge(hotcoco.mask.frPyObjects(polygons, height, width))["counts"]
    return {"size": [height, width], "counts": counts.decode()}
