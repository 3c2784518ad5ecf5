"""Training stages on transformers' Trainer: resumable, with progress, tensorboard and the model's own figures.

Importing this module sets `OMP_WAIT_POLICY=PASSIVE` unless it is set: OpenMP threads that spin make a training step
on two cores ten times slower as soon as anything else runs. It must therefore be imported before torch.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments


@dataclass
class Stage:
    """One run of the Trainer.

    Attributes:
        name: of the folder under the run's folder.
        model: builds the model; gets the folder of the stage before, or None.
        dataset: map-style; sample i must be the same at every call.
        collator: list of samples -> batch.
        arguments: of `TrainingArguments`.
        learning_rates: parameter-name prefix -> factor on the learning rate.
        save: writes the trained model to a folder in the form that others load.
    """

    name: str
    model: Callable[[Path | None], nn.Module]
    dataset: Dataset
    collator: Callable[[list], dict]
    arguments: dict[str, Any]
    save: Callable[[nn.Module, Path], None]
    learning_rates: dict[str, float] = field(default_factory=dict)


class StageTrainer(Trainer):
    """Trainer that averages the figures in a model output's `metrics` and logs them beside the loss."""

    def __init__(self, *args, learning_rates: dict[str, float] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._learning_rates = learning_rates or {}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        for name, value in (outputs.get("metrics") or {}).items():
            value = float(value)
            if math.isfinite(value):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1
        loss = outputs["loss"]
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs = logs | {name: round(self._sums[name] / self._counts[name], 4) for name in self._sums}
            self._sums, self._counts = {}, {}
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        """AdamW as the Trainer makes it, its groups split by `learning_rates`."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if not self._learning_rates:
            return optimizer
        names = {id(p): n for n, p in self.model.named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            by_factor: dict[float, list] = {}
            for parameter in group["params"]:
                name = names[id(parameter)]
                factor = next(
                    (f for prefix, f in self._learning_rates.items() if name.startswith(prefix)), 1.0
                )
                by_factor.setdefault(factor, []).append(parameter)
            rest = {k: v for k, v in group.items() if k != "params"}
            groups += [rest | {"params": ps, "lr": rest["lr"] * f} for f, ps in by_factor.items()]
        optimizer.param_groups.clear()
        for group in groups:
            optimizer.add_param_group(group)
        return optimizer


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Newest `checkpoint-N` whose state was written to the end; the Trainer writes `trainer_state.json` last.

    A checkpoint cut off by a kill lacks that file, or holds half of it, and is passed over.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        state = path / "trainer_state.json"
        if not state.exists():
            continue
        try:
            found.append((json.loads(state.read_text())["global_step"], path))
        except (json.JSONDecodeError, KeyError):
            continue
    return max(found)[1] if found else None


def run_stage(stage: Stage, run_dir: Path, previous: Path | None, resume: bool = True) -> Path:
    """Trains one stage and saves its model under `run_dir / stage.name / "final"`.

    A stage that has been saved is not run again; one that was interrupted goes on from its last complete checkpoint.

    Returns:
        The folder of the saved model.
    """
    folder = run_dir / stage.name
    final = folder / "final"
    if (final / "done").exists() and resume:
        return final
    arguments = TrainingArguments(
        output_dir=str(folder), remove_unused_columns=False, report_to=["tensorboard"], **stage.arguments
    )
    model = stage.model(previous)
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=stage.dataset,
        data_collator=stage.collator,
        learning_rates=stage.learning_rates,
    )
    checkpoint = last_complete_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        final.mkdir(parents=True, exist_ok=True)
        stage.save(trainer.accelerator.unwrap_model(trainer.model), final)
        (final / "done").write_text(f"{trainer.state.global_step} steps\n")
    return final
