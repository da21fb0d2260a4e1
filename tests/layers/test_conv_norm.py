from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from boxwright.layers.conv_norm import conv_norm
from boxwright.layers.fused import can_fuse, fused_convolution
from boxwright.layers.norm import FrozenBatchNorm2d


def with_statistics(norm: nn.Module) -> nn.Module:
    for tensor in (norm.weight, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    for tensor in (norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    return norm.double().eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm_type", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_folded_norm_has_the_output_and_gradients_of_the_norm(norm_type: type[nn.Module], bias: bool) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=bias).double()
    norm = with_statistics(norm_type(6))
    x, add = torch.randn(2, 4, 9, 7, dtype=torch.float64), torch.randn(2, 6, 5, 4, dtype=torch.float64)
    inputs = [x.requires_grad_(), add.requires_grad_(), *convolution.parameters(), *norm.parameters()]
    actual = conv_norm(convolution, norm, x, add, relu=True)
    expected = (
        nn.functional.batch_norm(
            convolution(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
        + add
    ).relu()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        rtol=1e-10,
        atol=1e-10,
    )


def test_norm_that_updates_its_statistics_is_not_folded() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6).train()
    x = torch.randn(2, 4, 8, 8)
    y = conv_norm(nn.Conv2d(4, 6, 1), norm, x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(6), rtol=0, atol=1e-5)
    assert norm.num_batches_tracked == 1


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    dtypes: list[torch.dtype] = []

    def recorded(convolution: nn.Conv2d, weight: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        dtypes.append(weight.dtype)
        return fused_convolution(convolution, weight, *args, **kwargs)

    monkeypatch.setattr("boxwright.layers.conv_norm.fused_convolution", recorded)
    return dtypes


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_sum_and_relu_equal_float64(
    dtype: torch.dtype,
    groups: int,
    channels_last: bool,
    with_norm: bool,
    adds: bool,
    relu: bool,
    fused_calls: list[torch.dtype],
) -> None:
    if not can_fuse(dtype):
        pytest.skip(f"oneDNN does not support {dtype} on this CPU")
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=groups)
    norm = with_statistics(FrozenBatchNorm2d(12)).float() if with_norm else None
    x, add = torch.randn(2, 8, 19, 17), torch.randn(2, 12, 10, 9) if adds else None
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    seed = torch.randn(2, 12, 10, 9)
    before = None if add is None else add.clone()

    def output_and_gradients(to: torch.dtype) -> list[torch.Tensor]:
        layers = copy.deepcopy(convolution).to(to), None if norm is None else copy.deepcopy(norm).to(to)
        inputs = [tensor.to(to).requires_grad_() for tensor in (x, add) if tensor is not None]
        parameters = [*inputs, *layers[0].parameters(), *(() if layers[1] is None else layers[1].parameters())]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16 and to == torch.float32):
            y = conv_norm(*layers, *inputs, relu=relu)
        return [y, *torch.autograd.grad(y, parameters, seed.to(y.dtype))]

    outputs = output_and_gradients(torch.float32)
    assert fused_calls == ([dtype] if adds or relu else [])
    assert outputs[0].dtype == dtype
    # Values near 0 may be rounded to the other side of the ReLU: one in a few hundred in bfloat16.
    tolerance = 1e-5 if dtype == torch.float32 else 0.1 if relu else 0.01
    for actual, expected in zip(outputs, output_and_gradients(torch.float64), strict=True):
        assert actual.shape == expected.shape
        assert (actual - expected).norm() < tolerance * expected.norm()
    assert add is None or torch.equal(add, before), "`add` must not be overwritten"


def test_tensors_without_requires_grad_get_no_gradient(fused_calls: list[torch.dtype]) -> None:
    convolution, norm = nn.Conv2d(4, 6, 1), FrozenBatchNorm2d(6, train_affine=False)
    for frozen in (convolution, norm):
        frozen.requires_grad_(False)
    x, add = torch.randn(1, 4, 5, 5), torch.randn(1, 6, 5, 5, requires_grad=True)
    assert not conv_norm(convolution, norm, x, relu=True).requires_grad
    y = conv_norm(convolution, norm, x, add)
    y.sum().backward()
    assert torch.equal(add.grad, torch.ones_like(add))
    assert x.grad is None
    assert len(fused_calls) == 2


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_other_padding_is_computed_as_by_the_layer(
    padding: int | str, padding_mode: str, fused_calls: list[torch.dtype]
) -> None:
    torch.manual_seed(0)
    convolution, x = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=padding_mode), torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(conv_norm(convolution, None, x, relu=True), convolution(x).relu())
    assert bool(fused_calls) == (padding == 1 and padding_mode == "zeros")
