"""Trains a recipe: `train.py --recipe NAME`. The same script runs plain, under torchrun and under deepspeed."""

from __future__ import annotations

import os

# Before torch is loaded: OpenMP threads that spin while they wait slow a busy machine down by ten times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vlmslice.training import Stage

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
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:WEIGHT]",
            help="Conversations to train on, for a recipe that takes them; see docs/finetuning.md. Repeatable.",
        ),
    ] = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:WEIGHT]", help="Conversations whose loss is measured. Repeatable."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the recipe, such as rank=8. Repeatable."),
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
            "--set",
            metavar="[STAGE.]KEY=VALUE",
            help="Overrides a training argument of the recipe, in all stages or in one; repeatable.",
        ),
    ] = None,
    decay_from: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Branch off RUN/STAGE/checkpoint-N into a stage `decay`, whose learning rate falls to 0 within "
            "--max-steps.",
        ),
    ] = None,
    decay_shape: Annotated[str, typer.Option(help="Of the learning rate: linear or 1-sqrt.")] = "linear",
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
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Measure a few batches and print what each stage will cost; keep nothing."
        ),
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Processes that --dry-run reckons with.  [default: 1]")
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the recipes with their stages.")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,  # given by deepspeed
) -> None:
    """Trains a recipe stage by stage; the same command again goes on where the last one was stopped."""
    from vlmslice.errors import VlmSliceError
    from vlmslice.training.stopping import EXIT_INTERRUPTED, Interrupted

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
                dry_run,
                world_size,
                data or [],
                eval_data or [],
                option or [],
                decay_from,
                decay_shape,
            )
    except Interrupted as error:
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"stopped: {error}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from error
    except VlmSliceError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def print_recipes() -> None:
    from recipes import find_recipe, recipe_names, required_inputs

    for name in recipe_names():
        function = find_recipe(name)
        typer.echo(f"{name}: {(function.__doc__ or '').splitlines()[0]}")
        if needed := required_inputs(function):
            typer.echo(f"  its stages depend on {', '.join(needed)}")
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
    dry_run: bool,
    world_size: int | None,
    data: list[str],
    eval_data: list[str],
    options: list[str],
    decay_from: Path | None,
    decay_shape: str,
) -> None:
    """Runs the stages of a recipe, or only the stage named `only`; or, in a dry run, prints what they will cost."""
    from recipes import RecipeError, build_stages, check_name, recipe_names
    from transformers.utils.logging import disable_progress_bar

    from vlmslice.data.sources import parse_source
    from vlmslice.process_group import leave_process_group
    from vlmslice.training import run_stage
    from vlmslice.training.decay import decay_stage

    disable_progress_bar()  # of every file written; the bar of the stage is our own
    if recipe is None:
        raise RecipeError(f"--recipe is missing; expected one of {', '.join(recipe_names())}")
    if world_size is not None and not dry_run:
        raise RecipeError(
            "--world-size needs --dry-run; a run has the processes of its launcher, as in "
            "`torchrun --nproc_per_node 2 train/train.py ...`"
        )
    if dry_run and (deepspeed is not None or "WORLD_SIZE" in os.environ):
        raise RecipeError(
            "--dry-run runs in one process and tells of ZeRO-0 to 3; leave the launcher and --deepspeed out, and add "
            "--world-size N"
        )
    if dry_run and decay_from is not None:
        raise RecipeError("--dry-run tells of the stages of a recipe, not of a decay; leave --decay-from out")
    overrides, overrides_of_stages = parse_settings(settings)
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
    files, eval_files = ([parse_source(text) for text in texts] for texts in (data, eval_data))
    stages = build_stages(
        recipe, model, data_root, teacher, files, eval_files, dict(map(parse_option, options))
    )
    names = [s.name for s in stages]
    if only is not None:
        check_name(f"stage of recipe {recipe!r}", only, names)
    for name in overrides_of_stages:
        check_name(f"stage of recipe {recipe!r}", name, [*names, "decay"] if decay_from else names)
    folder = output_dir or Path("runs") / recipe
    if dry_run:
        resolved = [override(s, overrides | overrides_of_stages.get(s.name, {}), adamw) for s in stages]
        print_estimates(resolved, folder, only, world_size or 1)
        return
    previous: Path | None = None
    if decay_from is not None:
        if only is not None:
            raise RecipeError(f"--decay-from runs a stage of its own; leave --stage {only} out")
        trunk, previous = find_trunk(recipe, stages, decay_from)
        overrides |= overrides_of_stages.get(trunk.name, {}) | overrides_of_stages.get("decay", {})
        branch = decay_stage(override(trunk, overrides, adamw), decay_from, decay_shape, new_data=bool(data))
        previous = run_stage(branch, folder, previous, resume=not restart, recipe=recipe)
        stages = []
    for stage in stages:
        if only is None or stage.name == only:
            stage = override(stage, overrides | overrides_of_stages.get(stage.name, {}), adamw)
            previous = run_stage(stage, folder, previous, resume=not restart, recipe=recipe)
        else:
            previous = folder / stage.name / "final"
            if not previous.exists():
                raise RecipeError(
                    f"stage {only!r} needs {previous}, which is not there; run `--stage {stage.name}` first"
                )
        if stage.name == only:
            break
    leave_process_group()
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"saved: {previous}")


