"""Average recall of proposals, classes ignored: how much of what is there the best 100, 300, 1000 boxes cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from boxwright.data.dataset import Dataset
from boxwright.evaluation.coco import AREA_SUFFIXES, GroundTruth, accumulate, mean_measured
from boxwright.evaluation.results import Results

LIMITS = (100, 300, 1000)


def recall_names(limits: Sequence[int] = LIMITS) -> list[str]:
    """The names of what `proposal_recall` gives, in its order."""
    return [f"AR{suffix}@{limit}" for suffix in AREA_SUFFIXES for limit in limits]


def proposal_recall(
    ground_truth: GroundTruth | Dataset, results: Results, *, limits: Sequence[int] = LIMITS
) -> dict[str, float]:
    """Recall averaged over IoU 0.50:0.95 (COCO's AR with `useCats = 0`), for each limit of boxes an image.

    Args:
        ground_truth: A data set, or its `GroundTruth` where it is measured more than once.
        results: The proposals; their labels play no part.
        limits: Rising numbers of best-scored boxes an image that are looked at.

    Returns:
        `AR@100`, `AR@300`, `AR@1000` over all objects, then `ARs@...`, `ARm@...`, `ARl@...` over the small, medium
        and large ones; in 0..1, or -1 where there is no such object.
    """
    truth = ground_truth if isinstance(ground_truth, GroundTruth) else GroundTruth(ground_truth)
    # Without categories any label will do, but hotcoco wants one that exists.
    evaluator = truth.evaluator(replace(results, labels=np.zeros_like(results.labels)), max_detections=limits)
    evaluator.params.use_cats = False
    recall = accumulate(evaluator)["recall"]  # [T, 1, A, M]
    values = [mean_measured(recall[:, :, area, m]) for area in range(len(AREA_SUFFIXES)) for m in range(len(limits))]
    return dict(zip(recall_names(limits), values, strict=True))
