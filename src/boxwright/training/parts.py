"""Parts of a model: how an experiment names them, how they are built, and their JSON form.

A part is a function, an `nn.Module` subclass, or `functools.partial` of either; parts nest. `build` calls a part after
it has built the parts among its arguments. An argument that still needs arguments itself is a factory: `build` passes
it on uncalled, and the part that receives it calls it (`faster_rcnn` calls `box_head` with channels, strides, ...).
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import textwrap
from collections.abc import Callable, Collection
from difflib import get_close_matches
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn

MODEL_MODULES = ("boxwright.backbones", "boxwright.heads", "boxwright.detectors")
"""Boxwright's packages whose functions and `nn.Module` classes JSON may name: they build modules and do nothing else.
"""
SETTINGS_MODULES = (
    "boxwright.training.experiment",
    "boxwright.data.augment",
    "boxwright.data.buckets",
    "boxwright.geometry.conventions",
)
"""Further modules whose dataclasses JSON may name. No other module is imported, since an import runs code."""


def is_part(value: Any) -> bool:
    """Whether a value is a part: a function, an `nn.Module` subclass, or `functools.partial` of either."""
    target = value.func if isinstance(value, partial) else value
    return isinstance(target, FunctionType) or _is_module_class(target)


def is_settings(value: Any) -> bool:
    """Whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def build(part: Callable[..., Any], **arguments: Any) -> Any:
    """Build a part: first the parts among its arguments, then the part itself. Factories are passed on uncalled.

    Args:
        part: a part, see the docstring of this module.
        arguments: further arguments, such as `num_classes`. A part may already bind one of them to its default, as
            parts read from JSON do.

    Raises:
        ValueError: The part does not have these parameters, an argument is missing, or the part binds an argument that
            is also in `arguments`.
    """
    function, bound = _split(part)
    signature = inspect.signature(function)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    bound = {name: value for name, value in bound.items() if name not in arguments or value != defaults.get(name)}
    factories = factories_in(part)
    parts = {name: build(value) if is_part(value) and name not in factories else value for name, value in bound.items()}
    try:
        signature.bind(**parts, **arguments)
    except TypeError as error:
        raise ValueError(f"{call_name(part)}: {error}") from None
    return function(**parts, **arguments)


def factories_in(value: Any) -> set[str]:
    """Names of the arguments of a part that are factories; none for a dataclass instance.

    A part is a factory if it still needs arguments. It is also a factory if the default of its parameter is one, so
    that a class with the signature `*args, **kwargs` can replace `BoxHead`.
    """
    if not is_part(value):
        return set()
    function, bound = _split(value)
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    named = {**defaults, **bound}
    return {
        name for name in named if _is_factory(named[name]) or (is_part(named[name]) and _is_factory(defaults.get(name)))
    }


def _is_factory(value: Any) -> bool:
    """Whether a value is a part with a required parameter that has no value."""
    if not is_part(value):
        return False
    function, bound = _split(value)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(
        parameter.default is inspect.Parameter.empty and parameter.kind not in variadic and name not in bound
        for name, parameter in inspect.signature(function).parameters.items()
    )


def replaced_parts(part: Callable[..., Any]) -> dict[str, str]:
    """Full names of the parts that replace a default part, such as another `box_head`, by argument."""
    function, bound = _split(part)
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    return {
        name: call_name(value)
        for name, value in bound.items()
        if is_part(value) and is_part(defaults.get(name)) and call_name(value) != call_name(defaults[name])
    }


def call_name(value: Any) -> str:
    """Full name of the function or class that a part calls, or of the class of a dataclass instance."""
    target = _target(value)
    return f"{target.__module__}.{target.__qualname__}"


def _target(value: Any) -> Callable[..., Any]:
    """The function or class that a part calls, or the class of a dataclass instance."""
    return _split(value)[0] if is_part(value) else type(value)


