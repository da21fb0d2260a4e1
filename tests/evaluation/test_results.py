from __future__ import annotations

import numpy as np
import pytest

from boxwright.data.dataset import Category
from boxwright.evaluation.results import Results, match_categories
from boxwright.importers.categories import COCO, by_coco_id


def test_models_with_labels_for_unused_coco_ids_are_evaluated_on_coco() -> None:
    """In torchvision's models, labels are COCO category ids. Detections of unused ids are dropped."""
    rows = match_categories(by_coco_id(0), COCO)
    assert len(rows) == 91
    for id, name in ((1, "person"), (13, "stop sign"), (90, "toothbrush")):
        assert COCO[rows[id]].name == name
    assert [id for id, row in enumerate(rows) if row < 0] == [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    count = 4
    results = Results(
        image_ids=np.array([5, 5, 6, 7]),
        boxes=np.arange(4.0 * count).reshape(count, 4),
        scores=np.array([0.9, 0.8, 0.7, 0.6]),
        labels=np.array([12, 13, 1, 0]),
        evaluated=np.array([5, 6, 7]),
    )
    kept = results.relabel(rows)
    assert kept.image_ids.tolist() == [5, 6]
    assert [COCO[label].name for label in kept.labels] == ["stop sign", "person"]
    assert kept.evaluated.tolist() == [5, 6, 7]


def test_unused_labels_do_not_hide_other_differences() -> None:
    with pytest.raises(ValueError, match=r"Only in the data set .*: zebra"):
        match_categories([Category(1, "cat"), Category(2, "N/A 2")], [Category(1, "cat"), Category(2, "zebra")])
    both = [Category(1, "N/A 1"), Category(2, "cat")]
    assert match_categories(both, both[::-1]) == [1, 0], "a data set may have a class named N/A 1"
