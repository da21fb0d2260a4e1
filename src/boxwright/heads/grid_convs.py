"""3x3 convolutions that a head applies to RoI features."""

from __future__ import annotations

from typing import Literal

from torch import nn

from boxwright.layers.conv_norm import ConvNorm
from boxwright.layers.norm import make_norm

GridNorm = Literal["gn", "frozen_bn"]
"""Normalisation layers without batch statistics, because batch statistics would include the RoIs of empty slots."""


def grid_convs(inputs: int, width: int, num_convs: int, norm: GridNorm | None) -> nn.ModuleList:
    """3x3 convolutions that keep the size of the RoI features. The caller applies a ReLU after each of them.

    Args:
        inputs: number of input channels.
        width: number of output channels of each convolution.
        num_convs: number of convolutions.
        norm: normalisation layer after each convolution, which then has no bias; None for no normalisation.
    """
    layers = nn.ModuleList()
    for index in range(num_convs):
        conv = nn.Conv2d(width if index else inputs, width, 3, padding=1, bias=norm is None)
        layers.append(conv if norm is None else ConvNorm(conv, make_norm(norm, width)))
    return layers


def init_relu_convs(head: nn.Module) -> None:
    """Initialise the (transposed) convolutions of a head for ReLU: Kaiming normal weights by fan-out, zero biases.

    Source: He et al., Delving Deep into Rectifiers (2015).
    """
    for layer in head.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
