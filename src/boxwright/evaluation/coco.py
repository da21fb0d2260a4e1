"""COCO's average precision of boxes and masks, computed by hotcoco, which gives the same values as pycocotools.

T IoU thresholds, R recall points (0, 0.01, ... 1), C categories, A areas (all, small, medium, large), M limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import hotcoco
import numpy as np

from boxwright.checks import check_count
from boxwright.data.dataset import Category, Dataset
from boxwright.evaluation.ground_truth import GroundTruth
from boxwright.evaluation.results import Results

CLASS_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
CURVES = ("mean", "0.50", "0.75")
AREA_SUFFIXES = ("", "s", "m", "l")
NUM_RECALLS = 101


@dataclass(frozen=True, kw_only=True)
class CocoMetrics:
    """COCO metrics of a data set, in 0..1; -1 (as in pycocotools) if there is no object to evaluate on."""

    summary: dict[str, float]
    """The twelve metrics by name: AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl (with the detection limits
    used)."""
    categories: Sequence[Category]
    """Categories of the data set."""
    num_objects: np.ndarray
    """[C] int64, number of objects of each category in the evaluated images, without crowd regions."""
    per_class: np.ndarray
    """[C, 7] float64, metrics of each category in the order of `CLASS_COLUMNS`."""
    precision: np.ndarray
    """[3, R, C] float64, precision over recall for each of `CURVES`: mean over IoU 0.50:0.95, IoU 0.5, IoU 0.75."""
    masks: CocoMetrics | None = None
    """Metrics of the masks, if the detections have masks. All other fields are metrics of the boxes."""

    @property
    def numbers(self) -> dict[str, float]:
        """Summary of the boxes, and summary of the masks as `mask_AP`, `mask_AP50` and so on."""
        masks = {} if self.masks is None else self.masks.summary
        return {**self.summary, **{f"mask_{name}": value for name, value in masks.items()}}

    @classmethod
    def blank(
        cls,
        categories: Sequence[Category],
        max_detections: tuple[int, int, int] = (1, 10, 100),
        *,
        with_masks: bool = False,
    ) -> CocoMetrics:
        """Metrics of the right shapes in which every value is -1 or 0 (nothing evaluated)."""
        return cls(
            summary=dict.fromkeys(summary_names(max_detections), -1.0),
            categories=list(categories),
            num_objects=np.zeros(len(categories), dtype=np.int64),
            per_class=np.full((len(categories), len(CLASS_COLUMNS)), -1.0),
            precision=np.full((len(CURVES), NUM_RECALLS, len(categories)), -1.0),
            masks=cls.blank(categories, max_detections) if with_masks else None,
        )

    def pack(self) -> np.ndarray:
        """All metrics as one float64 vector, to send to other ranks."""
        parts = [np.array(list(self.summary.values())), self.num_objects, self.per_class, self.precision]
        parts += [] if self.masks is None else [self.masks.pack()]
        return np.concatenate([part.astype(np.float64).ravel() for part in parts])

    def unpack(self, values: np.ndarray) -> CocoMetrics:
        """Metrics with the shapes of these metrics and the values in `values` (from `pack`)."""
        parts = (np.array(list(self.summary.values())), self.num_objects, self.per_class, self.precision)
        ends = np.cumsum([part.size for part in parts])
        summary, num_objects, per_class, precision, masks = np.split(values, ends)
        return CocoMetrics(
            summary=dict(zip(self.summary, summary.tolist(), strict=True)),
            categories=self.categories,
            num_objects=num_objects.astype(np.int64),
            per_class=per_class.reshape(self.per_class.shape),
            precision=precision.reshape(self.precision.shape),
            masks=None if self.masks is None else self.masks.unpack(masks),
        )


def summary_names(max_detections: Sequence[int] = (1, 10, 100)) -> list[str]:
    """Names of the twelve metrics, in COCO's order."""
    return ["AP", "AP50", "AP75", "APs", "APm", "APl", *(f"AR{limit}" for limit in max_detections), "ARs", "ARm", "ARl"]


def coco_limits(max_detections: int) -> tuple[int, int, int]:
    """Limits of 1, 10 and 100 detections per image and category, as in COCO; a larger `max_detections` replaces 100."""
    return (1, 10, max(100, max_detections))


