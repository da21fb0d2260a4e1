"""Which parameters have rows of classes, and how those of one set of classes come into another.

A anchors a position (1 but in RetinaNet), C classes of the model, D classes of the weights, V values a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ClassRows:
    """How the first dimension of a parameter is laid out: [A, C + background, V]."""

    background: int = 0
    """Rows of background, after those of the classes: 1 or none."""
    values: int = 1
    """V, the rows of one class, which stand together."""

    def num_anchors(self, num_rows: int, num_classes: int) -> int | None:
        """A of a parameter with so many rows; None where they are not by class, as those of class-agnostic boxes."""
        anchors, rest = divmod(num_rows, (num_classes + self.background) * self.values)
        return None if rest else anchors


CLASS_ROWS = {
    "box_head.class_logits": ClassRows(background=1),
    "box_head.box_deltas": ClassRows(values=4),
    "mask_head.mask_logits": ClassRows(),
    # Of a cascade, a head a stage
    "box_heads.*.class_logits": ClassRows(background=1),
    "box_heads.*.box_deltas": ClassRows(values=4),
    "mask_heads.*.mask_logits": ClassRows(),
    # Of RetinaNet, A anchors a position
    "head.class_logits": ClassRows(),
}
"""The layers with rows of classes, by the ends of their names; weight and bias are laid out alike."""


def class_rows(name: str) -> ClassRows | None:
    """The layout of a parameter, by its name in the detector's `state_dict`; None where it has no rows of classes."""
    layer = "." + name.rpartition(".")[0]
    return next((rows for end, rows in CLASS_ROWS.items() if fnmatchcase(layer, f"*.{end}")), None)


def with_shared_rows(
    own: Tensor, given: Tensor, layout: ClassRows, *, shared: Sequence[int | None], num_given: int
) -> Tensor | None:
    """A parameter with the rows of shared classes, and of background, taken from the weights'.

    Args:
        own: [A * (C + background) * V, ...] the model's parameter, whose other rows stay.
        given: [A * (D + background) * V, ...] the weights'.
        layout: of the rows of both.
        shared: C, for each class of the model the weights' label of it, or None.
        num_given: D.

    Returns:
        The new parameter, in memory of its own; None where the two differ in more than their classes.
    """
    num_own = len(shared)
    anchors = layout.num_anchors(len(own), num_own)
    if anchors is None or anchors != layout.num_anchors(len(given), num_given) or own.shape[1:] != given.shape[1:]:
        return None
    pairs = [(label, other) for label, other in enumerate(shared) if other is not None]
    pairs += [(num_own + row, num_given + row) for row in range(layout.background)]
    mixed = own.detach().clone().unflatten(0, (anchors, num_own + layout.background, layout.values))
    source = given.unflatten(0, (anchors, num_given + layout.background, layout.values))
    mixed[:, [to for to, _ in pairs]] = source[:, [origin for _, origin in pairs]].to(mixed)
    return mixed.flatten(0, 2)
