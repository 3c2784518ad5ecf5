"""The bundled model goes on from its weights with all that is asked of it: documents, charts, crowds, real receipts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from recipes.nano import CANVAS_SIDE, build_processor, nano, save_reader
from vlmslice import VlmSliceConfig, VlmSliceForConditionalGeneration
from vlmslice.data.fonts import FontLibrary
from vlmslice.data.task_collator import TaskCollator
from vlmslice.data.tasks import Curriculum, TaskConfig, TaskDataset
from vlmslice.model_files import BUNDLED_MODEL
from vlmslice.training import Stage

# Print of any size and shapes: what the dense head has to tell.
_HEAD = [
    Curriculum(
        3_200,
        TaskConfig(
            megapixels=(0.01, 0.06),
            num_lines=(2, 5),
            max_answer=160,
            max_count=12,
            font_px=(10, 50),
            photo=0.25,
        ),
        {"paragraph": 0.5, "count": 0.25, "crowd": 0.25},
    )
]


def _build_head(folder: Path, previous: Path | None) -> nn.Module:
    """The model of `folder`, all of it frozen, with a new dense head: saved for use, it has lost its own."""
    config = VlmSliceConfig.from_pretrained(folder)
    config.dense_loss_weight = 0.3
    torch.manual_seed(0)
    model = VlmSliceForConditionalGeneration.from_pretrained(folder, config=config, dtype=torch.float32)
    model.requires_grad_(False)
    assert model.dense_head is not None
    model.dense_head.requires_grad_(True)
    return model


def widen(model: Path = BUNDLED_MODEL, data_root: Path | None = None) -> list[Stage]:
    """Goes on with a saved `nano`, by default the bundled model: a new dense head, then its stages `broad` and `large`.

    Command: `OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 train/train.py --recipe widen --data-root DATA --output-dir
    runs/widen`. Hardware: two CPU cores, 16 GB; ten hours for `broad`, whose learning rate stays, so that `large` may
    begin wherever it stands (`--set broad.max_steps=N`).
    """
    broad, large = nano(data_root=data_root)[-2:]
    head = Stage(
        name="head",
        model=partial(_build_head, model),
        dataset=TaskDataset(_HEAD, FontLibrary("train"), group=32, name="head"),
        collator=TaskCollator(build_processor(), guide=False, canvas_side=CANVAS_SIDE),
        arguments=broad.arguments
        | {
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 5,
            "max_steps": 100,
        },
        save=save_reader,
    )
    return [head, broad, large]
