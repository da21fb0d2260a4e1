"""Print an experiment as text, and change its fields by text such as `optimizer.lr=0.01`."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from boxwright.training.experiment import Experiment
from boxwright.training.parts import arguments_of, call_name, factories_in, is_part, is_settings, nearest

_INNER = re.compile(r"\([^()]*\)")

Tree = dict[str, Any]
"""Settings as a tree of the parts of their names: {"optimizer": {"": "SGD", "lr": {"": "0.01"}}}. The key "" holds the
value of a node."""


def with_settings(experiment: Experiment, settings: Sequence[str]) -> Experiment:
    """Return a copy of an experiment with some fields changed.

    Args:
        experiment: the experiment; it is not changed.
        settings: list of `name=value`. Dots lead into parts: `model.backbone.depth=101`, `ema_decay=none`,
            `model.rpn.ratios=0.5,1,2`, `scales=(640,1333),(800,1333)`. The name of a dataclass creates it with its
            defaults: `optimizer=AdamW`. If a name occurs twice, the later value is used.

    Raises:
        ValueError: A name does not exist (the message suggests the nearest one), or a value has the wrong type.
    """
    tree: Tree = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ValueError(f"setting {setting!r}: expected name=value, such as optimizer.lr=0.01")
        node = tree
        for part in name.strip().split("."):
            node = node.setdefault(part, {})
        node[""] = text.strip()
    changed: Experiment = _changed(experiment, tree, "")
    return changed


def _changed(value: Any, tree: Tree, path: str, *, factory: bool = False) -> Any:
    """Apply a tree of changes to a part or a dataclass instance."""
    arguments, names, hints = arguments_of(value, factory=factory), _names(value, factory=factory), _types(value)
    changes = {}
    for name, branch in tree.items():
        full = f"{path}{name}"
        if name not in names:
            raise ValueError(f"{path.rstrip('.') or 'the experiment'} has no {name!r}{nearest(name, names)}")
        change = arguments.get(name)
        if "" in branch:
            annotation = hints.get(name, Any if change is None else type(change))
            change = _parse(branch[""], annotation, full)
        inner = {key: node for key, node in branch.items() if key}
        if inner:
            if not (is_part(change) or is_settings(change)):
                raise ValueError(f"{full} is {_text(change)} and has no field {next(iter(inner))!r}")
            change = _changed(change, inner, f"{full}.", factory=name in factories_in(value))
        changes[name] = change
    if is_part(value):
        return partial(value, **changes)
    return dataclasses.replace(value, **changes)


def _names(value: Any, *, factory: bool = False) -> list[str]:
    """Names of the settable parameters of a part, or of the fields of a dataclass.

    The settable parameters of a factory are its keyword-only parameters and the parameters that it binds. Its caller
    passes the others.
    """
    if not is_part(value):
        return [field.name for field in dataclasses.fields(value)]
    kinds: set[Any] = {inspect.Parameter.KEYWORD_ONLY}
    if not factory:
        kinds.add(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(_function(value)).parameters.values() if p.kind in kinds]
    return list(dict.fromkeys([*names, *arguments_of(value, factory=factory)]))


def _types(value: Any) -> dict[str, Any]:
    """Declared types of the arguments or fields, by name."""
    target = _function(value) if is_part(value) else type(value)
    if is_part(value) and isinstance(target, type):
        target = getattr(target, "__init__")  # noqa: B009, mypy expects the attribute of an instance
    try:
        return get_type_hints(target)
    except NameError:  # a user's module that imports types under TYPE_CHECKING only
        return {}


def _function(part: Any) -> Any:
    return part.func if isinstance(part, partial) else part


def _parse(text: str, annotation: Any, path: str) -> Any:
    """Convert text to the annotated type."""
    try:
        return _read(text, annotation)
    except ValueError:
        raise ValueError(f"{path}: expected {_type_text(annotation)}, got {text!r}") from None


def _read(text: str, annotation: Any) -> Any:
    origin, choices = get_origin(annotation), get_args(annotation)
    lower = text.lower()
    if annotation is Any:
        return _read(text, bool | int | float | None | str)
    if origin in (Union, types.UnionType):
        # None first, and str last because it takes any text.
        for choice in sorted(choices, key=lambda kind: (kind is not types.NoneType, kind is str)):
            with suppress(ValueError):
                return _read(text, choice)
    elif origin is Literal:
        for choice in choices:
            if text == str(choice):
                return choice
    elif annotation is types.NoneType and lower == "none":
        return None
    elif annotation is bool and lower in ("true", "false"):
        return lower == "true"
    elif annotation is int:
        return int(text)
    elif annotation is float and math.isfinite(float(text)):
        return float(text)
    elif annotation is str:
        return text
    elif _is_sequence(annotation):
        return _read_tuple(text, choices)
    elif isinstance(annotation, type) and dataclasses.is_dataclass(annotation) and text == annotation.__name__:
        return _with_defaults(annotation)
    raise ValueError(text)


def _read_tuple(text: str, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if any(_is_sequence(kind) for kind in kinds):
        elements, rest = _INNER.findall(text), _INNER.sub("", text)
        if rest.strip("()[], "):
            raise ValueError(text)
    else:
        elements = [element.strip() for element in text.strip("()[]").split(",") if element.strip()]
    if not kinds:
        kinds = (Any,) * len(elements)
    elif len(kinds) == 1 or kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(elements)
    return tuple(_read(element, kind) for element, kind in zip(elements, kinds, strict=True))


def _is_sequence(annotation: Any) -> bool:
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, Sequence) and kind is not str


def _with_defaults(annotation: type) -> Any:
    try:
        return annotation()
    except TypeError as error:
        raise ValueError(error) from None


def _type_text(annotation: Any) -> str:
    """Describe a type in words, for an error message."""
    origin, choices = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        settable = [choice for choice in choices if get_origin(choice) is not Callable]
        return " or ".join(_type_text(choice) for choice in settable or choices)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in choices)
    if annotation in (int, float, bool, str, types.NoneType):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        return words.get(annotation, "none")
    if _is_sequence(annotation):
        inner = [choice for choice in choices if choice is not Ellipsis]
        if inner and _is_sequence(inner[0]):
            return f"groups in parentheses, each with {_type_text(inner[0])}"
        count = f"{len(inner)} values" if len(inner) > 1 else "values"
        return f"{count} separated by commas, each {_type_text(inner[0])}" if inner else "values separated by commas"
    if dataclasses.is_dataclass(annotation):
        return str(getattr(annotation, "__name__", annotation))
    name = getattr(annotation, "__name__", annotation)
    return f"a value that text can express ({name} cannot: set its arguments, or replace it in Python)"


def describe(experiment: Experiment) -> str:
    """Format an experiment as text, one name per line with defaults included; the arguments of a part are indented."""
    return "\n".join(_lines(experiment, ""))


def _lines(value: Any, indent: str, *, factory: bool = False) -> list[str]:
    arguments, factories = arguments_of(value, factory=factory), factories_in(value)
    lines = []
    for name in _names(value, factory=factory):
        if name not in arguments:
            lines.append(f"{indent}{name} = (passed when it is built)")
            continue
        argument = arguments[name]
        lines.append(f"{indent}{name} = {_text(argument)}")
        if is_part(argument) or is_settings(argument):
            lines += _lines(argument, indent + "  ", factory=name in factories)
    return lines


def _text(value: Any) -> str:
    """Format a value as `with_settings` reads it. A part or a dataclass instance is shown by its name."""
    if is_part(value) or is_settings(value):
        return call_name(value).rpartition(".")[2]
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(f"({_text(part)})" if isinstance(part, tuple) else _text(part) for part in value)
    return str(value)
