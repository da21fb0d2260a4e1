"""What an annotation format has to provide, and the values that formats share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from boxwright.data.formats.columns import Columns
from boxwright.data.formats.fault import Fault

SPLIT_NAMES = {"train": "train|training", "val": "val|valid|validation", "test": "test|testing"}
"""Regular expression of the names that data sets use for each split."""


class Split(NamedTuple):
    """One part of a data set."""

    annotations: Path
    """The annotation file or folder; what it is depends on the format."""
    images: Path
    """The image folder; the file names of the annotations are relative to it."""


@dataclass(frozen=True)
class NoMatch:
    """A folder does not hold a data set in a format."""

    reason: str
    """What the format looked for, as a clause after "looked for"."""


class Format(Protocol):
    """An annotation format: finds its data sets in folders and reads their splits.

    Each format is a module of this package with these members; any other object with them serves as well. `formats` in
    the package lists all formats. The commands, the data set and the evaluation go through that list, so a new format
    needs one module and one entry in the list.
    """

    @property
    def name(self) -> str:
        """The name that users know the format by, such as "COCO"."""
        ...

    def detect(self, folder: Path) -> dict[str, Split] | NoMatch:
        """Look for a data set in this format.

        It must be fast: it looks at names and at the beginnings of files, and parses no large file.

        Args:
            folder: An existing folder.

        Returns:
            The splits that are there, by "train", "val" and "test"; at least one. Otherwise what was looked for.

        Raises:
            ValueError: The folder is in this format, but it is ambiguous which file is which split.
        """
        ...

    def reads(self, annotations: Path) -> bool:
        """Whether an annotation path given by the user is in this format.

        It decides by the name, or by the first bytes of the file. It must return False for the files of other formats,
        and must not raise for a path that does not exist.
        """
        ...

    def content_hash(self, split: Split) -> str:
        """A hash of everything that `read` looks at, in hexadecimal digits.

        The index of a split is cached under this hash, so two splits that are read differently must have different
        hashes. A format outside this package should include the version of its reader.

        Raises:
            OSError: A file cannot be read.
        """
        ...

    def read(self, split: Split) -> tuple[Columns, list[Fault]]:
        """Read the annotations of a split.

        `read` reports what is wrong with single entries. References between entries, duplicate ids, NaN, and boxes
        outside their images are checked afterwards for all formats alike, when the index is built.

        Returns:
            The well-typed entries, and one fault for each of the others. Boxes are x, y, width and height in continuous
            pixels of the displayed image: the upper left pixel spans 0..1.

        Raises:
            OSError: A file cannot be read.
            ValueError: Files or folders that the format requires are missing.
        """
        ...
