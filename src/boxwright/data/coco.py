"""Deprecated: use `boxwright.data.indexed_dataset`."""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "CocoDataset":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "boxwright.data.coco.CocoDataset is deprecated: use boxwright.data.indexed_dataset.IndexedDataset",
        DeprecationWarning,
        stacklevel=2,
    )
    from boxwright.data.indexed_dataset import IndexedDataset

    return IndexedDataset
