from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from boxwright.heads.box_head import BoxConfig, BoxHead
from boxwright.structures import Proposals, map_tensors
from factory import random_targets

CANVAS = (128, 160)


@pytest.fixture
def head() -> BoxHead:
    torch.manual_seed(0)
    return BoxHead(8, (4, 8, 16, 32), num_classes=3, config=BoxConfig(width=16, num_sampled=24))


def random_proposals(num_images: int = 2, num_proposals: int = 100) -> Proposals:
    targets = random_targets(num_images, num_proposals, num_proposals, CANVAS, 1)
    return Proposals(
        boxes=targets.boxes,
        scores=torch.rand(num_images, num_proposals).sort(descending=True).values,
        valid=torch.rand(num_images, num_proposals) < 0.9,
        sources=torch.stack([torch.randperm(10_000)[:num_proposals] for _ in range(num_images)]),
    )


def test_the_sample_does_not_depend_on_the_order_of_proposals(head: BoxHead) -> None:
    proposals, targets, seeds = random_proposals(), random_targets(2, 8, 3, CANVAS, 3), torch.tensor([5, 6])
    shuffled = map_tensors(proposals, lambda t: t[:, torch.randperm(100, generator=torch.Generator().manual_seed(1))])
    from_shuffled, from_sorted = (head.sample(p, targets, seeds) for p in (shuffled, proposals))
    for one, two in zip(from_shuffled, from_sorted, strict=True):
        assert torch.equal(one, two)


def test_ground_truth_is_sampled_and_positives_come_first(head: BoxHead) -> None:
    targets = random_targets(2, 8, 3, CANVAS, 3)
    far = replace(random_proposals(), boxes=torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 100, 4))
    boxes, matched, positive, valid, _ = head.sample(far, targets, torch.tensor([5, 6]))
    assert positive.sum(1).tolist() == [3, 3]
    assert positive[:, :3].all()
    assert sorted(matched[0, :3].tolist()) == [0, 1, 2]
    assert torch.equal(boxes[0, :3], targets.boxes[0, matched[0, :3]])
    assert valid.all()


def test_proposals_in_a_crowd_region_are_not_sampled(head: BoxHead) -> None:
    targets = random_targets(1, 1, 1, CANVAS, 3)
    crowd = replace(targets, crowd=torch.ones(1, 1, dtype=torch.bool))
    inside = replace(random_proposals(1), boxes=targets.boxes.expand(1, 100, 4))
    _, _, positive, valid, _ = head.sample(inside, crowd, torch.tensor([1]))
    assert not positive.any()
    assert not valid.any()


@pytest.mark.parametrize("num_valid", [0, 1])
def test_with_few_proposals_the_remaining_slots_are_invalid(head: BoxHead, num_valid: int) -> None:
    features = [torch.rand(2, 8, 128 // stride, 160 // stride) for stride in (4, 8, 16, 32)]
    proposals = replace(random_proposals(), valid=(torch.arange(100) < num_valid).expand(2, 100))
    detections = head.detect(features, proposals, torch.tensor([CANVAS, CANVAS]))
    assert detections.valid.sum(1).max() <= num_valid * 3
    assert detections.boxes.isfinite().all()


def pyramid(num_images: int = 2) -> list[torch.Tensor]:
    return [torch.rand(num_images, 8, CANVAS[0] // stride, CANVAS[1] // stride) for stride in (4, 8, 16, 32)]


def with_config(**changes: object) -> BoxHead:
    torch.manual_seed(0)
    return BoxHead(8, (4, 8, 16, 32), num_classes=3, config=BoxConfig(width=16, num_sampled=24, **changes))


def test_class_agnostic_boxes_equal_a_head_with_the_same_deltas_for_each_class() -> None:
    agnostic, by_class = with_config(class_agnostic=True), with_config()
    torch.nn.init.normal_(agnostic.box_deltas.weight, std=0.1)
    state = agnostic.state_dict()
    assert state["box_deltas.weight"].shape == (4, 16)
    by_class.load_state_dict(
        state
        | {
            name: state[name].repeat(3, *[1] * (state[name].ndim - 1))
            for name in ("box_deltas.weight", "box_deltas.bias")
        }
    )
    features, proposals, targets = pyramid(), random_proposals(), random_targets(2, 8, 3, CANVAS, 3)
    sizes = torch.tensor([CANVAS, CANVAS])
    actual, expected = (head.detect(features, proposals, sizes) for head in (agnostic, by_class))
    assert actual.valid.sum() > 50
    torch.testing.assert_close(actual.boxes, expected.boxes)
    assert torch.equal(actual.scores, expected.scores)
    assert torch.equal(actual.labels, expected.labels)
    sampled = agnostic.sample(proposals, targets, torch.tensor([5, 6]))
    actual_losses, expected_losses = (head.losses(features, sampled, targets) for head in (agnostic, by_class))
    assert actual_losses["box_regression"] > 0
    torch.testing.assert_close(actual_losses, expected_losses)


def test_hard_examples_are_the_samples_with_the_highest_class_loss() -> None:
    head = with_config(hard_examples=True)
    torch.nn.init.normal_(head.class_logits.weight, std=1.0)
    features, proposals, targets = pyramid(), random_proposals(), random_targets(2, 8, 3, CANVAS, 3)
    sampled = head.sample(proposals, targets, torch.tensor([5, 6]), features)
    all_candidates = replace(head.config, num_sampled=108, positive_fraction=1.0, hard_examples=False)
    head.config = all_candidates
    candidates = head.sample(proposals, targets, torch.tensor([5, 6]))
    logits, _ = head(features, candidates.boxes, candidates.valid)
    labels = torch.where(candidates.positive, targets.labels.gather(1, candidates.matched), 3)
    losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").detach()
    for image in range(2):
        positive, valid = candidates.positive[image], candidates.valid[image]
        expected = []
        for kind, count in ((positive, 6), (valid & ~positive, 24 - int(min(positive.sum(), 6)))):
            hardest = losses[image].where(kind, -1.0).topk(min(count, int(kind.sum()))).indices
            expected += candidates.sources[image, hardest].tolist()
        assert sampled.sources[image][sampled.valid[image]].tolist() == expected


def test_hard_examples_are_selected_without_gradients() -> None:
    head = with_config(hard_examples=True)
    features = [feature.requires_grad_() for feature in pyramid()]
    sampled = head.sample(random_proposals(), random_targets(2, 8, 3, CANVAS, 3), torch.tensor([5, 6]), features)
    assert not sampled.boxes.requires_grad


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_keeps_the_best_box_and_reduces_other_scores(method: str) -> None:
    features, proposals = pyramid(), random_proposals()
    sizes = torch.tensor([CANVAS, CANVAS])
    hard = with_config(max_detections=300).detect(features, proposals, sizes)
    soft = with_config(max_detections=300, nms=method).detect(features, proposals, sizes)
    assert torch.equal(soft.boxes[:, 0], hard.boxes[:, 0])
    assert torch.equal(soft.scores[:, 0], hard.scores[:, 0])
    assert (soft.scores[soft.valid] > 0.05).all()
    assert soft.valid.sum() != hard.valid.sum()


def test_a_head_without_fully_connected_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"num_fcs\S*: expected a whole number, at least 1"):
        BoxConfig(num_fcs=0)
