"""A convolution with what comes behind it: a norm, a sum, a ReLU.

B images, C channels, H x W positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxwright.backbones.fused import fused_convolution, fused_dtype
from boxwright.backbones.norm import folded, has_constant_statistics
from boxwright.backbones.packed import PackedConv2d


def convolve(
    convolution: nn.Module, norm: nn.Module | None, x: Tensor, add: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """`relu(norm(convolution(x)) + add)`.

    A norm of constant statistics is a scale and a shift of each channel, so it is put into the weights and the bias:
    the same in real arithmetic, gradients included, without another pass over the map and without a second map to keep
    for the backward pass. On a CPU the sum and the ReLU cost no passes either.

    Args:
        convolution: an `nn.Conv2d`, or a module that answers as one.
        norm: of its outputs; None for none.
        x: [B, inputs, H, W].
        add: [B, C, H', W']; None for nothing.
        relu: whether what is below 0 becomes 0.

    Returns:
        [B, C, H', W'].
    """
    if isinstance(convolution, nn.Conv2d) and (norm is None or has_constant_statistics(norm)):
        return _convolve(convolution, norm, x, add, relu)
    y = convolution(x)
    return _finish(y if norm is None else norm(y), add, relu)


def _convolve(convolution: nn.Conv2d, norm: nn.Module | None, x: Tensor, add: Tensor | None, relu: bool) -> Tensor:
    dtype = fused_dtype(convolution, x)
    if dtype and isinstance(convolution, PackedConv2d) and convolution.norm is norm and not torch.is_grad_enabled():
        return fused_convolution(convolution, *convolution.packed(dtype), x, add, relu=relu)
    weight, bias = (convolution.weight, convolution.bias) if norm is None else folded(convolution, norm)
    if dtype and (relu or add is not None):
        return fused_convolution(convolution, weight.to(dtype), bias, x, add, relu=relu)
    return _finish(convolution._conv_forward(x, weight, bias), add, relu)


def _finish(y: Tensor, add: Tensor | None, relu: bool) -> Tensor:
    if add is not None:
        y += add
    return F.relu(y, inplace=True) if relu else y