def arguments_of(value: Any, *, factory: bool = False) -> dict[str, Any]:
    """Arguments of a part, or fields of a dataclass instance, by name, defaults included.

    Parameters without a value are left out.

    Args:
        value: a part or a dataclass instance.
        factory: whether the part is passed on uncalled. Then its caller passes the positional parameters
            (`faster_rcnn` passes `config` to `box_head`), and their defaults are left out.
    """
    if not is_part(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    function, bound = _split(value)
    parameters = inspect.signature(function).parameters.values()
    defaults = {
        p.name: p.default
        for p in parameters
        if p.default is not inspect.Parameter.empty and not (factory and p.kind is not inspect.Parameter.KEYWORD_ONLY)
    }
    named = {p.name: {**defaults, **bound}[p.name] for p in parameters if p.name in defaults or p.name in bound}
    return {**named, **bound}


def _split(part: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function or class of a part, and the arguments that its partial binds."""
    if not isinstance(part, partial):
        return part, {}
    if part.args:
        raise ValueError(
            f"{part!r} binds {part.args!r} by position: give the arguments by name, as in "
            f"partial({part.func.__name__}, width=16)"
        )
    return part.func, dict(part.keywords)


def to_json(value: Any) -> Any:
    """Convert a value to JSON types. Defaults are included, so that a later change of a default has no effect.

    A part or a dataclass instance becomes `{"call": "boxwright.backbones.fpn.resnet_fpn", "arguments": {...}}`.

    Raises:
        ValueError: The value contains something else than parts, dataclass instances, numbers, strings, bools, None and
            tuples, or a part that cannot be imported by its name.
    """
    return _encode(value, "")


def _encode(value: Any, path: str, *, factory: bool = False) -> Any:
    if is_part(value) or is_settings(value):
        name = call_name(value)
        target = _target(value)
        # Lambdas, and functions and classes defined inside others, have no name in their module.
        if not target.__qualname__.isidentifier() or target.__module__ == "__main__":
            raise ValueError(
                f"{_at(path)}{name} cannot be imported by its name, so the model could not be rebuilt from its "
                "weights file: define it at the top of an importable module, and import it from there"
            )
        factories = factories_in(value)
        arguments = {
            key: _encode(item, f"{path}.{key}", factory=key in factories)
            for key, item in arguments_of(value, factory=factory).items()
        }
        return {"call": name, "arguments": arguments}
    if isinstance(value, (tuple, list)):
        return [_encode(element, f"{path}[{index}]") for index, element in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    shown = textwrap.shorten(repr(value), 80, placeholder=" ...")
    raise ValueError(
        f"{_at(path)}expected a number, string, bool, None, tuple, dataclass or part, got {shown} (of type "
        f"{type(value).__name__}). A part is a function, an nn.Module class, or functools.partial of one."
    )


def _at(path: str) -> str:
    return f"{path[1:]}: " if path else ""


def modules_of(value: Any) -> set[str]:
    """Modules outside Boxwright that define the parts and dataclasses of a value."""
    if isinstance(value, (tuple, list)):
        return {module for element in value for module in modules_of(element)}
    if not is_part(value) and not is_settings(value):
        return set()
    module = _target(value).__module__
    modules = set() if _inside(module, ("boxwright",)) else {module}
    return modules.union(*map(modules_of, arguments_of(value).values()))


def not_pretrained(part: Any) -> Any:
    """Set `pretrained` to False in a part and in the parts among its arguments, for parts of Boxwright.

    Used for a model whose weights come from a file: pretrained weights would be downloaded and then overwritten.
    """
    if not is_part(part):
        return part
    function, bound = _split(part)
    changes = {name: not_pretrained(value) for name, value in bound.items() if is_part(value)}
    if _inside(function.__module__, ("boxwright",)) and bound.get("pretrained"):
        changes["pretrained"] = False
    return partial(part, **changes) if changes else part


def from_json(data: Any, trusted_modules: Collection[str] = ()) -> Any:
    """Convert the result of `to_json` back. Lists become tuples; functions and classes become partials of them.

    Args:
        data: JSON as `json.loads` returns it.
        trusted_modules: modules and packages whose functions and classes may be called, in addition to Boxwright's.

    Raises:
        ValueError: `data` has another structure, or names something that does not exist or is not trusted.
    """
    trusted = tuple(trusted_modules)
    if isinstance(data, list):
        return tuple(from_json(element, trusted) for element in data)
    if not isinstance(data, dict):
        return data
    name, values = data.get("call"), data.get("arguments")
    if set(data) != {"call", "arguments"} or not isinstance(name, str) or not isinstance(values, dict):
        raise ValueError(f'invalid experiment: expected {{"call": NAME, "arguments": {{...}}}}, got {data!r}')
    target = _find(name, trusted)
    known = inspect.signature(target).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        for argument in values:
            if argument not in known:
                raise ValueError(f"{name} has no {argument!r}{nearest(argument, known)}")
    arguments = {argument: from_json(value, trusted) for argument, value in values.items()}
    if is_part(target):
        return partial(target, **arguments)
    try:
        return target(**arguments)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None


def _find(name: str, trusted: tuple[str, ...]) -> Any:
    """Import the function or class of a name that JSON may contain.

    Raises:
        ValueError: JSON may not contain the name, or it does not exist.
    """
    module_name, _, attribute = name.rpartition(".")
    if not _inside(module_name, ("boxwright", *trusted)):
        raise ValueError(
            f"{name} is not Boxwright's. If you know its code and want to run it here, trust its module: "
            f"trusted_modules=[{module_name!r}], on the command line --trust {module_name}"
        )
    if not _inside(module_name, (*MODEL_MODULES, *SETTINGS_MODULES, *trusted)):
        raise ValueError(f"{name} is neither a part of a model nor settings")
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        if isinstance(error, ImportError) and not _inside(module_name, ("boxwright",)):
            raise ValueError(
                f"{name}: the trusted module {module_name} cannot be imported ({error}). Install it, or start Python "
                "in the folder that holds it, on the command line as python -m boxwright"
            ) from None
        raise ValueError(
            f"{name} does not exist. Install the version of its package that wrote the experiment, see 'versions' in "
            "experiment.json"
        ) from None
    is_model_part = is_part(target) and _inside(module_name, (*MODEL_MODULES, *trusted))
    is_settings_class = isinstance(target, type) and dataclasses.is_dataclass(target)
    # A module also has the names that it imports, and some of Boxwright's functions write files.
    if getattr(target, "__module__", None) != module_name or not (is_model_part or is_settings_class):
        raise ValueError(f"{name} is neither a part of a model nor settings")
    return target


def _is_module_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _inside(module: str, packages: Collection[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def nearest(name: str, names: Collection[str]) -> str:
    """End of an error message about a wrong name: the names that contain it, or the closest name, or all names."""
    containing = [right for right in names if name in right]
    close = get_close_matches(name, list(names), n=1)
    if len(containing) < 2 and close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(containing or names) or 'none'}"
