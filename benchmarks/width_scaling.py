"""Does the best learning rate stay where it is as a model gets wider? A sweep with and without muP.

    OMP_NUM_THREADS=1 python benchmarks/width_scaling.py --output-dir runs/width_scaling

Every cell (objective, width, rule, rate, seed) is a stage in a folder of its own, so a sweep that was stopped goes on
where it was when it is started again. The figures go to `width_scaling.json`, the plot to `width_scaling.png`.
"""

from __future__ import annotations

import os

# Before torch is loaded: OpenMP threads that spin while they wait slow a busy machine down by ten times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import io
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import typer
from torch import nn
from transformers import LlamaConfig
from transformers.utils.logging import disable_progress_bar

from vlmslice import (
    VlmSliceConfig,
    VlmSliceForConditionalGeneration,
    VlmSliceImageProcessorPil,
    VlmSliceProcessor,
)
from vlmslice.data.dense import DenseCropConfig, DenseCropDataset, collate_crops
from vlmslice.data.fonts import FontLibrary, matplotlib_font_dir
from vlmslice.data.task_collator import TaskCollator
from vlmslice.data.tasks import Curriculum, TaskConfig, TaskDataset
from vlmslice.dense_reader import DenseReader
from vlmslice.slicing import SlicingConfig
from vlmslice.tokenization import build_byte_tokenizer
from vlmslice.training import Stage, run_stage
from vlmslice.training.width_scaling import learning_rate_factors, scale_width, widen
from vlmslice.vision_encoder import VlmSliceVisionConfig

BASE_WIDTH = 32
HEAD_WIDTH = 16
BATCH_SIZE = 8
RULES = ("standard", "mup")

SLICING = SlicingConfig(scale_resolution=64, overview_resolution=32, max_slice_nums=6, max_visual_tokens=32)
TASK = TaskConfig(
    megapixels=(0.002, 0.008), num_words=(1, 1), max_characters=4, font_px=(14, 24), max_count=4
)


@cache
def _processor() -> VlmSliceProcessor:
    return VlmSliceProcessor(VlmSliceImageProcessorPil(**SLICING.to_dict()), build_byte_tokenizer())


@cache
def _fonts() -> FontLibrary:
    return FontLibrary("train", [matplotlib_font_dir()])


def _vision_config() -> VlmSliceVisionConfig:
    return VlmSliceVisionConfig(
        hidden_size=BASE_WIDTH,
        timm_kwargs={
            "depth": 2,
            "num_heads": BASE_WIDTH // HEAD_WIDTH,
            "global_pool": "",
            "class_token": False,
            "pos_embed_grid_size": (4, 4),
        },
    )


def _build_dense(width: int) -> nn.Module:
    return DenseReader(widen(_vision_config(), width / BASE_WIDTH))


