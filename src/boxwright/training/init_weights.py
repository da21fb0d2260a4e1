"""Starts a model from a weights file: what fits is taken, the rest stays as it was made, and all of it is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from boxwright.data.categories import shared_by_name
from boxwright.data.dataset import Category
from boxwright.detectors.class_rows import class_rows, with_shared_rows
from boxwright.heads.class_rows import ClassRows
from boxwright.training.metrics import say
from boxwright.weights.ours import load_weights


def load_init(detector: nn.Module, path: Path, categories: Sequence[Category], *, match_classes: bool = False) -> None:
    """Start from the tensors of a weights file that fit by name and shape.

    Rows of classes (see `class_rows`) go by their place, or with `match_classes` by the classes' names: those of shared
    classes and of background are taken, whatever their places and number, and the others start anew.

    Args:
        detector: as made for `categories`; changed in place.
        path: of the weights file.
        categories: the model's classes by label.
        match_classes: whether rows of classes go by name.

    Raises:
        ValueError: it is no weights file, or nothing in it fits; with `match_classes` also if it does not say its
            classes, none of them is the model's, or the model has no rows of classes.
    """
    tensors, page = load_weights(path)
    own, layouts = detector.state_dict(), class_rows(detector)
    taken = {name: tensor for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
    if match_classes:
        theirs = _categories(path, page)
        shared = _shared(path, categories, theirs)
        by_name = _class_tensors(path, own, tensors, layouts, shared=shared, num_given=len(theirs))
        taken = {name: tensor for name, tensor in taken.items() if name not in layouts} | by_name
    if not taken:
        raise ValueError(f"{path} holds no tensor that fits the model: it belongs to another kind of model")
    detector.load_state_dict(taken, strict=False)
    say(f"{path}: {len(taken)} of the model's {len(own)} tensors taken")
    if match_classes:
        _say_classes(path, categories, shared)
    elif layouts.keys() & taken.keys():
        _warn_of_other_names(path, page, categories)
    _say_fresh(path, own, tensors, taken)


def _categories(path: Path, page: Mapping[str, Any]) -> list[Category]:
    """The classes that the weights were trained on, by label."""
    import msgspec  # Here, so that training from a backbone's weights does not need it.

    try:
        return msgspec.convert(page.get("categories") or [], list[Category])
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}: its categories cannot be read: {error}") from None


def _shared(path: Path, ours: Sequence[Category], theirs: Sequence[Category]) -> list[int | None]:
    """For each class of the model, the weights' label of it, or None.

    Raises:
        ValueError: they share none.
    """
    if not theirs:
        raise ValueError(
            f"{path} does not name its classes, so no rows can be taken by name: leave out --init-classes (in Python: "
            "init_classes)"
        )
    shared = shared_by_name(ours, theirs)
    if all(label is None for label in shared):
        raise ValueError(
            f"{path} shares no class with the data set, so no rows can be taken by name. The weights have "
            f"{', '.join(sorted(c.name for c in theirs))}. The data set has {', '.join(sorted(c.name for c in ours))}. "
            "Rename the data set's categories, or leave out --init-classes (in Python: init_classes)"
        )
    return shared


def _class_tensors(
    path: Path,
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    layouts: Mapping[str, ClassRows],
    *,
    shared: Sequence[int | None],
    num_given: int,
) -> dict[str, Tensor]:
    """The parameters with rows of classes, mixed of what the model has and what the weights have.

    Raises:
        ValueError: there is none, or the weights have not so many rows as classes.
    """
    mixed = {}
    for name, layout in layouts.items():
        if name not in tensors:
            continue
        tensor, given = own[name], tensors[name]
        if layout.num_anchors(len(tensor), len(shared)) is None:  # class-agnostic boxes
            new = given if given.shape == tensor.shape else None
        else:
            new = with_shared_rows(tensor, given, layout, shared=shared, num_given=num_given)
        if new is not None:
            mixed[name] = new
    if not mixed:
        raise ValueError(
            f"{path}: no layer with rows of classes fits the model, for the {num_given} classes that the file names: "
            "leave out --init-classes (in Python: init_classes)"
        )
    return mixed


def _say_classes(path: Path, categories: Sequence[Category], shared: Sequence[int | None]) -> None:
    known = [category.name for category, label in zip(categories, shared, strict=True) if label is not None]
    fresh = [category.name for category, label in zip(categories, shared, strict=True) if label is None]
    rest = f"; {len(fresh)} start anew: {', '.join(fresh)}" if fresh else ""
    say(f"{path}: the rows of {len(known)} classes taken by name: {', '.join(known)}{rest}")


def _warn_of_other_names(path: Path, page: Mapping[str, Any], categories: Sequence[Category]) -> None:
    """Say it where rows of classes went by their place although the names differ."""
    theirs = _categories(path, page)
    if theirs and [c.name for c in theirs] != [c.name for c in categories]:
        say(
            f"{path}: warning: rows of classes are taken by their place, though the file's classes are others or stand "
            "in another order; --init-classes takes those of the same name"
        )


def _say_fresh(path: Path, own: Mapping[str, Tensor], given: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> None:
    """Say which tensors start anew, and why."""
    missing = sorted(own.keys() - given.keys())
    if missing:
        say(f"{path}: {len(missing)} tensors start anew, which it does not have: {', '.join(missing)}")
    other = sorted(own.keys() & given.keys() - taken.keys())
    if other:
        shapes = [f"{name} is {list(given[name].shape)} there and {list(own[name].shape)} here" for name in other]
        say(f"{path}: {len(other)} tensors start anew, which do not fit: {'; '.join(shapes)}")
