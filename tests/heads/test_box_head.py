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


def test_the_order_of_proposals_does_not_change_which_are_sampled(head: BoxHead) -> None:
    proposals, targets, seeds = random_proposals(), random_targets(2, 8, 3, CANVAS, 3), torch.tensor([5, 6])
    shuffled = map_tensors(proposals, lambda t: t[:, torch.randperm(100, generator=torch.Generator().manual_seed(1))])
    given, wanted = (head.sample(p, targets, seeds) for p in (shuffled, proposals))
    for ours, theirs in zip(given, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_ground_truth_is_among_the_samples_and_positives_come_first(head: BoxHead) -> None:
    targets = random_targets(2, 8, 3, CANVAS, 3)
    far = replace(random_proposals(), boxes=torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 100, 4))
    boxes, matched, positive, valid = head.sample(far, targets, torch.tensor([5, 6]))
    assert positive.sum(1).tolist() == [3, 3]
    assert positive[:, :3].all()
    assert sorted(matched[0, :3].tolist()) == [0, 1, 2]
    assert torch.equal(boxes[0, :3], targets.boxes[0, matched[0, :3]])
    assert valid.all()


def test_crowds_are_neither_learnt_nor_negative(head: BoxHead) -> None:
    targets = random_targets(1, 1, 1, CANVAS, 3)
    crowd = replace(targets, crowd=torch.ones(1, 1, dtype=torch.bool))
    inside = replace(random_proposals(1), boxes=targets.boxes.expand(1, 100, 4))
    _, _, positive, valid = head.sample(inside, crowd, torch.tensor([1]))
    assert not positive.any()
    assert not valid.any()


@pytest.mark.parametrize("num_valid", [0, 1])
def test_few_proposals_leave_slots_unused(head: BoxHead, num_valid: int) -> None:
    features = [torch.rand(2, 8, 128 // stride, 160 // stride) for stride in (4, 8, 16, 32)]
    proposals = replace(random_proposals(), valid=(torch.arange(100) < num_valid).expand(2, 100))
    detections = head.detect(features, proposals, torch.tensor([CANVAS, CANVAS]))
    assert detections.valid.sum(1).max() <= num_valid * 3
    assert detections.boxes.isfinite().all()
