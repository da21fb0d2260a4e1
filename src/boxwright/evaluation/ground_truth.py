"""The objects that detections are measured against, of annotation files and of any other data set.

K objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np

from boxwright.data.coco_index import read_columns
from boxwright.data.coco_json import POLYGONS, RLE, Columns
from boxwright.data.dataset import Dataset
from boxwright.data.masks import Masks
from boxwright.evaluation.results import Results

COORDINATE_DECIMALS = 3
"""Of the corners of annotated polygons."""


class GroundTruth:
    """The objects to measure with: the annotation file's own, areas and crowd regions included.

    What training drops or clips stays as annotated here, so that the numbers are comparable with anyone's.
    """

    def __init__(self, dataset: Dataset) -> None:
        """Take the data set's annotation file where it has one (`annotations`), else its samples.

        Raises:
            ValueError: The data set has no categories.
        """
        if not dataset.categories:
            raise ValueError("the data set has no categories, so there is nothing to measure")
        self.categories = list(dataset.categories)
        annotations = getattr(dataset, "annotations", None)
        self._objects = _from_file(Path(annotations)) if isinstance(annotations, str | Path) else _from_samples(dataset)
        self.coco: hotcoco.COCO = self._objects.index()

    @cached_property
    def coco_of_masks(self) -> hotcoco.COCO:
        """The objects with their masks, the same otherwise.

        The box of an object without a mask is a crowd region here: what is found in it counts neither as right nor as
        wrong.
        """
        return self._objects.index(with_masks=True)

    def masks(self, objects: Sequence[dict[str, Any]]) -> Masks:
        """The masks of objects (from `coco`), the box for those without."""
        same = self.coco_of_masks.load_anns([thing["id"] for thing in objects])
        runs = [self.coco_of_masks.ann_to_rle(thing) for thing in same]
        return Masks.of([run["counts"] for run in runs], [run["size"] for run in runs])

    def require_images(self, results: Results) -> None:
        """Check that the evaluated images are the ground truth's.

        Raises:
            ValueError: No image was evaluated, or one that the ground truth does not have.
        """
        if not len(results.evaluated):
            raise ValueError("no image was evaluated, so there is nothing to measure")
        unknown = sorted(set(results.evaluated.tolist()) - set(self.coco.get_img_ids()))
        if unknown:
            raise ValueError(
                f"{len(unknown)} evaluated images are not in the ground truth, image id {unknown[0]} for one: "
                "the results belong to another data set or split"
            )

    def evaluator(
        self, results: Results, *, max_detections: Sequence[int], with_masks: bool = False
    ) -> hotcoco.COCOeval:
        """A hotcoco evaluator of `results` over the images that were evaluated, not yet run.

        Args:
            results: Labels are rows of the categories.
            max_detections: Rising limits of detections an image and category.
            with_masks: Whether masks are compared, in place of boxes.

        Raises:
            ValueError: No image was evaluated, or one that the ground truth does not have.
        """
        self.require_images(results)
        category_ids = np.array([category.id for category in self.categories], dtype=np.int64)
        rows = np.column_stack([results.image_ids, results.boxes, results.scores, category_ids[results.labels]])
        rows = rows.reshape(-1, 7)
        if with_masks:
            assert results.masks is not None
            runs: list[Any] = results.masks.to_coco()
            found = self.coco_of_masks.load_res(rows, segmentation=runs)
            # Small, medium and large go by a mask's own area, as they do for objects, not by its box's.
            found.update_anns(ids=np.arange(1, len(runs) + 1), area=hotcoco.mask.area(runs))
            evaluator = hotcoco.COCOeval(self.coco_of_masks, found, "segm")
        else:
            evaluator = hotcoco.COCOeval(self.coco, self.coco.load_res(rows), "bbox")
        evaluator.params.img_ids = results.evaluated.tolist()
        evaluator.params.cat_ids = category_ids.tolist()
        evaluator.params.max_dets = list(max_detections)
        return evaluator


@dataclass(frozen=True, kw_only=True)
class _Objects:
    """The objects of a data set, K of them."""

    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    columns: dict[str, np.ndarray]
    """What hotcoco takes for each object: image_ids, category_ids, boxes (x, y, width, height), area, iscrowd; ids."""
    masks: list[Any]
    """K masks as polygons or runs, None where there is none; empty where no object has one."""

    def index(self, *, with_masks: bool = False) -> hotcoco.COCO:
        """Hotcoco's form of them; with masks, objects without one are crowd regions of their boxes' shape."""
        columns: dict[str, Any] = self.columns
        if not with_masks:
            return hotcoco.COCO.from_arrays(images=self.images, categories=self.categories, **columns)
        masks = self.masks or [None] * len(self.columns["boxes"])
        without = np.array([mask is None for mask in masks], dtype=bool)
        masks = [
            _outline(box) if mask is None else mask
            for mask, box in zip(masks, self.columns["boxes"].tolist(), strict=True)
        ]
        columns = {**columns, "iscrowd": columns["iscrowd"].astype(bool) | without}
        return hotcoco.COCO.from_arrays(images=self.images, categories=self.categories, segmentation=masks, **columns)


def _outline(box: Sequence[float]) -> list[list[float]]:
    """A box (x, y, width, height) as a polygon."""
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def _from_file(path: Path) -> _Objects:
    """Ground truth from an annotation file, read as training reads it.

    hotcoco's own reader refuses what training takes: a byte order mark, a licence that is no number, fields of one's
    own that COCO uses otherwise.
    """
    columns, _ = read_columns(path)
    images = [
        {"id": image_id, "file_name": name, "height": height, "width": width}
        for image_id, name, (height, width) in zip(
            columns.image_ids, columns.file_names, np.asarray(columns.image_sizes).reshape(-1, 2).tolist(), strict=True
        )
    ]
    pairs = zip(columns.category_ids, columns.category_names, strict=True)
    return _Objects(
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
        masks=_masks_of(columns),
    )


def _masks_of(columns: Columns) -> list[Any]:
    """Each annotation's polygons or runs, None where it has none; empty where no annotation has any."""
    kinds = np.asarray(columns.segmentation)
    if not kinds.any():
        return []
    # The columns are float32; files have two decimals or so, which come back to the last digit.
    points = np.asarray(columns.points).astype(np.float64).round(COORDINATE_DECIMALS).tolist()
    point_ends, polygon_ends = [0, *columns.point_ends], [0, *columns.polygon_ends]
    rle_ends, sizes = [0, *columns.rle_ends], np.asarray(columns.rle_sizes).reshape(-1, 2).tolist()
    masks: list[Any] = []
    for row, kind in enumerate(kinds.tolist()):
        if kind == POLYGONS:
            ends = point_ends[polygon_ends[row] : polygon_ends[row + 1] + 1]
            masks.append([points[start:end] for start, end in pairwise(ends)])
        elif kind == RLE:
            characters = columns.rle_characters[rle_ends[row] : rle_ends[row + 1]]
            masks.append({"size": sizes[row], "counts": characters.decode()})
        else:
            masks.append(None)
    return masks


