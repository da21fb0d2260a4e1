"""Pascal VOC's average precision of boxes at one IoU threshold.

N detections, M objects, K detections of one class that count, C categories.

Boxes are continuous, so the IoU has no `+ 1`. VOC's devkit adds 1 because x2 and y2 of its boxes are the last pixel;
for boxes that Boxwright reads from VOC files, both give the same IoU.
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
"""voc07: mean of the interpolated precision at the recalls 0, 0.1, ... 1 (VOC 2007). voc12: area under the
monotonically decreasing precision (VOC 2010 and later)."""


@dataclass(frozen=True, kw_only=True)
class VocMetrics:
    """VOC metrics of a data set, in 0..1; -1 if there is no object to evaluate on."""

    interpolation: Interpolation
    """Interpolation of precision over recall."""
    mean: float
    """mAP: mean over the categories that have objects."""
    categories: Sequence[Category]
    """Categories of the data set."""
    num_objects: np.ndarray
    """[C] int64, number of objects of each category in the evaluated images, without difficult objects and crowd
    regions."""
    per_class: np.ndarray
    """[C] float64, AP of each category."""


def voc_metrics(
    ground_truth: GroundTruth | Dataset,
    results: Results,
    *,
    interpolation: Interpolation = "voc12",
    iou_threshold: float = 0.5,
) -> VocMetrics:
    """Evaluate `results` as VOC's devkit does, on the images in `results.evaluated` only.

    In the order of their scores, each detection is compared with the object of its class and image that it overlaps
    most (the first of equals). If the IoU is at least `iou_threshold`, it is a true positive, or is ignored if the
    object is difficult or a crowd region. Further detections of the same object, and detections below the threshold,
    are false positives.

    Args:
        ground_truth: A data set, or its `GroundTruth` to read the objects only once for several evaluations.
        results: Detections; labels are indices into the data set's categories. Equal scores keep the order of the rows.
        interpolation: See `Interpolation`.
        iou_threshold: IoU threshold; 0.5 in VOC.

    Raises:
        ValueError: As `GroundTruth.require_images`.
    """
    truth = ground_truth if isinstance(ground_truth, GroundTruth) else GroundTruth(ground_truth)
    truth.require_images(results)
    images = np.unique(results.evaluated)
    labels_of = {category.id: label for label, category in enumerate(truth.categories)}
    objects = truth.coco.load_anns(truth.coco.get_ann_ids(img_ids=images.tolist(), cat_ids=list(labels_of)))
    labels = np.array([labels_of[item["category_id"]] for item in objects], dtype=np.int64)
    ignored = np.array([bool(item.get("iscrowd")) for item in objects], dtype=bool)
    num_classes = len(truth.categories)
    object_keys = np.searchsorted(images, [item["image_id"] for item in objects]) * num_classes + labels
    object_boxes = np.array([item["bbox"] for item in objects], dtype=np.float64).reshape(-1, 4)

    detections = results.select(np.isin(results.image_ids, images))
    detections = detections.select(np.argsort(-detections.scores, kind="stable"))
    keys = np.searchsorted(images, detections.image_ids) * num_classes + detections.labels
    best, overlaps = _best_objects(detections.boxes, keys, object_boxes, object_keys)
    hits = overlaps >= iou_threshold
    counts = ~hits | ~ignored[best] if len(objects) else np.ones(len(detections), bool)
    right = np.zeros(len(detections), bool)
    claims = np.flatnonzero(hits & counts)
    right[claims[np.unique(best[claims], return_index=True)[1]]] = True

    num_objects = np.bincount(labels[~ignored], minlength=num_classes)
    per_class = np.array(
        [
            average_precision(right[counts & (detections.labels == label)], int(num_objects[label]), interpolation)
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
    """Average precision of one class.

    Args:
        right: [K] bool, whether each detection is a true positive, best first.
        num_objects: Number of objects, the denominator of recall.
        interpolation: See `Interpolation`.

    Returns:
        Average precision in 0..1, or -1 if there are no objects.
    """
    if num_objects == 0:
        return -1.0
    num_right = np.cumsum(right)
    precision = num_right / np.arange(1, len(right) + 1)
    # Maximum precision at this recall or a higher one; 0 after the last detection.
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    if interpolation == "voc12":
        return float(best[:-1][right].sum() / num_objects)
    # Integer arithmetic, because 3 / 10 is less than 3 * 0.1 in floating point.
    return float(best[np.searchsorted(10 * num_right, num_objects * np.arange(11))].mean())


def _best_objects(
    boxes: np.ndarray, keys: np.ndarray, object_boxes: np.ndarray, object_keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each detection, find the object with the same key that it overlaps most.

    Args:
        boxes: [N, 4] (x, y, width, height).
        keys: [N] int64, image and class.
        object_boxes: [M, 4] (x, y, width, height).
        object_keys: [M] int64.

    Returns:
        [N] int64 indices of objects, and [N] float64 IoU; 0 and -1 if no object has the key.
    """
    order = np.argsort(object_keys, kind="stable")
    first = np.searchsorted(object_keys[order], keys, side="left")
    counts = np.searchsorted(object_keys[order], keys, side="right") - first
    with_object = np.flatnonzero(counts)
    counts = counts[with_object]
    starts = np.cumsum(counts) - counts
    # One row per pair of detection and object; the pairs of a detection are consecutive.
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
    """IoU of boxes (x, y, width, height), row by row; 0 if both have no area."""
    low = np.maximum(ones[:, :2], others[:, :2])
    high = np.minimum(ones[:, :2] + ones[:, 2:], others[:, :2] + others[:, 2:])
    shared = np.maximum(high - low, 0).prod(1)
    union = ones[:, 2:].prod(1) + others[:, 2:].prod(1) - shared
    return shared / np.where(union > 0, union, 1)
