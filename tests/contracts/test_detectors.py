"""The contract of every detector: one graph, static shapes, no effect of padding, a gradient for every parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._functorch._aot_autograd.autograd_cache import check_cacheable
from torch._subclasses.fake_tensor import FakeTensorMode

from boxwright.heads import box_head, mask_head
from boxwright.heads.box_head import BoxHead
from boxwright.heads.box_sample import SampledBoxes
from boxwright.structures import Batch, MaskGrids, map_tensors
from boxwright.training.compiled import compiler_settings
from factory import CONTRACT_DETECTORS, NUM_PROPOSALS, random_batch, small_detector

NUM_SLOTS = 8
OBJECT_COUNTS = (0, 1, NUM_SLOTS)


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch._dynamo.reset()


class Cached(CompileCounterWithBackend):
    """Raises for a graph that PyTorch cannot cache and would therefore compile again in every process."""

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        check_cacheable(gm)  # Must run before compilation, which drops the metadata that it checks.
        return super().__call__(gm, example_inputs)


def with_gradients(
    detector: torch.nn.Module, losses: Callable[[Batch], dict[str, torch.Tensor]], batch: Batch
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the losses, and the gradient of their sum for each parameter."""
    detector.zero_grad()
    values = losses(batch)
    sum(values.values()).backward()
    return values, {name: parameter.grad for name, parameter in detector.named_parameters()}


