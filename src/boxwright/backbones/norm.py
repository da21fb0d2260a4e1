"""The former place of `boxwright.layers.norm`."""

from __future__ import annotations

import warnings
from typing import Any

from boxwright.layers import norm


def __getattr__(name: str) -> Any:
    """The same name in `boxwright.layers.norm`, with a warning."""
    if name.startswith("__") or not hasattr(norm, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"boxwright.backbones.norm.{name} has moved to boxwright.layers.norm.{name}; import it from there",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(norm, name)
