from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from boxwright.losses import (
    binary_cross_entropy,
    cross_entropy,
    shared_denominators,
    sigmoid_focal_loss,
    smooth_l1,
    weighted_mean,
)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def test_binary_cross_entropy() -> None:
    logits, targets = values(2, 50), values(2, 50, seed=1).sigmoid()
    probability = logits.sigmoid()
    expected = -(targets * probability.log() + (1 - targets) * (1 - probability).log())
    torch.testing.assert_close(binary_cross_entropy(logits, targets), expected)
    ours = binary_cross_entropy(logits.float(), targets > 0.5)
    torch.testing.assert_close(
        ours, F.binary_cross_entropy_with_logits(logits.float(), (targets > 0.5).float(), reduction="none")
    )


def test_cross_entropy() -> None:
    logits, labels = values(2, 50, 7), torch.arange(100).view(2, 50) % 7
    expected = -(logits.exp() / logits.exp().sum(-1, keepdim=True)).log().gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(cross_entropy(logits, labels), expected)
    torch.testing.assert_close(
        cross_entropy(logits.float(), labels), F.cross_entropy(logits.float().mT, labels, reduction="none")
    )


def focal_inputs(num_classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels (some of them background), and the labels as one-hot rows."""
    logits, labels = values(2, 50, num_classes), torch.arange(100).view(2, 50) % (num_classes + 1)
    return logits, labels, F.one_hot(labels, num_classes + 1)[..., :num_classes].double()


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.75, 1.5)])
def test_sigmoid_focal_loss(alpha: float, gamma: float) -> None:
    logits, labels, one_hot = focal_inputs()
    probability = logits.sigmoid()
    positive = -alpha * (1 - probability) ** gamma * probability.log()
    negative = -(1 - alpha) * probability**gamma * (1 - probability).log()
    expected = (one_hot * positive + (1 - one_hot) * negative).sum(-1)
    torch.testing.assert_close(sigmoid_focal_loss(logits, labels, alpha=alpha, gamma=gamma), expected)
    theirs, ours = logits.float().requires_grad_(), logits.float().requires_grad_()
    reference = torchvision.ops.sigmoid_focal_loss(theirs, one_hot.float(), alpha, gamma).sum(-1)
    actual = sigmoid_focal_loss(ours, labels, alpha=alpha, gamma=gamma)
    torch.testing.assert_close(actual, reference)
    weights = values(2, 50, seed=3).float()
    torch.testing.assert_close(
        torch.autograd.grad(actual, ours, weights),
        torch.autograd.grad(reference, theirs, weights),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("gamma", [0.0, 1.5, 2.0])
def test_the_gradient_of_focal_loss_equals_the_finite_difference(gamma: float) -> None:
    logits, labels, _ = focal_inputs(3)
    valid = torch.arange(50) < 40
    assert torch.autograd.gradcheck(
        lambda x: sigmoid_focal_loss(x, labels, valid.expand(2, 50), gamma=gamma), logits.requires_grad_()
    )


def test_focal_loss_of_large_logits_is_finite_and_exact() -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0], [20.0, -20.0]], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([0, 0, 2]))
    # Row 0: both logits right. Row 1: both wrong, the loss is the absolute logit. Row 2: background, but class 0 has a
    # probability of 1 - 2e-9.
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.25 * 200 + 0.75 * 200, 0.75 * 20]))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.0], [-0.25, 0.75], [0.75, 0.0]]))


def test_focal_loss_saves_only_its_inputs_for_backward() -> None:
    logits, labels, _ = focal_inputs()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sigmoid_focal_loss(logits.requires_grad_(), labels)
    assert {t.data_ptr() for t in saved} == {logits.data_ptr(), labels.data_ptr()}


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0])
def test_smooth_l1(beta: float) -> None:
    predictions, targets = values(2, 50, 4), values(2, 50, 4, seed=1)
    error = (predictions - targets).abs()
    expected = torch.where(error < beta, error**2 / (2 * beta), error - beta / 2) if beta else error
    torch.testing.assert_close(smooth_l1(predictions, targets, beta), expected)
    torch.testing.assert_close(
        smooth_l1(predictions.float(), targets.float(), beta),
        F.smooth_l1_loss(predictions.float(), targets.float(), beta=beta, reduction="none"),
    )


def test_weighted_mean() -> None:
    loss = torch.tensor([1.0, 2.0, 4.0])
    assert weighted_mean(loss, torch.tensor([True, False, True])).item() == 2.5
    assert weighted_mean(loss, torch.tensor([0.0, 0.0, 0.5])).item() == 2.0  # a denominator below 1 counts as 1
    assert weighted_mean(loss, torch.zeros(3)).item() == 0.0
    assert weighted_mean(loss, torch.ones(3), over=torch.tensor([True, True, False])).item() == 3.5
    assert weighted_mean(loss, torch.ones(3), over=torch.zeros(3, dtype=torch.bool)).item() == 7.0


def all_losses(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    objectness = binary_cross_entropy(logits[..., 0], targets[..., 0].sigmoid(), valid)
    classes = cross_entropy(logits, labels, valid) + sigmoid_focal_loss(logits, labels, valid)
    coordinates = smooth_l1(boxes, targets, 0.1, valid[..., None]).sum(-1)
    return weighted_mean(objectness + classes + coordinates, valid)


def padded_inputs(padding: float, label: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    valid = torch.tensor([[True, True, False], [False, False, False]])
    floats = [values(2, 3, size, seed=size).float() for size in (5, 4, 6)]
    logits, boxes, targets = (torch.where(valid[..., None], tensor, padding) for tensor in floats)
    labels = torch.where(valid, 3, label)
    return logits.requires_grad_(), boxes.requires_grad_(), labels, targets[..., :4], valid


def test_padding_does_not_change_losses_and_gradients() -> None:
    clean, dirty = padded_inputs(0.0, 0), padded_inputs(float("nan"), 10**6)
    losses = all_losses(*clean), all_losses(*dirty)
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(clean[:2], dirty[:2], strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
        assert ours.grad[0, :2].all()
        assert not ours.grad[1].any()


def test_losses_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        arguments = padded_inputs(0.0, 0)
        halves = [tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in arguments]
        assert all_losses(*halves).dtype == torch.float32
        torch.testing.assert_close(all_losses(*arguments), all_losses(*halves), rtol=0.02, atol=0.02)


def test_losses_compile_to_one_graph_and_run_on_fake_tensors() -> None:
    arguments = padded_inputs(float("nan"), -1)
    compiled: Callable[..., Tensor] = torch.compile(all_losses, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), all_losses(*arguments))
    detached = [argument.detach() for argument in arguments]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(argument) for argument in detached]
        assert all_losses(*fakes).shape == ()


LOSS = values(2, 6, 4).float()
WEIGHT = torch.tensor([[1.0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0.5, 0]])


def gradient_of(rows: slice, mean: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    scale = torch.ones((), requires_grad=True)
    mean((LOSS[rows] * scale).sum(-1), WEIGHT[rows]).backward()
    assert scale.grad is not None
    return scale.grad


def average_over_ranks(rank: int, port: int) -> None:
    """Check that denominators are shared only within `shared_denominators`, in eager and in compiled code."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    rows = slice(rank, rank + 1)
    local = (LOSS[rows].sum(-1) * WEIGHT[rows]).sum() / WEIGHT[rows].sum()
    shared = (LOSS.sum(-1) * WEIGHT).sum() / WEIGHT.sum()
    for mean in (weighted_mean, torch.compile(weighted_mean, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(gradient_of(rows, mean), local)
        with shared_denominators():
            gradient = gradient_of(rows, mean)
        dist.all_reduce(gradient)
        torch.testing.assert_close(gradient / 2, shared)
        torch.testing.assert_close(gradient_of(rows, mean), local)
    dist.destroy_process_group()


def test_with_shared_denominators_two_ranks_average_to_the_result_of_one_process() -> None:
    whole = gradient_of(slice(None), weighted_mean)
    torch.testing.assert_close(whole, (LOSS.sum(-1) * WEIGHT).sum() / WEIGHT.sum())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(average_over_ranks, args=(port,), nprocs=2)
