"""The fully connected layer that reads RoIAlign's grids.

N boxes, C channels, S x S cells of a grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GridLinear(nn.Linear):
    """A linear layer on grids whose weights are in the order of (C, S, S), as every code base stores them.

    RoIAlign's grids lie in memory with the channels last. Detecting on a CPU, where bringing 2,000 of them into the
    order of the weights is a twentieth of the time, the weights are brought into theirs instead, once.
    """

    _laid_out: tuple[tuple[object, ...], Tensor] | None = None

    def forward(self, grid: Tensor) -> Tensor:
        """[N, C, S, S] -> [N, outputs]."""
        detecting = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        # Nothing would tell that a weight made in inference mode has changed.
        if not detecting or grid.device.type != "cpu" or self.weight.is_inference():
            return super().forward(grid.flatten(1))
        return F.linear(grid.permute(0, 2, 3, 1).flatten(1), self._weight_like(grid), self.bias)

    def train(self, mode: bool = True) -> GridLinear:
        """Give back what only detecting needs."""
        if mode:
            self._laid_out = None
        return super().train(mode)

    def _weight_like(self, grid: Tensor) -> Tensor:
        """[outputs, S * S * C] in the precision of the product, made anew where the weight has changed."""
        weight = self.weight
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        state = (weight.data_ptr(), weight._version, dtype)
        if self._laid_out is None or self._laid_out[0] != state:
            ordered = weight.unflatten(1, grid.shape[1:]).permute(0, 2, 3, 1).flatten(1)
            self._laid_out = state, ordered.to(dtype)
        return self._laid_out[1]
