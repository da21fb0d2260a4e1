"""Batch norms are folded only where they directly follow a convolution, and never in modules with hooks."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from boxwright.backbones.fpn import FPN, resnet_fpn
from boxwright.backbones.resnet import BasicBlock, ResNet
from boxwright.layers.conv_norm import conv_norm
from boxwright.layers.norm import FrozenBatchNorm2d
from boxwright.layers.optimize import optimize_for_cpu, optimize_for_cuda
from boxwright.layers.packed import PackedConv2d


def with_random_norms(model: nn.Module) -> Any:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.4, 0.9)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval()


@pytest.fixture
def norm_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per batch norm that is computed separately from its convolution."""
    calls: list[int] = []
    batch_norm = torch.nn.functional.batch_norm
    monkeypatch.setattr(
        torch.nn.functional, "batch_norm", lambda *args, **kwargs: calls.append(1) or batch_norm(*args, **kwargs)
    )
    return calls


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@torch.no_grad()
def test_optimized_torchvision_models_compute_the_same(name: str) -> None:
    model = with_random_norms(getattr(torchvision.models, name)())
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    names = list(model.state_dict())
    optimize_for_cpu(model)
    assert list(model.state_dict()) == names
    for _ in range(2):
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_norms_of_a_pyramid_are_folded(norm_calls: list[int]) -> None:
    model = with_random_norms(resnet_fpn(depth=18, norm="bn", fpn_norm="bn", channels=16, extra="c5"))
    x = torch.randn(1, 3, 64, 64)
    expected = deepcopy(model).double()(x.double())
    optimize_for_cpu(model)
    norm_calls.clear()
    for level, expected_level in zip(model(x), expected, strict=True):
        assert (level - expected_level).norm() < 1e-5 * expected_level.norm()
    assert not norm_calls


class Block(nn.Module):
    """A convolution and the norm that follows it."""

    conv_norms = (("conv1", "bn1"),)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(self.conv1, self.bn1, x)


class Clipped(Block):
    """The same layers with an in-place ReLU between them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x).relu_())


class Doubled(Block):
    """The same layers; the output of the convolution is used twice."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        return y + self.bn1(y)


class PreActivation(Block):
    """The same layers, the norm first."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(self.bn1(x).relu())


@pytest.mark.parametrize("kind", [Clipped, Doubled, PreActivation])
@torch.no_grad()
def test_a_norm_that_does_not_simply_follow_the_convolution_is_not_folded(kind: type[Block]) -> None:
    model, x = with_random_norms(kind()), torch.randn(1, 4, 6, 6)
    expected = model(x)
    optimize_for_cpu(model)
    optimize_for_cuda(model)
    for _ in range(3):
        torch.testing.assert_close(model(x), expected)


def optimized_block(x: Tensor) -> tuple[Any, Any]:
    """An optimized block that has folded its norm, and the same block without optimization."""
    plain = with_random_norms(Block())
    model = deepcopy(plain)
    optimize_for_cpu(model)
    model(x)
    return model, plain


@torch.no_grad()
def test_a_copy_folds_its_own_weights() -> None:
    x = torch.randn(1, 4, 6, 6)
    model, plain = optimized_block(x)
    copy = deepcopy(model)
    for other in (copy, plain):
        other.conv1.weight.mul_(2)
    torch.testing.assert_close(copy(x), plain(x))


@pytest.mark.parametrize("name", ["conv1", "bn1"])
@torch.no_grad()
def test_a_hook_after_optimization_gets_what_the_module_computes(name: str) -> None:
    x = torch.randn(1, 4, 6, 6)
    model, plain = optimized_block(x)
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, y: seen.append(y))
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(seen[0], plain.conv1(x) if name == "conv1" else plain(x))
    handle.remove()
    torch.testing.assert_close(model(x), plain(x))


class Shifted(nn.Module):
    """A layer whose output is increased by 1."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 1


