"""Recipes: functions that return an `Experiment`. Every public function of a module of this package is a recipe."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType

from boxwright.recipes import cascade_rcnn, fast_mask_rcnn, fast_rcnn, faster_rcnn, mask_rcnn, retinanet, rpn
from boxwright.training.experiment import Experiment, nearest

Recipe = Callable[[], Experiment]


def built_in_recipes() -> dict[str, Recipe]:
    """Return the built-in recipes by name."""
    families = (rpn, fast_rcnn, fast_mask_rcnn, faster_rcnn, mask_rcnn, cascade_rcnn, retinanet)
    return {name: recipe for family in families for name, recipe in _functions(family).items()}


def find_recipe(name: str) -> Recipe:
    """Look up a recipe.

    Args:
        name: name of a built-in recipe, or `package.module:function` for a function of another package.

    Raises:
        ValueError: No recipe has this name; the message suggests the nearest one.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon:
        recipes = built_in_recipes()
        if name not in recipes:
            raise ValueError(
                f"there is no recipe {name!r}{nearest(name, recipes)} (for your own recipe: package.module:function)"
            )
        return recipes[name]
    if not module_name or not function_name:
        raise ValueError(
            f"there is no recipe {name!r}: expected the name of a built-in recipe, or package.module:function"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but a module that it imports does not
        raise ValueError(
            f"there is no module {error.name!r} for recipe {name!r}. Install it, or run the command in its folder."
        ) from None
    functions = _functions(module)
    if function_name not in functions:
        raise ValueError(f"{module_name} has no function {function_name!r}{nearest(function_name, functions)}")
    recipe = functions[function_name]
    try:
        inspect.signature(recipe).bind()
    except TypeError as error:
        raise ValueError(f"{name} is not a recipe: a recipe must be callable without arguments ({error})") from None
    return recipe


def _functions(module: ModuleType) -> dict[str, Recipe]:
    """Return the public functions that a module defines itself."""
    return {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }
