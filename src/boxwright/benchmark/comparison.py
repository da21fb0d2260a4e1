"""The page's comparison with peers: accuracy as published, speed and memory as measured in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from boxwright.benchmark.model_tables import FAMILIES, accuracy, looks, schedule_of
from boxwright.benchmark.report import Case, Operations, Ratio, Timing
from boxwright.benchmark.stored import GB, Stored, peak_bytes, setting
from boxwright.benchmark.table import spread, table
from boxwright.recipes import built_in_recipes
from boxwright.zoo import Entry


def performance(zoo: Mapping[str, Entry], sources: Sequence[str]) -> str:
    """What was published for R-50-FPN, a column a source; nothing where nothing was."""
    rows = []
    for family, title in FAMILIES.items():
        for schedule in ("1x", "2x", ""):
            cells = [_published(zoo, source, family, schedule) for source in sources]
            if any(cells):
                rows.append([title, schedule or "not stated", *cells])
    letters = [f"[{chr(ord('A') + number)}]" for number in range(len(sources))]
    return table(["Type", "Lr schd", *letters], rows)


def speed(stored: Sequence[Stored], task: str) -> str:
    """Times beside peers' of the same pictures and weights, taken in turns, and beside the floor of operations.

    The floor may be another report's of the same machine.
    """
    rows = []
    for _, machine, report in stored:
        own = [t for t in report.timings if t.case.system == "boxwright" and t.case.task == task and not t.loading]
        for timing in own:
            operations = (o for other in stored if other.machine == machine for o in other.report.operations)
            counted = next((o for o in operations if _counted(o, timing.case)), None)
            peers = [t for t in report.timings if _beside(t.case, timing.case) and not t.loading]
            # With its floor alone a time is of use too, and with neither it stands in the tables above.
            for peer in [*peers, *([None] if counted is not None and not peers else [])]:
                ratio = None if peer is None else next((r for r in report.ratios if r.case == peer.case), None)
                rows.append(_speed_row(timing, peer, ratio, counted, setting(timing.case, machine)))
    unit = "s/iter" if task == "train" else "s"
    head = ["Recipe", "Setting", f"Boxwright ({unit})", "Peer", f"Peer ({unit})", "Peer / Boxwright"]
    return table([*head, "Floor (s)", "Boxwright / floor"], rows)


def memory(stored: Sequence[Stored]) -> str:
    """Peaks of training beside peers'."""
    rows = []
    for _, machine, report in stored:
        for own in report.memory:
            if own.case.system != "boxwright" or own.case.task != "train":
                continue
            for peer in (m for m in report.memory if _beside(m.case, own.case)):
                ours, theirs = peak_bytes(own), peak_bytes(peer)
                what = "host" if own.cuda_reserved is None else "GPU"
                cells = [f"{ours / GB:.2f}", peer.case.system, f"{theirs / GB:.2f}", f"{ours / theirs:.2f}"]
                rows.append([f"`{own.case.recipe}`", setting(own.case, machine), what, *cells])
    return table(["Recipe", "Setting", "Of", "Boxwright (GB)", "Peer", "Peer (GB)", "Boxwright / peer"], rows)


def _published(zoo: Mapping[str, Entry], source: str, family: str, schedule: str) -> str:
    """The accuracy of a source's first R-50-FPN model of a family and schedule, of each style of backbone."""
    named: dict[str, str] = {}
    for entry in zoo.values():
        if entry.collection.title != source or entry.model.family != family or not entry.model.recipe:
            continue
        backbone, style, _ = looks(built_in_recipes()[entry.model.recipe]())
        figures = [f"{entry.model.figures[name]:g}" for name in accuracy(family) if name in entry.model.figures]
        if figures and (backbone, schedule_of(entry)) == ("R-50-FPN", schedule):
            named.setdefault(style, " & ".join(figures))
    return " / ".join(text if style == "pytorch" else f"{text} (caffe)" for style, text in named.items())


def _speed_row(
    own: Timing, peer: Timing | None, ratio: Ratio | None, counted: Operations | None, under: str
) -> list[str]:
    theirs = ["", "", ""]
    if peer is not None:
        precision = "" if peer.case.precision == own.case.precision else f" ({peer.case.precision})"
        theirs = [
            f"{peer.case.system}{precision}",
            spread(peer.seconds),
            "" if ratio is None else spread(ratio.each, 2),
        ]
    floor = ["", ""] if counted is None else [f"{counted.floor:.3f}", f"{own.median / counted.floor:.2f}"]
    return [f"`{own.case.recipe}`", under, spread(own.seconds), *theirs, *floor]


def _beside(peer: Case, own: Case) -> bool:
    """Whether a peer's case is that of ours."""
    same = ("recipe", "settings", "task", "batch", "size", "pictures")
    return peer.system != own.system and all(getattr(peer, name) == getattr(own, name) for name in same)


def _counted(operations: Operations, case: Case) -> bool:
    same = ("recipe", "settings", "task", "batch", "size", "precision")
    return all(getattr(operations.case, name) == getattr(case, name) for name in same)
