"""Which parameters have rows of classes, and how to copy the rows of shared classes from other weights.

A anchors per position (1 except in RetinaNet), C classes of the model, D classes of the weights, V values per class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from boxwright.heads.class_rows import ClassRows


@runtime_checkable
class HasClassRows(Protocol):
    """A module that declares its layers with rows of classes."""

    class_rows: Mapping[str, ClassRows]
    """Layout of each such layer, by the attribute that holds it."""


def class_rows(detector: nn.Module) -> dict[str, ClassRows]:
    """Layouts of the parameters with rows of classes, by name in the `state_dict`, as the detector's parts declare."""
    layouts = {}
    for path, module in detector.named_modules():
        if isinstance(module, HasClassRows):
            for attribute, layout in module.class_rows.items():
                layer = f"{path}.{attribute}" if path else attribute
                parameters = dict(detector.get_submodule(layer).named_parameters(recurse=False))
                layouts.update({f"{layer}.{name}": layout for name in ("weight", "bias") if name in parameters})
    return layouts


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
        A copy with these rows; None if the two parameters differ in more than their classes.
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
