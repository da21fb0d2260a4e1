"""Comparison with peers on the benchmark page: published accuracy, and speed and memory measured in alternation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from boxwright.benchmark.model_tables import FAMILIES, accuracy_metrics, backbone_and_schedule, schedule_of
from boxwright.benchmark.report import Case, Operations, Ratio, Timing
from boxwright.benchmark.stored import GB, StoredReport, conditions, peak_bytes
from boxwright.benchmark.table import spread, table
from boxwright.recipes import built_in_recipes
from boxwright.zoo import Entry


def performance(zoo: Mapping[str, Entry], sources: Sequence[str]) -> str:
    """Table of the published accuracy of R-50-FPN models, one column per source; unpublished cells are empty."""
    rows = []
    for family, title in FAMILIES.items():
        for schedule in ("1x", "2x", ""):
            cells = [_published(zoo, source, family, schedule) for source in sources]
            if any(cells):
                rows.append([title, schedule or "not stated", *cells])
    letters = [f"[{chr(ord('A') + index)}]" for index in range(len(sources))]
    return table(["Type", "Lr schd", *letters], rows)


def speed(stored: Sequence[StoredReport], task: str) -> str:
    """Table of Boxwright's times, each with the peer's time in the same report and the floor of the operations.

    The floor may come from another report of the same machine.
    """
    rows = []
    for _, machine, report in stored:
        ours = [t for t in report.timings if t.case.system == "boxwright" and t.case.task == task and not t.loading]
        for timing in ours:
            operations = (o for other in stored if other.machine == machine for o in other.report.operations)
            counted = next((o for o in operations if _same_computation(o, timing.case)), None)
            peers = [t for t in report.timings if _same_workload(t.case, timing.case) and not t.loading]
            # A time with neither a peer nor a floor is left out: the model tables show it.
            for peer in [*peers, *([None] if counted is not None and not peers else [])]:
                ratio = None if peer is None else next((r for r in report.ratios if r.case == peer.case), None)
                rows.append(_speed_row(timing, peer, ratio, counted, conditions(timing.case, machine)))
    unit = "s/iter" if task == "train" else "s"
    head = ["Recipe", "Conditions", f"Boxwright ({unit})", "Peer", f"Peer ({unit})", "Peer / Boxwright"]
    return table([*head, "Floor (s)", "Boxwright / floor"], rows)


def memory(stored: Sequence[StoredReport]) -> str:
    """Table of the peak memory of training, Boxwright's and the peer's."""
    rows = []
    for _, machine, report in stored:
        for ours in report.memory:
            if ours.case.system != "boxwright" or ours.case.task != "train":
                continue
            for peer in (m for m in report.memory if _same_workload(m.case, ours.case)):
                our_peak, peer_peak = peak_bytes(ours), peak_bytes(peer)
                device = "host" if ours.cuda_reserved is None else "GPU"
                cells = [
                    f"{our_peak / GB:.2f}",
                    peer.case.system,
                    f"{peer_peak / GB:.2f}",
                    f"{our_peak / peer_peak:.2f}",
                ]
                rows.append([f"`{ours.case.recipe}`", conditions(ours.case, machine), device, *cells])
    return table(["Recipe", "Conditions", "Memory", "Boxwright (GB)", "Peer", "Peer (GB)", "Boxwright / peer"], rows)


def _published(zoo: Mapping[str, Entry], source: str, family: str, schedule: str) -> str:
    """Table cell with the published metrics of a source's R-50-FPN model, for each backbone style.

    If several models match, the first one in the zoo file is used.
    """
    by_style: dict[str, str] = {}
    for entry in zoo.values():
        if entry.collection.title != source or entry.model.family != family or not entry.model.recipe:
            continue
        backbone, style, _ = backbone_and_schedule(built_in_recipes()[entry.model.recipe]())
        figures = [f"{entry.model.figures[name]:g}" for name in accuracy_metrics(family) if name in entry.model.figures]
        if figures and (backbone, schedule_of(entry)) == ("R-50-FPN", schedule):
            by_style.setdefault(style, " & ".join(figures))
    return " / ".join(text if style == "pytorch" else f"{text} (caffe)" for style, text in by_style.items())


def _speed_row(
    ours: Timing, peer: Timing | None, ratio: Ratio | None, counted: Operations | None, conditions: str
) -> list[str]:
    peer_cells = ["", "", ""]
    if peer is not None:
        precision = "" if peer.case.precision == ours.case.precision else f" ({peer.case.precision})"
        peer_cells = [
            f"{peer.case.system}{precision}",
            spread(peer.seconds),
            "" if ratio is None else spread(ratio.each, 2),
        ]
    floor = ["", ""] if counted is None else [f"{counted.floor:.3f}", f"{ours.median / counted.floor:.2f}"]
    return [f"`{ours.case.recipe}`", conditions, spread(ours.seconds), *peer_cells, *floor]


def _same_workload(peer: Case, ours: Case) -> bool:
    """Whether a peer was measured on the same task and inputs; its precision and weights may differ."""
    fields = ("recipe", "settings", "task", "batch", "size", "dataset")
    return peer.system != ours.system and all(getattr(peer, name) == getattr(ours, name) for name in fields)


def _same_computation(operations: Operations, case: Case) -> bool:
    """Whether operations were counted for the same model, task, shapes and precision."""
    fields = ("recipe", "settings", "task", "batch", "size", "precision")
    return all(getattr(operations.case, name) == getattr(case, name) for name in fields)
