"""Train, test and measure object detectors on COCO-style data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from boxwright.predictor import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `load`, and with it torch, only for those who use it."""
    if name == "load":
        from boxwright.predictor import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