def _from_samples(dataset: Dataset) -> _Objects:
    """Ground truth from one pass over the samples, for data sets that are not COCO files; an area is its box's."""
    images, image_ids, boxes, labels, crowd = [], [], [], [], []
    for index in range(len(dataset)):
        sample = dataset[index]
        height, width = sample.image.shape[:2]
        images.append({"id": int(sample.image_id), "file_name": sample.file_name, "height": height, "width": width})
        image_ids.append(np.full(len(sample.boxes), sample.image_id, dtype=np.int64))
        boxes.append(sample.boxes)
        labels.append(sample.labels)
        crowd.append(sample.crowd)
    corners = np.concatenate([np.zeros((0, 4)), *boxes]).astype(np.float64)
    sides = corners[:, 2:] - corners[:, :2]
    category_ids = np.array([category.id for category in dataset.categories], dtype=np.int64)
    return _Objects(
        images=images,
        categories=[{"id": category.id, "name": category.name} for category in dataset.categories],
        columns={
            "image_ids": np.concatenate([np.zeros(0, np.int64), *image_ids]),
            "category_ids": category_ids[np.concatenate([np.zeros(0, np.int64), *labels])],
            "boxes": np.concatenate([corners[:, :2], sides], axis=1),
            "area": sides.prod(axis=1),
            "iscrowd": np.concatenate([np.zeros(0, bool), *crowd]),
        },
        masks=[],
    )
