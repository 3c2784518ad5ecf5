"""Recipes: named training runs. A recipe is a function, named like its module here, that returns its stages.

    def nano() -> list[Stage]: ...        # in nano.py

Its docstring gives command, hardware, time and expected figures. Calling it builds datasets and settings, but no
model: that happens when a stage is run.

What a recipe can be given stands in its signature, by these names; one without a default must be given:

- `model: Path`, the folder of a saved model that it starts from
- `teacher: Path`, the folder of a saved model that it learns from
- `data_root: Path`, labelled photographs
- `data`, `eval_data: Sequence[Source]`, files of conversations

Its keyword-only parameters are its options, `sft(..., *, connector: float = 1.0)`, whose values have the type of their
default.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmslice.data.sources import Source
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


_INPUTS = {
    "model": "starts from nothing",
    "data_root": "trains on rendered pictures only",
    "teacher": "has no teacher",
    "data": "trains on pictures of its own",
    "eval_data": "measures no loss on data of yours",
}
"""What a recipe may take, and what one that does not take it is said to do instead."""

_REMEDIES = {
    "model": "starts from a saved model; add --model FOLDER, see `vlmslice compose`",
    "data": "trains on conversations of yours; add --data FILE.jsonl, see docs/finetuning.md",
}


def required_inputs(recipe: Callable[..., list[Stage]]) -> list[str]:
    """What a recipe must be given, as command-line options: `["--model"]`."""
    parameters = inspect.signature(recipe).parameters
    return [
        _option(name)
        for name in _INPUTS
        if name in parameters and parameters[name].default is inspect.Parameter.empty
    ]


def build_stages(
    name: str,
    model: Path | None = None,
    data_root: Path | None = None,
    teacher: Path | None = None,
    data: Sequence[Source] = (),
    eval_data: Sequence[Source] = (),
    options: Mapping[str, Any] | None = None,
) -> list[Stage]:
    """Calls the recipe `name` with what is given; `None` and empty sequences count as not given.

    Raises:
        RecipeError: the recipe does not take what is given, or needs what is not.
    """
    recipe = find_recipe(name)
    given = {
        key: value
        for key, value in {
            "model": model,
            "data_root": data_root,
            "teacher": teacher,
            "data": data,
            "eval_data": eval_data,
        }.items()
        if value
    }
    parameters = inspect.signature(recipe).parameters
    for key, value in given.items():
        if key not in parameters:
            shown = [str(part.path) for part in value] if isinstance(value, Sequence) else str(value)
            raise RecipeError(
                f"recipe {name!r} {_INPUTS[key]} and takes no {_option(key)}; got {shown!r}{_takers(key)}"
            )
    for key, remedy in _REMEDIES.items():
        if key not in given and _option(key) in required_inputs(recipe):
            raise RecipeError(f"recipe {name!r} {remedy}")
    if model is not None and not (model / "config.json").is_file():
        raise RecipeError(f"--model {str(model)!r} is no folder of a saved model: it has no config.json")
    return recipe(**given, **_check_options(name, parameters, options or {}))


def _check_options(
    name: str, parameters: Mapping[str, inspect.Parameter], options: Mapping[str, Any]
) -> dict[str, Any]:
    defaults = {
        key: parameter.default
        for key, parameter in parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    checked = {}
    for key, value in options.items():
        if not defaults:
            raise RecipeError(f"recipe {name!r} has no options; got {key!r}")
        check_name(f"option of recipe {name!r}", key, list(defaults))
        kind = type(defaults[key])
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise RecipeError(
                f"option {key} of recipe {name!r} is {value!r}; expected a value like {defaults[key]!r}"
            )
        checked[key] = value
    return checked


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _takers(name: str) -> str:
    """The recipes that take an input, as the end of an error."""
    recipes = [r for r in recipe_names() if name in inspect.signature(find_recipe(r)).parameters]
    return f"; recipes that do: {', '.join(recipes)}"


def check_name(what: str, name: str, names: list[str]) -> None:
    """Raises `RecipeError` with the nearest match unless `name` is one of `names`."""
    if name in names:
        return
    hint = suggestion(name, names) or f"; expected one of {', '.join(names)}"
    raise RecipeError(f"unknown {what} {name!r}{hint}")
