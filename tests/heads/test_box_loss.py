from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from boxwright.detectors.cascade_rcnn import cascade_rcnn
from boxwright.detectors.detector import Detector
from boxwright.detectors.rcnn import faster_rcnn, mask_rcnn
from boxwright.detectors.retinanet import retinanet
from boxwright.geometry.boxes import decode, encode
from boxwright.heads.box_head import BoxConfig
from boxwright.heads.box_loss import BoxLoss, box_regression_loss
from boxwright.heads.mask_head import MaskConfig
from boxwright.heads.retina_head import RetinaConfig
from boxwright.heads.rpn_head import RPNConfig
from boxwright.losses import giou_loss
from boxwright.recipes.faster_rcnn import faster_rcnn_r50_fpn_1x
from boxwright.training.experiment import from_json, to_json
from boxwright.training.settings import with_settings
from factory import CASCADE_BOX, SMALL_BOX, SMALL_MASK, SMALL_RETINA, SMALL_RPN, random_batch, small_backbone

STDS = (0.1, 0.1, 0.2, 0.2)
PEERS = {
    "giou": torchvision.ops.generalized_box_iou_loss,
    "diou": torchvision.ops.distance_box_iou_loss,
    "ciou": torchvision.ops.complete_box_iou_loss,
}


def corner_distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """A custom box loss."""
    return (predictions - targets).abs().sum(-1) / 100


