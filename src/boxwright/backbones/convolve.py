"""A convolution with what comes behind it: a norm, a sum, a ReLU.

B images, C channels, H x W positions.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from boxwright.backbones.fused import FusedConv2d
from boxwright.backbones.norm import folded, has_constant_statistics


def convolve(
    convolution: nn.Module, norm: nn.Module | None, x: Tensor, add: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """`relu(norm(convolution(x)) + add)`.

    A norm of constant statistics is a scale and a shift of each channel, so it is put into the weights and the bias:
    the same in real arithmetic, gradients included, without another pass over the map and without a second map to keep
    for the backward pass.

    Args:
        convolution: an `nn.Conv2d`.
        norm: of its outputs; None for none.
        x: [B, inputs, H, W].
        add: [B, C, H', W']; None for nothing.
        relu: whether what is below 0 becomes 0.

    Returns:
        [B, C, H', W'].
    """
    if isinstance(convolution, FusedConv2d) and convolution.norm is norm:
        return convolution(x, add, relu=relu)
    if norm is None:
        y: Tensor = convolution(x)
    elif has_constant_statistics(norm):
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(convolution.padding, tuple)
        weight, bias = folded(convolution, norm)
        y = F.conv2d(x, weight, bias, convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    else:
        y = norm(convolution(x))
    if add is not None:
        y += add
    return F.relu(y, inplace=True) if relu else y
