"""GIoU, DIoU and CIoU losses against values computed elsewhere, torchvision, and plain formulas in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from boxwright.losses import ciou_loss, diou_loss, giou_loss

LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}
PEERS = {
    "giou": torchvision.ops.generalized_box_iou_loss,
    "diou": torchvision.ops.distance_box_iou_loss,
    "ciou": torchvision.ops.complete_box_iou_loss,
}
CASES = json.loads((Path(__file__).parent / "cases" / "iou_losses.json").read_text())
BOX = [10.0, 10.0, 50.0, 40.0]
DEGENERATE = {
    "equal": (BOX, BOX),
    "prediction is a point": ([20.0, 20.0, 20.0, 20.0], BOX),
    "prediction is a line": ([20.0, 20.0, 20.0, 30.0], BOX),
    "target is a point": (BOX, [20.0, 20.0, 20.0, 20.0]),
    "target is a line": (BOX, [20.0, 20.0, 45.0, 20.0]),
    "both are the same point": ([20.0] * 4, [20.0] * 4),
    "both are points": ([20.0] * 4, [30.0] * 4),
    "both are lines that share a part": ([20.0, 10.0, 20.0, 40.0], [20.0, 20.0, 20.0, 60.0]),
    "corners swapped": ([50.0, 40.0, 10.0, 10.0], BOX),
    "corners swapped in x": ([50.0, 10.0, 10.0, 40.0], BOX),
    "touching": ([50.0, 10.0, 90.0, 40.0], BOX),
    "minute": ([1e-20, 0.0, 2e-20, 1e-20], [0.0, 0.0, 1e-20, 1e-20]),
    "huge": ([0.0, 0.0, 1e9, 1e9], [-1e9, 5.0, 10.0, 1e9]),
}


def boxes(seed: int, number: int = 400) -> Tensor:
    """Boxes of all sizes and aspect ratios, of which many overlap."""
    generator = torch.Generator().manual_seed(seed)
    corner = 60 * torch.rand(number, 2, generator=generator, dtype=torch.float64)
    size = 80 * torch.rand(number, 2, generator=generator, dtype=torch.float64) ** 2 + 0.5
    return torch.cat([corner, corner + size], dim=-1)


def with_gradient(loss: Callable[..., Tensor], predictions: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    predictions = predictions.clone().requires_grad_()
    values = loss(predictions, *others)
    (gradient,) = torch.autograd.grad(values.sum(), predictions)
    return values.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["name"])
@pytest.mark.parametrize("name", LOSSES)
def test_values_computed_elsewhere(name: str, case: dict[str, object], dtype: torch.dtype) -> None:
    predicted, target = (torch.tensor(case["inputs"][part], dtype=dtype) for part in ("predicted", "target"))
    loss, gradient = with_gradient(LOSSES[name], predicted, target)
    tolerance = {"rtol": CASES["tolerance"], "atol": CASES["tolerance"]}
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, torch.tensor(case[name], dtype=dtype), **tolerance)
    torch.testing.assert_close(gradient, torch.tensor(case[f"{name}_gradient"], dtype=dtype), **tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_to_torchvision(name: str) -> None:
    """In float64, where torchvision's epsilon of 1e-7 in the denominators is the only difference."""
    predictions, targets = boxes(0), boxes(1)
    ours = with_gradient(LOSSES[name], predictions, targets)
    theirs = with_gradient(PEERS[name], predictions, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def formula(name: str, p: list[float], t: list[float]) -> float:
    """The papers' formulas, one box at a time."""
    width, height = (max(0.0, min(p[i + 2], t[i + 2]) - max(p[i], t[i])) for i in (0, 1))
    areas = (p[2] - p[0]) * (p[3] - p[1]), (t[2] - t[0]) * (t[3] - t[1])
    union = sum(areas) - width * height
    around = [max(p[i + 2], t[i + 2]) - min(p[i], t[i]) for i in (0, 1)]
    if name == "giou":
        return 1 - width * height / union + 1 - union / (around[0] * around[1])
    offset = [(p[i] + p[i + 2] - t[i] - t[i + 2]) / 2 for i in (0, 1)]
    diou = 1 - width * height / union + math.hypot(*offset) ** 2 / math.hypot(*around) ** 2
    if name == "diou":
        return diou
    angles = [math.atan((box[2] - box[0]) / (box[3] - box[1])) for box in (p, t)]
    v = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
    return diou + v * v / (width * height / -union + 1 + v)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_to_the_formulas(name: str) -> None:
    predictions, targets = boxes(2), boxes(3)
    expected = [formula(name, p, t) for p, t in zip(predictions.tolist(), targets.tolist(), strict=True)]
    torch.testing.assert_close(LOSSES[name](predictions, targets), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", LOSSES)
def test_degenerate_boxes_have_finite_losses_and_gradients(name: str, case: str) -> None:
    predicted, target = (torch.tensor(box) for box in DEGENERATE[case])
    loss, gradient = with_gradient(LOSSES[name], predicted, target)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert -1e-6 < loss <= (3.0 if name == "ciou" else 2.0)
    if case == "equal":
        assert loss == 0
    elif "prediction" in case or "swapped" in case:
        assert loss >= 1


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_neither_loss_nor_gradient(name: str) -> None:
    predictions, targets = boxes(4, 6).float(), boxes(5, 6).float()
    valid = torch.tensor([True, True, False, True, False, False])
    for padding in (torch.nan, torch.inf, 1e30):
        padded = [torch.where(valid[:, None], tensor, padding) for tensor in (predictions, targets)]
        loss, gradient = with_gradient(LOSSES[name], *padded, valid)
        expected = with_gradient(LOSSES[name], predictions, targets)
        assert torch.equal(loss[valid], expected[0][valid])
        torch.testing.assert_close(gradient[valid], expected[1][valid])
        assert not loss[~valid].any()
        assert not gradient[~valid].any()


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_descent_moves_boxes_to_their_targets(name: str) -> None:
    """Also from where the two do not overlap."""
    predictions, targets = boxes(6, 20).requires_grad_(), boxes(7, 20)
    before = LOSSES[name](predictions, targets).mean()
    optimizer = torch.optim.Adam([predictions], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        LOSSES[name](predictions, targets).sum().backward()
        optimizer.step()
    assert LOSSES[name](predictions, targets).mean() < 0.25 * before


@pytest.mark.parametrize("name", LOSSES)
def test_float32_for_half_precision(name: str) -> None:
    predictions, targets = boxes(8).bfloat16(), boxes(9).bfloat16()
    loss = LOSSES[name](predictions, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LOSSES[name](predictions.float(), targets.float()))