def _build_answer(width: int) -> nn.Module:
    tokenizer = _processor().tokenizer
    config = VlmSliceConfig(
        vision_config=_vision_config(),
        text_config=LlamaConfig(
            hidden_size=BASE_WIDTH,
            intermediate_size=2 * BASE_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=BASE_WIDTH // HEAD_WIDTH,
            num_key_value_heads=BASE_WIDTH // HEAD_WIDTH,
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        slicing=SLICING.to_dict(),
        connector_heads=4,
        connector_head_dim=HEAD_WIDTH,
        image_token_id=_processor().image_token_id,
    )
    return VlmSliceForConditionalGeneration(widen(config, width / BASE_WIDTH))


@cache
def _crops(num_samples: int) -> list:
    config = DenseCropConfig(
        num_samples=num_samples, group=BATCH_SIZE, max_side=6, max_patches=24, easy_samples=10 * num_samples
    )
    dataset = DenseCropDataset(config, _fonts())
    return [dataset[i] for i in range(num_samples)]


@cache
def _questions(num_samples: int) -> list:
    dataset = TaskDataset(
        [Curriculum(num_samples, TASK, {"read": 0.5, "count": 0.5})], _fonts(), group=BATCH_SIZE
    )
    return [dataset[i] for i in range(num_samples)]


@dataclass(frozen=True)
class Objective:
    """What is learned: model by width, rendered samples by number, collator, and steps of a cell by default."""

    model: Callable[[int], nn.Module]
    samples: Callable[[int], list]
    collator: Callable[[], Any]
    num_steps: int


OBJECTIVES = {
    "dense": Objective(_build_dense, _crops, lambda: collate_crops, 200),
    "answer": Objective(_build_answer, _questions, lambda: TaskCollator(_processor(), dense=()), 100),
}


def build(objective: str, width: int, rule: str, seed: int) -> nn.Module:
    """A fresh model; under `mup`, scaled from the one of `BASE_WIDTH`."""
    builder = OBJECTIVES[objective].model
    torch.manual_seed(seed)
    model = builder(width)
    if rule == "mup":
        scale_width(model, builder(BASE_WIDTH))
    return model


def final_loss(folder: Path) -> float:
    """Mean training loss over the last fifth of the steps. No sample is seen twice, so it is that of fresh samples."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    last = losses[-max(1, len(losses) // 5) :]
    return sum(last) / len(last)


def run_cell(
    folder: Path, objective: str, width: int, rule: str, rate: float, seed: int, num_steps: int
) -> float:
    """Trains one model of the sweep, unless it has been trained, and returns its loss."""
    builder = OBJECTIVES[objective].model
    name = f"{objective}-{width}-{rule}-{rate:.6f}-{seed}-{num_steps}"
    if not (folder / name / "final").exists():
        factors = {}
        if rule == "mup":
            with torch.device("meta"):
                factors = learning_rate_factors(builder(width), builder(BASE_WIDTH))
        stage = Stage(
            name=name,
            model=lambda previous: build(objective, width, rule, seed),
            dataset=OBJECTIVES[objective].samples(num_steps * BATCH_SIZE),  # type: ignore[arg-type]  # a list is map-style
            collator=OBJECTIVES[objective].collator(),
            arguments={
                "per_device_train_batch_size": BATCH_SIZE,
                "learning_rate": rate,
                "optim": "adamw_torch",
                "lr_scheduler_type": "linear",
                "warmup_steps": num_steps // 10,
                "max_steps": num_steps,
                "logging_steps": max(1, num_steps // 50),
                "logging_nan_inf_filter": False,
                "save_strategy": "no",
                "report_to": [],
                "disable_tqdm": True,
                "use_cpu": True,
                "train_sampling_strategy": "sequential",
                "seed": seed,
            },
            save=lambda model, path: None,
            learning_rates=factors,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints every log
            run_stage(stage, folder, None)
    return final_loss(folder / name)


def plot(results: dict[str, Any], path: Path) -> None:
    """Loss against rate, a curve for each width: a row for each objective, left without muP and right with it."""
    losses = results["losses"]
    figure, grid = plt.subplots(len(losses), 2, figsize=(8, 3.1 * len(losses)), sharey="row", squeeze=False)
    for row, (objective, by_rule) in zip(grid, losses.items(), strict=True):
        lowest = min(min(curve.values()) for by_width in by_rule.values() for curve in by_width.values())
        for axes, rule in zip(row, RULES, strict=True):
            for shade, (width, curve) in enumerate(by_rule[rule].items()):
                rates, values = [float(rate) for rate in curve], list(curve.values())
                color = plt.get_cmap("viridis")(0.85 * shade / max(1, len(by_rule[rule]) - 1))
                axes.plot(rates, values, "o-", markersize=3, color=color, label=f"width {width}")
                best = min(range(len(values)), key=values.__getitem__)
                axes.plot(rates[best], values[best], "o", markersize=9, fillstyle="none", color=color)
            axes.set_xscale("log", base=2)
            axes.set_title(
                f"{objective}: {'muP' if rule == 'mup' else 'one rate for all weights'}", fontsize=9
            )
            axes.grid(alpha=0.3)
        start = max(v for by_width in by_rule.values() for c in by_width.values() for v in c.values())
        row[0].set_ylim(lowest - 0.1, min(start, lowest + 2.0))
        row[0].set_ylabel("loss")
        row[1].legend(fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("learning rate (of the base)")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(
    output_dir: Annotated[Path, typer.Option(help="Folder of cells and results.")] = Path(
        "runs/width_scaling"
    ),
    objective: Annotated[list[str] | None, typer.Option(help="dense or answer; both by default.")] = None,
    width: Annotated[list[int] | None, typer.Option(help="Repeatable; 32, 64 and 128 by default.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of each cell; the objective's by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds of the weights.")] = 1,
    lowest: Annotated[int, typer.Option(help="Lowest rate, as a power of two.")] = -10,
    highest: Annotated[int, typer.Option(help="Highest rate, as a power of two.")] = -4,
) -> None:
    """Trains every cell that is missing, prints a table, and writes JSON and plot."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()
    objectives, widths = objective or list(OBJECTIVES), sorted(width or [32, 64, 128])
    rates = [2.0**power for power in range(lowest, highest + 1)]
    losses: dict[str, Any] = {}
    for name in objectives:
        num_steps = steps or OBJECTIVES[name].num_steps
        losses[name] = {rule: {str(w): {} for w in widths} for rule in RULES}
        for w in widths:
            for rule in RULES:
                for rate in rates:
                    # At the base width the two rules are one: tests/test_width_scaling.py.
                    cell = partial(
                        run_cell, output_dir, name, w, "standard" if w == BASE_WIDTH else rule, rate
                    )
                    values = [cell(seed, num_steps) for seed in range(seeds)]
                    loss = sum(values) / len(values)
                    losses[name][rule][str(w)][str(rate)] = round(loss, 4) if math.isfinite(loss) else 1e3
                curve = losses[name][rule][str(w)]
                best = min(curve, key=curve.__getitem__)
                print(
                    f"{name} width {w} {rule:8}",
                    *(f"{v:7.3f}" for v in curve.values()),
                    f" best {best}",
                    flush=True,
                )
    path = output_dir / "width_scaling.json"
    # Objectives of earlier calls stay in the file and in the plot.
    results = json.loads(path.read_text()) if path.exists() else {"losses": {}, "steps": {}}
    results["losses"] |= losses
    results["steps"] |= {name: steps or OBJECTIVES[name].num_steps for name in objectives}
    results |= {"seeds": seeds, "batch_size": BATCH_SIZE, "base_width": BASE_WIDTH}
    path.write_text(json.dumps(results, indent=1))
    plot(results, output_dir / "width_scaling.png")


if __name__ == "__main__":
    typer.run(main)
