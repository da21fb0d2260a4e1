"""What is wrong with a data set, told so that its owner can mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SHOWN = 10


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a data set."""

    file: str
    """The annotation file or picture."""
    object: str
    """What in it: an image, annotation or category by its id, or the file as a whole."""
    what: str
    """What is wrong."""
    mend: str
    """What to do about it."""
    severity: Literal["error", "dropped", "clipped"] = "error"
    """Training refuses what is an `error`, leaves out what is `dropped` and cuts what is `clipped`."""

    def __str__(self) -> str:
        return f"{self.file}: {self.object}: {self.what}: {self.mend}"


class FaultyDataError(ValueError):
    """A data set that training would be corrupted by; the message lists the first faults and counts the rest."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__(faults)
        self.faults = list(faults)

    def __str__(self) -> str:
        count = len(self.faults)
        lines = [f"{count} fault{'s' * (count > 1)} in the data set:", *map(str, self.faults[:SHOWN])]
        if count > SHOWN:
            lines.append(f"... and {count - SHOWN} more; `boxwright data check` lists them all")
        return "\n  ".join(lines)
