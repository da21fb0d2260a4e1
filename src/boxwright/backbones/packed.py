"""Convolutions for a CPU that detects: weights are kept as oneDNN reads them.

B images, C channels, H x W positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from boxwright.backbones.fused import fused_convolution, fused_dtype
from boxwright.backbones.norm import folded


class PackedConv2d(nn.Conv2d):
    """A convolution that, without gradient, keeps what it and a norm behind it weigh together.

    In bfloat16, where matrix units leave little time for anything else, the weights are kept in oneDNN's blocks, too,
    into which every call would bring them. Which blocks those are may depend on the size of the map, and to turn one
    kind into another takes far longer than the convolution: so it is in float32, where there is little to save anyway,
    and where outputs do not fill the blocks.
    """

    norm: nn.Module | None
    _packed: tuple[tuple[object, ...], Tensor, Tensor | None] | None

    @classmethod
    def of(cls, convolution: nn.Conv2d, norm: nn.Module | None) -> PackedConv2d:
        """Of a convolution and a norm of constant statistics, or None; it shares their parameters."""
        packed = cls.__new__(cls)
        packed.__dict__.update(convolution.__dict__)
        # The norm is no submodule here: it has its place in the model.
        packed.__dict__.update(norm=norm, _packed=None)
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, C, H', W'], without the norm."""
        dtype = fused_dtype(self, x)
        if dtype is None or self.norm is not None or torch.is_grad_enabled():
            return super().forward(x)
        return fused_convolution(self, *self.packed(dtype), x)

    def packed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the norm in them, without gradient; made anew where those have changed."""
        tensors: list[Tensor] = list(self.parameters())
        if self.norm is not None:
            tensors += [*self.norm.parameters(), *self.norm.buffers()]
        # Tensors made in inference mode have no version, so that nothing tells of a change.
        tells = not any(tensor.is_inference() for tensor in tensors)
        state = dtype, *((tensor.data_ptr(), tensor._version) for tensor in tensors if tells)
        if self._packed is None or self._packed[0] != state or not tells:
            weight, bias = (self.weight, self.bias) if self.norm is None else folded(self, self.norm)
            weight = weight.detach().to(dtype, memory_format=torch.channels_last)
            if dtype == torch.bfloat16 and self.out_channels % 64 == 0:
                reorder: Any = torch.ops.mkldnn._reorder_convolution_weight
                weight = reorder(weight, self.padding, self.stride, self.dilation, self.groups)
            self._packed = state, weight, None if bias is None else bias.detach().to(dtype)
        return self._packed[1], self._packed[2]