@pytest.mark.parametrize("kind", CONTRACT_DETECTORS)
def test_shapes_of_losses_and_detections_do_not_depend_on_data(kind: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        detector = small_detector(kind)
        batch = map_tensors(random_batch(num_slots=NUM_SLOTS), mode.from_tensor)
        losses = detector.losses(batch)
        detections = detector.detect(batch)
    assert all(loss.shape == () and loss.dtype == torch.float32 for loss in losses.values())
    assert detections.boxes.shape[:2] == detections.scores.shape == detections.valid.shape
    assert detections.valid.shape[1] <= detector.max_detections


@pytest.mark.parametrize(("kind", "recompute"), [*((kind, False) for kind in CONTRACT_DETECTORS), ("mask_rcnn", True)])
def test_one_graph_serves_any_number_of_objects(kind: str, recompute: bool) -> None:
    """AOTAutograd traces losses and gradients once, as one graph, even with activation checkpointing (`recompute`).

    The graph can be cached for the next process, see `Cached`.
    """
    detector = small_detector(kind, recompute=recompute)
    counter = Cached("aot_eager")
    compiled = torch.compile(detector.losses, fullgraph=True, backend=counter)
    for count in OBJECT_COUNTS:
        batch = random_batch(num_slots=NUM_SLOTS, num_objects=count)
        with compiler_settings():
            losses, compiled_gradients = with_gradients(detector, compiled, batch)
        expected, gradients = with_gradients(detector, detector.losses, batch)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6, msg=f"{count} objects")
        for name, gradient in gradients.items():
            # A sum rounds relative to its largest term, so compare with the gradient's largest element.
            atol = 1e-4 * gradient.abs().max().item() + 1e-8
            torch.testing.assert_close(compiled_gradients[name], gradient, rtol=0, atol=atol, msg=f"{name}, {count}")
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", CONTRACT_DETECTORS)
@torch.no_grad()
def test_detection_is_one_graph(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU, eager mode skips unused slots, which changes rounding. Make both modes process all slots.
    for head in (box_head, mask_head):
        monkeypatch.setattr(head, "used_slots", lambda valid: valid.shape[1])
    detector = small_detector(kind)
    counter = CompileCounter()
    compiled = torch.compile(detector.detect, fullgraph=True, backend=counter)
    for _ in range(2):
        batch = random_batch()
        assert torch.equal(compiled(batch).boxes, detector.detect(batch).boxes)
    assert counter.frame_count == 1


@pytest.mark.parametrize("count", OBJECT_COUNTS)
@pytest.mark.parametrize("kind", CONTRACT_DETECTORS)
def test_every_parameter_gets_a_finite_gradient(kind: str, count: int) -> None:
    detector = small_detector(kind)
    losses = detector.losses(random_batch(num_slots=NUM_SLOTS, num_objects=count))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"gradient of {name} is not finite"


@pytest.mark.parametrize("kind", [*CONTRACT_DETECTORS, "ohem_cascade_rcnn"])
def test_every_parameter_gets_a_gradient_under_autocast(kind: str) -> None:
    """Autocast caches bfloat16 copies of weights; a copy made without a graph would cut off the weight's gradient."""
    detector, batch = small_detector(kind), random_batch(num_slots=NUM_SLOTS)
    # Proposals of all sizes, so that RoIAlign pools from every level of the pyramid.
    corners, ends = batch.proposals.boxes.split(2, dim=-1)
    scales = torch.tensor([1.0, 6.0, 16.0]).repeat(NUM_PROPOSALS)[:NUM_PROPOSALS, None]
    boxes = torch.cat([corners, corners + scales * (ends - corners)], dim=-1)
    batch = replace(batch, proposals=replace(batch.proposals, boxes=boxes))
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.losses(batch)
    sum(losses.values()).backward()
    without = [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without, f"no gradient: {', '.join(without)}"


@pytest.mark.parametrize("count", [0, NUM_SLOTS])
@pytest.mark.parametrize("kind", CONTRACT_DETECTORS)
def test_bfloat16_is_close_to_float32(kind: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, losses and boxes stay float32, and the full gradient has nearly the direction of float32's gradient.

    Both runs use the RoIs sampled in float32: rounding may move a proposal across the positive IoU threshold, which
    would change the loss. No other threshold in the losses depends on the detector's outputs.
    """
    detector = small_detector(kind)
    batch = random_batch(num_slots=NUM_SLOTS, num_objects=count)
    sampled: list[SampledBoxes] = []
    sample = BoxHead.sample
    with monkeypatch.context() as patch:
        patch.setattr(BoxHead, "sample", lambda *arguments: sampled.append(sample(*arguments)) or sampled[-1])
        expected = detector.losses(batch)
    sum(expected.values()).backward()
    gradient = torch.cat([p.grad.flatten() for p in detector.parameters()])
    detector.zero_grad()
    replayed = iter(sampled)
    monkeypatch.setattr(BoxHead, "sample", lambda *_: next(replayed))
    with torch.autocast("cpu", torch.bfloat16):
        actual = detector.losses(batch)
        with torch.no_grad():
            detections = detector.detect(batch)
    assert next(replayed, None) is None
    sum(actual.values()).backward()
    for name, loss in actual.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.05, atol=0.01, msg=name)
    rounded = torch.cat([p.grad.flatten() for p in detector.parameters()])
    assert rounded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rounded, gradient, dim=0) > 0.98
    assert detections.boxes.dtype == detections.scores.dtype == torch.float32
    assert detections.boxes[detections.valid].isfinite().all()


def outside_the_image(batch: Batch) -> torch.Tensor:
    rows = torch.arange(batch.images.shape[2])[None, :, None] >= batch.image_sizes[:, 0, None, None]
    columns = torch.arange(batch.images.shape[3])[None, None, :] >= batch.image_sizes[:, 1, None, None]
    return (rows | columns)[:, None].expand_as(batch.images)


@pytest.mark.parametrize("kind", CONTRACT_DETECTORS)
def test_content_of_padding_has_no_effect(kind: str) -> None:
    detector, batch = small_detector(kind), random_batch(num_slots=NUM_SLOTS)
    targets = batch.targets
    padded = ~targets.valid
    other = replace(
        batch,
        images=torch.where(outside_the_image(batch), 255 - batch.images, batch.images),
        targets=replace(
            targets,
            boxes=torch.where(padded[..., None], torch.tensor([5.0, 6.0, 60.0, 70.0]), targets.boxes),
            labels=torch.where(padded, 2 - targets.labels, targets.labels),
            crowd=targets.crowd | padded,
            masks=MaskGrids(
                bitmaps=torch.where(padded[..., None, None], 255 - targets.masks.bitmaps, targets.masks.bitmaps),
                frames=torch.where(padded[..., None], torch.tensor([5.0, 6.0, 60.0, 70.0]), targets.masks.frames),
                valid=targets.masks.valid | padded,
            ),
        ),
    )
    assert not torch.equal(batch.images, other.images)
    actual, expected = detector.losses(other), detector.losses(batch)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    actual_boxes, expected_boxes = detector.detect(other), detector.detect(batch)
    assert torch.equal(actual_boxes.boxes, expected_boxes.boxes)
    assert torch.equal(actual_boxes.scores, expected_boxes.scores)
    if expected_boxes.masks is not None:
        assert torch.equal(actual_boxes.masks, expected_boxes.masks)


def test_content_of_proposal_padding_has_no_effect() -> None:
    detector, batch = small_detector("fast_rcnn"), random_batch()
    proposals = batch.proposals
    padded = ~proposals.valid
    other = replace(
        proposals,
        boxes=torch.where(padded[..., None], torch.tensor([5.0, 6.0, 60.0, 70.0]), proposals.boxes),
        scores=torch.where(padded, 1.0, proposals.scores),
        sources=torch.where(padded, 3, proposals.sources),
    )
    wider = map_tensors(other, lambda t: torch.cat([t, torch.zeros_like(t[:, :9])], 1))
    for proposals in (other, wider):
        changed = replace(batch, proposals=proposals)
        losses, expected_losses = detector.losses(changed), detector.losses(batch)
        assert all(torch.allclose(losses[name], expected_losses[name], rtol=1e-5) for name in expected_losses)
        detections, expected = detector.detect(changed), detector.detect(batch)
        assert torch.equal(detections.valid, expected.valid)
        assert expected.valid.any()
        torch.testing.assert_close(detections.boxes[expected.valid], expected.boxes[expected.valid])


def test_losses_do_not_depend_on_the_order_of_proposals() -> None:
    detector, batch = small_detector("fast_rcnn"), random_batch()
    turned = replace(batch, proposals=map_tensors(batch.proposals, lambda t: t.flip(1)))
    losses, expected = detector.losses(turned), detector.losses(batch)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CONTRACT_DETECTORS)
def test_additional_object_slots_have_no_effect(kind: str) -> None:
    detector, batch = small_detector(kind), random_batch(num_slots=NUM_SLOTS)
    wider = map_tensors(batch.targets, lambda t: torch.cat([t, torch.zeros_like(t).expand(-1, 8, *t.shape[2:])], 1))
    actual, expected = detector.losses(replace(batch, targets=wider)), detector.losses(batch)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-7)
