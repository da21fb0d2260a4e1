"""Deprecated module: use `boxwright.optimize_for_cpu`."""

from __future__ import annotations

import warnings

from torch import nn

from boxwright.layers.optimize import optimize_for_cpu


def pack_convolutions(detector: nn.Module) -> None:
    """Deprecated name of `optimize_for_cpu`."""
    warnings.warn(
        "boxwright.detectors.inference.pack_convolutions is deprecated: use boxwright.optimize_for_cpu",
        DeprecationWarning,
        stacklevel=2,
    )
    optimize_for_cpu(detector)
