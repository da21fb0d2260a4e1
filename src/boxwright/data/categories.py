"""Classes of two sides brought together by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from boxwright.data.dataset import Category

UNUSED = "N/A "
"""How the names of classes begin that a model has rows for and that no data set has, as COCO's ids with their gaps."""


def match_by_name(
    ours: Sequence[Category], theirs: Sequence[Category], *, sides: tuple[str, str], what: str, mend: str
) -> list[int]:
    """For each category of ours, the row of the same-named one of theirs.

    Where several share a name (Roboflow writes the project's name as one more category), the first is the first's.

    Args:
        ours: What is looked up.
        theirs: Where it is looked up.
        sides: What to call the two in an error.
        what: The error's beginning.
        mend: Its end.

    Raises:
        ValueError: The two sides do not have the same names; the message lists what each side alone has.
    """
    our_names, their_names = (Counter(category.name for category in side) for side in (ours, theirs))
    if our_names != their_names:
        raise ValueError(
            f"{what}. Only in {sides[0]} ({len(ours)} categories): {_listed(our_names - their_names)}. "
            f"Only in {sides[1]} ({len(theirs)} categories): {_listed(their_names - our_names)}. {mend}"
        )
    rows = _rows_by_name(theirs)
    return [rows[category.name].pop(0) for category in ours]


def shared_by_name(ours: Sequence[Category], theirs: Sequence[Category]) -> list[int | None]:
    """For each category of ours, the row of the same-named one of theirs, or None; the first is the first's."""
    rows = _rows_by_name(theirs)
    return [rows[category.name].pop(0) if rows.get(category.name) else None for category in ours]


def _rows_by_name(categories: Sequence[Category]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, category in enumerate(categories):
        rows.setdefault(category.name, []).append(row)
    return rows


def _listed(names: Counter[str]) -> str:
    """Names in order, or `none`."""
    return ", ".join(sorted(names)) or "none"
