"""A smaller model learns from the one it was made from: the healing after `vlmslice prune`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from vlmslice import VlmSliceForConditionalGeneration, VlmSliceProcessor
from vlmslice.data.fonts import FontLibrary
from vlmslice.data.task_collator import TaskCollator
from vlmslice.data.tasks import Curriculum, TaskConfig, TaskDataset
from vlmslice.model_files import find_model
from vlmslice.shrinking.distillation import Student
from vlmslice.training import Stage
from vlmslice.training.freezing import freeze

TASK = TaskConfig(megapixels=(0.02, 0.3), font_px=(10, 90), max_questions=5)
TEACHER_WEIGHT = 0.5
TEMPERATURE = 2.0


def build_student(folder: Path, teacher: Path, previous: Path | None) -> nn.Module:
    """The model in `folder`, its vision encoder frozen, with its teacher."""
    student = Student.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    freeze(student, "vision_encoder")
    return student.learn_from(
        VlmSliceForConditionalGeneration.from_pretrained(teacher, dtype=torch.float32, local_files_only=True),
        TEACHER_WEIGHT,
        TEMPERATURE,
    )


def save_student(processor: VlmSliceProcessor, model: nn.Module, folder: Path) -> None:
    model.config.use_cache = True  # the Trainer turns it off
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def distil(model: Path, teacher: Path | None = None) -> list[Stage]:
    """Heals a model by the answers and by the probabilities of its teacher, the bundled model by default.

    The vision encoder stays as it is. Pictures are rendered: lines to read, shapes to count.

    Command: `python train/train.py --recipe distil --model FOLDER --output-dir runs/distil`, on what `vlmslice prune`
    saved; `--teacher FOLDER` names another teacher. Hardware: two CPU cores, 4 GB. docs/shrinking.md has what a short
    run gives back.
    """
    processor = VlmSliceProcessor.from_pretrained(model, local_files_only=True)
    points = processor.location_token_id is not None
    return [
        Stage(
            name="distil",
            model=partial(build_student, model, find_model(teacher)),
            dataset=TaskDataset(
                [Curriculum(16_000, TASK, {"read": 0.4, "count": 0.6})],
                FontLibrary("train"),
                group=8,
                name="distil",
            ),
            collator=TaskCollator(processor, dense=(), guide=False, points=points),
            arguments={
                "bf16": True,
                "per_device_train_batch_size": 8,
                "learning_rate": 3e-4,
                "lr_scheduler_type": "linear",
                "warmup_steps": 10,
                "max_steps": 2_000,
                "max_grad_norm": 1.0,
                "train_sampling_strategy": "sequential",
                "logging_steps": 10,
                "save_steps": 100,
                "save_total_limit": 2,
                "seed": 0,
            },
            save=partial(save_student, processor),
        )
    ]
