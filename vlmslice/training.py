"""Training stages on transformers' Trainer: the same step on any number of processes, resumable at any second.

A run folder::

    RUN/STAGE/checkpoint-500/     weights, optimizer, schedule, random states; manifest.json lists every file
    RUN/STAGE/incomplete/         a checkpoint or model being written; worthless after a kill
    RUN/STAGE/runs/               tensorboard
    RUN/STAGE/trainer_state.json  all logged figures
    RUN/STAGE/final/              the trained model, as `Stage.save` writes it

Checkpoints and the final model are written aside, flushed to the disk and renamed into place, so a folder either bears
its name and is whole, or does not bear it. (The Trainer itself writes in place, and then fails on what a kill leaves.)
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import Dataset, Subset
from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vlmslice.data.collator import IGNORED
from vlmslice.errors import VlmSliceError
from vlmslice.optimizer import MuonAdamW, find_matrices

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

MANIFEST = "manifest.json"

_log = logging.getLogger(__name__)


class TrainingError(VlmSliceError, ValueError):
    """A stage cannot be run as asked."""


@dataclass
class Stage:
    """One run of the Trainer.

    Attributes:
        name: of the folder under the run's folder.
        model: builds the model; gets the folder of the stage before, or None.
        dataset: map-style; sample i must be the same at every call.
        collator: list of samples -> batch.
        arguments: of `TrainingArguments`. `per_device_train_batch_size` times `gradient_accumulation_steps` is the
            batch of one optimizer step in all: several processes share it; see `share_batch`.
        learning_rates: parameter-name prefix -> factor on the learning rate.
        muon: beginnings of the names of the layers whose matrices Muon trains; the rest, or all by default, is left to
            AdamW. See `optimizer`.
        save: writes the trained model to a folder in the form that others load.
    """

    name: str
    model: Callable[[Path | None], nn.Module]
    dataset: Dataset
    collator: Callable[[list], dict]
    arguments: dict[str, Any]
    save: Callable[[nn.Module, Path], None]
    learning_rates: dict[str, float] = field(default_factory=dict)
    muon: tuple[str, ...] = ()

    @property
    def step_batch_size(self) -> int:
        """Samples per optimizer step, whatever the number of processes."""
        return self.arguments["per_device_train_batch_size"] * self.arguments.get(
            "gradient_accumulation_steps", 1
        )


def share_batch(batch_size: int, num_accumulations: int, num_processes: int) -> tuple[int, int]:
    """Shares the batch of a step among processes: fewer accumulations first, then smaller batches.

    Batches of 8 accumulated 4 times make a step of 32 samples; on 8 processes that is 4 samples each, once.

    Returns:
        Batch size and number of accumulations of each process. Their product with `num_processes` is unchanged.

    Raises:
        TrainingError: the batch does not divide.
    """
    fewer = math.gcd(num_accumulations, num_processes)
    smaller = num_processes // fewer
    if batch_size % smaller:
        raise TrainingError(
            f"a step of {batch_size} x {num_accumulations} samples cannot be shared by {num_processes} processes; set "
            f"per_device_train_batch_size to a multiple of {smaller}, or use another number of processes"
        )
    return batch_size // smaller, num_accumulations // fewer


class StageTrainer(Trainer):
    """Trainer whose steps do not depend on the number of processes, with checkpoints that survive a kill.

    It also averages the figures in a model output's `metrics` and logs them, and samples per second, with the loss.
    """

    def __init__(
        self,
        *args,
        learning_rates: dict[str, float] | None = None,
        muon: tuple[str, ...] = (),
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self._learning_rates = learning_rates or {}
        self._muon = muon
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._last_log: tuple[float, int] | None = None
        self._writing_aside = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss, weighted so that every answer id of a step counts the same.

        A model gives the mean over its own batch. With 10 answer ids here and 30 in the other process, the mean of
        the two means would give an id here three times the weight of one there.
        """
        outputs = model(**inputs)
        for name, value in (outputs.get("metrics") or {}).items():
            value = float(value)
            if math.isfinite(value):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            num_items = (inputs["labels"][:, 1:] != IGNORED).sum()
            # Gradients are averaged over the processes afterwards, and summed over the accumulated batches.
            share = num_items / num_items_in_batch * self.accelerator.num_processes
            auxiliary_loss = outputs.get("auxiliary_loss")
            if auxiliary_loss is None:
                loss = loss * share
            else:
                loss = (
                    loss - auxiliary_loss
                ) * share + auxiliary_loss / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            sums: dict[str, list[float]] = {}
            for name, value, count in gather_object([(n, v, self._counts[n]) for n, v in self._sums.items()]):
                pair = sums.setdefault(name, [0.0, 0.0])
                pair[0] += value
                pair[1] += count
            logs = logs | {name: round(value / count, 4) for name, (value, count) in sums.items()}
            self._sums, self._counts = {}, {}
            now = time.perf_counter()
            if self._last_log is not None:
                before, step = self._last_log
                num_samples = (self.state.global_step - step) * self.get_total_train_batch_size(self.args)
                logs["samples_per_second"] = round(num_samples / (now - before), 2)
            self._last_log = now, self.state.global_step
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        """AdamW as the Trainer makes it, its groups split by `learning_rates`, the matrices of `muon` given to Muon."""
        # Under DeepSpeed the Trainer asks twice; the second time the factors are in already.
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not (self._learning_rates or self._muon) or not is_new:
            return optimizer
        assert self.model is not None
        names = {id(p): n for n, p in self.model.named_parameters()}
        matrices = {id(p) for p in find_matrices(self.model, self._muon)} if self._muon else set()
        groups = []
        for group in optimizer.param_groups:
            parts: dict[tuple[float, bool], list] = {}
            for parameter in group["params"]:
                name = names[id(parameter)]
                factor = next(
                    (f for prefix, f in self._learning_rates.items() if name.startswith(prefix)), 1.0
                )
                parts.setdefault((factor, id(parameter) in matrices), []).append(parameter)
            rest = {k: v for k, v in group.items() if k != "params"}
            # The Trainer logs the first group's rate: let it be the undiminished one.
            ordered = sorted(parts.items(), key=lambda item: item[0][0] != 1.0)
            groups += [
                rest
                | {"params": ps, "lr": rest["lr"] * factor}
                | ({"is_matrix": is_matrix} if self._muon else {})
                for (factor, is_matrix), ps in ordered
            ]
        if self._muon:
            kept = ("params", "lr", "weight_decay", "is_matrix")
            self.optimizer = MuonAdamW(
                [{key: group[key] for key in kept} for group in groups],
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
            return self.optimizer
        optimizer.param_groups.clear()
        for group in groups:
            optimizer.add_param_group(group)
        return optimizer

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, "incomplete") if self._writing_aside else folder

    def _save_checkpoint(self, model, trial) -> None:
        """Has the Trainer write the checkpoint aside, then commits it and drops the oldest complete ones."""
        self._writing_aside = True
        super()._save_checkpoint(model, trial)
        self._writing_aside = False
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        folder = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        seal_checkpoint(folder / "incomplete" / name, self._layout())
        _commit(folder / "incomplete" / name, folder / name)
        if self.args.save_total_limit:
            for path in complete_checkpoints(folder)[: -self.args.save_total_limit]:
                _discard(path)

    def _layout(self) -> dict[str, int]:
        """How the optimizer is spread over processes; a checkpoint only fits the layout it was written in."""
        if not self.is_deepspeed_enabled:
            return {"zero_stage": 0}
        return {
            "zero_stage": self.args.hf_deepspeed_config.config["zero_optimization"]["stage"],
            "num_processes": self.args.world_size,
        }

    def check_layout(self, checkpoint: Path) -> None:
        """Raises `TrainingError` if `checkpoint` was written under another ZeRO stage or number of processes."""
        got = json.loads((checkpoint / MANIFEST).read_text())["layout"]
        if got != self._layout():
            raise TrainingError(
                f"{checkpoint} was written with {got}, this run has {self._layout()}; resume it with the launcher and "
                "the DeepSpeed config it was begun with (without DeepSpeed the number of processes is free)"
            )


