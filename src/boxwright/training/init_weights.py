"""Initialise a model from a weights file, and print which tensors were loaded and which were not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from boxwright.data.categories import shared_by_name
from boxwright.data.dataset import Category
from boxwright.detectors.class_rows import class_rows, with_shared_rows
from boxwright.heads.class_rows import ClassRows
from boxwright.text import plural
from boxwright.training.metrics import log_line
from boxwright.weights.ours import load_weights


def load_init(detector: nn.Module, path: Path, categories: Sequence[Category], *, match_classes: bool = False) -> None:
    """Load the tensors of a weights file that match the model in name and shape.

    Class-specific rows (see `class_rows`) are matched by position. With `match_classes` they are matched by class name:
    the rows of shared classes and of the background are copied, the rows of other classes keep their initial values.

    Args:
        detector: detector built for `categories`; changed in place.
        path: weights file.
        categories: classes of the model, by label.
        match_classes: whether class-specific rows are matched by class name.

    Raises:
        ValueError: The file is not a weights file, or no tensor matches. With `match_classes` also: the file does not
            name its classes, no class is shared, or the model has no class-specific rows.
    """
    tensors, metadata = load_weights(path)
    state, layouts = detector.state_dict(), class_rows(detector)
    loaded = {name: tensor for name, tensor in tensors.items() if name in state and state[name].shape == tensor.shape}
    if match_classes:
        file_categories = _categories(path, metadata)
        shared = _shared(path, categories, file_categories)
        by_name = _class_tensors(path, state, tensors, layouts, shared=shared, num_classes=len(file_categories))
        loaded = {name: tensor for name, tensor in loaded.items() if name not in layouts} | by_name
    if not loaded:
        raise ValueError(
            f"{path}: no tensor matches the model in name and shape. Use weights of the same kind of model."
        )
    detector.load_state_dict(loaded, strict=False)
    log_line(f"{path}: loaded {len(loaded)} of the model's {len(state)} tensors")
    if match_classes:
        _log_classes(path, categories, shared)
    elif layouts.keys() & loaded.keys():
        _warn_of_other_names(path, metadata, categories)
    _log_initialised(path, state, tensors, loaded)


def _categories(path: Path, metadata: Mapping[str, Any]) -> list[Category]:
    """Classes that the weights were trained on, by label."""
    import msgspec  # Imported here, because loading the weights of a backbone does not need it.

    try:
        return msgspec.convert(metadata.get("categories") or [], list[Category])
    except msgspec.ValidationError as error:
        raise ValueError(f"{path}: its categories cannot be read: {error}") from None


def _shared(path: Path, categories: Sequence[Category], file_categories: Sequence[Category]) -> list[int | None]:
    """For each class of the model, the label of the class of the same name in the weights file, or None.

    Raises:
        ValueError: No class is shared.
    """
    if not file_categories:
        raise ValueError(
            f"{path}: the file does not name its classes, so rows cannot be matched by class name. Leave out "
            "--init-classes (in Python: init_classes)."
        )
    shared = shared_by_name(categories, file_categories)
    if all(label is None for label in shared):
        raise ValueError(
            f"{path}: no class is shared with the data set. Weights: {_names(file_categories)}. Data set: "
            f"{_names(categories)}. Rename the categories of the data set, or leave out --init-classes (in Python: "
            "init_classes)."
        )
    return shared


def _names(categories: Sequence[Category]) -> str:
    return ", ".join(sorted(category.name for category in categories))


def _class_tensors(
    path: Path,
    state: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    layouts: Mapping[str, ClassRows],
    *,
    shared: Sequence[int | None],
    num_classes: int,
) -> dict[str, Tensor]:
    """Parameters with class-specific rows: rows of shared classes from the file, the other rows from the model.

    Args:
        path: weights file.
        state: tensors of the model, by name.
        tensors: tensors of the file, by name.
        layouts: layout of the class-specific rows, by name of the parameter.
        shared: for each class of the model, its label in the file, or None.
        num_classes: number of classes of the file.

    Raises:
        ValueError: No parameter has class-specific rows for this number of classes.
    """
    mixed = {}
    for name, layout in layouts.items():
        if name not in tensors:
            continue
        tensor, from_file = state[name], tensors[name]
        if layout.num_anchors(len(tensor), len(shared)) is None:  # class-agnostic boxes
            new = from_file if from_file.shape == tensor.shape else None
        else:
            new = with_shared_rows(tensor, from_file, layout, shared=shared, num_given=num_classes)
        if new is not None:
            mixed[name] = new
    if not mixed:
        raise ValueError(
            f"{path}: rows cannot be matched by class name: no layer with rows for the {num_classes} classes of the "
            "file matches a layer of the model. Leave out --init-classes (in Python: init_classes)."
        )
    return mixed


def _log_classes(path: Path, categories: Sequence[Category], shared: Sequence[int | None]) -> None:
    loaded = [category.name for category, label in zip(categories, shared, strict=True) if label is not None]
    initial = [category.name for category, label in zip(categories, shared, strict=True) if label is None]
    rest = f" | re-initialised: {', '.join(initial)}" if initial else ""
    log_line(f"{path}: rows loaded by class name: {', '.join(loaded)}{rest}")


def _warn_of_other_names(path: Path, metadata: Mapping[str, Any], categories: Sequence[Category]) -> None:
    """Warn if class-specific rows were matched by position although the class names differ."""
    file_categories = _categories(path, metadata)
    if file_categories and [c.name for c in file_categories] != [c.name for c in categories]:
        log_line(
            f"{path}: warning: class-specific rows were matched by position, but the classes of the file have other "
            "names or another order. Use --init-classes to match them by name."
        )


def _log_initialised(
    path: Path, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], loaded: Mapping[str, Tensor]
) -> None:
    """Print which tensors keep their initial values, and why."""
    missing = sorted(state.keys() - tensors.keys())
    if missing:
        log_line(f"{path}: {plural(len(missing), 'tensor')} re-initialised (not in the file): {', '.join(missing)}")
    other = sorted(state.keys() & tensors.keys() - loaded.keys())
    if other:
        shapes = [
            f"{name} {list(tensors[name].shape)} in the file, {list(state[name].shape)} in the model" for name in other
        ]
        log_line(f"{path}: {plural(len(other), 'tensor')} re-initialised (shape mismatch): {'; '.join(shapes)}")
