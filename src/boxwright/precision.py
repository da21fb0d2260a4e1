"""Precision of a detector's arithmetic: bfloat16 autocast, and how sections without gradients behave under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from boxwright.checks import check_choice

Precision = Literal["float32", "bfloat16", "auto"]
"""What a detector computes in; "auto" is bfloat16 on GPUs that support it, float32 otherwise."""


def check_precision(precision: str) -> None:
    """Raise ValueError unless `precision` is one of `Precision`."""
    check_choice("precision", precision, get_args(Precision))


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The autocast context for a detector's arithmetic. Weights, losses and boxes stay float32.

    Raises:
        ValueError: `precision` has another value than those of `Precision`.
    """
    check_precision(precision)
    if precision == "auto":
        # GPUs before Ampere emulate bfloat16, which is slower than float32.
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if native else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def without_gradients() -> Iterator[None]:
    """`torch.no_grad` for a part of the losses that applies layers which are trained by another part.

    Autocast caches the bfloat16 copy of a weight. Some PyTorch versions (2.9, for example) also cache a copy that was
    made under `torch.no_grad`. The next use of the weight reads that copy, which has no graph, and the weight gets no
    gradient. So autocast caches nothing within the block.
    """
    # Whether autocast caches is one setting for all device types; "cpu" only has to be named, and keeps its state.
    enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=enabled, cache_enabled=False):
        yield