class SampleProgress(TrainerCallback):
    """A progress bar that counts samples, so that its rate is samples/s; logged figures go above it."""

    def __init__(self, name: str, step_batch_size: int):
        self._name, self._step_batch_size = name, step_batch_size
        self._bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._bar = tqdm(
                desc=self._name,
                initial=state.global_step * self._step_batch_size,
                total=state.max_steps * self._step_batch_size,
                unit=" samples",
                dynamic_ncols=True,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(self._step_batch_size)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._bar is not None:
            figures = "  ".join(
                f"{k} {v:.4g}" for k, v in logs.items() if isinstance(v, float) and k != "total_flos"
            )
            self._bar.write(f"step {state.global_step}  {figures}")

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()


def seal_checkpoint(folder: Path, layout: dict[str, int]) -> None:
    """Flushes all files of `folder` to the disk, and then a manifest with their sizes and the optimizer's layout."""
    sizes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _flush(path)
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"layout": layout, "files": sizes}, indent=1) + "\n")
    _flush(manifest)
    _flush(folder)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Every `checkpoint-N` in `folder` whose manifest and files are whole, oldest first.

    Others are left where they are and named in a warning: a copy that broke off, or another program's.
    """
    complete = []
    for path in folder.glob("checkpoint-*"):
        problem = _find_problem(path)
        if problem:
            _log.warning("passing over %s: %s", path, problem)
        else:
            complete.append(path)
    return sorted(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest of `complete_checkpoints`, or None."""
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def _find_problem(checkpoint: Path) -> str | None:
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (json.JSONDecodeError, KeyError):
        return f"its {MANIFEST} is cut off"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _commit(aside: Path, target: Path) -> None:
    """Renames a finished folder into place; what bears the name is dropped."""
    if target.exists():
        _discard(target)
    aside.rename(target)
    _flush(target.parent)


