"""A model of 0.1M parameters in seconds: the shortest complete recipe, to read, to copy and to test with."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import LlamaConfig

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
from vlmslice.dense_reader import DenseReader, adopt_dense_reader, save_dense_reader
from vlmslice.slicing import SlicingConfig
from vlmslice.tokenization import build_byte_tokenizer
from vlmslice.training import Stage
from vlmslice.vision_encoder import VlmSliceVisionConfig

# Slices of 4 x 4 patches: 4 visual tokens each.
SLICING = SlicingConfig(scale_resolution=64, overview_resolution=32, max_slice_nums=6, max_visual_tokens=32)

TASK = TaskConfig(megapixels=(0.002, 0.02), num_words=(1, 1), max_characters=4, font_px=(14, 24), max_count=4)


def build_processor() -> VlmSliceProcessor:
    return VlmSliceProcessor(VlmSliceImageProcessorPil(**SLICING.to_dict()), build_byte_tokenizer())


def build_vision_config() -> VlmSliceVisionConfig:
    return VlmSliceVisionConfig(
        hidden_size=32,
        timm_kwargs={
            "depth": 2,
            "num_heads": 2,
            "global_pool": "",
            "class_token": False,
            "pos_embed_grid_size": (4, 4),
        },
    )


def build_eye(previous: Path | None) -> nn.Module:
    return DenseReader(build_vision_config())


def build_model(previous: Path | None) -> nn.Module:
    """The whole model; its encoder comes from the stage before."""
    processor = build_processor()
    tokenizer = processor.tokenizer
    text_config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = VlmSliceConfig(
        vision_config=build_vision_config(),
        text_config=text_config,
        slicing=SLICING.to_dict(),
        connector_heads=4,
        connector_head_dim=16,
        image_token_id=processor.image_token_id,
    )
    model = VlmSliceForConditionalGeneration(config)
    model.stop_as(tokenizer)
    if previous is not None:
        adopt_dense_reader(previous, model.vision_encoder)
    return model


def save_model(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)


COMMON = {
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-3,
    "optim": "adamw_torch",
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "logging_steps": 10,
    "save_steps": 20,
    "save_total_limit": 2,
    "seed": 0,
}


def tiny() -> list[Stage]:
    """Teaches a toy eye cell labels and then to answer: seconds, not useful figures.

    Command: `python train/train.py --recipe tiny`
    Hardware: one CPU core, 1 GB. Time: 5 s of training after 9 s of imports. Expected: the loss of stage answer falls
    from 5.6 to 3.3.
    """
    fonts = FontLibrary("train", [matplotlib_font_dir()])
    eye = Stage(
        name="eye",
        model=build_eye,
        dataset=DenseCropDataset(
            DenseCropConfig(num_samples=4096, group=8, max_side=8, max_patches=48, easy_samples=2048), fonts
        ),
        collator=collate_crops,
        arguments=COMMON | {"max_steps": 60, "train_sampling_strategy": "sequential"},
        save=save_dense_reader,
    )
    answer = Stage(
        name="answer",
        model=build_model,
        dataset=TaskDataset([Curriculum(256, TASK, {"read": 0.5, "count": 0.5})], fonts, group=8),
        collator=TaskCollator(build_processor(), dense=()),
        arguments=COMMON | {"max_steps": 60},
        save=save_model,
        learning_rates={"vision_encoder.": 0.3},
    )
    return [eye, answer]
