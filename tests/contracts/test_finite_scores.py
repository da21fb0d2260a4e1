"""Candidates with a non-finite score or box never outrank finite candidates and are never kept.

The expected result is always the result for the same input without the faulty candidates.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from boxwright.assign.sample import hardest
from boxwright.data.dataset import Category
from boxwright.detectors.cascade_rcnn import CascadeRCNN
from boxwright.evaluation.evaluate import detect_dataset
from boxwright.evaluation.propose import propose
from boxwright.evaluation.results import Results
from boxwright.evaluation.views import merge_views
from boxwright.geometry.conventions import CAFFE2, MODERN, Conventions
from boxwright.heads.box_head import BoxConfig, BoxHead
from boxwright.heads.retina_head import RetinaConfig, RetinaHead, RetinaOutput
from boxwright.heads.rpn_head import RPNConfig, RPNHead, RPNOutput
from boxwright.heads.suppression import Suppression
from boxwright.ops.nms import nms
from boxwright.ops.roi_align import multilevel_roi_align
from boxwright.ops.soft_nms import every_box_a_round, soft_nms
from boxwright.structures import Batch, Detections
from factory import DETECTORS, random_batch, small_detector

NAN, INF = float("nan"), float("inf")
BAD = [NAN, INF, -INF]
SIZES = torch.tensor([[64, 96]])


def spread_boxes(count: int) -> Tensor:
    """[1, count, 4] boxes that do not overlap."""
    x = torch.arange(count) * 20.0
    return torch.stack([x, x * 0, x + 10, x * 0 + 10], 1)[None]


def rpn_output(head: RPNHead) -> RPNOutput:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(1, 6, 64 // stride, 96 // stride, generator=generator) for stride in (4, 8)]
    output = head(maps, (64, 96))
    return output._replace(objectness=torch.randn(output.objectness.shape, generator=generator))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("conventions", [MODERN, CAFFE2])
@pytest.mark.parametrize("training", [True, False])
def test_rpn(value: float, conventions: Conventions, training: bool) -> None:
    """The faulty anchors outnumber `pre_nms_per_level`; the proposals equal the proposals without faulty anchors."""
    config = RPNConfig(pre_nms_per_level=20, num_proposals=30, test_pre_nms_per_level=20, test_num_proposals=30)
    torch.manual_seed(0)
    head = RPNHead(6, (4, 8), config, conventions)
    output = rpn_output(head)
    bad = torch.rand(output.objectness.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    faulty = output._replace(objectness=output.objectness.masked_fill(bad, value))
    expected = head.proposals(
        output._replace(objectness=output.objectness.masked_fill(bad, -100)), SIZES, training=training
    )
    proposals = head.proposals(faulty, SIZES, training=training)
    assert expected.valid.sum() > 10
    assert torch.equal(proposals.valid, expected.valid)
    for name in ("boxes", "scores", "sources"):
        assert torch.equal(getattr(proposals, name)[proposals.valid], getattr(expected, name)[expected.valid])

    for place in range(4 if value != value else 2):  # decoding clamps infinite sizes
        deltas = output.deltas.clone()
        deltas[..., place] = value
        assert not head.proposals(output._replace(deltas=deltas), SIZES, training=training).valid.any()

    nothing = output._replace(objectness=torch.full_like(output.objectness, value))
    assert not head.proposals(nothing, SIZES, training=training).valid.any()


@pytest.mark.parametrize("value", BAD)
def test_box_head(value: float) -> None:
    head = BoxHead(8, (4, 8), 3, BoxConfig(width=16, max_detections=5), CAFFE2)
    logits = torch.tensor([[[5.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 3.0, 0]]])
    boxes, valid = spread_boxes(3), torch.ones(1, 3, dtype=torch.bool)
    deltas = torch.zeros(1, 3, 3, 4)

    def labels() -> list[int]:
        detections = head.best_detections(logits.softmax(-1), head.refine(boxes, deltas, SIZES), valid)
        assert detections.scores[detections.valid].isfinite().all()
        assert detections.boxes[detections.valid].isfinite().all()
        return detections.labels[detections.valid].tolist()[:3]

    assert labels()[:1] == [0]
    deltas[:, 0, :, 0] = value
    assert labels()[0] == 1
    logits[:, 1, 3] = value if value > 0 or value != value else NAN
    assert labels()[0] == 2


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("clip_first", [True, False])
def test_retinanet(value: float, clip_first: bool) -> None:
    """Every second anchor is faulty; the detections equal the detections of the other anchors."""
    config = RetinaConfig(num_convs=1, pre_nms_per_level=10, score_threshold=0.0, clip_first=clip_first)
    torch.manual_seed(0)
    head = RetinaHead(6, (8, 16), 3, config)
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(1, 6, 64 // stride, 96 // stride, generator=generator) for stride in (8, 16)]
    output = head(maps, (64, 96))
    logits = [torch.randn(level.shape, generator=generator) for level in output.logits]
    bad = [torch.rand(level.shape[:2], generator=generator) < 0.5 for level in logits]

    def detect(replacement: float, places: slice) -> Detections:
        levels = []
        for level, rows in zip(logits, bad, strict=True):
            level = level.clone()
            level[..., places] = torch.where(rows[..., None], replacement, level[..., places])
            levels.append(level)
        return head.detect(RetinaOutput(tuple(levels), output.deltas, output.anchors, output.level_lengths), SIZES)

    expected = detect(-1000.0, slice(None))
    assert expected.valid.sum() > 10
    for places in (slice(None), slice(1, 2)):
        if places == slice(1, 2) and value == -INF:
            continue  # a logit of -inf is valid: it only rules out this class
        detections = detect(value, places)
        assert torch.equal(detections.valid, expected.valid)
        assert torch.equal(detections.boxes[detections.valid], expected.boxes[expected.valid])
        assert torch.equal(detections.scores[detections.valid], expected.scores[expected.valid])

    deltas = output.deltas.clone()
    deltas[..., 1] = value
    detections = head.detect(RetinaOutput(tuple(logits), deltas, output.anchors, output.level_lengths), SIZES)
    assert not detections.valid.any()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", ["nms", "linear", "gaussian", "gaussian on a GPU"])
def test_nms(value: float, kind: str) -> None:
    boxes, scores = spread_boxes(5), torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]])
    scores[0, 1] = value
    boxes[0, 3, 2] = value
    groups, valid = torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool)
    if kind == "nms":
        indices, keep = nms(boxes, scores, groups, valid, iou_threshold=0.5, max_keep=6)
    elif kind == "gaussian on a GPU":
        suppression = Suppression(score_threshold=0.0, iou_threshold=0.5, max_detections=6, method="gaussian")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("boxwright.ops.soft_nms.grouped_soft_nms", every_box_a_round)
            indices, _, keep = suppression.keep(boxes, scores, groups, valid)
    else:
        indices, lowered, keep = soft_nms(
            boxes, scores, groups, valid, decay=kind, iou_threshold=0.5, sigma=0.5, min_score=0.0, max_keep=6
        )
        assert lowered[keep].tolist() == pytest.approx([0.9, 0.7, 0.5])
    assert indices[keep].tolist() == [0, 2, 4]


@pytest.mark.parametrize("value", BAD)
def test_hard_examples(value: float) -> None:
    """Non-finite losses rank last but can be sampled: if all losses are NaN, the total loss must be NaN."""
    labels = torch.tensor([[0, 0, 0, 1, 1, 0]])
    losses = torch.tensor([[0.1, value, 0.3, value, 0.5, 0.0]])
    identities = torch.arange(6)[None]
    sampled = hardest(labels, losses, identities, num=4, positive_fraction=0.25)
    assert sampled.indices[sampled.valid].tolist() == [4, 2, 0, 5]
    all_sampled = hardest(labels, losses, identities, num=6, positive_fraction=0.5)
    assert all_sampled.indices[all_sampled.valid].tolist() == [4, 3, 2, 0, 5, 1]


@pytest.mark.parametrize("value", BAD)
def test_roi_align_gives_zeros_for_non_finite_boxes(value: float) -> None:
    boxes, valid = spread_boxes(3), torch.ones(1, 3, dtype=torch.bool)
    boxes[0, 1, 3] = value
    maps = [torch.ones(1, 2, 16, 24), torch.ones(1, 2, 8, 12)]
    pooled = multilevel_roi_align(maps, boxes, valid, strides=(4, 8), output_size=2)
    assert (pooled[0, [0, 2]] > 0).any()
    assert (pooled[0, 1] == 0).all()


@pytest.mark.parametrize("value", BAD)
def test_cascade_with_a_non_finite_first_stage(value: float) -> None:
    detector = small_detector("cascade_rcnn")
    assert isinstance(detector, CascadeRCNN)
    batch = random_batch()
    nn.init.constant_(detector.box_heads[0].box_deltas.bias, value)
    detector.eval()
    with torch.no_grad():
        detections = detector.detect(batch)
    assert detections.boxes[detections.valid].isfinite().all()
    assert detections.scores[detections.valid].isfinite().all()
    losses = detector.losses(batch)
    assert not losses["box_regression_1"].isfinite(), "the loss must reveal the fault during training"


@pytest.mark.parametrize("kind", DETECTORS)
def test_no_detector_keeps_non_finite_detections(kind: str) -> None:
    """All parameters are NaN, then one in a hundred."""
    for share in (1.0, 0.01):
        detector = small_detector(kind)
        assert isinstance(detector, nn.Module)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in detector.parameters():
                parameter[torch.rand(parameter.shape, generator=generator) < share] = NAN
        detector.eval()
        with torch.no_grad():
            detections = detector.detect(random_batch())
        assert detections.boxes[detections.valid].isfinite().all()
        assert detections.scores[detections.valid].isfinite().all()


class Careless(nn.Module):
    """A third-party detector that returns non-finite values and inverted boxes."""

    num_classes, max_detections = 1, 4

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def detect(self, batch: Batch) -> Detections:
        count = len(batch.images)
        boxes = torch.tensor([[1.0, 1, 9, 9], [1, NAN, 9, 9], [2, 2, 8, 8], [9, 3, 5, 9]]).expand(count, 4, 4)
        scores = torch.tensor([0.9, 0.8, INF, 0.6]).expand(count, 4)
        return Detections(
            boxes=boxes,
            scores=scores,
            labels=torch.zeros(count, 4, dtype=torch.int64),
            valid=torch.ones(count, 4, dtype=torch.bool),
            masks=torch.ones(count, 4, 3, 3),
        )


def one_batch() -> Batch:
    batch = random_batch()
    return replace(batch, targets=None)


def test_evaluation_and_proposals_drop_faulty_detections_of_third_party_detectors() -> None:
    batch = one_batch()
    results = detect_dataset(Careless(), [batch], device="cpu")
    count = len(batch.images)
    assert results.scores.tolist() == pytest.approx([0.9, 0.6] * count)
    assert results.masks is not None
    assert len(results.masks) == len(results) == 2 * count
    results.check()  # inverted boxes get zero area

    class Nothing:
        categories = (Category(1, "thing"),)

        def __len__(self) -> int:
            return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("boxwright.evaluation.propose.RecallCounter", lambda dataset: _Uncounted())
        proposals, _ = propose(Careless(), Nothing(), [batch], device="cpu")  # type: ignore[arg-type]
    for of_image in proposals.values():
        assert of_image.scores.tolist() == pytest.approx([0.9, 0.6])


class _Uncounted:
    def add(self, image_id: int, boxes: np.ndarray) -> None: ...
    def recall(self) -> dict[str, float]:
        return {}


@pytest.mark.parametrize(("value", "method"), [*itertools.product(BAD, ("hard", "gaussian"))])
def test_views(value: float, method: str) -> None:
    def view(scores: list[float], first: float) -> Results:
        corners = np.array([[first, 0, 10, 10], [50, 0, 10, 10]], np.float64)
        return Results(
            image_ids=np.array([1, 1]),
            boxes=corners,
            scores=np.array(scores),
            labels=np.zeros(2, np.int64),
            evaluated=np.array([1]),
        )

    suppression = Suppression(score_threshold=0.05, iou_threshold=0.5, max_detections=9, method=method)
    merged = merge_views([view([value, 0.5], 0), view([0.4, 0.45], 0), view([0.9, 0.3], value)], suppression)
    assert merged.scores[:2].tolist() == pytest.approx([0.5, 0.4])
    assert np.isfinite(merged.scores).all()
    assert np.isfinite(merged.boxes).all()
