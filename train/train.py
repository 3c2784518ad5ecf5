"""Trains a recipe: `train.py --recipe NAME`. The same script runs plain, under torchrun and under deepspeed."""

from __future__ import annotations

import os

# Before torch is loaded: OpenMP threads that spin while they wait slow a busy machine down by ten times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    recipe: Annotated[str | None, typer.Option(help="Name of the recipe; see --list.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a saved model, for a recipe that starts from one.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of a saved model, for a recipe that learns from another.")
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(
            help="Folder of labelled photographs, for a recipe that can use them; see docs/data.md."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/RECIPE by default.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Run this stage only; those before it must be done.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps of each stage.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Overrides a training argument of the recipe; repeatable."
        ),
    ] = None,
    deepspeed: Annotated[
        Path | None, typer.Option(help="DeepSpeed config, e.g. train/deepspeed/zero2.json; needs a launcher.")
    ] = None,
    adamw: Annotated[
        bool,
        typer.Option("--adamw", help="AdamW for all parameters, also for those the recipe gives to Muon."),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete what these stages left in the folder of the run.")
    ] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes with their stages.")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,  # given by deepspeed
) -> None:
    """Trains a recipe stage by stage; the same command again goes on where the last one was stopped."""
    from vlmslice.errors import VlmSliceError

    try:
        if list_recipes:
            print_recipes()
        else:
            run(
                recipe,
                model,
                teacher,
                data_root,
                output_dir,
                stage,
                max_steps,
                setting or [],
                deepspeed,
                adamw,
                restart,
            )
    except VlmSliceError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def print_recipes() -> None:
    from recipes import find_recipe, recipe_names, starts_from_model

    for name in recipe_names():
        function = find_recipe(name)
        typer.echo(f"{name}: {(function.__doc__ or '').splitlines()[0]}")
        if starts_from_model(function):
            typer.echo("  its stages depend on --model")
            continue
        for stage in function():
            typer.echo(
                f"  {stage.name}: {stage.arguments['max_steps']} steps of {stage.step_batch_size} samples, "
                f"learning rate {stage.arguments['learning_rate']}"
            )


def run(
    recipe: str | None,
    model: Path | None,
    teacher: Path | None,
    data_root: Path | None,
    output_dir: Path | None,
    only: str | None,
    max_steps: int | None,
    settings: list[str],
    deepspeed: Path | None,
    adamw: bool,
    restart: bool,
) -> None:
    """Runs the stages of a recipe, or only the stage named `only`."""
    from recipes import RecipeError, build_stages, check_name, recipe_names
    from transformers.utils.logging import disable_progress_bar

    from vlmslice.training import run_stage

    disable_progress_bar()  # of every file written; the bar of the stage is our own
    if recipe is None:
        raise RecipeError(f"--recipe is missing; expected one of {', '.join(recipe_names())}")
    overrides = parse_settings(settings)
    if max_steps is not None:
        overrides["max_steps"] = max_steps
    if deepspeed is not None:
        if "WORLD_SIZE" not in os.environ:
            raise RecipeError(
                "--deepspeed needs a launcher; run `torchrun --nproc_per_node 2 train/train.py ...` or "
                "`deepspeed --num_gpus 2 train/train.py ...`"
            )
        if not deepspeed.is_file():
            raise RecipeError(f"DeepSpeed config {deepspeed} is not a file; see train/deepspeed/")
        overrides["deepspeed"] = str(deepspeed)
    stages = build_stages(recipe, model, data_root, teacher)
    if only is not None:
        check_name(f"stage of recipe {recipe!r}", only, [s.name for s in stages])
    folder = output_dir or Path("runs") / recipe
    previous = None
    for stage in stages:
        if only is None or stage.name == only:
            muon = () if adamw else stage.muon
            stage = dataclasses.replace(stage, arguments=stage.arguments | overrides, muon=muon)
            previous = run_stage(stage, folder, previous, resume=not restart)
        else:
            previous = folder / stage.name / "final"
            if not previous.exists():
                raise RecipeError(
                    f"stage {only!r} needs {previous}, which is not there; run `--stage {stage.name}` first"
                )
        if stage.name == only:
            break
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"saved: {previous}")


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`["learning_rate=1e-3", "optim=adamw_torch"]` -> a dict; values are JSON where they can be, else text."""
    from recipes import RecipeError, check_name
    from transformers import TrainingArguments

    names = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise RecipeError(f"--set {setting!r} has no value; expected KEY=VALUE")
        check_name("training argument", key, names)
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = value
    return parsed


if __name__ == "__main__":
    app()
