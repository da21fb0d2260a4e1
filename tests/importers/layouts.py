"""Random tensors under the names that other code bases use, for models as small as their layouts allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from boxwright.weights.foreign import ForeignFile

CHANNELS = 16
"""Channels of the feature pyramid."""
WIDTH = 24
"""Width of the two fully connected layers of a box head."""
MASK_WIDTH = 8
"""Channels of the convolutions of a mask head."""


def layer(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's weight and bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def transposed(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width, width, 2, 2), f"{name}.bias": (width,)}


def norm(name: str, channels: int, statistics: bool = True) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var") if statistics else ("weight", "bias")
    return {f"{name}.{part}": (channels,) for part in parts}


def filled(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.rand(*shape) + 0.1 for name, shape in shapes.items()}


def file_of(tensors: Mapping[str, Tensor], **about: Any) -> ForeignFile:
    return ForeignFile(path=Path("theirs.pth"), sha256="00", tensors=dict(tensors), about=about)
