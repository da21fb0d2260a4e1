"""Options shared by several commands, renamed options, and the search path of users' recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

PrecisionOption = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(
        help="Precision of the detector. bfloat16 is faster on devices that support it.",
        show_default="as in training",
    ),
]


Value = TypeVar("Value")


def renamed(value: Value | None, option: str, old_value: Value | None, old_option: str) -> Value | None:
    """Value of an option that was renamed; prints a note if the old name is used.

    Raises:
        ValueError: both names are used.
    """
    if old_value is None:
        return value
    if value is not None:
        raise ValueError(f"{old_option} is the old name of {option}, so only one of them can be used. Use {option}.")
    typer.echo(f"boxwright: {old_option} is deprecated: use {option}", err=True)
    return old_value


def search_current_folder(recipe: str) -> None:
    """Add the current folder to the search path if the recipe is `module:function`, as `python -m` does."""
    if ":" in recipe and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
