"""Pascal VOC's average precision of boxes at one IoU threshold.

N detections, M objects, K detections of one class that count, C categories.

Boxes are continuous, so that an overlap has no `+ 1`. VOC's devkit has one because its boxes name their last pixel; of
the boxes that Boxwright reads from VOC's files it gives the same overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from boxwright.data.dataset import Category, Dataset
from boxwright.evaluation.coco import mean_measured
from boxwright.evaluation.ground_truth import GroundTruth
from boxwright.evaluation.results import Results

Interpolation = Literal["voc07", "voc12"]
"""voc07: the mean of the best precision at the recalls 0, 0.1, ... 1 (VOC 2007). voc12: the area under the precision
that falls monotonically (VOC 2010 and later)."""


@dataclass(frozen=True, kw_only=True)
class VocMetrics:
    """VOC's numbers of one data set, in 0..1; -1 where there is no object to measure with."""

    interpolation: Interpolation
    """How precision over recall became one number."""
    mean: float
    """mAP: the mean over the categories that have objects."""
    categories: Sequence[Category]
    """The data set's categories."""
    num_objects: np.ndarray
    """[C] int64, objects of each category in the evaluated images, difficult ones and crowd regions not counted."""
    per_class: np.ndarray
    """[C] float64, AP of each category."""


def voc_metrics(
    ground_truth: GroundTruth | Dataset,
    results: Results,
    *,
    interpolation: Interpolation = "voc12",
    iou_threshold: float = 0.5,
) -> VocMetrics:
    """Measure `results` as VOC's devkit does, over the images in `results.evaluated` alone.

    In the order of their scores, each detection looks at the object of its class and image that it overlaps most (the
    first of equals). At `iou_threshold` or more it is right, or ignored where that object is difficult or a crowd
    region; another detection of the same object, and any below the threshold, is wrong.

    Args:
        ground_truth: A data set, or its `GroundTruth` where it is measured more than once.
        results: Labels are rows of the data set's categories. Equal scores count in the order of the rows.
        interpolation: See `Interpolation`.
        iou_threshold: VOC's is 0.5.

    Raises:
        ValueError: As `GroundTruth.require_images`.
    """
    truth = ground_truth if isinstance(ground_truth, GroundTruth) else GroundTruth(ground_truth)
    truth.require_images(results)
    images = np.unique(results.evaluated)
    labels_of = {category.id: label for label, category in enumerate(truth.categories)}
    objects = truth.coco.load_anns(truth.coco.get_ann_ids(img_ids=images.tolist(), cat_ids=list(labels_of)))
    labels = np.array([labels_of[thing["category_id"]] for thing in objects], dtype=np.int64)
    ignored = np.array([bool(thing.get("iscrowd")) for thing in objects], dtype=bool)
    num_classes = len(truth.categories)
    object_keys = np.searchsorted(images, [thing["image_id"] for thing in objects]) * num_classes + labels
    object_boxes = np.array([thing["bbox"] for thing in objects], dtype=np.float64).reshape(-1, 4)

    found = results.select(np.isin(results.image_ids, images))
    found = found.select(np.argsort(-found.scores, kind="stable"))
    keys = np.searchsorted(images, found.image_ids) * num_classes + found.labels
    best, overlaps = _best_objects(found.boxes, keys, object_boxes, object_keys)
    hits = overlaps >= iou_threshold
    counts = ~hits | ~ignored[best] if len(objects) else np.ones(len(found), bool)
    right = np.zeros(len(found), bool)
    claims = np.flatnonzero(hits & counts)
    right[claims[np.unique(best[claims], return_index=True)[1]]] = True

    num_objects = np.bincount(labels[~ignored], minlength=num_classes)
    per_class = np.array(
        [
            average_precision(right[counts & (found.labels == label)], int(num_objects[label]), interpolation)
            for label in range(num_classes)
        ]
    )
    return VocMetrics(
        interpolation=interpolation,
        mean=mean_measured(per_class),
        categories=truth.categories,
        num_objects=num_objects,
        per_class=per_class,
    )


def average_precision(right: np.ndarray, num_objects: int, interpolation: Interpolation) -> float:
    """The average precision of one class.

    Args:
        right: [K] bool, whether each detection is right, best first.
        num_objects: What recall is a share of.
        interpolation: See `Interpolation`.

    Returns:
        0..1, or -1 where there is no object.
    """
    if num_objects == 0:
        return -1.0
    num_right = np.cumsum(right)
    precision = num_right / np.arange(1, len(right) + 1)
    # The best precision at this recall or a higher one; 0 beyond the last detection.
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    if interpolation == "voc12":
        return float(best[:-1][right].sum() / num_objects)
    # In whole numbers, since 3 of 10 is less than 3 x 0.1 in floating point.
    return float(best[np.searchsorted(10 * num_right, num_objects * np.arange(11))].mean())


def _best_objects(
    boxes: np.ndarray, keys: np.ndarray, object_boxes: np.ndarray, object_keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The object that each detection overlaps most, among those with its key.

    Args:
        boxes: [N, 4] (x, y, width, height).
        keys: [N] int64, image and class.
        object_boxes: [M, 4] likewise.
        object_keys: [M] int64.

    Returns:
        [N] int64 rows of objects, and [N] float64 IoU; 0 and -1 where no object has the key.
    """
    order = np.argsort(object_keys, kind="stable")
    first = np.searchsorted(object_keys[order], keys, side="left")
    counts = np.searchsorted(object_keys[order], keys, side="right") - first
    with_object = np.flatnonzero(counts)
    counts = counts[with_object]
    starts = np.cumsum(counts) - counts
    # One row a pair of detection and object; the pairs of a detection lie together.
    pairs = np.arange(counts.sum())
    objects = order[pairs - np.repeat(starts - first[with_object], counts)]
    overlaps = _overlaps(boxes[np.repeat(with_object, counts)], object_boxes[objects])
    best, highest = np.zeros(len(boxes), np.int64), np.full(len(boxes), -1.0)
    if len(pairs):
        highest[with_object] = np.maximum.reduceat(overlaps, starts)
        is_highest = overlaps == np.repeat(highest[with_object], counts)
        best[with_object] = objects[np.minimum.reduceat(np.where(is_highest, pairs, len(pairs)), starts)]
    return best, highest


def _overlaps(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of boxes (x, y, width, height), row by row; 0 where both are without area."""
    low = np.maximum(ones[:, :2], others[:, :2])
    high = np.minimum(ones[:, :2] + ones[:, 2:], others[:, :2] + others[:, 2:])
    shared = np.maximum(high - low, 0).prod(1)
    union = ones[:, 2:].prod(1) + others[:, 2:].prod(1) - shared
    return shared / np.where(union > 0, union, 1)
