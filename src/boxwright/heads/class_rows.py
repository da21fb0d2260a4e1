"""Layers with one block of rows per class, as heads declare them in their `class_rows` attribute.

A anchors per position (1 except in RetinaNet), C classes, V values per class.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClassRows:
    """Layout of the first dimension of a layer's weight and bias: [A, C + background, V]."""

    background: int = 0
    """Number of background rows, after the rows of the classes: 0 or 1."""
    values: int = 1
    """V, the number of consecutive rows per class."""

    def num_anchors(self, num_rows: int, num_classes: int) -> int | None:
        """A for a parameter with `num_rows` rows; None if its rows are not per class (class-agnostic boxes)."""
        anchors, rest = divmod(num_rows, (num_classes + self.background) * self.values)
        return None if rest else anchors
