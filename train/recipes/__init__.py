"""Recipes: named training runs. A recipe is a function, named like its module here, that returns its stages.

    def nano() -> list[Stage]: ...        # in nano.py

Its docstring gives command, hardware, time and expected figures. Calling it builds datasets and settings, but no
model: that happens when a stage is run. A recipe that starts from a saved model takes its folder: `align(model)`; one
that can train on labelled photographs, too, takes theirs: `nano(data_root)`; one that learns from another model takes
that one's: `distil(model, teacher)`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path

from vlmslice.errors import VlmSliceError, suggestion
from vlmslice.training import Stage


class RecipeError(VlmSliceError, ValueError):
    """No recipe, stage or setting has the given name."""


def recipe_names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_recipe(name: str) -> Callable[..., list[Stage]]:
    """The function of the recipe `name`."""
    check_name("recipe", name, recipe_names())
    module = importlib.import_module(f"{__name__}.{name}")
    return getattr(module, name)


def starts_from_model(recipe: Callable[..., list[Stage]]) -> bool:
    """Whether a recipe takes the folder of a saved model."""
    return "model" in inspect.signature(recipe).parameters


def build_stages(
    name: str, model: Path | None = None, data_root: Path | None = None, teacher: Path | None = None
) -> list[Stage]:
    """Calls the recipe `name`, with the folder `model` if it starts from one, and the other folders if given."""
    recipe = find_recipe(name)
    options: dict[str, Path] = {}
    if data_root is not None:
        if "data_root" not in inspect.signature(recipe).parameters:
            raise RecipeError(
                f"recipe {name!r} trains on rendered pictures only and takes no --data-root; got {str(data_root)!r}"
            )
        options["data_root"] = data_root
    if teacher is not None:
        if "teacher" not in inspect.signature(recipe).parameters:
            raise RecipeError(f"recipe {name!r} has no teacher and takes no --teacher; got {str(teacher)!r}")
        options["teacher"] = teacher
    if not starts_from_model(recipe):
        if model is not None:
            raise RecipeError(f"recipe {name!r} starts from nothing and takes no --model; got {str(model)!r}")
        return recipe(**options)
    if model is None:
        raise RecipeError(
            f"recipe {name!r} starts from a saved model; add --model FOLDER, see `vlmslice compose`"
        )
    if not (model / "config.json").is_file():
        raise RecipeError(f"--model {str(model)!r} is no folder of a saved model: it has no config.json")
    return recipe(model, **options)


def check_name(what: str, name: str, names: list[str]) -> None:
    """Raises `RecipeError` with the nearest match unless `name` is one of `names`."""
    if name in names:
        return
    hint = suggestion(name, names) or f"; expected one of {', '.join(names)}"
    raise RecipeError(f"unknown {what} {name!r}{hint}")
