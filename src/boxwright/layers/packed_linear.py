"""The linear layer that reads RoI features.

N boxes, C channels, S x S cells of the grid of a box.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxwright.layers.stock import is_stock


def linear_on_grid(linear: nn.Module, grid: Tensor) -> Tensor:
    """Compute `linear(grid.flatten(1))`.

    Args:
        linear: any module that maps [N, C * S * S] to [N, outputs]. Without gradients, a stock `PackedLinear` reads the
            grid in its memory order.
        grid: [N, C, S, S].

    Returns:
        [N, outputs].
    """
    detects = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and grid.device.type == "cpu"
    if detects and is_stock(linear, PackedLinear):
        assert isinstance(linear, PackedLinear)
        # A weight created in inference mode has no version counter, so its changes cannot be detected.
        if not linear.weight.is_inference():
            return F.linear(grid.permute(0, 2, 3, 1).flatten(1), linear.weight_like(grid), linear.bias)
    y: Tensor = linear(grid.flatten(1))
    return y


class PackedLinear(nn.Linear):
    """Linear layer with a cached copy of its weight in channels-last order, for `linear_on_grid`.

    RoIAlign outputs channels-last features, but a linear layer expects channels first. Converting the features of 2,000
    RoIs takes 5% of the time of `detect`, so the weight is reordered once instead.
    """

    _packed: tuple[tuple[object, ...], Tensor] | None

    @classmethod
    def of(cls, linear: nn.Linear) -> PackedLinear:
        """Make a packed linear layer that shares the parameters of `linear`."""
        packed = cls.__new__(cls)
        packed.__dict__.update(linear.__dict__, _packed=None)
        return packed

    def weight_like(self, grid: Tensor) -> Tensor:
        """[outputs, S * S * C] in the dtype of the product, without gradient; recomputed after the weight changed."""
        weight = self.weight
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        state = weight.data_ptr(), weight._version, dtype
        if self._packed is None or self._packed[0] != state:
            ordered = weight.detach().unflatten(1, grid.shape[1:]).permute(0, 2, 3, 1).flatten(1)
            self._packed = state, ordered.to(dtype)
        return self._packed[1]

    def train(self, mode: bool = True) -> PackedLinear:
        """Set the mode. Training mode frees the cached weights, which only detection uses."""
        if mode:
            self._packed = None
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        """Arguments of the linear layer."""
        return f"{super().extra_repr()}, packed"
