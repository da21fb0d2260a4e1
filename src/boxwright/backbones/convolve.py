"""Deprecated module: use `boxwright.layers.conv_norm`."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from boxwright.layers.conv_norm import conv_norm


def convolve(
    convolution: nn.Module, norm: nn.Module | None, x: Tensor, add: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """Deprecated name of `conv_norm`."""
    warnings.warn(
        "boxwright.backbones.convolve.convolve is deprecated: use boxwright.layers.conv_norm.conv_norm",
        DeprecationWarning,
        stacklevel=2,
    )
    return conv_norm(convolution, norm, x, add, relu=relu)
