"""Convolutions that cache their weights in the form that the CPU computes with, for detection.

B images, C channels, H x W positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from boxwright.layers.fused import blocks_are_faster, fused_convolution, fused_dtype, to_blocks
from boxwright.layers.norm import fold


class PackedConv2d(nn.Conv2d):
    """A convolution that caches its weights, with a norm folded in, while gradients are disabled.

    `conv_norm` passes the norm and folds it. Calling the module applies the convolution alone. Training is the same as
    for the convolution that it was made from, whose parameters it shares.
    """

    folds: str | None
    """Name of the norm that `conv_norm` folds in, for `repr`; None if there is none."""
    _packed: tuple[tuple[object, ...], Tensor, Tensor | None] | None

    @classmethod
    def of(cls, conv: nn.Conv2d, folds: str | None = None) -> PackedConv2d:
        """Make a packed convolution that shares the parameters of `conv`.

        Args:
            conv: a stock convolution.
            folds: name of the norm that `conv_norm` folds in, or None.
        """
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
        """Weight and bias without gradient, with `norm` folded in; recomputed after one of their tensors changed."""
        tensors = [tensor for tensor in (self.weight, self.bias) if tensor is not None]
        if norm is not None:
            tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]  # type: ignore[list-item]
        # Tensors created in inference mode have no version counter, so their changes cannot be detected.
        versioned = not any(tensor.is_inference() for tensor in tensors)
        state = dtype, *((tensor.data_ptr(), tensor._version) for tensor in tensors if versioned)
        if self._packed is None or self._packed[0] != state or not versioned:
            weight, bias = (self.weight, self.bias) if norm is None else fold(self, norm)
            weight = weight.detach().to(dtype, memory_format=torch.channels_last)
            # Blocks have 64 output channels. oneDNN would reorder weights that do not fill them in every call.
            if dtype == torch.bfloat16 and self.out_channels % 64 == 0 and blocks_are_faster():
                weight = to_blocks(self, weight)
            self._packed = state, weight, None if bias is None else bias.detach().to(dtype)
        return self._packed[1], self._packed[2]

    def train(self, mode: bool = True) -> PackedConv2d:
        """Set the mode. Training mode frees the cached weights, which only detection uses."""
        if mode:
            self._packed = None
        super().train(mode)
        return self

    def extra_repr(self) -> str:
        """Arguments of the convolution, and the norm that `conv_norm` folds in."""
        return f"{super().extra_repr()}, packed" + (f", folds {self.folds}" if self.folds else "")
