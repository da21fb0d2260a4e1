"""`boxwright data`: look after data sets."""

from __future__ import annotations

import typer

app = typer.Typer(help="Check data sets, or generate one.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass
