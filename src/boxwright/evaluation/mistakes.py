"""True positives, false positives and missed objects of each image at one score threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from boxwright.evaluation.ground_truth import GroundTruth
from boxwright.evaluation.results import Results


@dataclass(frozen=True)
class ImageMistakes:
    """Number of correct and wrong detections in one image."""

    image_id: int
    """Image id of the data set."""
    num_right: int
    """True positives: detections that match an object of their class."""
    num_wrong: int
    """False positives: detections that match no object."""
    num_missed: int
    """False negatives: objects that no detection matches."""

    @property
    def f1(self) -> float:
        """F1 score, 2 right / (2 right + wrong + missed); 1 if there are neither objects nor detections."""
        total = 2 * self.num_right + self.num_wrong + self.num_missed
        return 2 * self.num_right / total if total else 1.0


@dataclass(frozen=True, kw_only=True)
class Mistakes:
    """Mistakes of a detector in all images, worst image first."""

    iou: float
    """IoU threshold for a match."""
    score: float
    """Score threshold: detections with a lower score are omitted."""
    images: list[ImageMistakes]
    """Sorted by ascending F1, then by descending number of mistakes."""
    results: Results
    """Detections at or above the score threshold."""
    right: np.ndarray
    """[N] bool, detections of `results` that match an object (true positives)."""
    ignored: np.ndarray
    """[N] bool, detections of `results` in a crowd region: neither true nor false positives."""
    missed: frozenset[int]
    """Annotation ids of the missed objects."""
    confusion: np.ndarray
    """[C + 1, C + 1] int64 confusion matrix of objects by true class (rows) and predicted class (columns), matched
    regardless of class. The last column counts unmatched objects, the last row unmatched detections."""


def find_mistakes(truth: GroundTruth, results: Results, *, score: float = 0.3, iou: float = 0.5) -> Mistakes:
    """Match detections (score >= `score`) with objects in order of score, as COCO does at one IoU threshold."""
    kept = results.select(results.scores >= score)
    max_per_image = int(np.unique(kept.image_ids, return_counts=True)[1].max(initial=1))
    evaluator = truth.evaluator(kept, max_detections=[max_per_image])
    evaluator.params.iou_thrs = [iou]
    evaluator.evaluate()
    diagnostics = evaluator.image_diagnostics(iou_thr=iou)
    # hotcoco numbers detections from 1 in the order of the rows. Detections in images that were not evaluated are
    # omitted.
    status = [diagnostics["dt_status"].get(row + 1, "ignored") for row in range(len(kept))]
    images = [
        ImageMistakes(image_id, counts["tp"], counts["fp"], counts["fn"])
        for image_id, counts in diagnostics["img_summary"].items()
    ]
    counted = {image.image_id for image in images}
    images += [ImageMistakes(image_id, 0, 0, 0) for image_id in results.evaluated.tolist() if image_id not in counted]
    ignored = np.array([name not in ("tp", "fp") for name in status], dtype=bool)
    # The confusion matrix does not support crowd regions, so detections inside them are removed first.
    outside_crowds = truth.evaluator(kept.select(~ignored), max_detections=[max_per_image])
    confusion = outside_crowds.confusion_matrix(iou_thr=iou, max_det=max_per_image)
    columns = {category_id: column for column, category_id in enumerate(confusion["cat_ids"])}
    order = [columns[category.id] for category in truth.categories] + [len(columns)]
    return Mistakes(
        iou=iou,
        score=score,
        images=sorted(images, key=lambda image: (image.f1, -image.num_wrong - image.num_missed, image.image_id)),
        results=kept,
        right=np.array([name == "tp" for name in status], dtype=bool),
        ignored=ignored,
        missed=frozenset(int(key) for key, name in diagnostics["gt_status"].items() if name == "fn"),
        confusion=confusion["matrix"].astype(np.int64)[np.ix_(order, order)],
    )
