"""The first training of a composed model: its new connector learns to tell its language model what it sees."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from vlmslice import VlmSliceForConditionalGeneration, VlmSliceProcessor
from vlmslice.data.fonts import FontLibrary
from vlmslice.data.task_collator import TaskCollator
from vlmslice.data.tasks import Curriculum, TaskConfig, TaskDataset
from vlmslice.training import Stage
from vlmslice.training.freezing import freeze

TASK = TaskConfig(megapixels=(0.02, 0.1), num_words=(1, 4), max_characters=30, font_px=(18, 60), photo=0.1)


def build_model(folder: Path, previous: Path | None) -> nn.Module:
    """The model in `folder`, its vision encoder frozen."""
    model = VlmSliceForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    freeze(model, "vision_encoder")
    return model


def save_model(processor: VlmSliceProcessor, model: nn.Module, folder: Path) -> None:
    model.config.use_cache = True  # the Trainer turns it off
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def align(model: Path) -> list[Stage]:
    """Trains the connector of a composed model, and its language model at a twentieth of the rate.

    The vision encoder stays as it is. Pictures are rendered: lines and paragraphs to read, shapes to count.

    Command: `python train/train.py --recipe align --model FOLDER --output-dir runs/align`, on what `vlmslice compose`
    saved. Hardware: for a DINOv2 ViT-S/14 and SmolLM2-135M, two CPU cores and 8 GB; 20 steps take two minutes there.
    Expected: 20 steps with `--set warmup_steps=4` bring the loss to 6.4; what a whole run reaches is not measured.
    """
    processor = VlmSliceProcessor.from_pretrained(model, local_files_only=True)
    steps = [Curriculum(64_000, TASK, {"read": 0.4, "paragraph": 0.3, "count": 0.3})]
    return [
        Stage(
            name="align",
            model=partial(build_model, model),
            dataset=TaskDataset(steps, FontLibrary("train"), group=8),
            collator=TaskCollator(processor, dense=(), guide=False, points=False),
            arguments={
                "bf16": True,
                "per_device_train_batch_size": 8,
                "learning_rate": 1e-3,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 100,
                "max_steps": 8_000,
                "max_grad_norm": 1.0,
                "train_sampling_strategy": "sequential",
                "logging_steps": 10,
                "save_steps": 500,
                "save_total_limit": 2,
                "seed": 0,
            },
            save=partial(save_model, processor),
            learning_rates={"language_model.": 0.05},
        )
    ]
