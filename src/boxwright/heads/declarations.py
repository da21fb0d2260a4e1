"""What a head may declare of its layers, by their attribute names: rows of classes, and the spread of their outputs.

A anchors per position (1 except in RetinaNet), C classes, V values per class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


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


@runtime_checkable
class HasClassLayers(Protocol):
    """A module with layers that have rows of classes, which `--init-classes` copies for the classes that are shared."""

    class_layers: Mapping[str, ClassRows]
    """Layout of each such layer, by the attribute that holds it."""


@runtime_checkable
class HasOutputStds(Protocol):
    """A module whose outputs have a known spread once it is trained, to which benchmarks scale random weights."""

    output_stds: Mapping[str, float]
    """Standard deviation of the outputs of each last layer, by the attribute that holds it."""
