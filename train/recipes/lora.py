"""Fine-tuning by LoRA of a saved model, by default the bundled one, on conversations of your own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from recipes.sft import save_model, sft
from vlmslice import VlmSliceProcessor
from vlmslice.data.sources import Source
from vlmslice.model_files import find_model
from vlmslice.training import Stage
from vlmslice.training.lora import add_lora, merge_lora
from vlmslice.training.parts import PARTS, find_prefixes, load_for_training


def build_model(
    folder: Path, parts: list[str], rank: int, alpha: float, dropout: float, previous: Path | None
) -> nn.Module:
    return add_lora(load_for_training(folder, dict.fromkeys(PARTS, 1.0)), parts, rank, alpha, dropout)


def save_merged(processor: VlmSliceProcessor, dtype: str, model: nn.Module, folder: Path) -> None:
    """The merged model in `folder`, the adapter in `folder / "adapter"`."""
    save_model(processor, dtype, merge_lora(model, folder), folder)


def lora(
    data: Sequence[Source],
    model: Path | None = None,
    eval_data: Sequence[Source] = (),
    *,
    parts: str = "language_model",
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    dtype: str = "float32",
    policy: str = "",
) -> list[Stage]:
    """Trains low-rank updates of a model's matrices on your conversations; see docs/finetuning.md.

    Options: `parts`, some of `vision_encoder,connector,language_model`, or `all-linear` for all of them; `rank`,
    `alpha` and `dropout` of LoRA; `dtype` and `policy` as in `sft`. The learning rate is ten times that of `sft`, as
    suits LoRA (Schulman et al., 2025, https://thinkingmachines.ai/blog/lora/).

    Command: `python train/train.py --recipe lora --data FILE.jsonl --output-dir runs/lora`
    Hardware: as `sft`, with less memory for the optimizer.
    """
    folder = find_model(model)
    chosen = list(PARTS) if parts == "all-linear" else parts.split(",")
    find_prefixes(chosen)  # a misspelt part is told before anything is loaded
    [full] = sft(data, model, eval_data, policy=policy)
    return [
        dataclasses.replace(
            full,
            name="lora",
            model=partial(build_model, folder, chosen, rank, alpha, dropout),
            arguments=full.arguments | {"learning_rate": 3e-3},
            save=partial(save_merged, full.collator.processor, dtype),
            learning_rates={},
        )
    ]
