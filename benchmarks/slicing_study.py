"""Small models that differ in the slicing policy alone: what does it do to counting, and to reading on long images?

    python benchmarks/slicing_study.py eye
    python benchmarks/slicing_study.py train --arm overlap --seed 1      (12 runs: 4 arms, 3 seeds)
    python benchmarks/slicing_study.py report

All arms see the same pictures in the same order, for as many steps, with encoders that start alike (`eye` trains that
on whole pictures, without slices) and language models that start alike, by seed. An image has at most five views of
4 x 4 patches and 80 visual tokens (padding: one view of 9 x 9 patches, 81 tokens). Slices are seen each by itself, their
visual tokens stand in the prompt between the tags of the spatial schema, and nothing else tells where they lie.
What came of it: docs/slicing-study.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image, ImageFont
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig

from vlmslice import (
    VlmSliceConfig,
    VlmSliceForConditionalGeneration,
    VlmSliceImageProcessorPil,
    VlmSliceProcessor,
)
from vlmslice.data.dense import collate_crops, label_cells
from vlmslice.data.fonts import matplotlib_font_dir
from vlmslice.data.nine_balls import draw_nine_balls
from vlmslice.data.samples import TaskSample
from vlmslice.data.scenes import Scene
from vlmslice.data.shapes import COLORS, KINDS, scatter_shapes
from vlmslice.data.task_collator import TaskCollator
from vlmslice.data.typesetting import Pen
from vlmslice.dense_reader import DenseReader, adopt_dense_reader, save_dense_reader
from vlmslice.metrics import parse_count
from vlmslice.slicing import SlicingConfig
from vlmslice.tokenization import build_byte_tokenizer
from vlmslice.vision_encoder import VlmSliceVisionConfig

WIDTH = 96
PATCH = 16
SLICING = SlicingConfig(scale_resolution=64, merge_size=1, max_slice_nums=4, max_visual_tokens=81)
ARMS = {
    "adaptive": SLICING,
    "overlap": SlicingConfig("overlap", 64, None, PATCH, 1, 4, max_visual_tokens=81),
    "overlap_dedup": SlicingConfig("overlap_dedup", 64, None, PATCH, 1, 4, max_visual_tokens=81),
    "pad": SlicingConfig("pad", 144, None, PATCH, 1, 1, max_visual_tokens=81),
}
COUNT, READ = "How many shapes are there?", "What number is it?"
DENSE = ("character", "kind", "center")
MOST = 9
TRAINED_SIDES = ((40, 64), (112, 160))
"""Shorter sides, px, of the pictures of counts: one tile, or 2 x 2 that share a third. Others are never trained on."""
BATCH = 16


# --- pictures -----------------------------------------------------------------------------------------------------


def draw_count(rng: random.Random, height: int, width: int, count: int) -> TaskSample:
    """Shapes of one kind and colour on a light ground, of 4 to 7 % of the shorter side in radius."""
    ground = rng.randint(215, 255)
    image = Image.new("RGB", (width, height), (ground, ground, ground))
    kind = (rng.choice(KINDS), rng.choice([name for name in COLORS if name not in ("white", "yellow")]))
    side = min(height, width)
    shapes = scatter_shapes(rng, image, [kind] * count, (0.055 * side, 0.095 * side), gap=0.02 * side)
    return TaskSample("count", Scene(image, shapes=shapes), COUNT, str(len(shapes)))


def draw_number(rng: random.Random, height: int, width: int, font_px: float) -> TaskSample:
    """Three digits anywhere on a light ground."""
    ground = rng.randint(215, 255)
    image = Image.new("RGB", (width, height), (ground, ground, ground))
    path = matplotlib_font_dir() / rng.choice(["DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf"])
    font = ImageFont.truetype(str(path), font_px)
    text = str(rng.randint(100, 999))
    scene = Scene(image)
    room = width - font.getlength(text) - 4, height - 1.2 * font_px - 2
    Pen(scene, (rng.randint(0, 60),) * 3).write(
        text, font, 1 + max(rng.random() * room[1], 0), 2 + rng.random() * max(room[0], 0)
    )
    return TaskSample("read", scene, READ, text)


def draw_training(seed: int, index: int) -> TaskSample:
    """Counts and numbers by turns; numbers on shapes from 1:1 to 1:8 and 8:1."""
    rng = random.Random(f"study {seed} {index}")
    if index % 2:
        aspect = 2 ** rng.uniform(0, 3)
        height = rng.uniform(34, 96) / max(1, math.log2(aspect)) ** 0.5
        return turned(rng, lambda h, w: draw_number(rng, h, w, rng.uniform(13, 22)), height, height * aspect)
    side = rng.uniform(*rng.choice(TRAINED_SIDES))
    return turned(
        rng, lambda h, w: draw_count(rng, h, w, rng.randint(1, MOST)), side, side * rng.uniform(1, 1.3)
    )


def turned(rng: random.Random, draw, height: float, width: float) -> TaskSample:
    sides = (round(height), round(width))
    return draw(*(sides if rng.random() < 0.5 else sides[::-1]))


# --- models -------------------------------------------------------------------------------------------------------


def vision_config() -> VlmSliceVisionConfig:
    return VlmSliceVisionConfig(
        hidden_size=WIDTH,
        stem="conv",
        join_slices=False,
        timm_kwargs={
            "depth": 3,
            "num_heads": 4,
            "global_pool": "",
            "class_token": False,
            "pos_embed_grid_size": (9, 9),
        },
    )


def build_processor(arm: str) -> VlmSliceProcessor:
    return VlmSliceProcessor(VlmSliceImageProcessorPil(**ARMS[arm].to_dict()), build_byte_tokenizer())


def build_model(arm: str, seed: int, eye: Path | None) -> VlmSliceForConditionalGeneration:
    torch.manual_seed(seed)
    processor = build_processor(arm)
    tokenizer = processor.tokenizer
    config = VlmSliceConfig(
        vision_config=vision_config(),
        text_config=LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=len(tokenizer),
            initializer_range=0.04,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        slicing=ARMS[arm].to_dict(),
        connector="pixel_unshuffle",
        connector_scale=0.04,
        canvas_position=False,
        dense_loss_weight=0.3,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=True,
    )
    model = VlmSliceForConditionalGeneration(config)
    model.stop_as(tokenizer)
    if eye is not None:
        adopt_dense_reader(eye, model.vision_encoder, model.dense_head)
    return model


def optimize(
    model: nn.Module, batches: Iterator[dict], num_steps: int, learning_rate: float, name: str
) -> list[float]:
    """Trains with a warm-up and a linear decay over the last third; the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50, 3 * (num_steps - step) / num_steps)
    )
    losses, model = [], model.train()
    progress = tqdm(range(num_steps), desc=name, mininterval=20)
    for _ in progress:
        output = model(**next(batches))
        output["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        auxiliary = output.get("auxiliary_loss")
        losses.append(float(output["loss"]) - float(auxiliary if auxiliary is not None else 0))
        if len(losses) % 100 == 0:
            progress.set_postfix(
                loss=f"{np.mean(losses[-100:]):.3f}",
                **{k: f"{float(v):.2f}" for k, v in (output.get("metrics") or {}).items()},
            )
    model.eval()
    return losses


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def eye(out: Path = Path("runs/slicing-study"), steps: int = 1500) -> None:
    """Trains the encoder from which all arms start: what stands in each cell of whole pictures."""
    torch.manual_seed(0)
    reader = DenseReader(vision_config())

    def batches() -> Iterator[dict]:
        rng = random.Random("eye")
        while True:
            rows, cols = rng.choice([(2, 8), (8, 2), (4, 4), (4, 8), (8, 4), (6, 6), (9, 9)])
            crops = []
            for index in range(2 * BATCH):
                scale = rng.uniform(0.8, 1.4)
                sides = round(rows * PATCH * scale), round(cols * PATCH * scale)
                sample = (
                    draw_number(rng, *sides, rng.uniform(12, 24) * scale)
                    if index % 2
                    else draw_count(rng, *sides, rng.randint(1, MOST))
                )
                image = sample.scene.image
                resized = image.resize((cols * PATCH, rows * PATCH), Image.Resampling.BICUBIC)
                labels = label_cells(sample.scene, (0, 0, image.height, image.width), (rows, cols))
                crops.append({"pixels": np.asarray(resized), "labels": labels})
            yield dict(collate_crops(crops))

    optimize(reader, batches(), steps, 2e-3, "eye")
    (out / "eye").mkdir(parents=True, exist_ok=True)
    save_dense_reader(reader, out / "eye")


@app.command()
def train(
    arm: Annotated[str, typer.Option(help=f"Of {', '.join(ARMS)}.")],
    seed: int = 0,
    steps: int = 1500,
    learning_rate: float = 2e-3,
    out: Path = Path("runs/slicing-study"),
) -> None:
    """Trains one arm from one seed."""
    folder = out / f"{arm}-{seed}"
    model, processor = build_model(arm, seed, out / "eye"), build_processor(arm)
    collate = TaskCollator(processor, dense=DENSE, guide=False, points=False)
    started = time.process_time()

    def batches() -> Iterator[dict]:
        index = 0
        while True:
            yield dict(collate([draw_training(seed, index + k) for k in range(BATCH)]))
            index += BATCH

    losses = optimize(model, batches(), steps, learning_rate, f"{arm}-{seed}")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    curve = [float(np.mean(losses[at : at + 50])) for at in range(0, len(losses), 50)]
    facts = {"steps": steps, "seconds": round(time.process_time() - started), "curve": curve}
    (folder / "training.json").write_text(json.dumps(facts))


class Answered(NamedTuple):
    sample: TaskSample
    text: str


@torch.no_grad()
def ask(model, processor, samples: list[TaskSample], batch: int = 50) -> list[str]:
    texts = []
    for at in range(0, len(samples), batch):
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": s.scene.image},
                        {"type": "text", "text": s.question},
                    ],
                }
            ]
            for s in samples[at : at + batch]
        ]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        texts += processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


