"""Which detections are right and which objects are missed at one score threshold, image by image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from boxwright.evaluation.ground_truth import GroundTruth
from boxwright.evaluation.results import Results


@dataclass(frozen=True)
class ImageMistakes:
    """How one image went."""

    image_id: int
    """The data set's id."""
    num_right: int
    """Detections that match an object of their class."""
    num_wrong: int
    """Detections that match none."""
    num_missed: int
    """Objects that no detection matches."""

    @property
    def f1(self) -> float:
        """2 right / (2 right + wrong + missed); 1 where there was nothing to find and nothing was found."""
        total = 2 * self.num_right + self.num_wrong + self.num_missed
        return 2 * self.num_right / total if total else 1.0


@dataclass(frozen=True, kw_only=True)
class Mistakes:
    """All images, worst first."""

    iou: float
    """Overlap from which a detection may match an object."""
    score: float
    """Detections below it are left out."""
    images: list[ImageMistakes]
    """Lowest F1 first, then most mistakes first."""
    results: Results
    """The detections at or above the score."""
    right: np.ndarray
    """[N] bool, detections of `results` that match an object."""
    ignored: np.ndarray
    """[N] bool, detections of `results` in a crowd region: neither right nor wrong."""
    missed: frozenset[int]
    """Annotation ids of the missed objects."""
    confusion: np.ndarray
    """[C + 1, C + 1] int64, objects by true class (rows) and predicted class (columns), matched whatever their class;
    the last column counts objects that nothing matched, the last row detections that matched nothing."""


def find_mistakes(truth: GroundTruth, results: Results, *, score: float = 0.3, iou: float = 0.5) -> Mistakes:
    """Match detections of at least `score` with objects, best score first, as COCO does at one IoU threshold."""
    kept = results.select(results.scores >= score)
    most = int(np.unique(kept.image_ids, return_counts=True)[1].max(initial=1))
    evaluator = truth.evaluator(kept, max_detections=[most])
    evaluator.params.iou_thrs = [iou]
    evaluator.evaluate()
    found = evaluator.image_diagnostics(iou_thr=iou)
    # hotcoco numbers detections from 1, in the order of the rows; what it does not list lies in no evaluated image.
    status = [found["dt_status"].get(row + 1, "ignored") for row in range(len(kept))]
    images = [
        ImageMistakes(image_id, counts["tp"], counts["fp"], counts["fn"])
        for image_id, counts in found["img_summary"].items()
    ]
    counted = {image.image_id for image in images}
    images += [ImageMistakes(image_id, 0, 0, 0) for image_id in results.evaluated.tolist() if image_id not in counted]
    ignored = np.array([name not in ("tp", "fp") for name in status], dtype=bool)
    # The confusion matrix knows no crowd regions, so what lies in one is taken out before.
    outside_crowds = truth.evaluator(kept.select(~ignored), max_detections=[most])
    confusion = outside_crowds.confusion_matrix(iou_thr=iou, max_det=most)
    places = {category_id: place for place, category_id in enumerate(confusion["cat_ids"])}
    order = [places[category.id] for category in truth.categories] + [len(places)]
    return Mistakes(
        iou=iou,
        score=score,
        images=sorted(images, key=lambda image: (image.f1, -image.num_wrong - image.num_missed, image.image_id)),
        results=kept,
        right=np.array([name == "tp" for name in status], dtype=bool),
        ignored=ignored,
        missed=frozenset(int(key) for key, name in found["gt_status"].items() if name == "fn"),
        confusion=confusion["matrix"].astype(np.int64)[np.ix_(order, order)],
    )
