from __future__ import annotations

import pytest
import torch

from boxwright.heads.suppression import Suppression

BOXES = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 8], [50, 50, 60, 60], [torch.nan] * 4]])
SCORES = torch.tensor([[0.9, 0.8, 0.7, 0.2, 0.95]])
LABELS = torch.tensor([[1, 1, 0, 1, 1]])
VALID = torch.tensor([[True, True, True, True, False]])


def kept_detections(rule: Suppression) -> list[tuple[float, int]]:
    detections = rule(BOXES, SCORES, LABELS, VALID)
    valid = detections.valid[0]
    assert detections.boxes[0][valid].isfinite().all()
    return list(zip(detections.scores[0][valid].tolist(), detections.labels[0][valid].tolist(), strict=True))


def approx(*expected: tuple[float, int]) -> list:
    return [(pytest.approx(score), label) for score, label in expected]


def test_hard_nms_removes_boxes_within_a_class() -> None:
    rule = Suppression(score_threshold=0.1, iou_threshold=0.5, max_detections=5)
    assert kept_detections(rule) == approx((0.9, 1), (0.7, 0), (0.2, 1))


def test_soft_nms_reduces_scores_within_a_class_and_applies_the_threshold() -> None:
    # Linear decay at an IoU of 0.8: 0.8 * (1 - 0.8) = 0.16.
    linear = Suppression(score_threshold=0.1, iou_threshold=0.5, max_detections=5, method="linear")
    assert kept_detections(linear) == approx((0.9, 1), (0.7, 0), (0.2, 1), (0.16, 1))
    stricter = Suppression(score_threshold=0.17, iou_threshold=0.5, max_detections=5, method="linear")
    assert kept_detections(stricter) == approx((0.9, 1), (0.7, 0), (0.2, 1))
    gaussian = Suppression(score_threshold=0.1, iou_threshold=0.5, max_detections=5, method="gaussian", sigma=0.64)
    assert kept_detections(gaussian) == approx((0.9, 1), (0.7, 0), (0.8 * 0.36787944, 1), (0.2, 1))


def test_max_detections_applies_to_all_classes_together() -> None:
    assert kept_detections(Suppression(score_threshold=0.0, iou_threshold=0.5, max_detections=2)) == approx(
        (0.9, 1), (0.7, 0)
    )
