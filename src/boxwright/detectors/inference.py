"""The former place of `boxwright.layers.optimize`."""

from __future__ import annotations

import warnings

from torch import nn

from boxwright.layers.optimize import optimize_for_cpu


def pack_convolutions(detector: nn.Module) -> None:
    """The former name of `optimize_for_cpu`."""
    warnings.warn(
        "boxwright.detectors.inference.pack_convolutions is now boxwright.optimize_for_cpu; call that",
        DeprecationWarning,
        stacklevel=2,
    )
    optimize_for_cpu(detector)