@app.command()
def quick(arm: str, seed: int = 0, out: Path = Path("runs/slicing-study")) -> None:
    """A first look at one run."""
    processor = build_processor(arm)
    model = VlmSliceForConditionalGeneration.from_pretrained(out / f"{arm}-{seed}").eval()
    for side in (52, 72, 80, 90, 96, 104, 128, 144, 192, 256, 400):
        rng = random.Random(f"test {side}")
        samples = [draw_count(rng, side, side, 1 + k % MOST) for k in range(90)]
        got = [
            (parse_count(t), int(s.answer))
            for t, s in zip(ask(model, processor, samples), samples, strict=True)
        ]
        exact = np.mean([a == b for a, b in got])
        signed = np.mean([(a if a is not None else 0) - b for a, b in got])
        print(side, f"exact {exact:.2f} signed {signed:+.2f}")
    for aspect in (1, 2, 4, 8):
        rng = random.Random(f"test {aspect}")
        h = 96 / aspect**0.5
        samples = [draw_number(rng, round(h), round(h * aspect), 15) for k in range(60)]
        got = ask(model, processor, samples)
        print("aspect", aspect, np.mean([t == s.answer for t, s in zip(got, samples, strict=True)]))
    for side in (64, 80, 96, 128, 192, 256):
        scene = Scene(draw_nine_balls(side))
        print("nine balls", side, ask(model, processor, [TaskSample("count", scene, COUNT, "9")]))


if __name__ == "__main__":
    app()
