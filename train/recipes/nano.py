"""The bundled model: about 10M parameters, trained from scratch on rendered pictures on two CPU cores."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig

from vlmslice import (
    VlmSliceConfig,
    VlmSliceForConditionalGeneration,
    VlmSliceImageProcessorPil,
    VlmSliceProcessor,
)
from vlmslice.data.dense import HEADS, DenseCropConfig, DenseCropDataset, collate_crops
from vlmslice.data.fonts import FontLibrary
from vlmslice.data.mixture import MixedDataset, ShuffledDataset
from vlmslice.data.real_data import RealDataset
from vlmslice.data.task_collator import TaskCollator
from vlmslice.data.tasks import Curriculum, TaskConfig, TaskDataset
from vlmslice.dense_reader import DenseReader, adopt_dense_reader, save_dense_reader
from vlmslice.slicing import SlicingConfig
from vlmslice.tokenization import build_byte_tokenizer
from vlmslice.training import Stage
from vlmslice.training.freezing import freeze
from vlmslice.vision_encoder import VlmSliceVisionConfig

# A visual token as wide as this language model holds the two or three characters of a patch, not the eight of a block
# of 2 x 2: see docs/experiments/connect.md.
SLICING = SlicingConfig(overview_resolution=160, merge_size=1, max_visual_tokens=4096)

GUIDE_LOSS_WEIGHT = 0.2
# Which words of a question name which objects is learned by the guide loss before the language loss can tell.
COUNT_GUIDE_LOSS_WEIGHT = 1.0

# Rows and columns of patches that 4,096 visual tokens may take: up to 1:4 in shape.
CANVAS_SIDE = 128

MATRICES = (
    "vision_encoder.vit.blocks.",
    "vision_encoder.stem.",
    "vision_encoder.mixer.",
    "connector.",
    "cross_attention.",
    "language_model.model.layers.",
)

VISION = {
    "hidden_size": 256,
    "stem": "conv",
    "canvas_dilations": [1, 2, 4, 1],
    "timm_kwargs": {
        "depth": 3,
        "num_heads": 4,
        "global_pool": "",
        "class_token": False,
        "pos_embed_grid_size": (14, 14),
        # "One patch to the right" must mean the same in every grid; interpolated positions alone stretch it.
        "rope_type": "axial",
        "rope_rotate_half": True,
    },
}


# Options of the connectors by which the language model looks at visual tokens beside the prompt; trained from nothing,
# it looks from the first step on.
CONNECTOR_OPTIONS: dict[str, dict] = {
    "cross_attention": {
        "connector_heads": 4,
        "connector_scale": 1.0,
        "cross_attention_gate": 1.0,
        "coverage_penalty": 20.0,
        "first_fit_layers": [3, 4],
    },
}


def build_processor(
    slicing: SlicingConfig = SLICING, connector: str = "cross_attention"
) -> VlmSliceProcessor:
    image_processor = VlmSliceImageProcessorPil(**slicing.to_dict())
    return VlmSliceProcessor(
        image_processor, build_byte_tokenizer(), one_placeholder=connector == "cross_attention"
    )


def build_config(connector: str = "cross_attention", slicing: SlicingConfig = SLICING) -> VlmSliceConfig:
    processor = build_processor(slicing, connector)
    tokenizer = processor.tokenizer
    text_config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return VlmSliceConfig(
        vision_config=VlmSliceVisionConfig(**VISION),
        text_config=text_config,
        slicing=slicing.to_dict(),
        connector=connector,
        dense_loss_weight=0.3,
        guide_loss_weight=GUIDE_LOSS_WEIGHT,
        image_token_id=processor.image_token_id,
        location_token_id=processor.location_token_id,
        **CONNECTOR_OPTIONS.get(connector, {}),
    )


def _build_eye(previous: Path | None) -> nn.Module:
    torch.manual_seed(0)
    return DenseReader(VlmSliceVisionConfig(**VISION))


def _build_reader(
    previous: Path | None, connector: str = "cross_attention", slicing: SlicingConfig = SLICING
) -> nn.Module:
    """The whole model, its encoder and dense head taken over from the stage before."""
    torch.manual_seed(1)
    model = VlmSliceForConditionalGeneration(build_config(connector, slicing))
    model.set_attn_implementation({"text_config": "eager"})
    if previous is not None:
        adopt_dense_reader(previous, model.vision_encoder, model.dense_head)
    return model


def _build_frozen(previous: Path | None) -> nn.Module:
    """The model of the stage before, its encoder frozen but for what it sees beyond a slice."""
    model = VlmSliceForConditionalGeneration.from_pretrained(previous, dtype=torch.float32)
    model.config.guide_loss_weight = COUNT_GUIDE_LOSS_WEIGHT
    model.set_attn_implementation({"text_config": "eager"})
    freeze(model, "vision_encoder", but=["vision_encoder.mixer"])
    return model


def _build_whole(previous: Path | None) -> nn.Module:
    """As `_build_frozen`, with everything to be trained."""
    model = _build_frozen(previous)
    return model.requires_grad_(True)


def _build_large(previous: Path | None) -> nn.Module:
    """As `_build_whole`; without the guide loss where thousands of visual tokens stand in the prompt.

    Their attention weights, of each for each, would fill the memory.
    """
    model = _build_whole(previous)
    if model.cross_attention is None:
        model.config.guide_loss_weight = 0.0
        model.set_attn_implementation({"text_config": "sdpa"})
    return model


def save_reader(model: nn.Module, folder: Path) -> None:
    """Weights with everything that `from_pretrained` needs."""
    processor = build_processor(SlicingConfig.from_dict(model.config.slicing), model.config.connector)
    model.stop_as(processor.tokenizer)
    model.config.use_cache = True  # the Trainer turns it off
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _save_for_use(model: nn.Module, folder: Path) -> None:
    """As `save_reader`, in bf16 and without what only training needs."""
    model.config.dense_loss_weight = 0.0
    model.config.guide_loss_weight = 0.0
    model.dense_head = None
    save_reader(model.to(torch.bfloat16), folder)


_COMMON = {
    "bf16": True,
    "use_cpu": True,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.05,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 16,
    "train_sampling_strategy": "sequential",  # the curricula lie in the order of the samples
    "logging_steps": 100,
    "save_steps": 500,
    "save_total_limit": 2,
    "seed": 0,
}

# Pictures and texts grow as the loss falls: small pictures teach most per second. Paragraphs give five times as many
# characters to learn from as lines, at the same cost.
CURRICULUM = [
    Curriculum(
        4_800,
        TaskConfig(
            megapixels=(0.007, 0.016),
            max_aspect=2.0,
            num_words=(1, 1),
            max_characters=10,
            font_px=(20, 44),
            max_count=3,
        ),
        {"read": 0.75, "count": 0.25},
    ),
    Curriculum(
        22_400,
        TaskConfig(
            megapixels=(0.007, 0.03),
            num_words=(1, 3),
            max_characters=24,
            font_px=(14, 50),
            max_count=6,
            num_lines=(2, 3),
            max_answer=60,
            photo=0.1,
        ),
        {"read": 0.45, "paragraph": 0.35, "count": 0.2},
    ),
    Curriculum(
        38_400,
        TaskConfig(
            megapixels=(0.01, 0.08),
            num_words=(1, 5),
            max_characters=40,
            font_px=(13, 60),
            max_count=8,
            num_lines=(2, 4),
            max_answer=90,
            photo=0.1,
        ),
        {"read": 0.5, "paragraph": 0.3, "count": 0.2},
    ),
]

COUNT = [
    Curriculum(
        80_000,
        TaskConfig(
            megapixels=(0.008, 0.03),
            max_count=6,
            num_lines=(2, 4),
            max_answer=60,
            photo=0.1,
            max_questions=3,
        ),
        {"read": 0.12, "paragraph": 0.03, "count": 0.85},
    ),
]

# A count has a tenth of the ids of a paragraph to learn from.
WIDE = [
    Curriculum(
        16_000,
        TaskConfig(megapixels=(0.015, 0.4), num_lines=(2, 5), max_answer=120, photo=0.1, max_questions=5),
        {"read": 0.3, "paragraph": 0.1, "count": 0.6},
    ),
]

# All that is asked of it; the eye learns on. Documents have a hundred ids to learn from, counts and charts a dozen.
BROAD_TASKS = {
    "read": 0.07,
    "paragraph": 0.12,
    "line": 0.04,
    "place": 0.05,
    "page": 0.06,
    "receipt": 0.1,
    "table": 0.05,
    "screenshot": 0.03,
    "plot": 0.25,
    "flowchart": 0.01,
    "count": 0.08,
    "crowd": 0.1,
    "cells": 0.04,
}
BROAD = [
    Curriculum(
        160_000,
        TaskConfig(
            megapixels=(0.02, 0.3),
            num_lines=(2, 7),
            max_answer=160,
            max_count=20,
            max_questions=4,
            font_px=(10, 60),
            photo=0.25,
            matplotlib=0.07,
            vega=0.04,
            crowded=0.35,
        ),
        BROAD_TASKS,
    ),
]

# Large pictures are what counting has to be taught on: a shape is then wider than what a patch sees around it.
LARGE_TASKS = {
    "read": 0.05,
    "paragraph": 0.09,
    "line": 0.03,
    "place": 0.03,
    "page": 0.05,
    "receipt": 0.07,
    "table": 0.03,
    "screenshot": 0.02,
    "plot": 0.18,
    "flowchart": 0.01,
    "count": 0.22,
    "crowd": 0.14,
    "cells": 0.08,
}
# Pictures beyond a megapixel are shrunk to it, print included.
LARGE = [
    Curriculum(
        12_800,
        TaskConfig(
            megapixels=(0.03, 1.2),
            num_lines=(2, 14),
            max_answer=500,
            max_count=30,
            max_questions=4,
            font_px=(10, 80),
            photo=0.3,
            matplotlib=0.07,
            vega=0.04,
            crowded=0.35,
        ),
        LARGE_TASKS,
    ),
]

# Of real sets among the pictures of each stage.
REAL_SHARES = {
    "count": {"receipt-line": 0.1},
    "wide": {"receipt-line": 0.2},
    "broad": {"receipt-line": 0.08, "receipt-part": 0.1},
    "large": {
        "receipt-line": 0.06,
        "receipt-part": 0.06,
        "receipt-page": 0.06,
        "receipt": 0.06,
    },
}


def mix(
    steps: list[Curriculum], fonts: FontLibrary, group: int, name: str, data_root: Path | None, seed: int = 0
) -> Dataset:
    """Rendered pictures; with `data_root`, real receipts among them, as many as are mixed into the stage `name`."""
    rendered = TaskDataset(steps, fonts, seed=seed, group=group, name=name)
    if data_root is None:
        return rendered
    shares = REAL_SHARES[name]
    real = [
        (ShuffledDataset(RealDataset(data_root, [part], seed=seed), seed=seed), share)
        for part, share in shares.items()
    ]
    return MixedDataset([(rendered, 1 - sum(shares.values())), *real], len(rendered), group, seed=seed)


def nano(
    connector: str = "cross_attention", slicing: SlicingConfig = SLICING, data_root: Path | None = None
) -> list[Stage]:
    """Teaches the eye densely, connects it to a byte-level language model, teaches it to count, then widens it.

    With `--data-root`, some of the pictures are lines of real receipts (SROIE, CC BY 4.0; the companies that
    `image_splits` keeps for evaluation are left out).

    Command: `OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 train/train.py --recipe nano --output-dir runs/nano`
    (two processes of one thread each are a third faster than one process of two).
    Hardware: two CPU cores, 16 GB; four hours. docs/report-card.md has the figures of the run that made the
    bundled model, and where it differed from this.
    """
    fonts = FontLibrary("train")
    eye = Stage(
        name="eye",
        model=_build_eye,
        dataset=DenseCropDataset(
            DenseCropConfig(group=64, text_share=0.8, easy_samples=20_000, least_easy=0.1), fonts
        ),
        collator=collate_crops,
        arguments=_COMMON
        | {
            "per_device_train_batch_size": 64,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 300},
            "warmup_steps": 50,
            "max_steps": 2_000,
            "logging_steps": 50,
            "save_steps": 100,
        },
        save=save_dense_reader,
        muon=("encoder.vit.blocks.", "encoder.stem."),
    )
    read = Stage(
        name="read",
        model=partial(_build_reader, connector=connector, slicing=slicing),
        dataset=TaskDataset(CURRICULUM, fonts, group=32),
        collator=TaskCollator(build_processor(slicing, connector), canvas_side=CANVAS_SIDE),
        arguments=_COMMON
        | {
            "per_device_train_batch_size": 32,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 100,
            "max_steps": CURRICULUM[-1].until // 32,
            "logging_steps": 25,
            "save_steps": 50,
        },
        save=save_reader,
        learning_rates={"vision_encoder.": 0.5},
        muon=MATRICES,
    )

    def go_on(name: str, steps: list[Curriculum], batch: tuple[int, int], **options) -> Stage:
        """A stage of `batch` (pictures at once, accumulations), by default without the eye's backward pass."""
        collator = TaskCollator(
            build_processor(slicing, connector),
            dense=options.pop("dense", ("kind", "color", "center")),
            guide=options.pop("guide", True),
            canvas_side=CANVAS_SIDE,
        )
        model, save = options.pop("model", _build_frozen), options.pop("save", save_reader)
        learning_rates = options.pop("learning_rates", {})
        arguments = {
            "per_device_train_batch_size": batch[0],
            "gradient_accumulation_steps": batch[1],
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant_with_warmup",
            "max_steps": steps[-1].until // math.prod(batch),
            "logging_steps": 10,
        }
        # Two processes then have pictures of one size at a time, and neither waits for the other.
        dataset = mix(steps, fonts, 2 * batch[0], name, data_root)
        return Stage(
            name, model, dataset, collator, _COMMON | arguments | options, save, learning_rates, MATRICES
        )

    count = go_on(
        "count",
        COUNT,
        (16, 2),
        warmup_steps=5,
        save_steps=50,
    )
    # Larger pictures cost ten and a hundred times what small ones do.
    wide = go_on("wide", WIDE, (8, 4), warmup_steps=5, save_steps=20)
    broad = go_on(
        "broad",
        BROAD,
        (8, 4),
        model=_build_whole,
        dense=tuple(HEADS),
        learning_rates={"vision_encoder.": 0.5},
        warmup_steps=20,
        save_steps=20,
    )
    large = go_on(
        "large",
        LARGE,
        (2, 8),  # four whole receipts at once would take 12 GB
        model=_build_large,
        dense=tuple(HEADS),
        guide=connector == "cross_attention",
        learning_rates={"vision_encoder.": 0.5},
        lr_scheduler_type="linear",
        save_steps=10,
        save=_save_for_use,
    )
    return [eye, read, count, wide, broad, large]
