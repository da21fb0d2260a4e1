"""Console output: progress, metrics and tables. Text of users is never interpreted as rich markup."""

from __future__ import annotations

from collections.abc import Sequence

import typer


class ImageProgress:
    """Progress bar with the number of images and images per second."""

    def __init__(self, description: str, total: int, num_ranks: int, *, shown: bool) -> None:
        """Set up the progress bar.

        Args:
            description: description of the task.
            total: number of images of all ranks.
            num_ranks: number of ranks that share the images.
            shown: whether this process shows the bar.
        """
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[speed]}"),
            progress.TimeRemainingColumn(),
        )
        self._progress = progress.Progress(*columns, disable=not shown)
        # All ranks are about equally fast, so the progress of all is estimated from this rank's.
        self._total, self._num_ranks, self._num_done = total, num_ranks, 0
        self._task = self._progress.add_task(description, total=total, speed="")

    def __enter__(self) -> ImageProgress:
        from time import perf_counter

        self._start = perf_counter()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, num_images: int) -> None:
        """Add images that this process has done."""
        from time import perf_counter

        self._num_done = min(self._num_done + num_images * self._num_ranks, self._total)
        speed = self._num_done / (perf_counter() - self._start)
        self._progress.update(self._task, completed=self._num_done, speed=f"{speed:.1f} images/s")


def print_metrics(metrics: dict[str, float]) -> None:
    """Print metrics in percent, six per line."""
    from boxwright.report.html import percent

    cells = [f"{name} {percent(value)}" for name, value in metrics.items()]
    width = max(map(len, cells)) + 2
    for start in range(0, len(cells), 6):
        typer.echo("".join(cell.ljust(width) for cell in cells[start : start + 6]).rstrip())


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. The first column is left-aligned, the others are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="dim", pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console(markup=False, emoji=False, highlight=False).print(table)
