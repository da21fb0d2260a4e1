from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from boxwright.heads.grid_linear import GridLinear


@pytest.fixture
def layer() -> GridLinear:
    torch.manual_seed(0)
    return GridLinear(6 * 3 * 3, 5).eval()


def grids(memory_format: torch.memory_format = torch.channels_last) -> Tensor:
    return torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(1)).to(memory_format=memory_format)


def flat(layer: GridLinear, grid: Tensor) -> Tensor:
    """What the weights mean, in the order in which they are stored."""
    return F.linear(grid.contiguous().flatten(1), layer.weight, layer.bias)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_detecting_equals_the_flat_product(
    layer: GridLinear, memory_format: torch.memory_format, precision: torch.dtype
) -> None:
    grid = grids(memory_format)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        given, wanted = layer(grid), flat(layer, grid)
    assert given.dtype == precision
    close = 2**-7 if precision == torch.bfloat16 else 1e-6
    torch.testing.assert_close(given, wanted, rtol=close, atol=close)


def test_weights_that_changed_are_read_anew(layer: GridLinear) -> None:
    grid, other = grids(), deepcopy(layer)
    torch.nn.init.normal_(other.weight)
    with torch.no_grad():
        layer(grid)
        layer.weight.mul_(2)  # As an optimizer does, and `load_state_dict`.
        torch.testing.assert_close(layer(grid), flat(layer, grid))
        layer.weight.data = other.weight.data.clone()  # As moving a model does.
        torch.testing.assert_close(layer(grid), flat(layer, grid))
        layer.double()
        torch.testing.assert_close(layer(grid.double()), flat(layer, grid.double()))


def test_learning_goes_to_the_stored_weights(layer: GridLinear) -> None:
    layer.train()
    grid = grids().requires_grad_()
    layer(grid).square().sum().backward()
    given = layer.weight.grad, grid.grad
    wanted = torch.autograd.grad(flat(layer, grid).square().sum(), (layer.weight, grid))
    torch.testing.assert_close(given, wanted)


def test_the_second_copy_stays_for_detecting_alone(layer: GridLinear) -> None:
    with torch.no_grad():
        layer(grids())
        laid_out = layer._laid_out
        layer.eval()(grids())
    assert laid_out is not None
    assert layer._laid_out is laid_out
    layer.train()
    assert layer._laid_out is None


def test_a_layer_made_in_inference_mode_is_read_as_it_is() -> None:
    with torch.inference_mode():
        layer, grid = GridLinear(6 * 3 * 3, 5).eval(), grids()
        for _ in range(2):
            torch.testing.assert_close(layer(grid), flat(layer, grid))
            layer.weight.mul_(2)
