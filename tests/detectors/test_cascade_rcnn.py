from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from boxwright.detectors.cascade_rcnn import CascadeConfig, CascadeRCNN, cascade_rcnn, refined_proposals
from boxwright.geometry.boxes import iou
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.box_sample import FIRST_OBJECT_SOURCE
from boxwright.structures import Batch
from factory import SMALL_BOX, SMALL_RPN, random_batch, small_backbone, small_detector

STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
CANVAS = (64, 96)
THREE_STAGES = CascadeConfig()


def small_cascade(
    *, box: BoxConfig = replace(SMALL_BOX, class_agnostic=True), cascade: CascadeConfig = THREE_STAGES
) -> CascadeRCNN:
    """Three stages, whose last layers have large random weights so that outputs differ."""
    torch.manual_seed(0)
    detector = cascade_rcnn(backbone=small_backbone(), num_classes=3, rpn=SMALL_RPN, box=box, cascade=cascade)
    for head in detector.box_heads:
        torch.nn.init.normal_(head.class_logits.weight, std=1.0)
        torch.nn.init.normal_(head.box_deltas.weight, std=1.0)
    return detector


def first_stage(detector: CascadeRCNN, batch: Batch, *, training: bool) -> tuple[list[Tensor], object]:
    features = detector.backbone(detector.normalize(batch.images, batch.image_sizes))
    output = detector.rpn(features, batch.images.shape[-2:])
    return features, detector.rpn.proposals(output, batch.image_sizes, training=training)


def decoded(boxes: Tensor, deltas: Tensor, stds: tuple[float, ...], height: float, width: float) -> Tensor:
    """Decode deltas as in appendix C of the R-CNN paper, one box at a time in float64, and clip."""
    rows = []
    for (x1, y1, x2, y2), values in zip(boxes.double().tolist(), deltas.double().tolist(), strict=True):
        dx, dy, dw, dh = (value * std for value, std in zip(values, stds, strict=True))
        w, h = x2 - x1, y2 - y1
        x, y = x1 + w / 2 + dx * w, y1 + h / 2 + dy * h
        grow = torch.tensor([dw, dh], dtype=torch.float64).clamp(max=torch.tensor(62.5).double().log().item()).exp()
        w, h = w * grow[0].item(), h * grow[1].item()
        rows.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    limits = torch.tensor([width, height, width, height], dtype=torch.float64)
    return torch.tensor(rows, dtype=torch.float64).clamp(min=0).minimum(limits)


def test_one_stage_is_bit_identical_to_faster_rcnn() -> None:
    faster = small_detector("faster_rcnn")
    one_stage = CascadeConfig(positive_ious=(), stds=(), loss_weights=())
    single = cascade_rcnn(backbone=small_backbone(), num_classes=3, rpn=SMALL_RPN, box=SMALL_BOX, cascade=one_stage)
    state = faster.state_dict()
    single.load_state_dict({name.replace("box_head.", "box_heads.0."): tensor for name, tensor in state.items()})
    batch = random_batch(canvas=CANVAS)
    expected, actual = faster.losses(batch), single.losses(batch)
    assert actual["box_regression_1"] > 0
    assert {name.removesuffix("_1"): loss for name, loss in actual.items()} == expected
    sum(expected.values()).backward()
    sum(actual.values()).backward()
    gradients = {name.replace("box_head.", "box_heads.0."): p.grad for name, p in faster.named_parameters()}
    assert all(torch.equal(p.grad, gradients[name]) for name, p in single.named_parameters())
    ours, theirs = single.detect(batch), faster.detect(batch)
    assert ours.valid.any()
    for field in ("boxes", "scores", "labels", "valid"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field))


