"""Read the benchmark reports stored in the repository, and number the distinct machines ([1], [2] on the page)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from boxwright.benchmark.report import Case, Memory, Report, read_report

GB = 1e9


class StoredReport(NamedTuple):
    """A report with its name and the number of its machine on the benchmark page."""

    name: str
    """File name without extension."""
    machine: int
    """Number of the machine, from 1."""
    report: Report
    """The measurements."""


def read_stored(folder: Path) -> list[StoredReport]:
    """Read the `*.json` reports of a folder, sorted by name; a missing folder gives an empty list.

    Raises:
        ValueError: a file is not a report.
    """
    machines: list[dict[str, str]] = []
    stored: list[StoredReport] = []
    for path in sorted(folder.glob("*.json")):
        report = read_report(path)
        if report.machine not in machines:
            machines.append(report.machine)
        stored.append(StoredReport(path.stem, machines.index(report.machine) + 1, report))
    return stored


def conditions(case: Case, machine: int) -> str:
    """Text that gives the size, batch size, precision, changed settings and machine of a measurement."""
    height, width = case.size
    images = "1 image" if case.batch == 1 else f"{case.batch} images"
    mode = f"{case.precision}{', compiled' if case.compiled else ''}"
    changes = "".join(f", {change}" for change in case.settings)
    return f"{height} x {width}, {images}, {mode}{changes} [{machine}]"


def peak_bytes(memory: Memory) -> int:
    """Peak memory reserved on the GPU, or the peak RSS of the process on a CPU."""
    return memory.peak_rss if memory.cuda_reserved is None else memory.cuda_reserved
