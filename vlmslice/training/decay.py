"""Branches of a run whose learning rate falls to zero: one trunk at a constant rate, a finished model at any step.

A run at a constant rate can go on for as long as there are data, and a short decay from any of its checkpoints gives a
model about as good as a cosine schedule of that length would have (warmup-stable-decay; Hu et al., 2024,
https://arxiv.org/abs/2404.06395; Haegele et al., 2024, https://arxiv.org/abs/2405.18392, who find `1-sqrt` a little
better than `linear`, and a decay of 10 to 20 % of the steps enough). The better data are best kept for the decay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer

from vlmslice.errors import suggestion
from vlmslice.training.checkpoints import complete_checkpoints
from vlmslice.training.stage import Stage, TrainingError

SHAPES = ("linear", "1-sqrt")


class RotatedDataset(Dataset):
    """Another dataset from its sample `first` on, and from the beginning again at its end."""

    def __init__(self, dataset: Sequence[Any], first: int):
        self.dataset, self.first = dataset, first % len(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.dataset[(self.first + index) % len(self)]


def decay_stage(stage: Stage, checkpoint: Path, shape: str = "linear", new_data: bool = False) -> Stage:
    """A stage `decay` that goes on from a checkpoint of `stage`, its learning rate falling to zero.

    Weights and optimizer state are the checkpoint's, and so is the learning rate that the decay begins at. Step k of n
    has (1 - k / n) of it with the shape `linear`, 1 - sqrt(k / n) with `1-sqrt`. The checkpoint is only read.

    Args:
        stage: as it is to be run: its `max_steps` is the length of the decay.
        checkpoint: `RUN/STAGE/checkpoint-N`.
        shape: one of `SHAPES`.
        new_data: the dataset of `stage` is not the one the checkpoint was trained on, so it is begun at its first
            sample; else it goes on where the checkpoint had got to.

    Raises:
        TrainingError: the checkpoint is not whole, or the decay has no length or shape, or runs under DeepSpeed.
    """
    if shape not in SHAPES:
        raise TrainingError(
            f"unknown shape of a decay {shape!r}{suggestion(shape, SHAPES) or '; expected one of ' + ', '.join(SHAPES)}"
        )
    if stage.arguments.get("deepspeed"):
        raise TrainingError(
            "a decay takes over the whole optimizer state, which DeepSpeed cuts up; run it without"
        )
    num_steps = stage.arguments.get("max_steps", -1)
    if num_steps < 1:
        raise TrainingError(
            "a decay needs its length; add --max-steps N, a tenth of the steps before it as a rule"
        )
    if checkpoint not in complete_checkpoints(checkpoint.parent):
        raise TrainingError(f"{str(checkpoint)!r} is no whole checkpoint; expected RUN/STAGE/checkpoint-N")
    dataset = stage.dataset
    if not new_data:
        num_samples = len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length
        if not stage.fills_steps:
            num_samples -= num_samples % stage.step_batch_size  # the trunk never sees the rest
        step = int(checkpoint.name.removeprefix("checkpoint-"))
        dataset = RotatedDataset(dataset, step * stage.step_batch_size % num_samples)  # type: ignore[arg-type]
    schedule = {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": num_steps, "decay_type": shape},
        "warmup_steps": 0,
    }
    return dataclasses.replace(
        stage,
        name="decay",
        dataset=dataset,
        arguments=stage.arguments | schedule,
        starts_at=checkpoint,
    )


def start_at(trainer: Trainer, checkpoint: Path) -> None:
    """Gives a trainer the weights and the optimizer state of a checkpoint, and its learning rates to begin with.

    Raises:
        TrainingError: the checkpoint has other parameters, or is at the rate 0 already.
    """
    trainer._load_from_checkpoint(str(checkpoint))
    optimizer = trainer.create_optimizer()
    state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    if not any(group["lr"] for group in state["param_groups"]):
        raise TrainingError(
            f"{checkpoint} has a learning rate of 0 already; decay from a checkpoint of a run whose rate is constant, "
            "such as one with --set lr_scheduler_type=constant_with_warmup"
        )
    got, expected = (
        [(len(group["params"]), group.get("is_matrix")) for group in groups]
        for groups in (state["param_groups"], optimizer.param_groups)
    )
    if got != expected:
        raise TrainingError(
            f"the optimizer of {checkpoint} has groups of {[number for number, _ in got]} parameters, that of this run "
            f"{[number for number, _ in expected]}; decay with the recipe, model and options of the trunk (--adamw too)"
        )
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # what the schedule multiplies
