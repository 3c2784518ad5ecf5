"""Which schedule of the learning rate, at equal compute? Warm-up, stable, decay (WSD) against cosine and linear.

    OMP_NUM_THREADS=1 python benchmarks/schedules.py --output-dir runs/schedules

Every schedule gets the same steps, samples, seeds and peak rates. WSD (Hu et al., 2024,
https://arxiv.org/abs/2404.06395) is run as it is meant to be: one trunk at a constant rate for each peak, and branches
that decay from its checkpoints at 50, 75 and 100 % of the stable phase. A cosine must be run anew for every length.

Figures are losses on held-out crops after the last step. Finished runs are kept, so the sweep can be stopped and
started again. The figures go to `schedules.json`, the plot to `schedules.png`.
"""

from __future__ import annotations

import os

# Before torch is loaded: OpenMP threads that spin while they wait slow a busy machine down by ten times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import io
import json
import logging
import shutil
import statistics
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import typer
from torch import nn
from transformers.utils.logging import disable_progress_bar

from vlmslice.data.dense import DenseCropConfig, DenseCropDataset, collate_crops
from vlmslice.data.fonts import FontLibrary, matplotlib_font_dir
from vlmslice.dense_reader import DenseReader
from vlmslice.training import Stage, run_stage
from vlmslice.vision_encoder import VlmSliceVisionConfig

WIDTH = 64
BATCH_SIZE = 8
NUM_HELD_OUT = 256
WARMUP_SHARE = 0.05
DECAY_SHARE = 0.2  # of all steps of a branch
BRANCHES = (0.5, 0.75, 1.0)
SCHEDULES = ("wsd", "cosine", "linear")


def _build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return DenseReader(
        VlmSliceVisionConfig(
            hidden_size=WIDTH,
            timm_kwargs={
                "depth": 2,
                "num_heads": WIDTH // 16,
                "global_pool": "",
                "class_token": False,
                "pos_embed_grid_size": (4, 4),
            },
        )
    )


@cache
def _crops(num_samples: int, seed: int) -> list:
    config = DenseCropConfig(
        seed=seed, group=BATCH_SIZE, max_side=6, max_patches=24, easy_samples=1_000_000_000
    )
    dataset = DenseCropDataset(config, FontLibrary("train", [matplotlib_font_dir()]))
    return [dataset[i] for i in range(num_samples)]


def _save_held_out_loss(model: nn.Module, folder: Path) -> None:
    """Saves no weights; the loss is all that is asked for."""
    samples = _crops(NUM_HELD_OUT, seed=1)
    model.eval()
    with torch.no_grad():
        losses = [
            float(model(**collate_crops(samples[first : first + BATCH_SIZE]))["loss"])
            for first in range(0, NUM_HELD_OUT, BATCH_SIZE)
        ]
    (folder / "loss.json").write_text(json.dumps(statistics.mean(losses)))


class Sweep:
    """Runs in one folder, each named after what it is."""

    def __init__(self, folder: Path, num_steps: int):
        self.folder, self.num_steps = folder, num_steps
        self.num_warmup_steps = max(1, round(WARMUP_SHARE * num_steps))

    def loss(self, schedule: str, peak: float, seed: int, num_steps: int) -> float:
        """Held-out loss of a run of `num_steps`; for `wsd`, that of a branch of a trunk of the whole length."""
        name = f"{schedule}-{peak:.5f}-{seed}-{num_steps}"
        if schedule != "wsd":
            return self._run(name, seed, num_steps, peak, lr_scheduler_type=schedule)
        num_decay_steps = round(DECAY_SHARE * num_steps)
        fork = num_steps - num_decay_steps
        checkpoint = self._trunk(peak, seed) / f"checkpoint-{fork}"
        if not (self.folder / name / checkpoint.name).exists():
            shutil.copytree(checkpoint, self.folder / name / checkpoint.name)
        schedule_options = {"num_decay_steps": num_decay_steps, "decay_type": "linear"}
        return self._run(
            name,
            seed,
            num_steps,
            peak,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs=schedule_options,
        )

    def _trunk(self, peak: float, seed: int) -> Path:
        """The folder of a run at a constant rate, with its checkpoints at the forks."""
        name = f"trunk-{peak:.5f}-{seed}-{self.num_steps}"
        fork = self.num_steps - round(DECAY_SHARE * self.num_steps)
        self._run(
            name, seed, fork, peak, lr_scheduler_type="constant_with_warmup", save_steps=round(fork / 4)
        )
        return self.folder / name

    def _run(self, name: str, seed: int, num_steps: int, peak: float, **options: Any) -> float:
        result = self.folder / name / "final" / "loss.json"
        if not result.exists():
            arguments = {
                "per_device_train_batch_size": BATCH_SIZE,
                "learning_rate": peak,
                "optim": "adamw_torch",
                "warmup_steps": self.num_warmup_steps,
                "max_steps": num_steps,
                "logging_steps": 10,
                "save_strategy": "steps",
                "save_steps": num_steps,
                "report_to": [],
                "disable_tqdm": True,
                "use_cpu": True,
                "train_sampling_strategy": "sequential",
                "seed": seed,
            }
            stage = Stage(
                name=name,
                model=lambda previous: _build(seed),
                # Longer than any run, so that every run takes the same samples in the same order.
                dataset=_crops(self.num_steps * BATCH_SIZE, seed=0),  # type: ignore[arg-type]  # a list is map-style
                collator=collate_crops,
                arguments=arguments | options,
                save=_save_held_out_loss,
            )
            with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints every log
                run_stage(stage, self.folder, None)
        return json.loads(result.read_text())


