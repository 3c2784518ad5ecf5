"""Recipes: named training runs. A recipe is a function, named like its module here, that returns its stages.

    def nano() -> list[Stage]: ...        # in nano.py

Its docstring gives command, hardware, time and expected figures. Calling it builds datasets and settings, but no
model: that happens when a stage is run.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from vlmslice.errors import VlmSliceError, suggestion
from vlmslice.training import Stage


class RecipeError(VlmSliceError, ValueError):
    """No recipe, stage or setting has the given name."""


def recipe_names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_recipe(name: str) -> Callable[[], list[Stage]]:
    """The function of the recipe `name`."""
    check_name("recipe", name, recipe_names())
    module = importlib.import_module(f"{__name__}.{name}")
    return getattr(module, name)


def check_name(what: str, name: str, names: list[str]) -> None:
    """Raises `RecipeError` with the nearest match unless `name` is one of `names`."""
    if name in names:
        return
    hint = suggestion(name, names) or f"; expected one of {', '.join(names)}"
    raise RecipeError(f"unknown {what} {name!r}{hint}")
