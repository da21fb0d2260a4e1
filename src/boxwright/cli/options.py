"""Options that several commands have, and how they find a user's recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

PrecisionOption = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(
        help="What the detector computes in; bfloat16 is faster where the device has it.",
        show_default="as it was trained",
    ),
]


def search_current_folder(recipe: str) -> None:
    """Let Python find the module of a user's recipe, `module:function`, in the current folder, as `python -m` does."""
    if ":" in recipe and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
