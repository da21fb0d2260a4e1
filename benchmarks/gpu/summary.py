"""The Markdown summary of a run, to be committed under docs/benchmarks/measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.worker import Outcome

_MIB = 2**20
_KERNELS = 8
"""Kernels of each profile that the summary shows."""
_CONVOLUTIONS = 20


def markdown(outcomes: Sequence[Outcome], command: str, facts: dict[str, str]) -> str:
    """All tables that have rows."""
    ok = sum(outcome.status == "ok" for outcome in outcomes)
    lines = [f"`{command}`", ", ".join(f"{name} {value}" for name, value in facts.items())]
    lines.append(f"{len(outcomes)} items, {ok} ok, {sum(outcome.seconds for outcome in outcomes):.0f} s.")
    sections = [*lines, _table(("item", "status", "s", "detail"), [_item(outcome) for outcome in outcomes])]
    for title, table in (
        ("Time", _times(outcomes)),
        ("Parts, ms", _parts(outcomes)),
        ("Compilation", _stages(outcomes)),
        ("Operators, ms", _operators(outcomes)),
        ("Convolutions, TFLOP/s", _convolutions(outcomes)),
        ("Transfer", _transfer(outcomes)),
        ("Kernels", _kernels(outcomes)),
    ):
        if table:
            sections += [f"## {title}", table]
    return "\n\n".join(["# GPU run", *sections]) + "\n"


def _item(outcome: Outcome) -> list[str]:
    """One row; of an error its last line."""
    shown = {k: v for k, v in outcome.result.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    detail = "; ".join(f"{name} {value:.3g}" for name, value in shown.items())
    if outcome.error:
        detail = outcome.error.strip().splitlines()[-1].replace("|", "/")
    return [outcome.item, outcome.status, f"{outcome.seconds:.1f}", detail]


def _times(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        seconds = outcome.result.get("seconds")
        if not seconds or "case" not in outcome.result:
            continue
        case, profile = outcome.result["case"], outcome.result.get("profile", {})
        median, peak = statistics.median(seconds), outcome.result.get("peak_bytes", {})
        rows.append(
            [
                outcome.item,
                case["precision"],
                f"{1000 * median:.2f}",
                f"{1000 * min(seconds):.2f} to {1000 * max(seconds):.2f}",
                f"{case['batch'] / median:.1f}",
                f"{peak['allocated'] / _MIB:.0f}" if peak else "",
                str(profile.get("launches", "")),
                f"{1000 * profile['busy_s']:.2f}" if profile else "",
                f"{1000 * profile['gap_s']:.2f}" if profile else "",
            ]
        )
    head = ("item", "precision", "median, ms", "range, ms", "images/s", "peak, MiB", "launches", "busy, ms", "gaps, ms")
    return _table(head, rows)


def _parts(outcomes: Sequence[Outcome]) -> str:
    timed = [outcome for outcome in outcomes if outcome.result.get("parts_s")]
    names = list(dict.fromkeys(name for outcome in timed for name in outcome.result["parts_s"]))
    rows = [[outcome.item, *(_ms(outcome.result["parts_s"].get(name)) for name in names)] for outcome in timed]
    return _table(("item", *names), rows)


def _stages(outcomes: Sequence[Outcome]) -> str:
    rows = [
        [outcome.item, run, *(f"{value:.4g}" for value in (outcome.result[run].get(name, 0.0) for name in _STAGES))]
        for outcome in outcomes
        for run in ("traced", "inductor")
        if run in outcome.result
    ]
    return _table(("item", "run", *_STAGES), rows)


_STAGES = (
    "dynamo_s",
    "dynamo_nodes",
    "aot_s",
    "aot_forward_nodes",
    "aot_backward_nodes",
    "inductor_forward_s",
    "inductor_backward_s",
    "first_call_s",
)


def _operators(outcomes: Sequence[Outcome]) -> str:
    rows = [
        [row["name"], form, f"{1000 * statistics.median(seconds):.3f}", _mib(row, form)]
        for outcome in outcomes
        for row in outcome.result.get("operators", [])
        for form, seconds in row["seconds"].items()
    ]
    return _table(("operator", "form", "median, ms", "peak, MiB"), rows)


def _mib(row: dict[str, Any], form: str) -> str:
    peak = row.get("peak_bytes", {}).get(form)
    return f"{peak / _MIB:.0f}" if peak else ""


def _convolutions(outcomes: Sequence[Outcome]) -> str:
    columns = [f"{direction}_{state}_tflops" for direction in ("forward", "backward") for state in ("off", "on")]
    rows = [
        [
            " x ".join(map(str, row["images"])),
            " x ".join(map(str, row["weight"])),
            str(row["stride"][0]),
            str(row["count"]),
            *(f"{row[column]:.3g}" for column in columns),
        ]
        for outcome in outcomes
        for row in outcome.result.get("convolutions", [])[:_CONVOLUTIONS]
    ]
    heads = [
        f"{direction}, cudnn.benchmark {state}" for direction in ("forward", "backward") for state in ("off", "on")
    ]
    return _table(("images", "weight", "stride", "count", *heads), rows)


def _transfer(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        for row in outcome.result.get("copies", []):
            memory = "pinned" if row["pinned"] else "unpinned"
            rows.append([f"{row['direction']}, {row['mib']} MiB, {memory}", f"{row['gb_per_s']:.2f} GB/s"])
        if loader := outcome.result.get("loader"):
            rows.append([f"loader, {loader['workers']} workers", f"{loader['images_per_s']:.1f} images/s"])
        for name, rate in outcome.result.get("matrix_tflops", {}).items():
            rows.append([f"matrix product, {name}", f"{rate:.4g} TFLOP/s"])
    return _table(("what", "rate"), rows)


def _kernels(outcomes: Sequence[Outcome]) -> str:
    rows = [
        [outcome.item, f"`{kernel['name'][:90]}`".replace("|", "/"), str(kernel["count"]), _ms(kernel["seconds"])]
        for outcome in outcomes
        for kernel in outcome.result.get("profile", {}).get("kernels", [])[:_KERNELS]
    ]
    return _table(("item", "kernel", "count", "total, ms"), rows)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; empty without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
