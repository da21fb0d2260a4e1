from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

import boxwright.assign.match as module
from boxwright.assign.match import IGNORED, NEGATIVE, POSITIVE, Matches, match
from boxwright.geometry.anchors import base_anchors, grid_anchors
from boxwright.geometry.boxes import area, intersection, iou
from boxwright.structures import Targets, map_tensors

RPN = {"positive_iou": 0.7, "negative_iou": 0.3}
NAN = float("nan")


def anchors_of(height: int = 160, width: int = 224) -> Tensor:
    strides = (8, 16, 32)
    base = [base_anchors([4 * stride], (0.5, 1.0, 2.0), "torchvision") for stride in strides]
    return torch.cat(grid_anchors([(height // stride, width // stride) for stride in strides], strides, base))


def targets_of(*images: Tensor, slots: int = 8) -> Targets:
    """Objects in the first slots; unused slots contain NaN."""
    boxes = torch.full((len(images), slots, 4), NAN)
    valid = torch.zeros(len(images), slots, dtype=torch.bool)
    for image, objects in enumerate(images):
        boxes[image, : len(objects)] = objects
        valid[image, : len(objects)] = True
    labels = torch.zeros(len(images), slots, dtype=torch.int64)
    return Targets(boxes=boxes, labels=labels, valid=valid, crowd=torch.zeros_like(valid))


def random_objects(count: int, seed: int) -> Tensor:
    """Boxes with integer coordinates. The first equals an anchor and the last is a duplicate, so that IoUs tie."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 100, (count, 2), generator=generator)
    size = torch.randint(8, 100, (count, 2), generator=generator)
    boxes = torch.cat([corner, corner + size], dim=-1).float()
    boxes[0] = anchors_of()[500 + seed]
    boxes[-1] = boxes[0]
    return boxes


@pytest.fixture(params=["at once", "in tiles"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in tiles":
        monkeypatch.setattr(module, "CPU_TILE", 10_000)
        monkeypatch.setattr(module, "TILE_OBJECTS", 3)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("low_quality", [0.0, None])
def test_match_equals_torchvision(low_quality: float | None) -> None:
    anchors, images = anchors_of(), [random_objects(count, seed) for seed, count in enumerate((2, 5, 8))]
    ours = match(anchors, targets_of(*images), **RPN, low_quality=low_quality)
    for image, objects in enumerate(images):
        theirs = Matcher(0.7, 0.3, allow_low_quality_matches=low_quality is not None)(box_iou(objects, anchors))
        expected = torch.where(theirs >= 0, 1, torch.where(theirs == Matcher.BELOW_LOW_THRESHOLD, 0, -1))
        assert torch.equal(ours.labels[image], expected)
        assert torch.equal(ours.matched[image], theirs.clamp(min=0))


def rule_by_hand(
    candidates: Tensor, targets: Targets, image: int, low_quality: float, plus_one: float
) -> list[list[int]]:
    """Labels and matches of one image by the documented rule, one candidate at a time, in float64."""
    slots = [s for s in range(targets.valid.shape[1]) if targets.valid[image, s] and not targets.crowd[image, s]]
    crowds = [s for s in range(targets.valid.shape[1]) if targets.valid[image, s] and targets.crowd[image, s]]
    boxes = targets.boxes[image].double()
    table = iou(boxes[slots], candidates.double(), plus_one).tolist()
    shared = intersection(candidates.double(), boxes[crowds], plus_one)
    inside = (shared / area(candidates.double(), plus_one).clamp(min=1e-300)[:, None]).tolist()
    best_of_object = [max(row) for row in table]
    result = []
    for n in range(len(candidates)):
        column = [row[n] for row in table]
        best = max(column, default=0.0)
        is_best = any(v == b and b > 0 and b >= low_quality for v, b in zip(column, best_of_object, strict=True))
        if best >= 0.7 or is_best:
            result.append([1, slots[column.index(best)]])
        else:
            result.append([0 if best < 0.3 and max(inside[n], default=0.0) < 0.7 else -1, 0])
    return result


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("plus_one", [0.0, 1.0])
def test_match_equals_the_rule_of_mmdetection_0_5(plus_one: float) -> None:
    anchors = anchors_of()
    targets = targets_of(random_objects(6, 0), random_objects(3, 1), torch.zeros(0, 4))
    crowd = torch.zeros_like(targets.crowd)
    crowd[0, 1] = crowd[1, 0] = True
    targets = replace(targets, crowd=crowd)
    ours = match(anchors, targets, **RPN, low_quality=0.3, plus_one=plus_one)
    for image in range(3):
        expected = rule_by_hand(anchors, targets, image, 0.3, plus_one)
        assert torch.stack([ours.labels[image], ours.matched[image]], -1).tolist() == expected
    assert (ours.labels[0] == -1).any()
    assert (ours.labels[2] == 0).all()


def test_the_minimum_iou_of_low_quality_matches() -> None:
    candidates = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    objects = torch.tensor([[5.0, 0.0, 15.0, 10.0]])  # IoU 1/3 with the first, 0 with the second
    for minimum, expected in ((0.0, 1), (0.33, 1), (0.34, -1), (None, -1)):
        assert match(candidates, targets_of(objects), **RPN, low_quality=minimum).labels.tolist() == [[expected, 0]]
    no_overlap = targets_of(torch.tensor([[20.0, 20.0, 30.0, 30.0]]))
    assert match(candidates, no_overlap, **RPN, low_quality=0.0).labels.tolist() == [[0, 0]]


def test_candidates_per_image_and_invalid_candidates() -> None:
    objects = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    candidates = torch.tensor(
        [[[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 6.0], [NAN] * 4], [[90.0, 90.0, 99.0, 99.0]] * 3]
    )
    valid = torch.tensor([[False, True, False], [True, True, False]])
    matches = match(candidates, targets_of(objects, objects), **RPN, low_quality=0.3, candidates_valid=valid)
    # The best candidate is invalid, so the second is the best match of the object.
    assert matches.labels.tolist() == [[-1, 1, -1], [0, 0, -1]]
    shared = match(candidates[0], targets_of(objects), **RPN, low_quality=0.3, candidates_valid=valid[0])
    assert shared.labels.tolist() == [[-1, 1, -1]]


def test_a_proposal_inside_a_crowd_region_is_ignored_unless_positive() -> None:
    targets = targets_of(torch.tensor([[0.0, 0.0, 100.0, 100.0], [20.0, 20.0, 40.0, 40.0]]))
    targets = replace(targets, crowd=torch.tensor([[True, False] + [False] * 6]))
    candidates = torch.tensor([[0.0, 0.0, 100.0, 99.0], [20.0, 20.0, 40.0, 40.0], [90.0, 0.0, 110.0, 10.0]])
    matches = match(candidates, targets, positive_iou=0.5, negative_iou=0.5)
    assert matches.labels.tolist() == [[-1, 1, 0]]
    assert matches.matched.tolist() == [[0, 1, 0]]


def test_boxes_without_area_are_negative() -> None:
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    assert match(point, targets_of(point), **RPN, low_quality=0.0).labels.tolist() == [[0]]
    crowd = replace(targets_of(point), crowd=torch.ones(1, 8, dtype=torch.bool))
    assert match(point, crowd, **RPN, low_quality=0.0).labels.tolist() == [[0]]


def rpn_match(anchors: Tensor, targets: Targets, valid: Tensor) -> Matches:
    return match(anchors, targets, **RPN, low_quality=0.3, candidates_valid=valid)


def test_match_compiles_to_one_graph_and_runs_on_fake_tensors() -> None:
    anchors, targets = anchors_of(), targets_of(random_objects(6, 0), torch.zeros(0, 4))
    valid = (anchors >= 0).all(-1).expand(2, -1)
    ours = rpn_match(anchors, targets, valid)
    compiled = torch.compile(rpn_match, fullgraph=True, backend="aot_eager")(anchors, targets, valid)
    assert torch.equal(ours.labels, compiled.labels)
    assert torch.equal(ours.matched, compiled.matched)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert rpn_match(anchors, targets, valid).labels.shape == (2, len(anchors))


def retinanet_match(anchors: Tensor, targets: Targets, valid: Tensor) -> Matches:
    return match(anchors, targets, positive_iou=0.5, negative_iou=0.4, low_quality=0.0)


@pytest.mark.parametrize("matching", [rpn_match, retinanet_match])
def test_the_graph_for_a_gpu_is_small_for_many_pairs(matching: Any) -> None:
    torch._dynamo.reset()  # otherwise Dynamo traces symbolic sizes, which add nodes
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode(), torch.device("cuda"):
        anchors = torch.empty(268_569, 4)
        slots = torch.ones(16, 128, dtype=torch.bool)
        targets = Targets(boxes=torch.empty(16, 128, 4), labels=slots.long(), valid=slots, crowd=slots)
        valid = torch.ones(16, len(anchors), dtype=torch.bool)
        torch.compile(matching, fullgraph=True, backend=record)(anchors, targets, valid)
    assert len(graphs) == 1
    assert len(graphs[0].graph.nodes) < 60


def test_tiles_do_not_synchronise_with_the_gpu() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        candidates, objects = torch.empty(1, 5000, 4), torch.empty(2, 300, 4)
        areas, object_areas = torch.empty(1, 5000), torch.empty(2, 300)
        results = module.compare(
            candidates, areas, objects, object_areas, torch.zeros(2, 300), 0.0, 0.7, 0.3, tile=100_000
        )
    assert {result.device.type for result in results} == {"cuda"}
    assert {result.shape for result in results} == {(2, 5000)}


def test_the_tiled_gpu_form_equals_the_cpu_form() -> None:
    targets = targets_of(random_objects(6, 0), random_objects(3, 1), torch.zeros(0, 4))
    objects = targets.boxes.nan_to_num()
    object_areas = area(objects).masked_fill(~targets.valid, torch.inf)
    crowd = torch.zeros(3, 8)
    crowd[0, 1] = 1
    arguments = (anchors_of()[None], area(anchors_of())[None], objects, object_areas, crowd, 0.0, 0.7, 0.3)
    for on_cpu, on_gpu in zip(module.compare_all(*arguments), module.compare(*arguments, 50_000), strict=True):
        assert torch.equal(on_cpu, on_gpu)


class LargestResult(TorchDispatchMode):
    """Records the number of elements of the largest result of any operation."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_memory_is_limited_by_the_tile_size() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(25_000, 2, generator=generator) * 1000
    boxes = torch.cat([corners, corners + 8 + 40 * torch.rand(25_000, 2, generator=generator)], -1)
    objects, candidates = boxes[None, :5000], boxes[None, 5000:]
    tile = 2**17
    with LargestResult() as largest:
        best_iou, matched, _, _ = module.compare(
            candidates, area(candidates), objects, area(objects), torch.zeros(1, 5000), 0.0, 0.7, 0.3, tile
        )
    assert largest.num_elements <= tile < objects.shape[1] * candidates.shape[1] / 700
    subset = torch.arange(0, 20_000, 400)
    expected = box_iou(objects[0], candidates[0, subset]).max(0)
    torch.testing.assert_close(best_iou[0, subset], expected.values)
    assert torch.equal(matched[0, subset], torch.where(expected.values > 0, expected.indices, 0))


def test_the_operator_passes_opcheck() -> None:
    objects = random_objects(5, 0)[None]
    arguments = (anchors_of()[None], area(anchors_of())[None], objects, area(objects), torch.zeros(1, 5), 0.0, 0.7, 0.3)
    torch.library.opcheck(module.compare_all, arguments)


def test_empty_slots_between_objects_change_nothing() -> None:
    packed = targets_of(random_objects(5, 0), random_objects(3, 1))
    slots = torch.tensor([1, 2, 4, 6, 7, 0, 3, 5])  # new position of each slot; 0, 3 and 5 are empty in both images
    scattered = map_tensors(packed, lambda tensor: torch.empty_like(tensor).index_copy_(1, slots, tensor))
    all_valid = torch.ones(len(anchors_of()), dtype=torch.bool)
    expected, actual = (rpn_match(anchors_of(), targets, all_valid) for targets in (packed, scattered))
    positive = expected.labels == POSITIVE
    assert positive.any(1).all()
    assert torch.equal(actual.labels, expected.labels)
    assert torch.equal(actual.matched[positive], slots[expected.matched[positive]])


@pytest.mark.parametrize(
    ("value", "coordinate"), [(NAN, 0), (NAN, 1), (NAN, 2), (NAN, 3), (torch.inf, 2), (torch.inf, 3), (-torch.inf, 0)]
)
@pytest.mark.parametrize("low_quality", [None, 0.0])
@pytest.mark.parametrize("some_invalid", [False, True], ids=["all_valid", "some_valid"])
def test_candidates_that_are_not_finite_are_ignored(
    value: float, coordinate: int, low_quality: float | None, some_invalid: bool
) -> None:
    """The results of the other candidates do not change."""
    candidates, targets = anchors_of(), targets_of(random_objects(6, 0), random_objects(3, 1))
    valid = torch.arange(len(candidates)) % 5 > 0 if some_invalid else torch.ones(len(candidates), dtype=torch.bool)
    faulty = torch.arange(len(candidates)) % 3 == 0
    expected = match(candidates, targets, **RPN, low_quality=low_quality, candidates_valid=valid & ~faulty)
    broken = candidates.clone()
    broken[faulty, coordinate] = value
    result = match(broken, targets, **RPN, low_quality=low_quality, candidates_valid=valid if some_invalid else None)
    assert torch.equal(result.labels, expected.labels)
    assert torch.equal(result.matched, expected.matched)
    assert (result.labels[:, faulty] == IGNORED).all()


@pytest.mark.parametrize(("value", "coordinate"), [(torch.inf, 0), (-torch.inf, 3)])
def test_infinitely_inverted_candidates_are_negative(value: float, coordinate: int) -> None:
    candidates, targets = anchors_of(), targets_of(random_objects(6, 0))
    candidates[::3, coordinate] = value
    result = match(candidates, targets, **RPN, low_quality=0.0)
    assert (result.labels[:, ::3] == NEGATIVE).all()
    assert (result.labels == POSITIVE).any()
