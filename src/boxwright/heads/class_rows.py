"""Layers with rows of classes, as heads declare them in `class_rows`.

A anchors per position (1 except in RetinaNet), C classes, V values per class.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClassRows:
    """Layout of the first dimension of a layer's weight and bias: [A, C + background, V]."""

    background: int = 0
    """Rows of background, after the rows of the classes: 1 or none."""
    values: int = 1
    """V, the consecutive rows of one class."""

    def num_anchors(self, num_rows: int, num_classes: int) -> int | None:
        """A of a parameter with this number of rows; None if its rows are not per class (class-agnostic boxes)."""
        anchors, rest = divmod(num_rows, (num_classes + self.background) * self.values)
        return None if rest else anchors