def plot(results: dict[str, Any], path: Path) -> None:
    """Left: loss against peak rate; right: loss against length, WSD's branches against runs of their own."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    for name, by_peak in results["by_peak"].items():
        rates = [float(rate) for rate in by_peak]
        means = [statistics.mean(values) for values in by_peak.values()]
        (line,) = left.plot(rates, means, "o-", markersize=3, label=name)
        for rate, values in zip(rates, by_peak.values(), strict=True):
            left.plot([rate] * len(values), values, ".", markersize=3, alpha=0.5, color=line.get_color())
    for name, by_length in results["by_length"].items():
        lengths = [int(length) for length in by_length]
        means = [statistics.mean(values) for values in by_length.values()]
        right.plot(lengths, means, "o-", markersize=3, label=f"{name}, peak {results['best_peak'][name]:.4f}")
    left.set_xscale("log", base=2)
    left.set_xlabel("peak learning rate")
    left.set_ylabel("loss on held-out crops")
    left.set_title(f"{results['steps']} steps", fontsize=9)
    right.set_xlabel("steps")
    right.set_title("WSD: branches of one trunk; others: a run each", fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(
    output_dir: Annotated[Path, typer.Option(help="Folder of runs and results.")] = Path("runs/schedules"),
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run; a multiple of 20.")] = 400,
    seeds: Annotated[int, typer.Option(help="Number of seeds of the weights.")] = 2,
    lowest: Annotated[int, typer.Option(help="Lowest peak rate, as a power of two.")] = -9,
    highest: Annotated[int, typer.Option(help="Highest peak rate, as a power of two.")] = -7,
) -> None:
    """Trains what is missing, prints two tables, and writes JSON and plot."""
    if steps % 20:
        raise typer.BadParameter(
            f"{steps} steps, expected a multiple of 20: branches fork at 40, 60 and 80 %"
        )
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()
    sweep = Sweep(output_dir, steps)
    by_peak: dict[str, dict[str, list[float]]] = {}
    for schedule in SCHEDULES:
        by_peak[schedule] = {}
        for power in range(lowest, highest + 1):
            values = [round(sweep.loss(schedule, 2.0**power, seed, steps), 4) for seed in range(seeds)]
            by_peak[schedule][str(2.0**power)] = values
            print(f"{schedule:8} peak {2.0**power:.5f} steps {steps}", *values, flush=True)
    best_peak = {
        schedule: float(min(curve, key=lambda peak: statistics.mean(curve[peak])))
        for schedule, curve in by_peak.items()
    }
    by_length: dict[str, dict[str, list[float]]] = {}
    for schedule in ("wsd", "cosine"):
        by_length[schedule] = {}
        for share in BRANCHES:
            length = round(share * steps)
            values = [
                round(sweep.loss(schedule, best_peak[schedule], seed, length), 4) for seed in range(seeds)
            ]
            by_length[schedule][str(length)] = values
            print(f"{schedule:8} peak {best_peak[schedule]:.5f} steps {length}", *values, flush=True)
    results = {
        "steps": steps,
        "seeds": seeds,
        "batch_size": BATCH_SIZE,
        "width": WIDTH,
        "by_peak": by_peak,
        "best_peak": best_peak,
        "by_length": by_length,
    }
    (output_dir / "schedules.json").write_text(json.dumps(results, indent=1))
    plot(results, output_dir / "schedules.png")


if __name__ == "__main__":
    typer.run(main)