def coco_metrics(
    ground_truth: GroundTruth | Dataset, results: Results, *, max_detections: tuple[int, int, int] = (1, 10, 100)
) -> CocoMetrics:
    """Evaluate `results` against the ground truth, on the images in `results.evaluated` only.

    If the results have masks, the masks are evaluated too (`CocoMetrics.masks`).

    Args:
        ground_truth: A data set, or its `GroundTruth` to read the objects only once for several evaluations.
        results: Detections; labels are indices into the data set's categories.
        max_detections: Three ascending limits of detections per image and category. Average precision uses the last
            one, average recall each of them. Crowded images need more than COCO's 100.

    Raises:
        ValueError: The limits are not ascending; or as `GroundTruth.evaluator`.
    """
    truth = ground_truth if isinstance(ground_truth, GroundTruth) else GroundTruth(ground_truth)
    for limit in max_detections:
        check_count("max_detections", limit)
    if len(max_detections) != 3 or list(max_detections) != sorted(max_detections):
        raise ValueError(f"max_detections: expected three ascending limits, such as (1, 10, 100), got {max_detections}")
    metrics = _measure(truth, results, max_detections, with_masks=False)
    if results.masks is None:
        return metrics
    return replace(metrics, masks=_measure(truth, results, max_detections, with_masks=True))


def _measure(
    truth: GroundTruth, results: Results, max_detections: tuple[int, int, int], *, with_masks: bool
) -> CocoMetrics:
    """Metrics of the boxes, or of the masks."""
    evaluator = truth.evaluator(results, max_detections=max_detections, with_masks=with_masks)
    tables = accumulate(evaluator)
    order = _file_order(evaluator, truth.categories)
    precision = tables["precision"][:, :, order]  # [T, R, C, A, M], -1 where a category has no object
    recall = tables["recall"][:, order]  # [T, C, A, M]
    thresholds = np.asarray(evaluator.params.iou_thrs)
    at50, at75 = int(np.argmin(np.abs(thresholds - 0.5))), int(np.argmin(np.abs(thresholds - 0.75)))

    summary = [precision[..., 0, -1], precision[at50, ..., 0, -1], precision[at75, ..., 0, -1]]
    summary += [precision[..., area, -1] for area in (1, 2, 3)]
    summary += [recall[..., 0, m] for m in range(len(max_detections))]
    summary += [recall[..., area, -1] for area in (1, 2, 3)]
    per_class = np.array(
        [
            [
                mean_measured(precision[:, :, c, 0, -1]),
                mean_measured(precision[at50, :, c, 0, -1]),
                mean_measured(precision[at75, :, c, 0, -1]),
                *(mean_measured(precision[:, :, c, area, -1]) for area in (1, 2, 3)),
                mean_measured(recall[:, c, 0, -1]),
            ]
            for c in range(len(truth.categories))
        ]
    )
    curves = [precision[..., 0, -1].mean(axis=0), precision[at50, ..., 0, -1], precision[at75, ..., 0, -1]]
    return CocoMetrics(
        summary=dict(zip(summary_names(max_detections), map(mean_measured, summary), strict=True)),
        categories=truth.categories,
        num_objects=_count_objects(evaluator.coco_gt, truth.categories, results.evaluated),
        per_class=per_class,
        precision=np.stack(curves),
    )


def accumulate(evaluator: hotcoco.COCOeval) -> dict[str, np.ndarray]:
    """Run an evaluator. Returns, among others, `precision` [T, R, C, A, M] and `recall` [T, C, A, M]."""
    evaluator.evaluate()
    evaluator.accumulate()
    tables = evaluator.eval
    assert tables is not None
    return tables


def _file_order(evaluator: hotcoco.COCOeval, categories: Sequence[Category]) -> list[int]:
    """Index of each category on the evaluator's category axis, which hotcoco may have sorted."""
    positions = {int(category_id): position for position, category_id in enumerate(evaluator.params.cat_ids)}
    return [positions[category.id] for category in categories]


def mean_measured(values: np.ndarray) -> float:
    """Mean over the defined values (above -1), or -1 if there are none, as in pycocotools."""
    measured = values[values > -1]
    return float(measured.mean()) if len(measured) else -1.0


def _count_objects(coco: hotcoco.COCO, categories: Sequence[Category], evaluated: np.ndarray) -> np.ndarray:
    """Number of objects of each category in the evaluated images."""
    images = evaluated.tolist()
    return np.array(
        [
            len(coco.get_ann_ids(img_ids=images, cat_ids=[category.id], iscrowd=False)) if images else 0
            for category in categories
        ],
        dtype=np.int64,
    )
