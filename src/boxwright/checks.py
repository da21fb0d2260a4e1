"""Checks of arguments and settings: each raises a ValueError with the name, the value and the allowed values."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import torch

from boxwright.text import plural


def check_choice(name: str, value: object, choices: Collection[Any]) -> None:
    """Check that a value is one of `choices`.

    Raises:
        ValueError: `value` is not one of `choices`.
    """
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Check that a value is an integer of at least `least`.

    Raises:
        ValueError: `value` is not an integer, or is below `least`.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a whole number, at least {least}, got {value!r}")


def check_number(
    name: str, value: object, least: float = -math.inf, most: float = math.inf, *, above: bool = False
) -> None:
    """Check that a value is a finite number in `least`..`most`.

    Args:
        name: Name of the argument or setting.
        value: Value to check.
        least: Minimum.
        most: Maximum.
        above: Whether the number must be strictly above `least`.

    Raises:
        ValueError: `value` is not a finite number in this range.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and least <= value <= most and not (above and value == least):  # type: ignore[operator]
        return
    if not math.isinf(most):
        allowed = f"a number above {least:g}, at most {most:g}" if above else f"a number in {least:g}..{most:g}"
    elif not math.isinf(least):
        allowed = f"a number above {least:g}" if above else f"a number, at least {least:g}"
    else:
        allowed = "a finite number"
    raise ValueError(f"{name}: expected {allowed}, got {value!r}")


def check_counts(settings: object, *names: str, least: int = 1) -> None:
    """Apply `check_count` to fields of a dataclass: to the value, or to each element of a tuple. None passes."""
    for name in names:
        for value in _values(settings, name):
            check_count(name, value, least)


def check_numbers(
    settings: object, *names: str, least: float = -math.inf, most: float = math.inf, above: bool = False
) -> None:
    """Apply `check_number` to fields of a dataclass: to the value, or to each element of a tuple. None passes."""
    for name in names:
        for value in _values(settings, name):
            check_number(name, value, least, most, above=above)


def _values(settings: object, name: str) -> list[Any]:
    value = getattr(settings, name)
    if isinstance(value, tuple | list):
        return list(value)
    return [] if value is None else [value]


def check_device(device: torch.device | str | int) -> torch.device:
    """Convert to a `torch.device`, and check that Boxwright supports it and that this machine has it.

    Args:
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: `device` is not a device, is not supported, or does not exist on this machine.
    """
    fix = 'Use --device cpu (in Python: device="cpu").'
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got '{chosen}', which is not supported. {fix}")
    if chosen.type == "cpu" and chosen.index:
        raise ValueError(f"device '{chosen}': there is only one CPU device. {fix}")
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(f"device '{chosen}': PyTorch finds no CUDA device on this machine. {fix}")
        if (chosen.index or 0) >= count:
            raise ValueError(
                f"device '{chosen}': this machine has {plural(count, 'CUDA device')}. Use cuda:0"
                + (f" to cuda:{count - 1}." if count > 1 else ".")
            )
    return chosen
