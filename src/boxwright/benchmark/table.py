"""Format a report as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from boxwright.benchmark.report import Case, Parts, Report

MIB = 2**20
_CASE_HEAD = ("recipe", "system", "task", "images", "canvas", "precision")


def markdown(report: Report) -> str:
    """Tables of all measurements, followed by the machine, the versions and the command."""
    sections = []
    head: tuple[str, ...]
    if report.timings:
        head = (*_CASE_HEAD, "loading", "s/iter, median (min-max)", "images/s", "data wait, s", "first, s")
        rows = [
            [
                *_case(timing.case),
                "yes" if timing.loading else "no",
                spread(timing.seconds),
                f"{timing.images_per_second:.2f}",
                f"{statistics.mean(timing.data_wait):.4f}" if timing.data_wait else "",
                "" if timing.first_seconds is None else f"{timing.first_seconds:.2f}",
            ]
            for timing in report.timings
        ]
        sections.append(table(head, rows))
    if report.ratios:
        head = (*_CASE_HEAD, "peer's time / Boxwright's, median (min-max)")
        sections.append(table(head, [[*_case(ratio.case), spread(ratio.each, 2)] for ratio in report.ratios]))
    if report.memory:
        head = (*_CASE_HEAD, "peak RSS, MiB", "start RSS, MiB", "GPU allocated, MiB", "GPU reserved, MiB")
        rows = [
            [*_case(m.case), *map(_mib, (m.peak_rss, m.start_rss, m.cuda_allocated, m.cuda_reserved))]
            for m in report.memory
        ]
        sections.append(table(head, rows))
    sections += [_parts(parts) for parts in report.parts]
    if report.operations:
        head = (*_CASE_HEAD, "GFLOP", "best GFLOP/s of the device", "floor, s")
        rows = [
            [*_case(o.case), f"{o.operations / 1e9:.1f}", f"{o.rate / 1e9:.0f}", f"{o.floor:.3f}"]
            for o in report.operations
        ]
        sections.append(table(head, rows))
    environment = ", ".join(f"{name} {value}" for name, value in [*report.machine.items(), *report.versions.items()])
    return "\n\n".join([*sections, environment, f"```\n{report.command}\n```"]) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Text with the median, minimum and maximum: `0.310 (0.300-0.340)`."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _case(case: Case) -> list[str]:
    mode = "" if not case.compiled else ", compiled"
    settings = "".join(f" {setting}" for setting in case.settings)
    height, width = case.size
    return [
        f"{case.recipe}{settings}",
        f"{case.system}{mode}",
        case.task,
        str(case.batch),
        f"{height} x {width}",
        case.precision,
    ]


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / MIB:.0f}"


def _parts(parts: Parts) -> str:
    """Table of the parts of a step or batch, slowest first. Their medians do not sum exactly to the whole's median."""
    whole = statistics.median(parts.whole)
    medians = {name: statistics.median(seconds) for name, seconds in parts.parts.items()}
    rows = [
        [name, f"{seconds:.4f}", f"{100 * seconds / whole:.1f}%"]
        for name, seconds in sorted(medians.items(), key=lambda item: -item[1])
    ]
    case = " ".join(_case(parts.case))
    return f"{case}, by part:\n\n" + table(("part", "s", "share"), [*rows, ["whole", f"{whole:.4f}", ""]])
