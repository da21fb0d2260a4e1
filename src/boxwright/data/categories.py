"""Match the categories of two data sets, or of a model and a data set, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from boxwright.data.dataset import Category

UNUSED = "N/A "
"""Name prefix of placeholder classes: a model predicts them, but no data set has them (gaps in COCO's category ids)."""


def match_by_name(
    ours: Sequence[Category], theirs: Sequence[Category], *, sides: tuple[str, str], what: str, fix: str
) -> list[int]:
    """For each of our categories, the index of the category with the same name in `theirs`.

    Categories that share a name (Roboflow adds the project name as a category) are matched in order: our first to their
    first, our second to their second.

    Args:
        ours: Categories to match.
        theirs: Categories to search.
        sides: Names of `ours` and `theirs` for the error message.
        what: Start of the error message: what is wrong.
        fix: End of the error message: how to fix it.

    Raises:
        ValueError: `ours` and `theirs` do not have the same names; the message lists the names that only one side has.
    """
    our_names, their_names = (Counter(category.name for category in side) for side in (ours, theirs))
    if our_names != their_names:
        raise ValueError(
            f"{what}. Only in {sides[0]} ({len(ours)} categories): {_listed(our_names - their_names)}. "
            f"Only in {sides[1]} ({len(theirs)} categories): {_listed(their_names - our_names)}. {fix}"
        )
    rows = _rows_by_name(theirs)
    return [rows[category.name].pop(0) for category in ours]


def shared_by_name(ours: Sequence[Category], theirs: Sequence[Category]) -> list[int | None]:
    """Like `match_by_name`, but None for a category whose name `theirs` lacks, instead of an error."""
    rows = _rows_by_name(theirs)
    return [rows[category.name].pop(0) if rows.get(category.name) else None for category in ours]


def _rows_by_name(categories: Sequence[Category]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, category in enumerate(categories):
        rows.setdefault(category.name, []).append(row)
    return rows


def _listed(names: Counter[str]) -> str:
    """Sorted names, or "none"."""
    return ", ".join(sorted(names)) or "none"
