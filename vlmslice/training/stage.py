"""What a stage of training is, and how several processes share its batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from vlmslice.errors import VlmSliceError
from vlmslice.training.guards import GuardConfig


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
        diagnostics_steps: optimizer steps between two looks at the parts of the model; see `diagnostics.Diagnostics`.
        guard: when a step is skipped, and when the run is given up; see `guards`.
        max_skipped_share: of conversations whose images cannot be loaded; None to stop at the first. They are listed
            in `skipped.jsonl` in the folder of the stage; see `data.tolerant`.
        eval_dataset: its loss is logged at the intervals that `arguments` tell, `eval_loss`.
        fills_steps: the last step of an epoch is filled up with the first samples, so that every sample is seen. By
            default the samples that fill no whole step are left out.
        starts_at: a checkpoint of another run whose weights and optimizer state this stage begins with; see `decay`.
    """

    name: str
    model: Callable[[Path | None], nn.Module]
    dataset: Dataset
    collator: Callable[[list], dict]
    arguments: dict[str, Any]
    save: Callable[[nn.Module, Path], None]
    learning_rates: dict[str, float] = field(default_factory=dict)
    muon: tuple[str, ...] = ()
    diagnostics_steps: int | None = None
    guard: GuardConfig = field(default_factory=GuardConfig)
    max_skipped_share: float | None = None
    eval_dataset: Dataset | None = None
    fills_steps: bool = False
    starts_at: Path | None = None

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
