"""Train, test and measure object detectors on COCO-style data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from boxwright.layers.optimize import optimize_for_cpu as optimize_for_cpu
    from boxwright.predictor import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load", "optimize_for_cpu"]


def __getattr__(name: str) -> Any:
    """Import functions, and with them torch, only when they are used."""
    if name == "load":
        from boxwright.predictor import load

        return load
    if name == "optimize_for_cpu":
        from boxwright.layers.optimize import optimize_for_cpu

        return optimize_for_cpu
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
