"""Options shared by several commands, and the search path of users' recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

PrecisionOption = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(
        help="Precision of the detector. bfloat16 is faster on devices that support it.",
        show_default="as in training",
    ),
]


def search_current_folder(recipe: str) -> None:
    """Add the current folder to the search path if the recipe is `module:function`, as `python -m` does."""
    if ":" in recipe and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
