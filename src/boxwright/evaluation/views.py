"""Test-time augmentation: detect objects in several views of an image (sizes, flipped) and merge the detections.

V views.

As in Detectron2, each view is processed separately, and NMS is applied to the detections of all views together, in
pixels of the files. A mask comes from the view whose box is kept. (mmdetection 0.5 (2018) instead averages the outputs
of the heads on shared proposals.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from boxwright.data.buckets import Resize
from boxwright.data.dataset import Category, Dataset
from boxwright.detectors.detector import as_detector
from boxwright.evaluation.coco import CocoMetrics, coco_limits
from boxwright.evaluation.evaluate import detect_dataset, shared_metrics
from boxwright.evaluation.results import Results, join, match_categories
from boxwright.heads.suppression import Suppression
from boxwright.precision import Precision
from boxwright.structures import Batch

_IMAGES_AT_ONCE = 64


@dataclass(frozen=True)
class View:
    """One view of the images: a size, optionally flipped."""

    resize: Resize
    """Size of the view."""
    flipped: bool = False
    """Whether the view is flipped horizontally."""


def views_of(resize: Resize, shorts: Sequence[int] = (), *, flip: bool = True) -> list[View]:
    """Views of every size, unflipped and (with `flip`) flipped.

    Args:
        resize: size of the detector.
        shorts: short sides in pixels; the long sides have the proportion of `resize`. Empty for `resize` only.
        flip: whether to add flipped views.
    """
    sizes = [Resize(short=short, long=round(short * resize.long / resize.short)) for short in shorts] or [resize]
    return [View(size, flipped) for size in sizes for flipped in ((False, True) if flip else (False,))]


def evaluate_views(
    detector: nn.Module,
    dataset: Dataset,
    views: Sequence[Iterable[Batch]],
    *,
    device: torch.device | str,
    precision: Precision = "float32",
    categories: Sequence[Category] | None = None,
    max_detections: tuple[int, int, int] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> tuple[Results, CocoMetrics]:
    """Like `evaluate`, with the merged detections of all views.

    Args:
        detector: As in `evaluate`; several views need a detector with a `suppression`.
        dataset: Data set with the ground truth.
        views: This rank's share of the images of each view, from `EvaluationLoader`. The images of a rank may differ
            between views.
        device: As in `evaluate`.
        precision: As in `evaluate`.
        categories: As in `evaluate`.
        max_detections: As in `evaluate`.
        progress: As in `evaluate`; called for the images of each view.

    Raises:
        ValueError: As `evaluate`; and, for several views, as `view_suppression`.
    """
    if not views:
        raise ValueError("views: expected at least one, got none")
    suppression = view_suppression(detector) if len(views) > 1 else None
    new_labels = None if categories is None else match_categories(categories, dataset.categories)
    results_of_views = [
        detect_dataset(detector, view, device=device, precision=precision, progress=progress) for view in views
    ]
    results = results_of_views[0] if suppression is None else merge_views(results_of_views, suppression)
    if new_labels is not None:
        results = results.relabel(new_labels)
    max_detections = max_detections or coco_limits(as_detector(detector).max_detections)
    return results, shared_metrics(dataset, results, device=device, max_detections=max_detections)


def view_suppression(detector: nn.Module) -> Suppression:
    """NMS of a detector.

    Raises:
        ValueError: The detector has no `suppression`.
    """
    suppression = as_detector(detector).suppression
    if suppression is None:
        raise ValueError(
            f"{type(detector).__name__} has no `suppression`, so detections of several views cannot be merged. Test it "
            "without test-time augmentation."
        )
    return suppression


def merge_views(views: Sequence[Results], suppression: Suppression) -> Results:
    """Merge the detections of all views: NMS within each class and image, then the best of each image.

    Args:
        views: Results of V views of the same images.
        suppression: NMS of the detector. Soft-NMS lowers the scores a second time here.

    Returns:
        Boxes and masks of the views, best first within each image; of equal scores the earlier view ranks first.
    """
    first = views[0]
    assert all(np.array_equal(first.evaluated, other.evaluated) for other in views), "views of other images"
    merged = join(views)
    merged = merged.select(np.argsort(merged.image_ids, kind="stable"))
    _, starts, counts = np.unique(merged.image_ids, return_index=True, return_counts=True)
    kept_rows, kept_scores = [np.zeros(0, np.int64)], [np.zeros(0)]
    for begin in range(0, len(starts), _IMAGES_AT_ONCE):
        chunk = slice(begin, begin + _IMAGES_AT_ONCE)
        slots = np.arange(counts[chunk].max())
        rows = starts[chunk, None] + np.minimum(slots, counts[chunk, None] - 1)
        corners = np.concatenate([merged.boxes[rows, :2], merged.boxes[rows, :2] + merged.boxes[rows, 2:]], axis=-1)
        indices, scores, kept = suppression.keep(
            torch.from_numpy(corners),
            torch.from_numpy(merged.scores[rows]),
            torch.from_numpy(merged.labels[rows]),
            torch.from_numpy(slots < counts[chunk, None]),
        )
        kept_rows.append(np.take_along_axis(rows, indices.numpy(), axis=1)[kept.numpy()])
        kept_scores.append(scores[kept].numpy())
    return replace(merged.select(np.concatenate(kept_rows)), scores=np.concatenate(kept_scores))
