"""`recipe.json`: what a stage was trained with, beside its weights.

It is written to the folder of the stage when the stage starts, and copied to `final/`. A stage that is resumed with
other settings keeps what they were before under `earlier`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Mapping
from enum import Enum
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils.hub import PushToHubMixin

import vlmslice
from vlmslice.training.stage import Stage, TrainingError

RECORD_FILE = "recipe.json"

_PACKAGES = (
    "accelerate",
    "deepspeed",
    "numpy",
    "peft",
    "pillow",
    "timm",
    "tokenizers",
    "torch",
    "transformers",
)


_LONGEST_LIST = 1000


def describe_stage(
    stage: Stage, arguments: TrainingArguments, recipe: str | None, previous: Path | None
) -> dict[str, Any]:
    """All that is needed to tell what a stage trains with, as JSON takes it.

    Keys: `recipe`, `stage`, `previous` (the folder of the model of the stage before), `starts_at` (a checkpoint),
    `command`, `training_arguments` (those that differ from transformers' defaults, as each process has them),
    `num_processes`, `samples_per_step`, `seed`, `model`, `collator`, `save` (see `describe`), `learning_rates`
    (factors by parameter-name prefix), `muon` (prefixes), `dataset`, `eval_dataset`, `versions`, and `git_commit`
    where the package runs from a checkout.
    """
    return {
        "recipe": recipe,
        "stage": stage.name,
        "previous": describe(previous),
        "starts_at": describe(stage.starts_at),
        "command": sys.argv,
        "training_arguments": _changed_arguments(arguments),
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
        "samples_per_step": stage.step_batch_size,
        "seed": arguments.seed,
        "model": describe(stage.model),
        "collator": describe(stage.collator),
        "save": describe(stage.save),
        "learning_rates": stage.learning_rates,
        "muon": list(stage.muon),
        "dataset": describe(stage.dataset),
        "eval_dataset": describe(stage.eval_dataset),
        "versions": _versions(),
    } | _git_commit()


def write_record(folder: Path, record: Mapping[str, Any], checkpoint: Path | None = None) -> None:
    """Writes `recipe.json` to the folder of a stage.

    Args:
        folder: `RUN/STAGE`.
        record: what `describe_stage` gives.
        checkpoint: that the stage goes on from. What an earlier start had otherwise is then kept, as
            `"earlier": [{"until_step": 500, "seed": 1}]`.
    """
    # As it will be read, so that a tuple is no difference from a list.
    record = json.loads(json.dumps(record))
    path = folder / RECORD_FILE
    if checkpoint is not None and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        earlier = before.pop("earlier", [])
        changed = {key: value for key, value in before.items() if record.get(key) != value}
        if changed:
            earlier.append({"until_step": int(checkpoint.name.removeprefix("checkpoint-"))} | changed)
        if earlier:
            record = {**record, "earlier": earlier}
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(path)


def check_same_start(stage: Stage, folder: Path) -> None:
    """Raises `TrainingError` if `folder` holds what a stage that started at another checkpoint has left."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return
    got = json.loads(path.read_text(encoding="utf-8"))["starts_at"]
    if got != describe(stage.starts_at):
        raise TrainingError(
            f"{str(folder)!r} holds a stage that started at {got}, expected {describe(stage.starts_at)}; give another "
            "--output-dir, or --restart to delete it"
        )


def describe(value: Any) -> Any:
    """A value as JSON: files with their SHA-256, objects by class and the arguments they were made with.

    `Source(Path("a.jsonl"), 0.5)` becomes `{"class": "vlmslice.data.sources.Source", "path": {"file":
    "/home/me/a.jsonl", "sha256": "..."}, "weight": 0.5}`. Arguments are those that an object keeps as attributes of the
    same name; what has a length tells it as `length`. Processors and models are named by class only: they are saved
    with the weights.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Enum):
        return describe(value.value)
    if isinstance(value, Path):
        return _describe_path(value)
    if isinstance(value, Mapping):
        return {str(key): describe(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, range, set, frozenset)):
        parts = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        if len(parts) > _LONGEST_LIST:
            return {"length": len(parts), "begins": [describe(part) for part in parts[:3]]}
        return [describe(part) for part in parts]
    if inspect.isroutine(value) or isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, partial):
        bound = inspect.signature(value.func).bind_partial(*value.args, **value.keywords)
        return {"function": describe(value.func)} | describe(bound.arguments)
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, (PushToHubMixin, nn.Module)):
        return name
    names: Collection[str] = ()
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    elif inspect.isfunction(kind.__init__) or inspect.isfunction(kind.__new__):  # not so in C, as a tensor's
        names = inspect.signature(kind).parameters
    described = {"class": name} | {key: describe(getattr(value, key)) for key in names if hasattr(value, key)}
    if hasattr(kind, "__len__"):
        described["length"] = len(value)
    return described


def _describe_path(path: Path) -> Any:
    if not path.is_file():
        return str(path.absolute())
    with path.open("rb") as file:
        return {"file": str(path.absolute()), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _changed_arguments(arguments: TrainingArguments) -> dict[str, Any]:
    """The arguments that differ from transformers' defaults."""
    defaults = {
        field.name: field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else field.default
        for field in dataclasses.fields(arguments)
        if field.init
    }
    # transformers turns this None into its defaults, and other empty values into each other.
    accelerator = AcceleratorConfig().to_dict()
    accelerator.pop("use_configured_state", None)  # as TrainingArguments does
    defaults["accelerator_config"] = accelerator
    return {
        name: describe(value)
        for name, value in sorted(arguments.to_dict().items())
        if (value or defaults[name])
        and describe(value) != describe(defaults[name])
        and not name.endswith("_token")
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "vlmslice": vlmslice.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git_commit() -> dict[str, Any]:
    """Commit of the checkout that this package lies in, and whether files differ from it; empty if it is in none."""
    root = Path(vlmslice.__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        # An environment inside another project's checkout is no checkout of this package.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return {}
        return {"git_commit": git("rev-parse", "HEAD"), "git_changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}
