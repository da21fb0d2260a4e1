from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from boxwright.geometry.boxes import iou
from boxwright.ops.nms import nms
from boxwright.ops.soft_nms import Decay, every_box_a_round, grouped_soft_nms, soft_nms

FORMS = pytest.mark.parametrize("form", [grouped_soft_nms, every_box_a_round], ids=["cpu", "cuda"])
DECAYS = pytest.mark.parametrize("decay", ["linear", "gaussian"])
SIGMA = 0.5


def random_boxes(*shape: int, size: float = 150.0) -> Tensor:
    corner = torch.rand(*shape, 2) * size
    return torch.cat([corner, corner + 4 + torch.rand(*shape, 2) * size / 2], -1)


def reference(
    boxes: Tensor, scores: Tensor, decay: Decay, threshold: float, min_score: float, plus_one: float
) -> dict[int, float]:
    """Soft-NMS as in figure 2 of the paper, for one group in float64: final scores of the remaining boxes by index."""
    overlaps = iou(boxes.double(), boxes.double(), plus_one)
    remaining = {index: score for index, score in enumerate(scores.double().tolist()) if score > min_score}
    final = {}
    while remaining:
        best = max(remaining, key=lambda index: (remaining[index], -index))
        final[best] = remaining.pop(best)
        for other in list(remaining):
            overlap = overlaps[best, other].item()
            if decay == "gaussian":
                remaining[other] *= math.exp(-(overlap**2) / SIGMA)
            elif overlap > threshold:
                remaining[other] *= 1 - overlap
            if remaining[other] <= min_score:
                del remaining[other]
    return final


@FORMS
@DECAYS
@pytest.mark.parametrize("plus_one", [0.0, 1.0])
@pytest.mark.parametrize("max_keep", [25, 130])
def test_soft_nms_equals_the_paper(form: Callable, decay: Decay, plus_one: float, max_keep: int) -> None:
    torch.manual_seed(0)
    boxes, scores = random_boxes(3, 120, size=30), torch.rand(3, 120)
    groups, valid = torch.randint(-2, 2, (3, 120)), torch.rand(3, 120) < 0.8
    valid[2] = False
    boxes = torch.where(valid[..., None], boxes, torch.nan)
    scores = torch.where(valid, scores, torch.nan)
    indices, new_scores, keep = form(
        boxes, scores, groups, valid, decay == "gaussian", 0.35, SIGMA, 0.1, max_keep, plus_one
    )
    assert indices.shape == new_scores.shape == keep.shape == (3, max_keep)
    num_reduced = 0
    for image in range(3):
        final: dict[int, float] = {}
        for group in range(-2, 2):
            members = (valid[image] & (groups[image] == group)).nonzero().flatten()
            group_scores = reference(boxes[image, members], scores[image, members], decay, 0.35, 0.1, plus_one)
            final |= {int(members[index]): score for index, score in group_scores.items()}
        expected = sorted(final, key=lambda index: -final[index])[:max_keep]
        assert indices[image][keep[image]].tolist() == expected
        assert keep[image].tolist() == [True] * len(expected) + [False] * (max_keep - len(expected))
        assert new_scores[image][keep[image]].tolist() == pytest.approx([final[index] for index in expected], rel=1e-5)
        assert not indices[image][~keep[image]].any()
        assert not new_scores[image][~keep[image]].any()
        num_reduced += sum(score < scores[image, index] - 1e-3 for index, score in final.items())
    assert num_reduced > 20


@FORMS
def test_for_equal_scores_the_lower_index_is_first(form: Callable) -> None:
    boxes = torch.arange(8.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    groups = torch.tensor([[3, 1, 2, 1, 0, 3, 2, 0]])
    indices, _, keep = form(
        boxes[None], torch.full((1, 8), 0.5), groups, torch.ones(1, 8).bool(), False, 0.5, SIGMA, 0.0, 8, 0.0
    )
    assert indices.tolist() == [list(range(8))]
    assert keep.all()


@FORMS
def test_linear_decay_and_minimum_score_exclude_their_bounds(form: Callable) -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10], [40, 40, 50, 50]]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.25]])
    zeros, ones = torch.zeros(1, 4).long(), torch.ones(1, 4).bool()
    indices, new_scores, keep = form(boxes, scores, zeros, ones, False, 0.5, SIGMA, 0.25, 4, 0.0)
    # An IoU of 0.5 is not above the threshold. The score of the duplicate becomes 0. 0.25 is not above min_score.
    assert indices[0][keep[0]].tolist() == [0, 1]
    assert torch.equal(new_scores[0], torch.tensor([0.9, 0.8, 0.0, 0.0]))


def test_with_an_iou_threshold_of_1_soft_nms_equals_nms() -> None:
    torch.manual_seed(1)
    boxes, scores, groups = random_boxes(2, 300), torch.rand(2, 300), torch.randint(5, (2, 300))
    valid = torch.rand(2, 300) < 0.9
    hard = nms(boxes, scores, groups, valid, iou_threshold=1.0, max_keep=300)
    soft = soft_nms(
        boxes,
        scores,
        groups,
        valid,
        decay="linear",
        iou_threshold=1.0,
        sigma=SIGMA,
        min_score=0.0,
        max_keep=300,
    )
    assert torch.equal(soft[0], hard[0])
    assert torch.equal(soft[2], hard[1])
    assert torch.equal(soft[1][soft[2]], scores.gather(1, hard[0])[hard[1]])


@FORMS
@pytest.mark.parametrize("num_boxes", [0, 3])
def test_soft_nms_without_valid_candidates(form: Callable, num_boxes: int) -> None:
    indices, new_scores, keep = form(
        torch.zeros(2, num_boxes, 4),
        torch.zeros(2, num_boxes),
        torch.zeros(2, num_boxes, dtype=torch.int64),
        torch.zeros(2, num_boxes, dtype=torch.bool),
        True,
        0.5,
        SIGMA,
        0.0,
        5,
        0.0,
    )
    assert not indices.any()
    assert not new_scores.any()
    assert keep.tolist() == [[False] * 5] * 2


@DECAYS
def test_soft_nms_is_a_valid_operator_and_compiles_to_one_graph(decay: Decay) -> None:
    boxes, scores, groups = random_boxes(2, 20), torch.rand(2, 20), torch.randint(3, (2, 20))
    valid = torch.rand(2, 20) < 0.8
    torch.library.opcheck(
        grouped_soft_nms, (boxes, scores, groups, valid, decay == "gaussian", 0.5, SIGMA, 0.05, 10, 0.0)
    )

    def new_scores(boxes: Tensor, scores: Tensor) -> Tensor:
        return soft_nms(
            boxes * 2,
            scores,
            groups,
            valid,
            decay=decay,
            iou_threshold=0.5,
            sigma=SIGMA,
            min_score=0.05,
            max_keep=10,
        )[1]

    compiled = torch.compile(new_scores, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(boxes, scores), new_scores(boxes, scores))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert new_scores(mode.from_tensor(boxes), mode.from_tensor(scores)).shape == (2, 10)
