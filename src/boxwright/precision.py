"""Precision of a detector's computation: bfloat16 autocast, and sections without gradients under autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from boxwright.checks import check_choice

Precision = Literal["float32", "bfloat16", "auto"]
"""Precision of a detector's computation; "auto" is bfloat16 on GPUs that support it, float32 otherwise."""


def check_precision(precision: str) -> None:
    """Raise ValueError unless `precision` is one of `Precision`."""
    check_choice("precision", precision, get_args(Precision))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast context for a detector's computation. Weights, losses and boxes stay float32.

    Raises:
        ValueError: `precision` is not one of `Precision`.
    """
    check_precision(precision)
    if precision == "auto":
        # GPUs before Ampere emulate bfloat16, which is slower than float32.
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if native else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def without_gradients() -> Iterator[None]:
    """`torch.no_grad` for a part of the losses that applies layers which another part of the losses trains.

    Autocast caches the bfloat16 copy of a weight. Some PyTorch versions also cache a copy that was made
    under `torch.no_grad`. The next use of the weight then reads this copy, which has no graph, and the weight gets no
    gradient. The block therefore disables the cache.
    """
    # The cache setting applies to all device types. "cpu" is named because a device type is required; its state is
    # kept.
    enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=enabled, cache_enabled=False):
        yield
