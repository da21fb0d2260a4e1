"""Convolutions for a CPU that detects: norm, sum and ReLU in the same call, weights kept as that call reads them.

oneDNN, which computes PyTorch's convolutions on a CPU, can add a shortcut and clamp while its result is in the cache.
PyTorch's compiler makes use of that; here it is used without one. In bfloat16, where matrix units leave little time for
anything else, the weights are kept in oneDNN's blocks, too, into which every call would bring them. In float32 those
blocks depend on the size of the map and save nothing that can be measured.

B images, C channels, H x W positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from boxwright.backbones.norm import folded


class FusedConv2d(nn.Conv2d):
    """A convolution, maybe with the norm behind it, that keeps what both weigh together."""

    norm: nn.Module | None
    dtype: torch.dtype
    _kept: tuple[list[int | None], Tensor, Tensor | None] | None

    @classmethod
    def of(cls, convolution: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype) -> FusedConv2d:
        """Of a convolution and a norm of constant statistics, whose parameters it shares.

        Args:
            convolution: padded with zeros, by numbers.
            norm: of its outputs; None for none.
            dtype: that it computes and answers in, float32 or bfloat16.
        """
        fused = cls.__new__(cls)
        fused.__dict__.update(convolution.__dict__)
        # The norm is no submodule here: it has its place in the model.
        fused.__dict__.update(norm=norm, dtype=dtype, _kept=None)
        return fused

    def forward(self, x: Tensor, add: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """The convolution with its norm, plus `add`, clamped at 0 where `relu`.

        Args:
            x: [B, inputs, H, W].
            add: [B, C, H', W'] or None.
            relu: whether what is below 0 becomes 0.

        Returns:
            [B, C, H', W'] of `dtype`.
        """
        weight, bias = self._weights()
        places = (self.padding, self.stride, self.dilation, self.groups)
        x = x.to(self.dtype)
        operator: Any = torch.ops.mkldnn._convolution_pointwise
        y: Tensor
        if add is None:
            y = operator(x, weight, bias, *places, "relu" if relu else "none", [], "")
        else:
            activation = "relu" if relu else None
            y = operator.binary(x, add.to(self.dtype), weight, bias, *places, "add", 1.0, activation, [], "")
        return y

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for oneDNN, made anew where the parameters have changed."""
        parameters = [*self.parameters(), *(() if self.norm is None else self.norm.parameters())]
        # Parameters made in inference mode have no version, so that nothing tells of a change.
        versions = [None if parameter.is_inference() else parameter._version for parameter in parameters]
        if self._kept is None or self._kept[0] != versions or None in versions:
            weight, bias = (self.weight, self.bias) if self.norm is None else folded(self, self.norm)
            weight = weight.detach().to(self.dtype, memory_format=torch.channels_last)
            if self.dtype == torch.bfloat16:
                reorder: Any = torch.ops.mkldnn._reorder_convolution_weight
                weight = reorder(weight, self.padding, self.stride, self.dilation, self.groups)
            self._kept = versions, weight, None if bias is None else bias.detach().to(self.dtype)
        return self._kept[1], self._kept[2]
