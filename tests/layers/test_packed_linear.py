from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxwright.layers.packed_linear import PackedLinear, linear_on_grid


@pytest.fixture
def layer() -> PackedLinear:
    torch.manual_seed(0)
    return PackedLinear.of(nn.Linear(6 * 3 * 3, 5)).eval()


def grids(memory_format: torch.memory_format = torch.channels_last) -> Tensor:
    return torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(1)).to(memory_format=memory_format)


def flat(layer: nn.Linear, grid: Tensor) -> Tensor:
    """The output of the layer for flattened grids, computed with the stored weights."""
    return F.linear(grid.contiguous().flatten(1), layer.weight, layer.bias)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_detection_equals_the_flat_product(
    layer: PackedLinear, memory_format: torch.memory_format, precision: torch.dtype
) -> None:
    grid = grids(memory_format)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        output, expected = linear_on_grid(layer, grid), flat(layer, grid)
    assert output.dtype == precision
    tolerance = 2**-7 if precision == torch.bfloat16 else 1e-6
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


def test_changed_weights_are_packed_again(layer: PackedLinear) -> None:
    grid, other = grids(), deepcopy(layer)
    torch.nn.init.normal_(other.weight)
    with torch.no_grad():
        linear_on_grid(layer, grid)
        layer.weight.mul_(2)  # Optimizers and `load_state_dict` change weights in place.
        torch.testing.assert_close(linear_on_grid(layer, grid), flat(layer, grid))
        layer.weight.data = other.weight.data.clone()  # Moving a model replaces the data.
        torch.testing.assert_close(linear_on_grid(layer, grid), flat(layer, grid))
        layer.double()
        torch.testing.assert_close(linear_on_grid(layer, grid.double()), flat(layer, grid.double()))


def test_gradients_flow_to_the_stored_weights(layer: PackedLinear) -> None:
    layer.train()
    grid = grids().requires_grad_()
    linear_on_grid(layer, grid).square().sum().backward()
    gradients = layer.weight.grad, grid.grad
    expected = torch.autograd.grad(flat(layer, grid).square().sum(), (layer.weight, grid))
    torch.testing.assert_close(gradients, expected)


def test_training_frees_the_packed_copy(layer: PackedLinear) -> None:
    with torch.no_grad():
        linear_on_grid(layer, grids())
        packed = layer._packed
        linear_on_grid(layer.eval(), grids())
    assert packed is not None
    assert layer._packed is packed
    layer.train()
    assert layer._packed is None


def test_weights_created_in_inference_mode_are_never_packed() -> None:
    with torch.inference_mode():
        layer, grid = PackedLinear.of(nn.Linear(6 * 3 * 3, 5)).eval(), grids()
        for _ in range(2):
            torch.testing.assert_close(linear_on_grid(layer, grid), flat(layer, grid))
            layer.weight.mul_(2)


class Doubled(nn.Linear):
    """A linear layer with another `forward`."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@torch.no_grad()
def test_a_subclass_and_a_hook_get_the_flat_grid() -> None:
    torch.manual_seed(0)
    plain, grid = nn.Linear(6 * 3 * 3, 5), grids()
    other = Doubled(6 * 3 * 3, 5)
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(linear_on_grid(other, grid), 2 * flat(plain, grid))
    packed, shapes = PackedLinear.of(plain), []
    packed.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    torch.testing.assert_close(linear_on_grid(packed, grid), flat(plain, grid))
    assert shapes == [(4, 54)]
