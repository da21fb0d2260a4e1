"""The measurements that are stored with the source, and the machines that they were made on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from boxwright.benchmark.report import Case, Memory, Report, read_report

GB = 1e9


class Stored(NamedTuple):
    """A report with the name that the page calls it by."""

    name: str
    """The file's name without its ending."""
    machine: int
    """The number of its machine on the page, from 1."""
    report: Report
    """What was measured."""


def read_stored(folder: Path) -> list[Stored]:
    """The reports of a folder's `*.json`, by name; none where there is no folder.

    Raises:
        ValueError: a file is no report.
    """
    machines: list[dict[str, str]] = []
    stored: list[Stored] = []
    for path in sorted(folder.glob("*.json")):
        report = read_report(path)
        if report.machine not in machines:
            machines.append(report.machine)
        stored.append(Stored(path.stem, machines.index(report.machine) + 1, report))
    return stored


def setting(case: Case, machine: int) -> str:
    """Under which a case was measured, but for its recipe, system and task."""
    height, width = case.size
    images = "1 image" if case.batch == 1 else f"{case.batch} images"
    mode = f"{case.precision}{', compiled' if case.compiled else ''}"
    changes = "".join(f", {change}" for change in case.settings)
    return f"{height} x {width}, {images}, {mode}{changes} [{machine}]"


def peak_bytes(memory: Memory) -> int:
    """What a GPU had reserved, or else what was resident on the host."""
    return memory.peak_rss if memory.cuda_reserved is None else memory.cuda_reserved
