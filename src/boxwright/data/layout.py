"""Deprecated: use `boxwright.data.formats`."""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("Split", "find_layout"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"boxwright.data.layout.{name} is deprecated: use boxwright.data.formats.{name}",
        DeprecationWarning,
        stacklevel=2,
    )
    from boxwright.data import formats

    return getattr(formats, name)