def override(stage: Stage, overrides: dict[str, Any], adamw: bool) -> Stage:
    """A stage with some training arguments changed, and without Muon if `adamw`."""
    muon = () if adamw else stage.muon
    return dataclasses.replace(stage, arguments=stage.arguments | overrides, muon=muon)


def print_estimates(stages: list[Stage], folder: Path, only: str | None, world_size: int) -> None:
    """Prints a table for each stage as soon as it is measured."""
    from rich.console import Console

    from vlmslice.training.estimate import describe_seconds, estimate_run, table_of

    # Into a file or a pipe, nothing is folded.
    console = Console(width=None if sys.stdout.isatty() else 10_000, markup=False, highlight=False)
    seconds = 0.0
    for estimate in estimate_run(stages, folder, only, world_size):
        console.print(table_of(estimate), "")
        seconds += estimate.seconds
    console.print(
        f"in all {describe_seconds(seconds)}, each process on a machine like this one; as measured now"
    )


def find_trunk(recipe: str, stages: list[Stage], checkpoint: Path) -> tuple[Stage, Path | None]:
    """The stage that `RUN/STAGE/checkpoint-N` is of, and the saved model of the one before it."""
    from recipes import check_name

    names = [stage.name for stage in stages]
    folder = checkpoint.absolute().parent
    check_name(f"stage of recipe {recipe!r}", folder.name, names)
    number = names.index(folder.name)
    return stages[number], folder.parent / names[number - 1] / "final" if number else None


def parse_settings(settings: list[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """`["learning_rate=1e-3", "eye.seed=1"]` -> what holds for all stages, and for each stage named."""
    from recipes import check_name
    from transformers import TrainingArguments

    names = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    of_all: dict[str, Any] = {}
    of_stages: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, value = parse_assignment("--set", setting)
        stage, _, key = key.rpartition(".")
        check_name("training argument", key, names)
        (of_stages.setdefault(stage, {}) if stage else of_all)[key] = value
    return of_all, of_stages


def parse_option(option: str) -> tuple[str, Any]:
    """`"rank=8"` -> name and value of an option of a recipe."""
    return parse_assignment("--option", option)


def parse_assignment(flag: str, text: str) -> tuple[str, Any]:
    """`"rank=8"` -> `("rank", 8)`; the value is JSON where it can be, else text."""
    from recipes import RecipeError

    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"{flag} {text!r} has no value; expected KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


if __name__ == "__main__":
    app()
