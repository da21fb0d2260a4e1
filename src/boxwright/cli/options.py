"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

PrecisionOption = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(
        help="What the detector computes in; bfloat16 is faster where the device has it.",
        show_default="as it was trained",
    ),
]
