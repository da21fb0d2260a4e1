from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from boxwright.heads.box_sample import SampledBoxes
from boxwright.heads.mask_head import MaskConfig, MaskHead
from boxwright.ops.mask_target import mask_target
from boxwright.structures import Detections, Targets
from factory import random_targets

CANVAS = (128, 160)
NUM_CLASSES = 3


@pytest.fixture
def head() -> MaskHead:
    torch.manual_seed(0)
    return MaskHead(8, (4, 8, 16, 32, 64), NUM_CLASSES, MaskConfig(width=8, num_convs=2, output_size=5))


def features() -> list[Tensor]:
    return [torch.rand(2, 8, -(-128 // stride), -(-160 // stride)) for stride in (4, 8, 16, 32, 64)]


def sampled_objects(targets: Targets, num_positive: int, num_slots: int = 6) -> SampledBoxes:
    """The ground-truth boxes of the first objects as positives, followed by NaN."""
    matched = torch.arange(num_slots).expand(2, -1) % targets.labels.shape[1]
    positive = (torch.arange(num_slots) < num_positive).expand(2, -1)
    boxes = torch.where(positive[..., None], targets.boxes[:, :num_slots], torch.nan)
    matched = torch.where(positive, matched, 0)
    return SampledBoxes(boxes, matched, positive, torch.ones_like(positive), sources=matched)


def test_the_loss_is_the_mean_over_all_cells_of_positives(head: MaskHead) -> None:
    """Expected: the logits of all classes from the last layer, the class of the target selected, in float64."""
    targets, maps = random_targets(2, 8, 8, CANVAS, NUM_CLASSES), features()
    sampled = sampled_objects(targets, 4)
    logits: list[Tensor] = []
    handle = head.upsample.register_forward_hook(lambda _, __, output: logits.append(head.mask_logits(output.relu())))
    loss = head.losses(maps, sampled, targets, max_positives=6)["mask"]
    handle.remove()
    all_logits = logits[0].view(2, 6, NUM_CLASSES, 10, 10).double()
    mask_targets = mask_target(targets.masks, sampled.boxes, sampled.matched, sampled.positive, output_size=10)
    assert 0.2 < mask_targets[sampled.positive].float().mean() < 0.8
    terms = []
    for b in range(2):
        for s in range(4):
            p = all_logits[b, s, targets.labels[b, s]].sigmoid()
            terms.append(-torch.where(mask_targets[b, s], p.log(), (1 - p).log()).mean())
    torch.testing.assert_close(loss.double(), torch.stack(terms).mean(), rtol=1e-5, atol=0)


def test_slots_after_the_last_positive_do_not_change_the_loss(head: MaskHead) -> None:
    targets, maps = random_targets(2, 8, 8, CANVAS, NUM_CLASSES), features()
    few, many = (
        head.losses(maps, sampled_objects(targets, 3), targets, max_positives=count)["mask"] for count in (3, 6)
    )
    torch.testing.assert_close(few, many)


def test_objects_without_a_mask_do_not_change_the_loss(head: MaskHead) -> None:
    targets, maps = random_targets(2, 8, 8, CANVAS, NUM_CLASSES), features()
    some = targets.masks.valid & (torch.arange(8) < 2)
    garbage = torch.where(some[..., None], targets.masks.frames, torch.nan)
    without = replace(targets, masks=replace(targets.masks, valid=some, frames=garbage))
    actual = head.losses(maps, sampled_objects(targets, 5), without, max_positives=6)["mask"]
    expected = head.losses(maps, sampled_objects(targets, 2), targets, max_positives=6)["mask"]
    torch.testing.assert_close(actual, expected)


def test_without_positives_loss_and_gradients_are_zero(head: MaskHead) -> None:
    targets = random_targets(2, 8, 0, CANVAS, NUM_CLASSES)
    targets = replace(targets, labels=torch.full_like(targets.labels, 2**40))
    loss = head.losses(features(), sampled_objects(targets, 0), targets, max_positives=6)["mask"]
    loss.backward()
    assert loss == 0
    assert all((parameter.grad == 0).all() for parameter in head.parameters())


def test_detections_get_the_mask_of_their_class(head: MaskHead) -> None:
    targets, maps = random_targets(2, 8, 5, CANVAS, NUM_CLASSES), features()
    labels = torch.where(targets.valid, targets.labels, 0)
    scores = torch.rand(2, 8)
    detections = Detections(boxes=targets.boxes, scores=scores, labels=labels, valid=targets.valid)
    with_masks = head.detect(maps, detections)
    assert with_masks.masks.shape == (2, 8, 10, 10)
    assert ((with_masks.masks > 0) & (with_masks.masks < 1))[targets.valid].all()
    assert (with_masks.masks[~targets.valid] == 0).all()
    assert torch.equal(with_masks.boxes[targets.valid], targets.boxes[targets.valid])
    others = head.detect(maps, replace(detections, labels=(labels + 1) % NUM_CLASSES)).masks
    assert (others != with_masks.masks)[targets.valid].any((1, 2)).all()
    assert set(dict(head.named_parameters())) == {
        f"{layer}.{part}" for layer in ("convs.0", "convs.1", "upsample", "mask_logits") for part in ("weight", "bias")
    }
