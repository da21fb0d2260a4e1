"""Convolutions laid out for a CPU that detects in bfloat16.

oneDNN, which computes PyTorch's convolutions on a CPU, brings weights into blocks of its own in every call, and could
add a shortcut and clamp while its result is in the cache. PyTorch's compiler makes use of both; here they are used
without one. In bfloat16, where matrix units leave little time for anything else, that is a fifth of a detection; in
float32 it is nothing.

B images, C channels, H x W positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from boxwright.backbones.norm import folded


class PackedConv2d(nn.Conv2d):
    """A convolution, maybe with the norm behind it, that also keeps its weights in bfloat16 as oneDNN reads them."""

    norm: nn.Module | None
    _laid_out: tuple[list[int | None], Tensor, Tensor | None] | None

    @classmethod
    def of(cls, convolution: nn.Conv2d, norm: nn.Module | None) -> PackedConv2d:
        """Lay out a convolution and a norm of constant statistics, whose parameters it shares."""
        packed = cls.__new__(cls)
        packed.__dict__.update(convolution.__dict__)
        packed.__dict__.update(norm=norm, _laid_out=None)  # Not as a submodule: the norm has its place in the model.
        return packed

    def forward(self, x: Tensor, add: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """The convolution with its norm, plus `add`, clamped at 0 where `relu`.

        Args:
            x: [B, inputs, H, W].
            add: [B, C, H', W'] or None.
            relu: whether what is below 0 becomes 0.

        Returns:
            [B, C, H', W'] bfloat16.
        """
        weight, bias = self._layout()
        activation = "relu" if relu else "none"
        places = (self.padding, self.stride, self.dilation, self.groups)
        x = x.bfloat16()
        operator: Any = torch.ops.mkldnn._convolution_pointwise
        if add is None:
            y: Tensor = operator(x, weight, bias, *places, activation, [], "")
            return y
        summed: Tensor = operator.binary(x, add.bfloat16(), weight, bias, *places, "add", 1.0, activation, [], "")
        return summed

    def _layout(self) -> tuple[Tensor, Tensor | None]:
        """The weight in oneDNN's blocks and the bias, made anew where the parameters have changed."""
        parameters = [*self.parameters(), *(() if self.norm is None else self.norm.parameters())]
        # Parameters made in inference mode have no version, so that nothing tells of a change.
        versions = [None if parameter.is_inference() else parameter._version for parameter in parameters]
        if self._laid_out is None or self._laid_out[0] != versions or None in versions:
            weight, bias = (self.weight, self.bias) if self.norm is None else folded(self, self.norm)
            weight = weight.detach().to(torch.bfloat16, memory_format=torch.channels_last)
            reorder: Any = torch.ops.mkldnn._reorder_convolution_weight
            weight = reorder(weight, self.padding, self.stride, self.dilation, self.groups)
            self._laid_out = versions, weight, None if bias is None else bias.detach().bfloat16()
        return self._laid_out[1], self._laid_out[2]
