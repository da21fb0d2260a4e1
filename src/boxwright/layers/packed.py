"""Convolutions that keep, for detection on a CPU, the weights that the CPU computes with.

B images, C channels, H x W positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from boxwright.layers.fused import blocks_are_faster, fused_convolution, fused_dtype, to_blocks
from boxwright.layers.norm import fold


class PackedConv2d(nn.Conv2d):
    """A convolution that keeps the product of its weights and of a norm while no gradient is needed.

    `conv_norm` passes the norm and folds it; calling the module applies the convolution alone. It has the parameters of
    the convolution that it was made from, and trains as that one does.
    """

    folds: str | None
    """Name of the norm that is folded in, for `repr`."""
    _packed: tuple[tuple[object, ...], Tensor, Tensor | None] | None

    @classmethod
    def of(cls, conv: nn.Conv2d, folds: str | None = None) -> PackedConv2d:
        """Make one that shares the parameters of a convolution."""
        packed = cls.__new__(cls)
        packed.__dict__.update(conv.__dict__, folds=folds, _packed=None)
        return packed

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, C, H', W']."""
        dtype = fused_dtype(self, x)
        if dtype is None or torch.is_grad_enabled():
            return super().forward(x)
        return fused_convolution(self, *self.packed(dtype), x)

    def packed(self, dtype: torch.dtype, norm: nn.Module | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias without gradient, `norm` folded in; computed again after any of their tensors changed."""
        tensors = [tensor for tensor in (self.weight, self.bias) if tensor is not None]
        if norm is not None:
            tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]  # type: ignore[list-item]
        # Tensors made in inference mode have no version, so that a change of them cannot be seen.
        versioned = not any(tensor.is_inference() for tensor in tensors)
        state = dtype, *((tensor.data_ptr(), tensor._version) for tensor in tensors if versioned)
        if self._packed is None or self._packed[0] != state or not versioned:
            weight, bias = (self.weight, self.bias) if norm is None else fold(self, norm)
            weight = weight.detach().to(dtype, memory_format=torch.channels_last)
            # oneDNN has blocks of 64 outputs. Weights that do not fill them would be reordered again in every call.
            if dtype == torch.bfloat16 and self.out_channels % 64 == 0 and blocks_are_faster():
                weight = to_blocks(self, weight)
            self._packed = state, weight, None if bias is None else bias.detach().to(dtype)
        return self._packed[1], self._packed[2]

    def train(self, mode: bool = True) -> PackedConv2d:
        """As in any module; training frees the weights that only detection uses."""
        if mode:
            self._packed = None
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        """The convolution's arguments, and the norm that is folded in."""
        return f"{super().extra_repr()}, packed" + (f", folds {self.folds}" if self.folds else "")