@torch.no_grad()
def test_modules_replaced_after_optimization_are_used() -> None:
    x = torch.randn(1, 4, 6, 6)
    model, plain = optimized_block(x)
    for block in (model, plain):
        block.conv1 = Shifted(block.conv1)
    torch.testing.assert_close(model(x), plain(x))
    model, plain = optimized_block(x)
    model.bn1 = nn.GroupNorm(2, 4)
    torch.testing.assert_close(model(x), nn.GroupNorm(2, 4)(plain.conv1(x)))


def test_training_after_optimization_equals_training_without_it() -> None:
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        model, plain = optimized_block(x)
    for block in (model.train(), plain.train()):
        block(x).square().sum().backward()
    torch.testing.assert_close(model.conv1.weight.grad, plain.conv1.weight.grad)
    assert model.bn1.num_batches_tracked == 1
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x))


@torch.no_grad()
def test_a_folded_convolution_can_be_called_alone() -> None:
    x = torch.randn(1, 4, 6, 6)
    model, plain = optimized_block(x)
    for _ in range(2):
        torch.testing.assert_close(model.conv1(x), plain.conv1(x))
        torch.testing.assert_close(model(x), plain(x))


@torch.no_grad()
def test_a_convolution_of_two_containers_is_not_folded() -> None:
    first, second = with_random_norms(Block()), with_random_norms(Block())
    nn.init.uniform_(second.bn1.weight, 2.0, 3.0)
    second.conv1 = first.conv1
    model, x = nn.ModuleList([first, second]), torch.randn(1, 4, 6, 6)
    expected = [block(x) for block in model]
    optimize_for_cpu(model)
    optimize_for_cuda(model)
    assert model[0].conv1 is model[1].conv1
    for _ in range(2):
        for block, y in zip(model, expected, strict=True):
            torch.testing.assert_close(block(x), y)


@torch.no_grad()
def test_norms_without_scale_and_shift_are_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)).eval()
    x = torch.randn(1, 3, 5, 5)
    expected = model(x)
    optimize_for_cpu(model)
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)


def test_repr_names_the_folded_norms() -> None:
    body = ResNet(18, norm="bn").eval()
    optimize_for_cpu(body)
    text = repr(body)
    assert text.count("PackedConv2d(") == text.count("packed, folds ") == 20
    assert "folds bn1" in repr(body.conv1)
    assert "folds" not in repr(PackedConv2d.of(nn.Conv2d(2, 2, 1)))


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", ["bn", "frozen_bn"])
@torch.no_grad()
def test_a_gpu_model_has_no_norms_left_and_equals_float64(depth: int, norm: Any) -> None:
    model = with_random_norms(resnet_fpn(depth=depth, norm=norm, fpn_norm="bn", channels=16))
    x = torch.randn(1, 3, 64, 64)
    expected = deepcopy(model).double()(x.double())
    optimize_for_cuda(model)
    assert not any(isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d) for module in model.modules())
    assert model.body.layer2[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    for level, expected_level in zip(model(x), expected, strict=True):
        assert (level - expected_level).norm() < 1e-5 * expected_level.norm()


class OtherOrder(BasicBlock):
    """A block whose `forward` adds convolution and norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x) + self.bn1(x)


@torch.no_grad()
def test_a_gpu_model_keeps_norms_that_may_not_follow_the_convolution() -> None:
    block = with_random_norms(OtherOrder(8, 8, 1, "pytorch", "bn", True, 8, 1))
    x = torch.randn(1, 8, 5, 5)
    expected = block(x)
    optimize_for_cuda(block)
    torch.testing.assert_close(block(x), expected)


def test_a_gpu_model_keeps_hooked_norms() -> None:
    model: FPN = with_random_norms(resnet_fpn(depth=18, norm="bn"))
    model.body.get_submodule("bn1").register_forward_hook(lambda *_: None)
    optimize_for_cuda(model)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 1
