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


def the_paper_s(
    boxes: Tensor, scores: Tensor, decay: Decay, threshold: float, min_score: float, plus_one: float
) -> dict[int, float]:
    """Figure 2 of the paper on the boxes of one group, in float64: the final score of every box that is left."""
    overlaps = iou(boxes.double(), boxes.double(), plus_one)
    left = {index: score for index, score in enumerate(scores.double().tolist()) if score > min_score}
    final = {}
    while left:
        best = max(left, key=lambda index: (left[index], -index))
        final[best] = left.pop(best)
        for other in list(left):
            overlap = overlaps[best, other].item()
            if decay == "gaussian":
                left[other] *= math.exp(-(overlap**2) / SIGMA)
            elif overlap > threshold:
                left[other] *= 1 - overlap
            if left[other] <= min_score:
                del left[other]
    return final


@FORMS
@DECAYS
@pytest.mark.parametrize("plus_one", [0.0, 1.0])
@pytest.mark.parametrize("max_keep", [25, 130])
def test_is_the_paper_s(form: Callable, decay: Decay, plus_one: float, max_keep: int) -> None:
    torch.manual_seed(0)
    boxes, scores = random_boxes(3, 120, size=30), torch.rand(3, 120)
    groups, valid = torch.randint(-2, 2, (3, 120)), torch.rand(3, 120) < 0.8
    valid[2] = False
    boxes = torch.where(valid[..., None], boxes, torch.nan)
    scores = torch.where(valid, scores, torch.nan)
    indices, lowered, kept = form(
        boxes, scores, groups, valid, decay == "gaussian", 0.35, SIGMA, 0.1, max_keep, plus_one
    )
    assert indices.shape == lowered.shape == kept.shape == (3, max_keep)
    num_lowered = 0
    for image in range(3):
        final: dict[int, float] = {}
        for group in range(-2, 2):
            members = (valid[image] & (groups[image] == group)).nonzero().flatten()
            own = the_paper_s(boxes[image, members], scores[image, members], decay, 0.35, 0.1, plus_one)
            final |= {int(members[place]): score for place, score in own.items()}
        expected = sorted(final, key=lambda index: -final[index])[:max_keep]
        assert indices[image][kept[image]].tolist() == expected
        assert kept[image].tolist() == [True] * len(expected) + [False] * (max_keep - len(expected))
        assert lowered[image][kept[image]].tolist() == pytest.approx([final[index] for index in expected], rel=1e-5)
        assert not indices[image][~kept[image]].any()
        assert not lowered[image][~kept[image]].any()
        num_lowered += sum(score < scores[image, index] - 1e-3 for index, score in final.items())
    assert num_lowered > 20


@FORMS
def test_of_equal_scores_the_lower_index_is_first(form: Callable) -> None:
    boxes = torch.arange(8.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    groups = torch.tensor([[3, 1, 2, 1, 0, 3, 2, 0]])
    indices, _, kept = form(
        boxes[None], torch.full((1, 8), 0.5), groups, torch.ones(1, 8).bool(), False, 0.5, SIGMA, 0.0, 8, 0.0
    )
    assert indices.tolist() == [list(range(8))]
    assert kept.all()


@FORMS
def test_linear_decay_begins_above_the_threshold_and_bounds_are_left_out(form: Callable) -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10], [40, 40, 50, 50]]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.25]])
    zeros, ones = torch.zeros(1, 4).long(), torch.ones(1, 4).bool()
    indices, lowered, kept = form(boxes, scores, zeros, ones, False, 0.5, SIGMA, 0.25, 4, 0.0)
    # IoU 0.5 is not above the threshold; the copy falls to 0; 0.25 is not above the least score.
    assert indices[0][kept[0]].tolist() == [0, 1]
    assert torch.equal(lowered[0], torch.tensor([0.9, 0.8, 0.0, 0.0]))


def test_a_threshold_that_nothing_exceeds_lowers_nothing() -> None:
    torch.manual_seed(1)
    boxes, scores, groups = random_boxes(2, 300), torch.rand(2, 300), torch.randint(5, (2, 300))
    valid = torch.rand(2, 300) < 0.9
    apart = nms(boxes, scores, groups, valid, iou_threshold=1.0, max_keep=300)
    gentle = soft_nms(
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
    assert torch.equal(gentle[0], apart[0])
    assert torch.equal(gentle[2], apart[1])
    assert torch.equal(gentle[1][gentle[2]], scores.gather(1, apart[0])[apart[1]])


@FORMS
@pytest.mark.parametrize("num_boxes", [0, 3])
def test_few_or_no_candidates(form: Callable, num_boxes: int) -> None:
    indices, lowered, kept = form(
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
    assert not lowered.any()
    assert kept.tolist() == [[False] * 5] * 2


@DECAYS
def test_is_one_operator_for_the_compiler(decay: Decay) -> None:
    boxes, scores, groups = random_boxes(2, 20), torch.rand(2, 20), torch.randint(3, (2, 20))
    valid = torch.rand(2, 20) < 0.8
    torch.library.opcheck(
        grouped_soft_nms, (boxes, scores, groups, valid, decay == "gaussian", 0.5, SIGMA, 0.05, 10, 0.0)
    )

    def lowered(boxes: Tensor, scores: Tensor) -> Tensor:
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

    compiled = torch.compile(lowered, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(boxes, scores), lowered(boxes, scores))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert lowered(mode.from_tensor(boxes), mode.from_tensor(scores)).shape == (2, 10)
