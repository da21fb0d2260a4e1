"""Test-time augmentation: a detector sees each picture at several sizes and mirrored, and what it finds is merged.

V views.

As in detectron2, each view is detected as it would be alone, and the detections of all views, in pixels of the files,
compete as those of one picture do; a mask is that of the view whose box is kept. (The 2018 toolbox instead averages
what the heads say of shared proposals.)
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
    """How pictures are shown to the detector once."""

    resize: Resize
    """The size that they are brought to."""
    flipped: bool = False
    """Whether left and right are swapped."""


def views_of(resize: Resize, shorts: Sequence[int] = (), *, flip: bool = True) -> list[View]:
    """Every size, plain and (with `flip`) mirrored.

    Args:
        resize: the detector's own size.
        shorts: short sides in pixels, each with a long side in the proportion of `resize`; empty for `resize` alone.
        flip: whether mirrored views join.
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
    """As `evaluate`, on what the detector finds in all views together.

    Args:
        detector: As in `evaluate`; for several views with a `suppression`, by which its detections compete.
        dataset: The ground truth.
        views: This rank's share of each view, as `EvaluationLoader` gives it; the pictures of a rank may differ from
            view to view.
        device: As in `evaluate`, like all further arguments.
        precision: See there.
        categories: See there.
        max_detections: See there.
        progress: See there; called for the images of each view.

    Raises:
        ValueError: As `evaluate`; and, of several views, as `view_suppression`.
    """
    if not views:
        raise ValueError("views: expected at least one")
    suppression = view_suppression(detector) if len(views) > 1 else None
    new_labels = None if categories is None else match_categories(categories, dataset.categories)
    found = [detect_dataset(detector, view, device=device, precision=precision, progress=progress) for view in views]
    results = found[0] if suppression is None else merge_views(found, suppression)
    if new_labels is not None:
        results = results.relabel(new_labels)
    max_detections = max_detections or coco_limits(as_detector(detector).max_detections)
    return results, shared_metrics(dataset, results, device=device, max_detections=max_detections)


def view_suppression(detector: nn.Module) -> Suppression:
    """How a detector's detections compete.

    Raises:
        ValueError: It does not say so.
    """
    suppression = as_detector(detector).suppression
    if suppression is None:
        raise ValueError(
            f"a {type(detector).__name__} does not say how its detections compete, so that those of several views "
            "cannot be merged: test it without test-time augmentation"
        )
    return suppression


def merge_views(views: Sequence[Results], suppression: Suppression) -> Results:
    """The detections of all views, of which those of a class that overlap compete, and the best of each image.

    Args:
        views: V of what was found in the same images.
        suppression: how detections compete. Where it lowers scores instead of dropping boxes, those of each view have
            been lowered once before.

    Returns:
        Boxes and masks as they were found, best first within each image; of equal scores the earlier view's is first.
    """
    first = views[0]
    assert all(np.array_equal(first.evaluated, other.evaluated) for other in views), "views of other images"
    found = join(views)
    found = found.select(np.argsort(found.image_ids, kind="stable"))
    _, starts, counts = np.unique(found.image_ids, return_index=True, return_counts=True)
    kept_rows, kept_scores = [np.zeros(0, np.int64)], [np.zeros(0)]
    for begin in range(0, len(starts), _IMAGES_AT_ONCE):
        chunk = slice(begin, begin + _IMAGES_AT_ONCE)
        slots = np.arange(counts[chunk].max())
        rows = starts[chunk, None] + np.minimum(slots, counts[chunk, None] - 1)
        corners = np.concatenate([found.boxes[rows, :2], found.boxes[rows, :2] + found.boxes[rows, 2:]], axis=-1)
        indices, scores, kept = suppression.keep(
            torch.from_numpy(corners),
            torch.from_numpy(found.scores[rows]),
            torch.from_numpy(found.labels[rows]),
            torch.from_numpy(slots < counts[chunk, None]),
        )
        kept_rows.append(np.take_along_axis(rows, indices.numpy(), axis=1)[kept.numpy()])
        kept_scores.append(scores[kept].numpy())
    return replace(found.select(np.concatenate(kept_rows)), scores=np.concatenate(kept_scores))
