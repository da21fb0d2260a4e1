from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import batched_nms

from boxwright.geometry.boxes import iou
from boxwright.ops.nms import grouped_nms, nms


def random_boxes(*shape: int, size: float = 400.0) -> Tensor:
    corner = torch.rand(*shape, 2) * size
    return torch.cat([corner, corner + 4 + torch.rand(*shape, 2) * size / 4], -1)


def greedy(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float, plus_one: float = 0.0):
    """Greedy NMS by definition, one box at a time, in float64."""
    selected: list[int] = []
    for index in sorted(valid.nonzero().flatten().tolist(), key=lambda index: -scores[index].item()):
        rivals = [other for other in selected if groups[other] == groups[index]]
        overlaps = iou(boxes[[index]].double(), boxes[rivals].double(), plus_one=plus_one)
        if not (overlaps > threshold).any():
            selected.append(index)
    return selected


@pytest.mark.parametrize("plus_one", [0.0, 1.0])
def test_nms_equals_the_definition(plus_one: float) -> None:
    torch.manual_seed(0)
    boxes, scores = random_boxes(3, 120, size=80).round(), torch.rand(3, 120)
    scores[:, 60:] = scores[:, :60].flip(1)  # Ties: the lower index is ranked first.
    groups, valid = torch.randint(-2, 2, (3, 120)), torch.rand(3, 120) < 0.8
    valid[2] = False
    boxes = torch.where(valid[..., None], boxes, torch.nan)
    scores = torch.where(valid, scores, torch.nan)
    indices, keep = nms(boxes, scores, groups, valid, iou_threshold=0.35, max_keep=130, plus_one=plus_one)
    assert indices.shape == keep.shape == (3, 130)
    for image in range(3):
        expected = greedy(boxes[image], scores[image], groups[image], valid[image], 0.35, plus_one)
        assert indices[image][keep[image]].tolist() == expected
        assert keep[image].tolist() == [True] * len(expected) + [False] * (130 - len(expected))
        assert not indices[image][~keep[image]].any()


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("num_groups", "num_candidates"), [(5, 10000), (80, 20000)])
@pytest.mark.parametrize("max_keep", [100, 1000, 20000])
@torch.inference_mode()
def test_nms_equals_torchvision(num_groups: int, num_candidates: int, max_keep: int, num_threads: int) -> None:
    torch.manual_seed(1)
    boxes, groups = random_boxes(num_candidates), torch.randint(num_groups, (num_candidates,))
    scores = torch.randperm(num_candidates) / num_candidates  # No ties: torchvision's order among them is undefined.
    indices, keep = nms(
        boxes[None],
        scores[None],
        groups[None],
        torch.ones(1, num_candidates, dtype=torch.bool),
        iou_threshold=0.5,
        max_keep=max_keep,
    )
    expected = batched_nms(boxes, scores, groups, 0.5)[:max_keep]
    assert torch.equal(indices[0, : len(expected)], expected)
    assert keep.sum() == len(expected)


@pytest.mark.parametrize(("size", "is_large"), [(2000, True), (100, False)])
def test_large_groups_run_in_threads_and_small_groups_sequentially(
    size: int, is_large: bool, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()
    original = torchvision.ops.nms

    def record_thread(*arguments: Tensor | float) -> Tensor:
        threads.add(threading.get_ident())
        return original(*arguments)

    monkeypatch.setattr(torchvision.ops, "nms", record_thread)
    groups = torch.arange(5).repeat_interleave(size)[None]
    boxes, scores = random_boxes(1, 5 * size), torch.rand(1, 5 * size)
    nms(boxes, scores, groups, torch.ones_like(groups, dtype=torch.bool), iou_threshold=0.5, max_keep=5 * size)
    assert (threading.get_ident() not in threads) == (is_large and num_threads > 1)


def test_a_box_with_an_iou_equal_to_the_threshold_is_kept() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 5.01]]])
    ones = torch.ones(1, 3)
    indices, keep = nms(boxes, -ones, ones.long(), ones.bool(), iou_threshold=0.5, max_keep=3)
    assert indices[0][keep[0]].tolist() == [0, 1]


def test_nms_without_candidates() -> None:
    indices, keep = nms(
        torch.zeros(2, 0, 4),
        torch.zeros(2, 0),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(2, 0, dtype=torch.bool),
        iou_threshold=0.5,
        max_keep=4,
    )
    assert not indices.any()
    assert not keep.any()


@pytest.mark.parametrize("num_valid", [0, 20])
def test_nms_is_a_valid_operator_and_compiles_to_one_graph(num_valid: int) -> None:
    boxes, scores, groups = random_boxes(2, 20), torch.rand(2, 20), torch.randint(3, (2, 20))
    valid = (torch.arange(20) < num_valid).expand(2, 20)
    torch.library.opcheck(grouped_nms, (boxes, scores, groups, valid, 0.5, 10, 0.0))

    def kept_scores(boxes: Tensor, scores: Tensor) -> Tensor:
        indices, keep = nms(boxes * 2, scores, groups, valid, iou_threshold=0.5, max_keep=10)
        return torch.where(keep, scores.gather(1, indices), 0.0)

    compiled = torch.compile(kept_scores, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(boxes, scores), kept_scores(boxes, scores))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert kept_scores(mode.from_tensor(boxes), mode.from_tensor(scores)).shape == (2, 10)


@pytest.mark.parametrize("max_keep", [40, 300, 900])
def test_nms_continues_if_the_best_candidates_overlap(max_keep: int) -> None:
    """The first 3000 candidates reduce to a few boxes, so boxes to keep are further down the sorted list."""
    torch.manual_seed(2)
    clusters = random_boxes(6).repeat(500, 1) + torch.rand(3000, 4)
    boxes, groups = torch.cat([clusters, random_boxes(3000)]), torch.randint(3, (6000,))
    scores = torch.arange(6000, 0, -1) / 6000
    all_valid = torch.ones(1, 6000, dtype=torch.bool)
    indices, keep = nms(boxes[None], scores[None], groups[None], all_valid, iou_threshold=0.5, max_keep=max_keep)
    expected = batched_nms(boxes, scores, groups, 0.5)
    assert (expected[:30] >= 3000).any(), "the test must need candidates after the first 3000"
    assert indices[keep].tolist() == expected[:max_keep].tolist()
