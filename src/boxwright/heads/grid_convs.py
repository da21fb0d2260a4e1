"""The 3x3 convolutions with which a head looks at RoIAlign's grids."""

from __future__ import annotations

from typing import Literal

from torch import nn

from boxwright.layers.norm import make_norm

GridNorm = Literal["gn", "frozen_bn"]
"""Norms of which no statistics are taken from the batch, since those would count the grids of empty slots."""


def grid_convs(inputs: int, width: int, num_convs: int, norm: GridNorm | None) -> nn.ModuleList:
    """Convolutions that keep a grid's size, one after another; a ReLU is to follow each.

    Args:
        inputs: channels of the grid.
        width: channels of each convolution.
        num_convs: how many there are.
        norm: normalises after each, which then has no bias; None normalises nowhere.
    """
    layers = nn.ModuleList()
    for index in range(num_convs):
        conv = nn.Conv2d(width if index else inputs, width, 3, padding=1, bias=norm is None)
        layers.append(conv if norm is None else nn.Sequential(conv, make_norm(norm, width)))
    return layers


def init_relu_convs(head: nn.Module) -> None:
    """Random weights for the convolutions of a head, those that upsample too, that keep scale through ReLUs; biases 0.

    Source: He et al., Delving Deep into Rectifiers (2015), by the number of outputs.
    """
    for layer in head.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
