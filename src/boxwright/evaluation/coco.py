"""COCO's average precision of boxes, measured by hotcoco, whose numbers are pycocotools' numbers.

T IoU thresholds, R recall points (0, 0.01, ... 1), C categories, A areas (all, small, medium, large), M limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hotcoco
import numpy as np

from boxwright.data.coco_index import read_columns
from boxwright.data.dataset import Category, Dataset
from boxwright.evaluation.results import Results

CLASS_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
CURVES = ("mean", "0.50", "0.75")
AREA_SUFFIXES = ("", "s", "m", "l")
NUM_RECALLS = 101


@dataclass(frozen=True, kw_only=True)
class CocoMetrics:
    """COCO's numbers of one data set, in 0..1; -1 (as in pycocotools) where there is no object to measure with."""

    summary: dict[str, float]
    """The twelve numbers, by name: AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl (limits as asked for)."""
    categories: Sequence[Category]
    """The data set's categories."""
    num_objects: np.ndarray
    """[C] int64, objects of each category in the evaluated images, crowd regions not counted."""
    per_class: np.ndarray
    """[C, 7] float64, the numbers of each category in the order of `CLASS_COLUMNS`."""
    precision: np.ndarray
    """[3, R, C] float64, precision over recall for each of `CURVES`: the mean over IoU 0.50:0.95, IoU 0.5, IoU 0.75."""

    @classmethod
    def blank(cls, categories: Sequence[Category], max_detections: tuple[int, int, int] = (1, 10, 100)) -> CocoMetrics:
        """Metrics of the right shapes in which nothing is measured."""
        return cls(
            summary=dict.fromkeys(summary_names(max_detections), -1.0),
            categories=list(categories),
            num_objects=np.zeros(len(categories), dtype=np.int64),
            per_class=np.full((len(categories), len(CLASS_COLUMNS)), -1.0),
            precision=np.full((len(CURVES), NUM_RECALLS, len(categories)), -1.0),
        )

    def pack(self) -> np.ndarray:
        """All numbers as one float64 vector, to send to other ranks."""
        parts = (np.array(list(self.summary.values())), self.num_objects, self.per_class, self.precision)
        return np.concatenate([part.astype(np.float64).ravel() for part in parts])

    def unpack(self, numbers: np.ndarray) -> CocoMetrics:
        """Metrics shaped as these that hold `numbers` (from `pack`)."""
        parts = (np.array(list(self.summary.values())), self.num_objects, self.per_class, self.precision)
        ends = np.cumsum([part.size for part in parts])
        summary, num_objects, per_class, precision = np.split(numbers, ends[:-1])
        return CocoMetrics(
            summary=dict(zip(self.summary, summary.tolist(), strict=True)),
            categories=self.categories,
            num_objects=num_objects.astype(np.int64),
            per_class=per_class.reshape(self.per_class.shape),
            precision=precision.reshape(self.precision.shape),
        )


def summary_names(max_detections: Sequence[int] = (1, 10, 100)) -> list[str]:
    """The names of the twelve numbers, in COCO's order."""
    return ["AP", "AP50", "AP75", "APs", "APm", "APl", *(f"AR{limit}" for limit in max_detections), "ARs", "ARm", "ARl"]


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
        self.coco = _from_file(Path(annotations)) if isinstance(annotations, str | Path) else _from_samples(dataset)

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

    def evaluator(self, results: Results, *, max_detections: Sequence[int]) -> hotcoco.COCOeval:
        """A hotcoco evaluator of `results` over the images that were evaluated, not yet run.

        Raises:
            ValueError: No image was evaluated, or one that the ground truth does not have.
        """
        self.require_images(results)
        category_ids = np.array([category.id for category in self.categories], dtype=np.int64)
        rows = np.column_stack([results.image_ids, results.boxes, results.scores, category_ids[results.labels]])
        evaluator = hotcoco.COCOeval(self.coco, self.coco.load_res(rows.reshape(-1, 7)), "bbox")
        evaluator.params.img_ids = results.evaluated.tolist()
        evaluator.params.cat_ids = category_ids.tolist()
        evaluator.params.max_dets = list(max_detections)
        return evaluator


def _from_file(path: Path) -> hotcoco.COCO:
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
    return hotcoco.COCO.from_arrays(
        images=images,
        categories=[{"id": category_id, "name": name} for category_id, name in pairs],
        image_ids=np.asarray(columns.annotation_images),
        category_ids=np.asarray(columns.annotation_categories),
        boxes=np.asarray(columns.bboxes).reshape(-1, 4),
        ids=np.asarray(columns.annotation_ids),
        area=np.asarray(columns.areas),
        iscrowd=np.asarray(columns.crowd),
    )


def _from_samples(dataset: Dataset) -> hotcoco.COCO:
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
    categories = [{"id": category.id, "name": category.name} for category in dataset.categories]
    corners = np.concatenate([np.zeros((0, 4)), *boxes]).astype(np.float64)
    category_ids = np.array([category.id for category in dataset.categories], dtype=np.int64)
    return hotcoco.COCO.from_arrays(
        images=images,
        categories=categories,
        image_ids=np.concatenate([np.zeros(0, np.int64), *image_ids]),
        category_ids=category_ids[np.concatenate([np.zeros(0, np.int64), *labels])],
        boxes=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1),
        iscrowd=np.concatenate([np.zeros(0, bool), *crowd]),
    )


def coco_metrics(
    ground_truth: GroundTruth | Dataset, results: Results, *, max_detections: tuple[int, int, int] = (1, 10, 100)
) -> CocoMetrics:
    """Measure `results` against the ground truth, over the images in `results.evaluated` alone.

    Args:
        ground_truth: A data set, or its `GroundTruth` where it is measured more than once.
        results: Labels are rows of the data set's categories.
        max_detections: Three rising limits of detections an image and category; COCO's numbers are stated for the
            last one (average recall: for each). Crowded images need more than COCO's 100.
    """
    truth = ground_truth if isinstance(ground_truth, GroundTruth) else GroundTruth(ground_truth)
    assert list(max_detections) == sorted(max_detections)
    evaluator = truth.evaluator(results, max_detections=max_detections)
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
        num_objects=_count_objects(truth, results.evaluated),
        per_class=per_class,
        precision=np.stack(curves),
    )


def accumulate(evaluator: hotcoco.COCOeval) -> dict[str, np.ndarray]:
    """Run an evaluator; `precision` [T, R, C, A, M] and `recall` [T, C, A, M]."""
    evaluator.evaluate()
    evaluator.accumulate()
    tables = evaluator.eval
    assert tables is not None
    return tables


def _file_order(evaluator: hotcoco.COCOeval, categories: Sequence[Category]) -> list[int]:
    """For each category of ours, its place on the evaluator's category axis (which hotcoco may have sorted)."""
    places = {int(category_id): place for place, category_id in enumerate(evaluator.params.cat_ids)}
    return [places[category.id] for category in categories]


def mean_measured(values: np.ndarray) -> float:
    """The mean over what could be measured, -1 where nothing could: pycocotools' rule."""
    measured = values[values > -1]
    return float(measured.mean()) if len(measured) else -1.0


def _count_objects(truth: GroundTruth, evaluated: np.ndarray) -> np.ndarray:
    """Objects of each category in the evaluated images."""
    images = evaluated.tolist()
    return np.array(
        [
            len(truth.coco.get_ann_ids(img_ids=images, cat_ids=[category.id], iscrowd=False)) if images else 0
            for category in truth.categories
        ],
        dtype=np.int64,
    )