def _discard(path: Path) -> None:
    """Deletes a folder in two steps, so that a kill never leaves half of it under its name."""
    aside = path.parent / "incomplete" / f"old-{path.name}"
    aside.parent.mkdir(exist_ok=True)
    path.rename(aside)
    shutil.rmtree(aside)


def run_stage(stage: Stage, run_dir: Path, previous: Path | None, resume: bool = True) -> Path:
    """Trains one stage and saves its model under `run_dir / stage.name / "final"`.

    A stage that has been saved is not run again; one that was interrupted goes on from its last complete checkpoint.
    Under a launcher, every process calls this with the same arguments and a `run_dir` that all of them see.

    Args:
        previous: the saved model of the stage before.
        resume: False deletes what the stage has left in `run_dir` and begins anew.

    Returns:
        The folder of the saved model.
    """
    folder = run_dir / stage.name
    final = folder / "final"
    if resume and final.exists():
        return final
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    seed = stage.arguments.get("seed", 42)
    # Built whole, before a DeepSpeed config exists: under ZeRO-3 transformers would otherwise initialise the parts in
    # another order, and the weights would not be those of a run without it.
    unset_hf_deepspeed_config()
    set_seed(seed)
    model = stage.model(previous)
    if stage.muon and stage.arguments.get("deepspeed"):
        raise TrainingError(
            f"stage {stage.name!r} gives matrices to Muon, which DeepSpeed would cut up; train it without --deepspeed, "
            "or with --adamw"
        )
    arguments = _training_arguments(stage, folder, num_processes)
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=_whole_steps(stage),
        data_collator=stage.collator,
        learning_rates=stage.learning_rates,
        muon=stage.muon,
    )
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(SampleProgress(stage.name, stage.step_batch_size))
    if trainer.is_world_process_zero():
        shutil.rmtree(folder / "incomplete" if resume else folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint:
        trainer.check_layout(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_state()
    trained = _whole_model(trainer, stage, previous)
    if trainer.is_world_process_zero():
        aside = folder / "incomplete" / "final"
        aside.mkdir(parents=True)
        stage.save(trained, aside)
        _commit(aside, final)
    trainer.accelerator.wait_for_everyone()
    return final


def _training_arguments(stage: Stage, folder: Path, num_processes: int) -> TrainingArguments:
    use_cpu = stage.arguments.get("use_cpu", not torch.accelerator.is_available())
    batch_size, num_accumulations = share_batch(
        stage.arguments["per_device_train_batch_size"],
        stage.arguments.get("gradient_accumulation_steps", 1),
        num_processes,
    )
    defaults: dict[str, Any] = {"remove_unused_columns": False, "report_to": ["tensorboard"]}
    if use_cpu and num_processes > 1:
        defaults["ddp_backend"] = "gloo"
    return TrainingArguments(
        **defaults
        | stage.arguments
        | {
            "output_dir": str(folder),
            "use_cpu": use_cpu,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": num_accumulations,
        }
    )


def _whole_steps(stage: Stage) -> Dataset:
    """The dataset without the samples that fill no whole step: an epoch is then the same on any number of processes."""
    num_samples = len(stage.dataset)  # type: ignore[arg-type]  # map-style datasets have a length
    num_steps = num_samples // stage.step_batch_size
    if not num_steps:
        raise TrainingError(
            f"stage {stage.name!r} has {num_samples} samples, fewer than one step of {stage.step_batch_size}; give it "
            "more data or a smaller per_device_train_batch_size"
        )
    return Subset(stage.dataset, range(num_steps * stage.step_batch_size))


def _whole_model(trainer: StageTrainer, stage: Stage, previous: Path | None) -> nn.Module:
    """The trained model with all its weights in this process (meaningful in the first process only).

    DeepSpeed's engine keeps hold of the module it trained, and under ZeRO-3 that module has no weights of its own; so
    the weights are gathered and put into a fresh one.
    """
    if not trainer.is_deepspeed_enabled:
        return trainer.accelerator.unwrap_model(trainer.model)
    weights = trainer.accelerator.get_state_dict(trainer.deepspeed)
    unset_hf_deepspeed_config()
    model = stage.model(previous)
    if trainer.is_world_process_zero():
        model.load_state_dict(weights)
    return model
