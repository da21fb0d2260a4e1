"""What the items of a run found, and the files that hold it."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import msgspec

from boxwright.benchmark.report import Report, Timing, write_report
from boxwright.benchmark.table import markdown, spread, table

_MIB = 2**20


class Result(msgspec.Struct, kw_only=True):
    """What one item found; most fields are empty."""

    detail: str = ""
    """Of a check: what it saw."""
    report: Report | None = None
    """Of `boxwright.benchmark`."""
    rates: dict[str, float] = {}
    """Operations a second that products of large matrices reach, by precision."""
    memory: list[dict[str, Any]] = []
    """Peaks of training, a row a mode."""
    detect: list[dict[str, Any]] = []
    """Times of `detect` alone, a row a mode."""
    kernels: list[dict[str, Any]] = []
    """Times of operators: `name`, `ours` and `other`, and what the other one is, `against`."""


class Outcome(msgspec.Struct, kw_only=True):
    """How an item went."""

    item: str
    """Its name."""
    seconds: float
    """That it took."""
    result: Result | None = None
    """What it found; None if it failed or was left out."""
    error: str = ""
    """Why it found nothing."""


def write(folder: Path, outcomes: list[Outcome], command: str, facts: dict[str, dict[str, str]]) -> str:
    """Write all that is known so far.

    Args:
        folder: gets `gpu.json` (each item), `benchmark.json` (of the form that `boxwright zoo page` reads) and
            `gpu.md`.
        outcomes: so far.
        command: that the user gave.
        facts: `machine` and `versions`.

    Returns:
        What stands in `gpu.md`.
    """
    report = Report(command=command, machine=facts["machine"], versions=facts["versions"])
    for found in (outcome.result.report for outcome in outcomes if outcome.result and outcome.result.report):
        for name in ("timings", "ratios", "memory", "operations"):
            getattr(report, name).extend(getattr(found, name))
    write_report(folder / "benchmark.json", report)
    page = {"command": command, **facts, "items": outcomes}
    (folder / "gpu.json").write_bytes(msgspec.json.format(msgspec.json.encode(page), indent=1) + b"\n")
    text = "\n\n".join([*_tables(outcomes, report), markdown(report)])
    (folder / "gpu.md").write_text(text, encoding="utf-8")
    return text


def _tables(outcomes: list[Outcome], report: Report) -> list[str]:
    """Items, shares of the device's rate, memory, detection and operators; those that have rows."""
    rows = [[o.item, "failed" if o.error else "ok", f"{o.seconds:.0f}", _told(o)] for o in outcomes]
    sections = [table(("item", "", "s", "what it saw"), rows)]
    results = [outcome.result for outcome in outcomes if outcome.result]
    rates = {precision: rate for result in results for precision, rate in result.rates.items()}
    if shares := _shares(report, rates):
        sections.append(table(("recipe", "task", "mode", "GFLOP", "s", "TFLOP/s", "of the matrix rate"), shares))
    if memory := [row for result in results for row in result.memory]:
        head = ("recipe, training", "mode", "precision", "images", "allocated, MiB", "reserved, MiB")
        keys = ("recipe", "mode", "precision", "images")
        cells = [
            [*(str(row[key]) for key in keys), f"{row['allocated'] / _MIB:.0f}", f"{row['reserved'] / _MIB:.0f}"]
            for row in memory
        ]
        sections.append(table(head, cells))
    if detect := [row for result in results for row in result.detect]:
        cells = [
            [
                *(str(row[key]) for key in ("recipe", "mode", "precision", "images")),
                spread(row["seconds"], 4),
                f"{row['images'] / statistics.median(row['seconds']):.1f}",
                f"{row['first_seconds']:.1f}",
            ]
            for row in detect
        ]
        sections.append(
            table(("recipe, detect alone", "mode", "precision", "images", "s", "images/s", "first, s"), cells)
        )
    if kernels := [row for result in results for row in result.kernels]:
        cells = []
        for row in kernels:
            ours, other = ([1000 * seconds for seconds in row[side]] for side in ("ours", "other"))
            ratio = statistics.median(other) / statistics.median(ours)
            wins = "ours" if ratio > 1 else row["against"]
            cells.append([row["name"], spread(ours), row["against"], spread(other), f"{ratio:.2f}", wins])
        sections.append(table(("operator", "ours, ms", "other", "other, ms", "other / ours", "faster"), cells))
    return sections


def _told(outcome: Outcome) -> str:
    """A line; of an error its last."""
    if outcome.error:
        return outcome.error.strip().splitlines()[-1].replace("|", "/")
    return outcome.result.detail if outcome.result else ""


def _shares(report: Report, rates: dict[str, float]) -> list[list[str]]:
    """The rate of each of our own times whose operations are counted, as a share of that of large matrices."""
    counts = {(o.case.recipe, o.case.task): (o.operations, o.case.batch) for o in report.operations}

    def row(timing: Timing) -> list[str]:
        case = timing.case
        operations, images = counts[case.recipe, case.task]
        rate = operations * case.batch / images / timing.median
        mode = " ".join([f"{case.batch} images, {case.precision}", *case.settings])
        cells = [f"`{case.recipe}`", case.task, mode, f"{operations * case.batch / images / 1e9:.0f}"]
        return [*cells, f"{timing.median:.4f}", f"{rate / 1e12:.1f}", f"{rate / rates[case.precision]:.1%}"]

    return [
        row(timing)
        for timing in report.timings
        if timing.case.system == "boxwright"
        and (timing.case.recipe, timing.case.task) in counts
        and timing.case.precision in rates
    ]
