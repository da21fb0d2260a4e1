"""Detections are right, wrong or ignored, objects may be missed, and the worst image comes first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from boxwright.data.dataset import Category, Sample
from boxwright.evaluation.ground_truth import GroundTruth
from boxwright.evaluation.mistakes import find_mistakes
from boxwright.evaluation.results import Results

BOXES = np.array([[0, 0, 20, 20], [50, 50, 90, 90], [10, 60, 40, 90]], dtype=np.float32)


@dataclass
class ThreeImages:
    """Image 1 has objects of both classes, image 2 an object and a crowd region, image 3 no objects."""

    categories = (Category(id=9, name="one"), Category(id=4, name="two"))

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        rows = [[0, 1], [0, 2], []][index]
        return Sample(
            image=np.zeros((100, 100, 3), dtype=np.uint8),
            image_id=index + 1,
            file_name=f"{index}.png",
            boxes=BOXES[rows],
            labels=np.array([[0, 1], [0, 0], []][index], dtype=np.int64),
            crowd=np.array([row == 2 for row in rows], dtype=bool),
            object_ids=np.array(rows, dtype=np.int64),
        )


def test_mistakes_of_each_kind() -> None:
    corner_boxes = [BOXES[0], BOXES[1], [12, 62, 38, 88], BOXES[0], [70, 0, 99, 30]]
    boxes = np.array(corner_boxes, dtype=np.float64)
    results = Results(
        image_ids=np.array([1, 1, 2, 2, 2]),
        boxes=np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1),
        scores=np.array([0.9, 0.8, 0.7, 0.6, 0.1]),
        labels=np.array([0, 0, 0, 0, 0]),  # the second has the wrong class, the third is inside the crowd region
        evaluated=np.array([1, 2, 3]),
    )
    mistakes = find_mistakes(GroundTruth(ThreeImages()), results, score=0.3)
    assert [(image.image_id, image.f1) for image in mistakes.images] == [(1, 0.5), (2, 1.0), (3, 1.0)]
    assert mistakes.right.tolist() == [True, False, False, True]
    assert mistakes.ignored.tolist() == [False, False, True, False]
    assert len(mistakes.missed) == 1
    assert mistakes.confusion.tolist() == [[2, 0, 0], [1, 0, 0], [0, 0, 0]]
