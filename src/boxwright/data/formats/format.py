"""The protocol of annotation formats, and the types that formats share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from boxwright.data.formats.columns import Columns
from boxwright.data.formats.fault import Fault

SPLIT_NAMES = {"train": "train|training", "val": "val|valid|validation", "test": "test|testing"}
"""For each split, a regular expression that matches the names data sets use for it."""


class Split(NamedTuple):
    """Paths of one part of a data set, such as its training images."""

    annotations: Path
    """Annotation file or folder, depending on the format."""
    images: Path
    """Image folder; the file names in the annotations are relative to it."""


@dataclass(frozen=True)
class NoMatch:
    """Result of `Format.detect` for a folder that is not a data set in this format."""

    reason: str
    """What the format looked for; the message reads "looked for REASON"."""


class Format(Protocol):
    """An annotation format: recognises data sets in folders and reads their splits.

    Each format is a module of this package with these members, or any other object with these members. Commands, data
    sets and evaluation use the formats in the list `boxwright.data.formats.formats()`, so a new format needs one module
    and one entry in that list.
    """

    @property
    def name(self) -> str:
        """Name for users, such as "COCO"."""
        ...

    def detect(self, folder: Path) -> dict[str, Split] | NoMatch:
        """Look for a data set in this format.

        `detect` must be fast: it checks file names and the first bytes of files, but does not parse large files.

        Args:
            folder: An existing folder.

        Returns:
            The splits that exist, by name: "train", "val" and "test"; or `NoMatch` if there are none.

        Raises:
            ValueError: The folder is in this format, but several files match the same split.
        """
        ...

    def reads(self, annotations: Path) -> bool:
        """Whether the annotations at a path are in this format.

        `reads` checks the file name or the first bytes of the file. It must return False for files of other formats,
        and must not raise for a path that does not exist.
        """
        ...

    def content_hash(self, split: Split) -> str:
        """Hash of all files that `read` depends on, as hexadecimal digits.

        The index of a split is cached under this hash, so splits with different content must have different hashes. A
        format outside this package should include the version of its reader in the hash.

        Raises:
            OSError: A file cannot be read.
        """
        ...

    def read(self, split: Split) -> tuple[Columns, list[Fault]]:
        """Read the annotations of a split.

        `read` reports faults within single entries, such as missing fields. Faults that do not depend on the format
        (unknown and duplicate ids, NaN, boxes outside their image) are found later, when the index is built.

        Returns:
            The valid entries, and at least one fault for each invalid entry. Boxes are (x, y, width, height) in pixels,
            after EXIF rotation. Coordinates are continuous: the top left pixel covers [0, 1] x [0, 1].

        Raises:
            OSError: A file cannot be read.
            ValueError: Files or folders that the format requires are missing.
        """
        ...
