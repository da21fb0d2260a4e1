"""Experiments as functions: a public function of a module here is a recipe, and its name is the recipe's."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType

from boxwright.recipes import cascade_rcnn, fast_mask_rcnn, fast_rcnn, faster_rcnn, mask_rcnn, retinanet, rpn
from boxwright.training.experiment import Experiment, nearest

Recipe = Callable[[], Experiment]


def built_in_recipes() -> dict[str, Recipe]:
    """Boxwright's own recipes by name."""
    families = (rpn, fast_rcnn, fast_mask_rcnn, faster_rcnn, mask_rcnn, cascade_rcnn, retinanet)
    return {name: recipe for family in families for name, recipe in _functions(family).items()}


def find_recipe(name: str) -> Recipe:
    """A recipe by name.

    Args:
        name: of a built-in recipe, or `package.module:function` for one of yours.

    Raises:
        ValueError: there is none of that name; the message names the nearest.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon:
        recipes = built_in_recipes()
        if name not in recipes:
            raise ValueError(
                f"there is no recipe {name!r}{nearest(name, recipes)} (a recipe of yours is package.module:function)"
            )
        return recipes[name]
    if not module_name or not function_name:
        raise ValueError(f"there is no recipe {name!r}: give a built-in one, or package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise ValueError(f"there is no module {error.name!r} for recipe {name!r}: is it installed?") from None
    functions = _functions(module)
    if function_name not in functions:
        raise ValueError(f"{module_name} has no function {function_name!r}{nearest(function_name, functions)}")
    recipe = functions[function_name]
    try:
        inspect.signature(recipe).bind()
    except TypeError as error:
        raise ValueError(f"{name} is no recipe, which takes no arguments: {error}") from None
    return recipe


def _functions(module: ModuleType) -> dict[str, Recipe]:
    """The public functions that a module defines."""
    return {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
