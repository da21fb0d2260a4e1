"""Deprecated module: use `boxwright.layers.norm`."""

from __future__ import annotations

import warnings
from typing import Any

from boxwright.layers import norm


def __getattr__(name: str) -> Any:
    """Return the attribute of the same name of `boxwright.layers.norm`, with a DeprecationWarning."""
    if name.startswith("__") or not hasattr(norm, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"boxwright.backbones.norm.{name} is deprecated: use boxwright.layers.norm.{name}",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(norm, name)
