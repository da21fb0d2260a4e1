"""Results of another data set and invalid boxes are refused; pycocotools shows what they would measure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boxwright.evaluation.coco import coco_metrics
from boxwright.evaluation.proposals import proposal_recall
from boxwright.evaluation.results import Results, read_results
from boxwright.evaluation.voc import voc_metrics
from coco_oracle import AnnotationFile, oracle

ROW = {"image_id": 1, "category_id": 1, "bbox": [60, 60, 10, 10], "score": 0.95}
RIGHT = [{"image_id": 1 + k % 2, "category_id": 1, "bbox": [10 + k, 10, 30, 30], "score": 0.5 + k / 10} for k in (0, 1)]


@pytest.fixture
def truth(tmp_path: Path) -> AnnotationFile:
    """Two images with one object each."""
    objects = [{**row, "id": number, "area": 900, "iscrowd": 0} for number, row in enumerate(RIGHT, start=1)]
    content = {
        "images": [{"id": image, "file_name": f"{image}.png", "width": 100, "height": 100} for image in (1, 2)],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": objects,
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    return AnnotationFile(path)


def read(truth: AnnotationFile, rows: list[dict[str, Any]] | str) -> Results:
    """Write and read a results file with these entries; all images of `truth` count as evaluated."""
    path = truth.annotations.with_name("results.json")
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return read_results(path, truth.categories, truth.image_ids)


def average_precision(truth: AnnotationFile) -> float:
    """AP of the last results file, computed by pycocotools."""
    return float(oracle(truth.annotations, truth.annotations.with_name("results.json")).stats[0])


def test_detections_of_unknown_images_are_refused_as_pycocotools_does(truth: AnnotationFile) -> None:
    rows = [*RIGHT, *({**ROW, "image_id": image} for image in (99, 98, 97, 97, 96))]
    results = read(truth, rows)
    with pytest.raises(AssertionError, match="do not correspond to current coco set"):
        average_precision(truth)
    expected = r"not in the ground truth: 5 of 7, in 4 images \(image ids 96, 97, 98, \.\.\.\).* another .* split"
    for measure in (coco_metrics, voc_metrics, proposal_recall):
        with pytest.raises(ValueError, match=expected):
            measure(truth, results)


def test_detections_of_images_that_were_not_evaluated_are_left_out(truth: AnnotationFile) -> None:
    results = replace(read(truth, [*RIGHT, ROW]), evaluated=np.array([2]))
    expected = oracle(truth.annotations, truth.annotations.with_name("results.json"), imgIds=[2]).stats[0]
    assert coco_metrics(truth, results).summary["AP"] == pytest.approx(expected, abs=1e-12)
    assert coco_metrics(truth, replace(results, evaluated=np.array([1, 2]))).summary["AP"] < expected


@pytest.mark.parametrize(
    ("bbox", "ignored"), [([70, 60, -10, 10], True), ([70, 60, 10, -0.25], True), ([70, 70, -10, -10], False)]
)
def test_negative_sizes_are_refused(truth: AnnotationFile, bbox: list[float], ignored: bool) -> None:
    """Pycocotools ignores a box with one negative side (its area is negative) and counts one with two as wrong."""
    with pytest.raises(ValueError, match=r"results.json: entry 3: bbox \[7.*negative width or height.*1 of 3"):
        read(truth, [*RIGHT, {**ROW, "bbox": bbox}])
    assert (average_precision(truth) > 0.99) is ignored
    results = read(truth, [*RIGHT, ROW])
    results.boxes[2] = bbox
    for measure in (coco_metrics, voc_metrics, proposal_recall):
        with pytest.raises(ValueError, match="detection 2: box"):
            measure(truth, results)


def test_boxes_without_area_and_any_finite_scores_measure_as_in_pycocotools(truth: AnnotationFile) -> None:
    for changed in ({"bbox": [40, 40, 0, 0]}, {"bbox": [40, 40, 0, 9]}, {"score": 50}, {"score": -3}, {"score": 0}):
        metrics = coco_metrics(truth, read(truth, [*RIGHT, {**ROW, **changed}]))
        assert metrics.summary["AP"] == pytest.approx(average_precision(truth), abs=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_and_boxes_that_are_not_finite_are_refused(truth: AnnotationFile, value: float) -> None:
    """Pycocotools ranks NaN scores last and infinite scores first, and never matches a non-finite box."""
    for changed in ({"score": value}, {"bbox": [value, 60, 10, 10]}):
        with pytest.raises(ValueError, match=r"results.json contains (NaN|-?Infinity) at byte \d+.*Remove"):
            read(truth, [*RIGHT, {**ROW, **changed}])
    results = read(truth, [*RIGHT, ROW])
    for field, place in (("scores", 2), ("boxes", (2, 3))):
        values = getattr(results, field).copy()
        values[place] = value
        for measure in (coco_metrics, voc_metrics, proposal_recall):
            with pytest.raises(ValueError, match=r"detection 2: (score|box) .*not finite"):
                measure(truth, replace(results, **{field: values}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"score": None}, "score"),
        ({"score": "0.9"}, "score"),
        ({"bbox": [1, 2, 3]}, "length 4"),
        ({"category_id": 5}, r"category ids \[5\]"),
    ],
)
def test_other_faulty_entries_are_refused(truth: AnnotationFile, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"results.json.*{message}"):
        read(truth, [*RIGHT, {**ROW, **changed}])
    with pytest.raises(ValueError, match=r"results.json .*Number out of range"):
        read(truth, json.dumps([*RIGHT, ROW]).replace("0.95", "1e999"))


def test_a_missing_score_is_refused(truth: AnnotationFile) -> None:
    with pytest.raises(ValueError, match=r"results.json .*missing required field `score`"):
        read(truth, [*RIGHT, {name: value for name, value in ROW.items() if name != "score"}])
