"""Find the parameters with one block of rows per class, and copy the rows of shared classes from other weights.

A anchors per position (1 except in RetinaNet), C classes of the model, D classes of the weights, V values per class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from boxwright.heads.class_rows import ClassRows


@runtime_checkable
class HasClassRows(Protocol):
    """A module that declares which of its layers have rows per class."""

    class_rows: Mapping[str, ClassRows]
    """Layout of the rows, by the name of the attribute that holds the layer."""


def class_rows(detector: nn.Module) -> dict[str, ClassRows]:
    """Layouts of the parameters with rows per class, by `state_dict` name, as declared by the detector's modules."""
    layouts = {}
    for path, module in detector.named_modules():
        if isinstance(module, HasClassRows):
            for attribute, layout in module.class_rows.items():
                layer = f"{path}.{attribute}" if path else attribute
                parameters = dict(detector.get_submodule(layer).named_parameters(recurse=False))
                layouts.update({f"{layer}.{name}": layout for name in ("weight", "bias") if name in parameters})
    return layouts


def with_shared_rows(
    current: Tensor, source: Tensor, layout: ClassRows, *, shared: Sequence[int | None], num_given: int
) -> Tensor | None:
    """Copy the rows of shared classes, and of background, from a parameter of other weights into the model's parameter.

    Args:
        current: [A * (C + background) * V, ...] parameter of the model; its other rows are kept.
        source: [A * (D + background) * V, ...] the same parameter in the other weights.
        layout: layout of the rows of both parameters.
        shared: for each of the C classes of the model, the class's label in the other weights, or None.
        num_given: D.

    Returns:
        A new tensor; None if the two parameters differ in more than the number of classes.
    """
    num_classes = len(shared)
    anchors = layout.num_anchors(len(current), num_classes)
    if (
        anchors is None
        or anchors != layout.num_anchors(len(source), num_given)
        or current.shape[1:] != source.shape[1:]
    ):
        return None
    pairs = [(label, other) for label, other in enumerate(shared) if other is not None]
    pairs += [(num_classes + row, num_given + row) for row in range(layout.background)]
    merged = current.detach().clone().unflatten(0, (anchors, num_classes + layout.background, layout.values))
    source = source.unflatten(0, (anchors, num_given + layout.background, layout.values))
    merged[:, [to for to, _ in pairs]] = source[:, [origin for _, origin in pairs]].to(merged)
    return merged.flatten(0, 2)
