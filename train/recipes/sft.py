"""Fine-tuning of a saved model, by default the bundled one, on conversations of your own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmslice import VlmSliceProcessor
from vlmslice.data.collator import VlmSliceCollator
from vlmslice.data.sources import ConversationMixture, Source
from vlmslice.model_files import find_model, read_max_length
from vlmslice.training import Stage
from vlmslice.training.parts import learning_rates_of, load_for_training

COMMON: dict[str, Any] = {
    "bf16": True,
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # of all
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_steps": 200,
    "save_total_limit": 2,
    "seed": 0,
}

EVALUATION: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 0.1, "eval_on_start": True}


def build_model(folder: Path, factors: dict[str, float], previous: Path | None) -> nn.Module:
    return load_for_training(folder, factors)


def save_model(processor: VlmSliceProcessor, dtype: str, model: nn.Module, folder: Path) -> None:
    """Weights as `dtype`, with the processor, and the generation settings that the model came with."""
    model.config.use_cache = True  # the Trainer turns it off
    model.config.slicing = processor.image_processor.slicing_config.to_dict()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    processor.save_pretrained(folder)


def sft(
    data: Sequence[Source],
    model: Path | None = None,
    eval_data: Sequence[Source] = (),
    *,
    vision_encoder: float = 0.1,
    connector: float = 1.0,
    language_model: float = 1.0,
    dtype: str = "float32",
    policy: str = "",
) -> list[Stage]:
    """Trains all weights of a model on your conversations; see docs/finetuning.md.

    Options: `vision_encoder`, `connector` and `language_model` are factors on the learning rate of these parts, and 0
    freezes one; `dtype` is that of the saved weights (training is in fp32, with bf16 autocast); `policy` is the slicing
    policy to train with and to save, by default the model's own.

    Command: `python train/train.py --recipe sft --data FILE.jsonl --output-dir runs/sft`
    Hardware: for the bundled model two CPU cores and 4 GB. docs/finetuning.md has an example with its time and figures.
    """
    folder = find_model(model)
    factors = {"vision_encoder": vision_encoder, "connector": connector, "language_model": language_model}
    processor = VlmSliceProcessor.from_pretrained(folder, local_files_only=True)
    if policy:
        slicing = replace(processor.image_processor.slicing_config, policy=policy)
        processor.image_processor.policy = slicing.policy
    return [
        Stage(
            name="sft",
            model=partial(build_model, folder, factors),
            dataset=ConversationMixture(data),
            collator=VlmSliceCollator(processor, max_length=read_max_length(folder)),
            arguments=COMMON | {"learning_rate": 3e-4} | (EVALUATION if eval_data else {}),
            save=partial(save_model, processor, dtype),
            learning_rates=learning_rates_of(factors),
            eval_dataset=ConversationMixture(eval_data) if eval_data else None,
            fills_steps=True,
        )
    ]
