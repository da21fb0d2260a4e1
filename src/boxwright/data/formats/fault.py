"""Faults of a data set: where, what is wrong, and how to fix it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SHOWN = 10
"""Maximum number of faults in an error message."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a data set."""

    file: str
    """Path of the annotation file or image."""
    object: str
    """Entry with the fault, such as "image 7", "annotation 11 (image 3)" or "file" for the whole file."""
    what: str
    """What is wrong, with the value."""
    fix: str
    """How to fix it, as a sentence without a full stop."""
    severity: Literal["error", "dropped", "clipped"] = "error"
    """What training does: `error`: raises; `dropped`: ignores the box or polygon; `clipped`: clips the box."""

    def __str__(self) -> str:
        return f"{self.file}: {self.object}: {self.what}. {self.fix}"

    @property
    def mend(self) -> str:
        """Deprecated name of `fix`."""
        return self.fix


class FaultyDataError(ValueError):
    """The data set has errors that would corrupt training; the message lists the first faults and counts the rest."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(faults)
        self.faults = list(faults)

    def __str__(self) -> str:
        count = len(self.faults)
        lines = [f"{count} fault{'s' * (count > 1)} in the data set:", *map(str, self.faults[:SHOWN])]
        if count > SHOWN:
            lines.append(f"... and {count - SHOWN} more; `boxwright data check` lists all of them")
        return "\n  ".join(lines)