def inputs(plus_one: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Deltas, reference boxes and matched boxes of [2, 40], and a mask of positives (a third); others are NaN."""
    generator = torch.Generator().manual_seed(3)
    corner, size = 50 * torch.rand(2, 2, 40, 2, generator=generator, dtype=torch.float64)
    references = torch.cat([corner, corner + size + 5], dim=-1)
    matched = references + 8 * torch.rand(2, 40, 4, generator=generator, dtype=torch.float64)
    deltas = encode(matched, references, STDS, plus_one=plus_one) + 0.3 * torch.randn(
        2, 40, 4, generator=generator, dtype=torch.float64
    )
    positive = (torch.arange(40) % 3 == 0).expand(2, 40)
    return (*(torch.where(positive[..., None], t, torch.nan) for t in (deltas, references, matched)), positive)


def loss_of(kind: BoxLoss, *tensors: Tensor, plus_one: float = 0.0) -> Tensor:
    return box_regression_loss(kind, *tensors, stds=STDS, smooth_l1_beta=1.0, plus_one=plus_one)


@pytest.mark.parametrize("plus_one", [0.0, 1.0])
@pytest.mark.parametrize("name", PEERS)
def test_iou_losses_compare_decoded_boxes_of_positives(name: str, plus_one: float) -> None:
    deltas, references, matched, positive = inputs(plus_one)
    deltas.requires_grad_()
    losses = loss_of(name, deltas, references, matched, positive, plus_one=plus_one)
    # With plus_one, x2 and y2 are the last pixels inside a box, so the box ends one pixel later.
    end = torch.tensor([0.0, 0.0, plus_one, plus_one])
    predictions = decode(deltas[positive], references[positive], STDS, plus_one=plus_one)
    expected = PEERS[name](predictions + end, matched[positive] + end)
    torch.testing.assert_close(losses[positive], expected, rtol=1e-5, atol=1e-7)
    assert not losses[~positive].any()
    (gradient,) = torch.autograd.grad(losses.sum(), deltas, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), deltas)
    torch.testing.assert_close(gradient[positive], expected_gradient[positive], rtol=1e-5, atol=1e-7)
    assert not gradient[~positive].any()


def test_a_custom_loss_receives_decoded_boxes() -> None:
    deltas, references, matched, positive = inputs()
    deltas.requires_grad_()
    losses = loss_of(corner_distance, deltas, references, matched, positive)
    predictions = decode(deltas[positive], references[positive], STDS)
    torch.testing.assert_close(losses[positive], (predictions - matched[positive]).abs().sum(-1) / 100)
    losses.sum().backward()
    assert deltas.grad is not None
    assert deltas.grad.isfinite().all()
    torch.testing.assert_close(loss_of(giou_loss, *inputs()), loss_of("giou", *inputs()), rtol=0, atol=0)


def test_a_custom_loss_that_reduces_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"box_loss: expected one loss per box, shape \[2, 40\], got \[\]"):
        loss_of(lambda predictions, targets: corner_distance(predictions, targets).mean(), *inputs())


@pytest.mark.parametrize("config", [RPNConfig, BoxConfig, RetinaConfig])
def test_invalid_settings_are_an_error(config: Any) -> None:
    with pytest.raises(ValueError, match=r"box_loss: expected one of smooth_l1, giou, diou, ciou or a function.*'iou'"):
        config(box_loss="iou")
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"box_loss_weight\S*: expected a number, at least 0"):
            config(box_loss_weight=weight)
    with pytest.raises(ValueError, match="mask_loss_weight"):
        MaskConfig(mask_loss_weight=-1.0)


Changes = dict[str, dict[str, Any]]


def detector_of(kind: str, changes: Changes) -> Detector:
    """A small detector with changed head configurations; the weights are the same at every call."""
    torch.manual_seed(0)
    rpn, box = replace(SMALL_RPN, **changes.get("rpn", {})), changes.get("box", {})
    build = {
        "faster_rcnn": partial(faster_rcnn, rpn=rpn, box=replace(SMALL_BOX, **box)),
        "mask_rcnn": partial(
            mask_rcnn, rpn=rpn, box=replace(SMALL_BOX, **box), mask=replace(SMALL_MASK, **changes.get("mask", {}))
        ),
        "cascade_rcnn": partial(cascade_rcnn, rpn=rpn, box=replace(CASCADE_BOX, **box)),
        "retinanet": partial(retinanet, retina=replace(SMALL_RETINA, **changes.get("retina", {}))),
    }[kind]
    return build(backbone=small_backbone(), num_classes=3)


def losses_of(kind: str, changes: Changes) -> dict[str, Tensor]:
    return {name: loss.detach() for name, loss in detector_of(kind, changes).losses(random_batch()).items()}


@cache
def default_losses(kind: str) -> dict[str, Tensor]:
    return losses_of(kind, {})


@pytest.mark.parametrize(
    ("kind", "part", "field", "names"),
    [
        ("faster_rcnn", "rpn", "objectness_loss_weight", {"rpn_objectness"}),
        ("faster_rcnn", "rpn", "box_loss_weight", {"rpn_box"}),
        ("faster_rcnn", "box", "class_loss_weight", {"box_class"}),
        ("faster_rcnn", "box", "box_loss_weight", {"box_regression"}),
        ("mask_rcnn", "mask", "mask_loss_weight", {"mask"}),
        ("cascade_rcnn", "box", "box_loss_weight", {f"box_regression_{stage}" for stage in (1, 2, 3)}),
        ("retinanet", "retina", "class_loss_weight", {"retina_class"}),
        ("retinanet", "retina", "box_loss_weight", {"retina_box"}),
    ],
)
def test_a_loss_weight_multiplies_only_its_loss(kind: str, part: str, field: str, names: set[str]) -> None:
    weighted, plain = losses_of(kind, {part: {field: 4.0}}), default_losses(kind)
    assert names <= plain.keys()
    for name, loss in plain.items():
        assert loss > 0
        assert torch.equal(weighted[name], loss * (4.0 if name in names else 1.0))


@pytest.mark.parametrize("box_loss", ["giou", corner_distance])
@pytest.mark.parametrize(
    ("kind", "part", "names"),
    [
        ("faster_rcnn", "rpn", {"rpn_box"}),
        ("faster_rcnn", "box", {"box_regression"}),
        ("cascade_rcnn", "box", {f"box_regression_{stage}" for stage in (1, 2, 3)}),
        ("retinanet", "retina", {"retina_box"}),
    ],
)
def test_a_box_loss_changes_only_the_box_loss_of_its_head(
    kind: str, part: str, names: set[str], box_loss: BoxLoss
) -> None:
    changed, plain = losses_of(kind, {part: {"box_loss": box_loss}}), default_losses(kind)
    for name, loss in plain.items():
        assert torch.equal(changed[name], loss) == (name not in names), name
        assert changed[name].isfinite()


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_iou_losses_compile_to_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    detector = detector_of(kind, {part: {"box_loss": "ciou"} for part in ("rpn", "box", "retina")})
    batch = random_batch()
    compiled = torch.compile(detector.losses, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), detector.losses(batch), rtol=1e-5, atol=1e-6)


def test_settings_and_json_contain_the_box_loss() -> None:
    experiment = with_settings(
        faster_rcnn_r50_fpn_1x(), ["model.box.box_loss=giou", "model.box.box_loss_weight=10", "model.rpn.box_loss=diou"]
    )
    restored = from_json(json.loads(json.dumps(to_json(experiment))))
    assert restored.model.keywords["box"].box_loss == "giou"
    assert restored.model.keywords["box"].box_loss_weight == 10.0
    assert restored.model.keywords["rpn"].box_loss == "diou"
    with pytest.raises(ValueError, match=r"model\.box\.box_loss.*'giou'"):
        with_settings(faster_rcnn_r50_fpn_1x(), ["model.box.box_loss=iou"])


def test_json_contains_a_custom_loss_of_a_trusted_module() -> None:
    experiment = faster_rcnn_r50_fpn_1x()
    box = BoxConfig(box_loss=corner_distance)
    stored = json.loads(json.dumps(to_json(replace(experiment, model=partial(experiment.model, box=box)))))
    restored = from_json(stored, trusted_modules=[corner_distance.__module__])
    box_loss = restored.model.keywords["box"].box_loss
    assert torch.equal(loss_of(box_loss, *inputs()), loss_of(corner_distance, *inputs()))
    with pytest.raises(ValueError, match="corner_distance"):
        from_json(stored)


def test_json_without_the_fields_of_box_losses_loads() -> None:
    stored = to_json(faster_rcnn_r50_fpn_1x())
    for part in ("rpn", "box"):
        arguments = stored["arguments"]["model"]["arguments"][part]["arguments"]
        for field in ("box_loss", "box_loss_weight", "class_loss_weight", "objectness_loss_weight"):
            arguments.pop(field, None)
    assert to_json(from_json(stored)) == to_json(faster_rcnn_r50_fpn_1x())
