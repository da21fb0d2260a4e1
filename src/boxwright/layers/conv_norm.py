"""A convolution with the norm, sum and ReLU that follow it.

B images, C channels, H x W positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxwright.layers.fused import fused_convolution, fused_dtype
from boxwright.layers.norm import FOLDED_NORMS, fold, has_constant_statistics
from boxwright.layers.packed import PackedConv2d
from boxwright.layers.stock import is_stock

CONVS = (nn.Conv2d, PackedConv2d)
"""Convolutions that may be computed from their weights, if stock."""
_NEW_OUTPUT = (*CONVS, *FOLDED_NORMS, nn.ConvTranspose2d, nn.SyncBatchNorm, nn.GroupNorm)
"""Layers whose output is a new tensor that autograd does not keep, so that it may be overwritten."""


class ConvNorm(nn.Sequential):
    """A convolution and the norm of its output."""

    conv_norms = (("0", "1"),)
    """Names of the convolution and of its norm, for `optimize_for_cpu`."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        """Combine a convolution and a norm."""
        super().__init__(conv, norm)

    def forward(self, x: Tensor) -> Tensor:
        """`norm(conv(x))`, see `conv_norm`."""
        return conv_norm(self[0], self[1], x)


def conv_norm(
    conv: nn.Module, norm: nn.Module | None, x: Tensor, add: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """Compute `relu(norm(conv(x)) + add)`.

    Both modules are called, with their hooks, unless they are stock (see `is_stock`). A stock norm with constant
    statistics is folded into the weight and bias of a stock convolution. Output and gradients are the same up to
    rounding, without a second pass over the map and without a second map for the backward pass. On a CPU, oneDNN
    computes the sum and the ReLU in the same call.

    Args:
        conv: any module. A stock `ConvNorm` counts as its convolution and its norm.
        norm: norm of the convolution's output, or None.
        x: [B, inputs, H, W].
        add: [B, C, H', W'], or None.
        relu: whether a ReLU follows.

    Returns:
        [B, C, H', W'].
    """
    if norm is None and is_stock(conv, ConvNorm):
        conv, norm = conv  # type: ignore[misc]
    if is_stock(norm, nn.Identity):
        norm = None
    if is_stock(conv, *CONVS) and (norm is None or _folds(norm)):
        assert isinstance(conv, nn.Conv2d)
        return _folded_conv(conv, norm, x, add, relu)
    y: Tensor = conv(x)
    if norm is not None:
        y = norm(y)
    return _finish(y, add, relu, in_place=is_stock(conv if norm is None else norm, *_NEW_OUTPUT))


def keeps_map_size(conv: nn.Conv2d, *, kernel: int) -> bool:
    """Whether a convolution has a square kernel, half of it as zero padding, stride 1, no dilation and one group.

    Args:
        conv: any convolution.
        kernel: side of the kernel, odd.
    """
    half = (kernel // 2, kernel // 2)
    shape = conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups, conv.padding_mode
    return shape == ((kernel, kernel), half, (1, 1), (1, 1), 1, "zeros")


def _folds(norm: nn.Module) -> bool:
    return is_stock(norm, *FOLDED_NORMS) and has_constant_statistics(norm)


def _folded_conv(conv: nn.Conv2d, norm: nn.Module | None, x: Tensor, add: Tensor | None, relu: bool) -> Tensor:
    dtype = fused_dtype(conv, x)
    if dtype and isinstance(conv, PackedConv2d) and not torch.is_grad_enabled():
        return fused_convolution(conv, *conv.packed(dtype, norm), x, add, relu=relu)
    weight, bias = (conv.weight, conv.bias) if norm is None else fold(conv, norm)
    if dtype and (relu or add is not None):
        return fused_convolution(conv, weight.to(dtype), bias, x, add, relu=relu)
    return _finish(conv._conv_forward(x, weight, bias), add, relu, in_place=True)


def _finish(y: Tensor, add: Tensor | None, relu: bool, *, in_place: bool) -> Tensor:
    if add is not None:
        y = y.add_(add) if in_place else y + add
    return F.relu(y, inplace=in_place) if relu else y
