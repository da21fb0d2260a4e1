from __future__ import annotations

import pytest
import torch

from boxwright.heads.suppression import Suppression

BOXES = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 8], [50, 50, 60, 60], [torch.nan] * 4]])
SCORES = torch.tensor([[0.9, 0.8, 0.7, 0.2, 0.95]])
LABELS = torch.tensor([[1, 1, 0, 1, 1]])
VALID = torch.tensor([[True, True, True, True, False]])


def found(rule: Suppression) -> list[tuple[float, int]]:
    detections = rule(BOXES, SCORES, LABELS, VALID)
    kept = detections.valid[0]
    assert detections.boxes[0][kept].isfinite().all()
    return list(zip(detections.scores[0][kept].tolist(), detections.labels[0][kept].tolist(), strict=True))


def near(*expected: tuple[float, int]) -> list:
    return [(pytest.approx(score), label) for score, label in expected]


def test_hard_drops_within_a_class() -> None:
    rule = Suppression(score_threshold=0.1, iou_threshold=0.5, max_detections=5)
    assert found(rule) == near((0.9, 1), (0.7, 0), (0.2, 1))


def test_soft_lowers_within_a_class_and_drops_what_falls_to_the_threshold() -> None:
    # An IoU of 0.8 leaves a fifth of 0.8.
    linear = Suppression(score_threshold=0.1, iou_threshold=0.5, max_detections=5, method="linear")
    assert found(linear) == near((0.9, 1), (0.7, 0), (0.2, 1), (0.16, 1))
    stricter = Suppression(score_threshold=0.17, iou_threshold=0.5, max_detections=5, method="linear")
    assert found(stricter) == near((0.9, 1), (0.7, 0), (0.2, 1))
    gaussian = Suppression(score_threshold=0.1, iou_threshold=0.5, max_detections=5, method="gaussian", sigma=0.64)
    assert found(gaussian) == near((0.9, 1), (0.7, 0), (0.8 * 0.36787944, 1), (0.2, 1))


def test_the_best_of_all_classes_stay() -> None:
    assert found(Suppression(score_threshold=0.0, iou_threshold=0.5, max_detections=2)) == near((0.9, 1), (0.7, 0))
