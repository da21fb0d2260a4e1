"""`boxwright data`: check a data set, or generate one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from boxwright.data.formats import Split
    from boxwright.data.formats.fault import Fault

app = typer.Typer(help="Check a data set, or generate one.", no_args_is_help=True)


@app.command()
def check(
    folder: Annotated[Path | None, typer.Argument(help="Folder of a data set.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="Annotation file of one split, instead of a folder.")] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder of --annotations.")] = None,
) -> None:
    """List all faults of a data set with their fixes. The exit status is 1 if there are any.

    Every image is decoded. Training stops at an `error`; it ignores `dropped` objects and clips `clipped` boxes.
    """
    from boxwright.data.formats import Split, find_layout
    from boxwright.text import plural

    if folder and not annotations and not images:
        layout = find_layout(folder)
    elif annotations and images and not folder:
        layout = {"split": Split(annotations, images)}
    else:
        raise ValueError("no data set: use either a folder, or --annotations FILE and --images FOLDER")
    severities: Counter[str] = Counter()
    for name, split in layout.items():
        faults = _check_split(name, split)
        for fault in faults:
            typer.echo(f"{fault.severity}: {fault}")
        severities.update(fault.severity for fault in faults)
        counts = Counter(fault.severity for fault in faults)
        counted = ", ".join(
            plural(count, severity) if severity == "error" else f"{count:,} {severity}"
            for severity, count in counts.items()
        )
        typer.echo(f"{name}: {split.annotations}, images in {split.images}: {counted or 'no faults'}")
    if severities:
        raise typer.Exit(1)


@app.command()
def shapes(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    train: Annotated[int, typer.Option(help="Number of training images.", min=1)] = 400,
    val: Annotated[int, typer.Option(help="Number of validation images.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Random seed of the images.", min=0)] = 0,
) -> None:
    """Write a generated data set of circles, squares and triangles with boxes and masks."""
    from boxwright.data.shapes import write_shapes
    from boxwright.text import plural

    write_shapes(folder, train=train, val=val, seed=seed)
    typer.echo(f"{folder}: train: {plural(train, 'image')} | val: {plural(val, 'image')}. Use it with --data {folder}")


def _check_split(name: str, split: Split) -> list[Fault]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from boxwright.data.formats.check import check as check_split

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{name}: images")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return check_split(*split, progress=show)
