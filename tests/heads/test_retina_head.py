from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import _default_anchorgen

from boxwright.geometry.conventions import MODERN, TORCHVISION
from boxwright.heads.retina_head import RetinaConfig, RetinaHead, RetinaOutput
from boxwright.structures import Targets
from factory import random_targets

STRIDES, CANVAS, NUM_CLASSES = (8, 16), (64, 96), 3
SMALL = RetinaConfig(num_convs=1)


def features(num_images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(num_images, 6, CANVAS[0] // s, CANVAS[1] // s, generator=generator) for s in STRIDES]


def spread_head(config: RetinaConfig = SMALL) -> RetinaHead:
    """A head whose scores and boxes differ between anchors."""
    torch.manual_seed(0)
    head = RetinaHead(6, STRIDES, NUM_CLASSES, config)
    with torch.no_grad():
        for convs in (head.class_convs, head.box_convs):
            convs[0].weight.mul_(30)
        head.class_logits.weight.mul_(150)
        head.box_deltas.weight.mul_(10)
    return head


def test_logits_and_deltas_have_the_order_of_the_anchors() -> None:
    head, maps = spread_head(), features()
    output = head(maps, CANVAS)
    assert output.level_lengths == (8 * 12 * 9, 4 * 6 * 9)
    level, y, x, ratio, size = 1, 3, 5, 2, 1  # the size varies fastest
    anchor = ratio * 3 + size
    index = (y * 6 + x) * 9 + anchor
    logits = head.class_logits(head.class_convs(maps[level]))[:, NUM_CLASSES * anchor :][:, :NUM_CLASSES, y, x]
    assert torch.equal(output.logits[level][:, index], logits)
    deltas = head.box_deltas(head.box_convs(maps[level]))[:, 4 * anchor :][:, :4, y, x]
    assert torch.equal(output.deltas[:, output.level_lengths[0] + index], deltas)
    x1, y1, x2, y2 = output.anchors[output.level_lengths[0] + index].tolist()
    assert ((x1 + x2) / 2, (y1 + y2) / 2) == pytest.approx((5 * 16, 3 * 16))
    assert ((x2 - x1) * (y2 - y1), (y2 - y1) / (x2 - x1)) == pytest.approx(((64 * 2 ** (1 / 3)) ** 2, 2.0))


def test_anchors_of_the_torchvision_and_modern_conventions() -> None:
    strides = (8, 16, 32, 64, 128)
    maps = [torch.zeros(1, 6, 256 // s, 384 // s) for s in strides]
    theirs = _default_anchorgen()(ImageList(torch.zeros(1, 3, 256, 384), [(256, 384)]), maps)[0]
    ours = RetinaHead(6, strides, 1, SMALL, TORCHVISION)(maps, (256, 384)).anchors
    assert torch.equal(ours, theirs)
    modern = RetinaHead(6, strides, 1, SMALL, MODERN)(maps, (256, 384)).anchors[:9]
    sides = ((modern[:, 2:] - modern[:, :2]).prod(1)).sqrt()
    torch.testing.assert_close(sides[:3], 32 * 2 ** (torch.arange(3) / 3))


def test_scores_of_an_untrained_head_equal_the_prior() -> None:
    head = RetinaHead(6, STRIDES, NUM_CLASSES, RetinaConfig(prior=0.02))
    scores = torch.cat(head([x * 0 for x in features()], CANVAS).logits, 1).sigmoid()
    torch.testing.assert_close(scores, torch.full_like(scores, 0.02))


def test_group_norm_replaces_the_bias() -> None:
    names = {name for name, _ in RetinaHead(6, STRIDES, 1, RetinaConfig(norm="gn")).named_parameters()}
    assert "class_convs.1.weight" in names
    assert "class_convs.0.bias" not in names


@torch.no_grad()
def plain_losses(output: RetinaOutput, targets: Targets) -> tuple[float, float]:
    """Losses of the RetinaNet paper (section 4 and equation 5) in float64, one anchor at a time."""
    anchors = output.anchors.double()
    scores = torch.cat(output.logits, 1).double().sigmoid()
    classes = boxes = 0.0
    num_positives = 0
    for image in range(len(targets.boxes)):
        real = targets.valid[image]
        objects, labels = targets.boxes[image][real].double(), targets.labels[image][real]
        ious = torchvision.ops.box_iou(objects, anchors) if len(objects) else torch.zeros(1, len(anchors)).double()
        best, matched = ious.max(0)
        is_best = ((ious == ious.amax(1, keepdim=True)) & (ious > 0)).any(0)
        for n in range(len(anchors)):
            positive = bool(best[n] >= 0.5 or is_best[n])
            if not positive and best[n] >= 0.4:
                continue
            for c in range(NUM_CLASSES):
                is_class = positive and labels[matched[n]] == c
                p = scores[image, n, c] if is_class else 1 - scores[image, n, c]
                classes += float(-(0.25 if is_class else 0.75) * (1 - p) ** 2 * p.log())
            if positive:
                num_positives += 1
                (ax1, ay1, ax2, ay2), (x1, y1, x2, y2) = anchors[n], objects[matched[n]]
                width, height = ax2 - ax1, ay2 - ay1
                expected = torch.stack([(x1 + x2 - ax1 - ax2) / 2 / width, (y1 + y2 - ay1 - ay2) / 2 / height])
                expected = torch.cat([expected, torch.stack([((x2 - x1) / width).log(), ((y2 - y1) / height).log()])])
                for error in (output.deltas[image, n].double() - expected).abs().tolist():
                    boxes += error**2 / 0.22 if error < 0.11 else error - 0.055
    return classes / max(1, num_positives), boxes / max(1, num_positives)


def mixed_targets() -> Targets:
    """An image with three objects (the last far from all anchors) and one without objects; best IoUs are unique."""
    objects = [[3.3, 5.1, 40.7, 36.2], [50.2, 20.4, 95.9, 58.8], [93.0, 61.0, 120.0, 90.0], [torch.nan] * 4]
    return replace(
        random_targets(2, 4, 3, CANVAS, NUM_CLASSES),
        boxes=torch.tensor(objects).expand(2, 4, 4),
        valid=torch.tensor([[True, True, True, False], [False] * 4]),
    )


def test_losses_equal_the_paper_normalised_by_the_positives_of_the_batch() -> None:
    output, targets = spread_head()(features(), CANVAS), mixed_targets()
    assert torchvision.ops.box_iou(targets.boxes[0], output.anchors)[2].max() < 0.4
    losses = spread_head().losses(output, targets)
    assert (losses["retina_class"].item(), losses["retina_box"].item()) == pytest.approx(
        plain_losses(output, targets), rel=1e-5
    )


def test_without_objects_all_anchors_are_background() -> None:
    output = spread_head()(features(), CANVAS)
    nothing = replace(mixed_targets(), valid=torch.zeros(2, 4, dtype=torch.bool))
    losses = spread_head().losses(output, nothing)
    assert losses["retina_box"] == 0
    assert losses["retina_class"].item() == pytest.approx(plain_losses(output, nothing)[0], rel=1e-5)


def test_anchors_inside_a_crowd_region_are_ignored() -> None:
    output, targets = spread_head()(features(1), CANVAS), random_targets(1, 1, 1, CANVAS, NUM_CLASSES)
    around_canvas = torch.tensor([[[-200.0, -200.0, 400.0, 400.0]]])
    crowd = replace(targets, boxes=around_canvas, crowd=torch.ones(1, 1, dtype=torch.bool))
    assert all(loss == 0 for loss in spread_head().losses(output, crowd).values())


@torch.no_grad()
def test_detections_equal_a_plain_implementation() -> None:
    """Threshold, top candidates of each level, decoding, NMS within each class, top detections: image by image."""
    config = replace(SMALL, pre_nms_per_level=60, score_threshold=0.05, max_detections=25)
    head = spread_head(config)
    sizes = torch.tensor([[64, 96], [50, 70]])
    output = head(features(), CANVAS)
    detections = head.detect(output, sizes)
    assert detections.valid.shape == (2, 25)
    for image in range(2):
        boxes, scores, labels = [], [], []
        levels = zip(
            output.logits,
            output.deltas.split(output.level_lengths, 1),
            output.anchors.split(output.level_lengths),
            strict=True,
        )
        for logits, deltas, anchors in levels:
            candidates = (logits[image].sigmoid() > 0.05).nonzero()
            values = logits[image].sigmoid()[candidates[:, 0], candidates[:, 1]]
            assert len(values) > 60, "each level must have more candidates than pre_nms_per_level"
            best = values.argsort(descending=True)[:60]
            anchor, d = anchors[candidates[best, 0]], deltas[image, candidates[best, 0]]
            side = anchor[:, 2:] - anchor[:, :2]
            centre = (anchor[:, :2] + anchor[:, 2:]) / 2 + d[:, :2] * side
            reach = side * d[:, 2:].exp() / 2
            box = torch.cat([centre - reach, centre + reach], 1)
            boxes.append(torchvision.ops.clip_boxes_to_image(box, tuple(sizes[image].tolist())))
            scores.append(values[best])
            labels.append(candidates[best, 1])
        keep = torchvision.ops.batched_nms(torch.cat(boxes), torch.cat(scores), torch.cat(labels), 0.5)[:25]
        valid = detections.valid[image]
        torch.testing.assert_close(detections.scores[image][valid], torch.cat(scores)[keep])
        torch.testing.assert_close(detections.boxes[image][valid], torch.cat(boxes)[keep], atol=1e-4, rtol=1e-5)
        assert torch.equal(detections.labels[image][valid], torch.cat(labels)[keep])


def test_without_candidates_above_the_threshold_all_slots_are_invalid() -> None:
    head = RetinaHead(6, STRIDES, NUM_CLASSES, replace(SMALL, max_detections=7))
    detections = head.detect(head(features(), CANVAS), torch.tensor([CANVAS, CANVAS]))
    assert detections.valid.shape == (2, 7)
    assert not detections.valid.any()


def test_with_clip_first_false_nms_uses_unclipped_boxes() -> None:
    """Two boxes that are equal after clipping, and a third box completely outside the image."""
    boxes = torch.tensor([[40.0, 8.0, 104.0, 40.0], [40.0, 8.0, 200.0, 40.0], [100.0, 8.0, 140.0, 40.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    output = RetinaOutput(
        logits=(scores.logit()[None, :, None],),
        deltas=torch.zeros(1, 3, 4),
        anchors=boxes,
        level_lengths=(3,),
    )
    sizes = torch.tensor([[64, 96]])
    first, after = (
        RetinaHead(6, (8,), 1, replace(SMALL, clip_first=clip_first)).detect(output, sizes)
        for clip_first in (True, False)
    )
    assert first.scores[first.valid].tolist() == pytest.approx([0.9, 0.7])
    assert after.scores[after.valid].tolist() == pytest.approx([0.9, 0.8])
    assert after.boxes[after.valid].tolist() == [[40.0, 8.0, 96.0, 40.0]] * 2