@pytest.mark.parametrize("mean_of", ["logits", "probabilities"])
@torch.no_grad()
def test_detections_are_boxes_of_the_last_stage_with_mean_scores_of_all_stages(mean_of: str) -> None:
    keep_all = replace(SMALL_BOX, class_agnostic=True, score_threshold=0.0, nms_iou=1.0, max_detections=150)
    detector = small_cascade(box=keep_all, cascade=CascadeConfig(mean_of=mean_of))
    batch = random_batch(canvas=CANVAS, num_images=1)
    features, proposals = first_stage(detector, batch, training=False)
    height, width = batch.image_sizes[0].tolist()
    boxes, logits = proposals.boxes, []
    for head, stds in zip(detector.box_heads, STDS, strict=True):
        stage_logits, deltas = head(features, boxes, proposals.valid)
        logits.append(stage_logits[0].double())
        boxes = decoded(boxes[0], deltas[0, :, 0], stds, height, width).float()[None]
    if mean_of == "logits":
        scores = ((logits[0] + logits[1] + logits[2]) / 3).softmax(-1)[:, :3]
    else:
        scores = ((logits[0].softmax(-1) + logits[1].softmax(-1) + logits[2].softmax(-1)) / 3)[:, :3]
    sides = boxes[0, :, 2:] - boxes[0, :, :2]
    scores = torch.where(proposals.valid[0, :, None] & (sides > 0.01).all(-1, keepdim=True), scores, 0.0).flatten()
    order = scores.argsort(descending=True)[: int((scores > 0).sum())]
    detections = detector.detect(batch)
    valid = detections.valid[0]
    assert valid.sum() == len(order) > 30
    torch.testing.assert_close(detections.scores[0, valid].double(), scores[order], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(detections.boxes[0, valid], boxes[0, order // 3], rtol=1e-4, atol=1e-2)
    assert torch.equal(detections.labels[0, valid], order % 3)


@torch.no_grad()
def test_each_stage_samples_refined_boxes_and_ground_truth_at_its_iou() -> None:
    detector, batch = small_cascade(), random_batch(canvas=CANVAS)
    targets, seeds = batch.targets, batch.seeds
    features, proposals = first_stage(detector, batch, training=True)
    num_refined = 0
    for stage, min_iou in enumerate((0.5, 0.6, 0.7)):
        head = detector.box_heads[stage]
        sampled = head.sample(proposals, targets, seeds, features, stage)
        is_truth = sampled.valid & (sampled.sources >= FIRST_OBJECT_SOURCE)
        assert is_truth.sum(1).tolist() == [3, 3], "ground truth is added once per stage"
        overlaps = iou(sampled.boxes.double(), targets.boxes[:, :3].double()).amax(2)
        assert (overlaps[sampled.positive] >= min_iou - 1e-6).all()
        assert (overlaps[sampled.valid & ~sampled.positive] < min_iou).all()
        deltas = head(features, sampled.boxes, sampled.valid)[1]
        proposals = refined_proposals(head, sampled, deltas, batch.image_sizes)
        assert torch.equal(proposals.valid, sampled.valid & ~is_truth)
        for image in range(2):
            valid = proposals.valid[image]
            height, width = batch.image_sizes[image].tolist()
            expected = decoded(sampled.boxes[image, valid], deltas[image, valid, 0], STDS[stage], height, width)
            torch.testing.assert_close(proposals.boxes[image, valid].double(), expected, rtol=1e-4, atol=1e-2)
            num_refined += int(valid.sum())
    assert num_refined > 100


def test_loss_weights_multiply_the_losses_of_their_stage() -> None:
    batch = random_batch(canvas=CANVAS)
    detector = small_cascade()
    weighted = detector.losses(batch)
    assert detector.loss_weights == (1.0, 0.5, 0.25)
    detector.loss_weights = (1.0, 1.0, 1.0)
    plain = detector.losses(batch)
    for stage, weight in enumerate((1.0, 0.5, 0.25), start=1):
        for name in (f"box_class_{stage}", f"box_regression_{stage}"):
            assert weighted[name].item() == pytest.approx(weight * plain[name].item(), rel=1e-6)
            assert plain[name] > 0


def test_no_gradient_flows_from_a_stage_to_the_previous_stage() -> None:
    detector = small_cascade()
    detector.losses(random_batch(canvas=CANVAS))["box_regression_2"].backward()
    assert detector.box_heads[0].box_deltas.weight.grad is None
    assert detector.box_heads[1].box_deltas.weight.grad.abs().sum() > 0


def test_inconsistent_settings_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"set box\.class_agnostic=true"):
        small_cascade(box=SMALL_BOX)
    with pytest.raises(ValueError, match="must have the same length, got 1, 2 and 2"):
        CascadeConfig(positive_ious=(0.6,))


@torch.no_grad()
def test_masks_are_the_mean_probabilities_of_all_stages() -> None:
    detector, batch = small_detector("cascade_mask_rcnn"), random_batch(canvas=CANVAS)
    detections = detector.detect(batch)
    features, _ = first_stage(detector, batch, training=False)
    masks = torch.stack([head.detect(features, detections).masks.double() for head in detector.mask_heads])
    assert detections.valid.any()
    assert masks.std(0)[detections.valid].mean() > 0.01, "the test needs stages with different masks"
    torch.testing.assert_close(detections.masks.double(), masks.mean(0), rtol=1e-5, atol=1e-6)
    assert not detections.masks[~detections.valid].any()


def test_a_single_mask_head_is_trained_on_the_first_stage_and_predicts_on_the_last() -> None:
    detector, batch = small_detector("cascade_one_mask_rcnn"), random_batch(canvas=CANVAS)
    losses = detector.losses(batch)
    assert [name for name in losses if name.startswith("mask")] == ["mask_1"]
    features, proposals = first_stage(detector, batch, training=True)
    first = detector.box_heads[0]
    sampled = first.sample(proposals, batch.targets, batch.seeds)
    head = detector.mask_heads[0]
    expected = head.losses(features, sampled, batch.targets, max_positives=first.config.max_positives)["mask"]
    assert losses["mask_1"].item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        detections = detector.detect(batch)
        assert detections.valid.any()
        torch.testing.assert_close(detections.masks, head.detect(features, detections).masks)
