"""The `boxwright` command. Each command has its own module, which is added to the app here.

These modules import only typer and the standard library at the top; torch and other heavy modules are imported inside
the command, so that `boxwright --help` is fast.
"""

from __future__ import annotations

import errno
import os
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from boxwright import __version__
from boxwright.cli import benchmark, data, predict, propose, test, train, weights, zoo


class _OneLineErrors(TyperGroup):
    """Prints errors of the user's input in one line. Other errors, which are bugs of Boxwright, print a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            broken_pipe = isinstance(error, OSError) and error.errno == errno.EPIPE
            if broken_pipe or os.environ.get("BOXWRIGHT_TRACEBACK"):
                raise
            typer.echo(f"boxwright: {_in_words(error)}", err=True)
            raise typer.Exit(1) from None


def _in_words(error: ValueError | OSError) -> str:
    """Text of the error. An error of the operating system starts with the file and has no error number."""
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return str(error)
    files = " -> ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{files}: {error.strerror}"


app = typer.Typer(
    cls=_OneLineErrors,
    name="boxwright",
    help="Train, evaluate and use object detectors. Set BOXWRIGHT_TRACEBACK=1 to print tracebacks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"boxwright {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    # Pillow warns about large images, which `decode_image` refuses with the name of the file, and about broken EXIF
    # data, which is not needed.
    warnings.filterwarnings("ignore", module=r"PIL\.")


app.command("train")(train.train)
app.command("test")(test.measure)
app.command("propose")(propose.propose)
app.command("predict")(predict.predict)
app.command("benchmark")(benchmark.benchmark)
app.add_typer(data.app, name="data")
app.add_typer(weights.app, name="weights")
app.add_typer(zoo.app, name="zoo")


if __name__ == "__main__":
    app()
