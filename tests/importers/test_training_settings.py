"""Imported models train with the settings of the code base that they come from.

The expected values are copied from the files that docs/guides/import_training_settings.md names. Values for torchvision
are read or computed from torchvision itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models.detection import FasterRCNN, RetinaNet, retinanet_resnet50_fpn_v2
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork

from boxwright.heads.retina_head import RetinaHead, RetinaOutput
from boxwright.importers.detectron import DETECTRON
from boxwright.importers.detectron2 import DETECTRON2
from boxwright.importers.maskrcnn_benchmark import MASKRCNN_BENCHMARK
from boxwright.importers.mmdetection import FIRST, LATER
from boxwright.importers.source import Settings, Source
from boxwright.importers.torchvision import TORCHVISION
from boxwright.losses import sigmoid_focal_loss, smooth_l1
from boxwright.structures import Targets
from boxwright.weights.foreign import ForeignFile

RPN = {
    "positive_iou": 0.7,
    "negative_iou": 0.3,
    "num_sampled": 256,
    "positive_fraction": 0.5,
    "pre_nms_per_level": 2000,
    "nms_iou": 0.7,
}
BOX = {"positive_iou": 0.5, "num_sampled": 512, "positive_fraction": 0.25, "hard_examples": False}
LOSS_WEIGHTS = {"class_loss_weight": 1.0, "box_loss_weight": 1.0}
RETINA = {"positive_iou": 0.5, "negative_iou": 0.4, "low_quality": 0.0, "focal_alpha": 0.25, "focal_gamma": 2.0}

TWO_STAGE = {
    FIRST: ["rpn_head.rpn_conv.weight", "bbox_head.shared_fcs.0.weight"],
    LATER: ["rpn_head.rpn_conv.weight", "roi_head.bbox_head.shared_fcs.0.weight"],
    DETECTRON2: ["proposal_generator.rpn_head.conv.weight", "roi_heads.box_head.fc1.weight"],
    DETECTRON: ["conv_rpn_fpn2_w", "cls_score_w"],
    MASKRCNN_BENCHMARK: ["rpn.head.conv.weight", "roi_heads.box.feature_extractor.fc6.weight"],
    TORCHVISION: ["rpn.head.conv.weight", "roi_heads.box_head.fc6.weight"],
}
CASCADE = {
    FIRST: ["rpn_head.rpn_conv.weight", "bbox_head.0.shared_fcs.0.weight"],
    LATER: ["rpn_head.rpn_conv.weight", "roi_head.bbox_head.0.shared_fcs.0.weight"],
    DETECTRON2: ["proposal_generator.rpn_head.conv.weight", "roi_heads.box_head.0.fc1.weight"],
}
RETINA_V2 = ["head.classification_head.conv.0.1.weight", "head.regression_head.conv.0.1.weight"]
RPN_ALONE = {FIRST: ["rpn_head.rpn_conv.weight"], LATER: ["rpn_head.rpn_conv.weight"]}


def settings_of(source: Source, names: Sequence[str], version: str | None = None) -> Settings:
    about = {} if version is None else {"meta": {"mmdet_version": version}}
    tensors = {name: torch.zeros(1, 1) for name in names}
    return source.settings(ForeignFile(path=Path("x.pth"), sha256="0" * 64, tensors=tensors, about=about))


def check(config: Any, expected: dict[str, Any]) -> None:
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("source", "rpn", "box_beta"),
    [
        (FIRST, {"smooth_l1_beta": 1 / 9, "border": 0.0, "low_quality": 0.3, "num_proposals": 2000}, 1.0),
        (LATER, {"smooth_l1_beta": 0.0, "border": None, "low_quality": 0.3, "num_proposals": 1000}, 0.0),
        (DETECTRON2, {"smooth_l1_beta": 0.0, "border": None, "low_quality": 0.0, "num_proposals": 1000}, 0.0),
        # Detectron uses 2000 proposals for the two images of a GPU together.
        (DETECTRON, {"smooth_l1_beta": 1 / 9, "border": 0.0, "low_quality": 0.0, "num_proposals": 1000}, 1.0),
        (MASKRCNN_BENCHMARK, {"smooth_l1_beta": 1 / 9, "border": 0.0, "low_quality": 0.0, "num_proposals": 1000}, 1.0),
        (TORCHVISION, {"smooth_l1_beta": 1 / 9, "border": None, "low_quality": 0.0, "num_proposals": 2000}, 1 / 9),
    ],
    ids=lambda value: value.name if isinstance(value, Source) else "",
)
def test_two_stages(source: Source, rpn: dict[str, Any], box_beta: float) -> None:
    settings = settings_of(source, TWO_STAGE[source])
    check(settings.rpn, {**RPN, "box_loss": "smooth_l1", "objectness_loss_weight": 1.0, "box_loss_weight": 1.0, **rpn})
    stds = (0.1, 0.1, 0.2, 0.2)
    check(settings.box, {**BOX, "box_loss": "smooth_l1", **LOSS_WEIGHTS, "smooth_l1_beta": box_beta, "stds": stds})
    check(settings.mask, {"mask_loss_weight": 1.0})
    assert settings.train_norm_affine is (source in (FIRST, LATER))


@pytest.mark.parametrize(
    ("source", "rpn", "box_beta", "loss_weights"),
    [
        (FIRST, {"smooth_l1_beta": 1 / 9, "border": 0.0, "num_proposals": 2000}, 1.0, (0.5, 0.25)),
        (LATER, {"smooth_l1_beta": 1 / 9, "border": 0.0, "num_proposals": 2000}, 1.0, (0.5, 0.25)),
        (DETECTRON2, {"smooth_l1_beta": 0.0, "border": None, "num_proposals": 2000}, 0.0, (1.0, 1.0)),
    ],
    ids=lambda value: value.name if isinstance(value, Source) else "",
)
def test_cascades(source: Source, rpn: dict[str, Any], box_beta: float, loss_weights: tuple[float, ...]) -> None:
    settings = settings_of(source, CASCADE[source])
    check(settings.rpn, {**RPN, **rpn})
    check(settings.box, {**BOX, "smooth_l1_beta": box_beta})
    check(settings.cascade, {"loss_weights": loss_weights, "positive_ious": (0.6, 0.7)})


@pytest.mark.parametrize(("source", "beta"), [(FIRST, 1 / 9), (LATER, 0.0)], ids=["mmdetection1", "mmdetection2"])
def test_mmdetections_rpn_alone(source: Source, beta: float) -> None:
    settings = settings_of(source, RPN_ALONE[source], "1.2.0" if source is FIRST else "2.28.0")
    check(settings.rpn, {**RPN, "smooth_l1_beta": beta, "border": 0.0, "low_quality": 0.3})


@pytest.mark.parametrize(
    ("source", "names", "box_loss"),
    [
        (FIRST, ["bbox_head.retina_cls.weight"], {"smooth_l1_beta": 0.11}),
        (LATER, ["bbox_head.retina_cls.weight"], {"smooth_l1_beta": 0.0}),
        (DETECTRON2, ["head.cls_score.weight"], {"smooth_l1_beta": 0.0}),
        (DETECTRON, ["retnet_cls_pred_fpn3_w"], {"smooth_l1_beta": 0.11}),
        (MASKRCNN_BENCHMARK, ["rpn.head.cls_tower.0.weight"], {"smooth_l1_beta": 0.0165, "box_loss_weight": 1.875}),
        (TORCHVISION, ["head.classification_head.conv.0.0.weight"], {"smooth_l1_beta": 0.0}),
        (TORCHVISION, RETINA_V2, {"box_loss": "giou"}),
    ],
    ids=lambda value: value.name if isinstance(value, Source) else "",
)
def test_retinanets(source: Source, names: list[str], box_loss: dict[str, Any]) -> None:
    settings = settings_of(source, names)
    check(settings.retina, {**RETINA, "box_loss": "smooth_l1", **LOSS_WEIGHTS, **box_loss})
    assert settings.train_norm_affine is (source in (FIRST, LATER) or names == RETINA_V2)


@pytest.mark.parametrize("error", [0.05, 0.3, 2.0])
def test_maskrcnn_benchmarks_box_loss_of_retinanet(error: float) -> None:
    """A box with the same error in all four plain deltas costs the same once the error exceeds both betas."""
    retina = settings_of(MASKRCNN_BENCHMARK, ["rpn.head.cls_tower.0.weight"]).retina
    deltas = torch.full((4,), error, dtype=torch.float64)
    scaled = deltas / torch.tensor([0.1, 0.1, 0.2, 0.2], dtype=torch.float64)
    expected = smooth_l1(scaled, torch.zeros(4), beta=0.11).sum() / 4
    loss = retina.box_loss_weight * smooth_l1(deltas, torch.zeros(4), beta=retina.smooth_l1_beta).sum()
    assert loss.item() == pytest.approx(expected.item(), abs=0.01)


def test_torchvisions_own_defaults() -> None:
    """Defaults of torchvision's constructors, under Boxwright's names."""
    defaults = {name: p.default for name, p in inspect.signature(FasterRCNN.__init__).parameters.items()}
    settings = settings_of(TORCHVISION, TWO_STAGE[TORCHVISION])
    theirs = {
        "positive_iou": "rpn_fg_iou_thresh",
        "negative_iou": "rpn_bg_iou_thresh",
        "num_sampled": "rpn_batch_size_per_image",
        "positive_fraction": "rpn_positive_fraction",
        "pre_nms_per_level": "rpn_pre_nms_top_n_train",
        "num_proposals": "rpn_post_nms_top_n_train",
        "nms_iou": "rpn_nms_thresh",
    }
    check(settings.rpn, {ours: defaults[name] for ours, name in theirs.items()})
    theirs = {
        "positive_iou": "box_fg_iou_thresh",
        "num_sampled": "box_batch_size_per_image",
        "positive_fraction": "box_positive_fraction",
    }
    check(settings.box, {ours: defaults[name] for ours, name in theirs.items()})
    defaults = {name: p.default for name, p in inspect.signature(RetinaNet.__init__).parameters.items()}
    theirs = {"positive_iou": "fg_iou_thresh", "negative_iou": "bg_iou_thresh"}
    check(settings.retina, {ours: defaults[name] for ours, name in theirs.items()})


@pytest.mark.parametrize("error", [0.02, 0.105, 0.5, 3.0])
def test_torchvisions_own_box_losses(error: float) -> None:
    """The loss of a box with `error` in one delta equals torchvision's loss for the same box."""
    settings = settings_of(TORCHVISION, TWO_STAGE[TORCHVISION])
    target, off = torch.zeros(1, 4), torch.tensor([[error, 0.0, 0.0, 0.0]])

    def ours(beta: float) -> float:
        return torch.nn.functional.smooth_l1_loss(off, target, beta=beta, reduction="sum").item()

    _, box = fastrcnn_loss(torch.zeros(1, 2), torch.cat([target, off], 1), [torch.ones(1, dtype=torch.int64)], [target])
    assert box.item() == pytest.approx(ours(settings.box.smooth_l1_beta))

    class Sampler:
        def __call__(self, labels: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            return [torch.ones(1, dtype=torch.uint8)], [torch.zeros(1, dtype=torch.uint8)]

    rpn = RegionProposalNetwork.__new__(RegionProposalNetwork)
    torch.nn.Module.__init__(rpn)
    rpn.fg_bg_sampler = Sampler()  # type: ignore[assignment]
    _, box = rpn.compute_loss(torch.zeros(1, 1), off, [torch.ones(1)], [target])
    assert box.item() == pytest.approx(ours(settings.rpn.smooth_l1_beta))

    head = RetinaNetRegressionHead(8, 1)
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    outputs = {"bbox_regression": off[None]}
    matched = [torch.zeros(1, dtype=torch.int64)]
    loss = head.compute_loss([{"boxes": anchors}], outputs, [anchors], matched)
    assert loss.item() == pytest.approx(ours(settings.retina.smooth_l1_beta))


def test_torchvisions_second_retinanet() -> None:
    """Both losses and their gradients equal torchvision's for the same predictions, anchors and ground truth."""
    peer = retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=3)
    retina = settings_of(TORCHVISION, list(peer.state_dict())).retina
    generator = torch.Generator().manual_seed(5)
    corners = 120 * torch.rand(400, 2, generator=generator, dtype=torch.float64)
    anchors = torch.cat([corners, corners + 20 + 60 * torch.rand(400, 2, generator=generator)], dim=1)
    # One image, since torchvision averages over images where we average over positive anchors.
    boxes = anchors[::50] + 4 * torch.randn(8, 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(8) % 3
    logits = torch.randn(1, 400, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    deltas = (0.3 * torch.randn(1, 400, 4, generator=generator, dtype=torch.float64)).requires_grad_()

    head = RetinaHead(8, [8], num_classes=3, config=retina)
    output = RetinaOutput(logits=(logits,), deltas=deltas, anchors=anchors, level_lengths=(400,))
    valid = torch.ones(1, 8, dtype=torch.bool)
    losses = head.losses(output, Targets(boxes=boxes[None], labels=labels[None], valid=valid, crowd=~valid))
    expected = peer.compute_loss(
        [{"boxes": boxes, "labels": labels}], {"cls_logits": logits, "bbox_regression": deltas}, [anchors]
    )
    names = (("retina_class", "classification", logits), ("retina_box", "bbox_regression", deltas))
    for name, peer_name, prediction in names:
        torch.testing.assert_close(losses[name], expected[peer_name], rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(losses[name], prediction)
        (expected_gradient,) = torch.autograd.grad(expected[peer_name], prediction)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-9)
        assert gradient.abs().sum() > 0


def test_torchvisions_own_focal_loss() -> None:
    retina = settings_of(TORCHVISION, []).retina
    head = RetinaNetClassificationHead(8, 1, 3)
    logits = torch.tensor([[[2.0, -1.0, 0.3], [-3.0, 0.5, 1.0]]])
    targets = [{"labels": torch.tensor([1])}]
    matched = [torch.tensor([0, -1])]  # the second anchor is background
    theirs = head.compute_loss(targets, {"cls_logits": logits}, matched)
    labels = torch.tensor([[1, 3]])
    losses = sigmoid_focal_loss(
        logits, labels, torch.ones(1, 2, dtype=torch.bool), alpha=retina.focal_alpha, gamma=retina.focal_gamma
    )
    assert losses.sum().item() == pytest.approx(theirs.item())
