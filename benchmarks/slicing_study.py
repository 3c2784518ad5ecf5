"""Small models that differ in the slicing policy alone: what does it do to counting, and to reading on long images?

    python benchmarks/slicing_study.py eye
    python benchmarks/slicing_study.py train --arm overlap --seed 1      (12 runs: 4 arms, 3 seeds)
    python benchmarks/slicing_study.py answer --arm overlap --seed 1
    python benchmarks/slicing_study.py report

All arms see the same pictures in the same order, for as many steps, with one encoder (`eye` trains it on views such as
any arm may see; then it is frozen) and language models that start alike, by seed. An image has at most five views of
4 x 4 patches and 80 visual tokens (padding: one view of 9 x 9 patches, 81 tokens). Slices are seen each by itself,
their visual tokens stand in the prompt between the tags of the spatial schema, and nothing else tells where they lie.
What came of it: docs/slicing-study.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import itertools
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
from vlmslice.data.shapes import COLORS, KINDS, draw_shape, scatter_shapes
from vlmslice.data.task_collator import TaskCollator
from vlmslice.data.typesetting import Pen
from vlmslice.dense_reader import DenseReader, adopt_dense_reader, save_dense_reader
from vlmslice.metrics import parse_count
from vlmslice.slicing import SlicingConfig
from vlmslice.tokenization import build_byte_tokenizer
from vlmslice.training.freezing import freeze
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
CONTRASTS = (("overlap", "adaptive"), ("overlap_dedup", "overlap"), ("pad", "adaptive"))
COUNT, READ = "How many shapes are there?", "Which digit is it?"
MOST = 12
CURRICULUM = ((6_000, 3), (12_000, 6))
"""Pictures up to which, and most shapes on them: who has to tell 12 numbers apart at once may never begin to count."""
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


def draw_number(
    rng: random.Random, height: int, width: int, font_px: float, numbers: tuple[int, int] = (0, 9)
) -> TaskSample:
    """A number, by default a digit, anywhere on a light ground."""
    ground = rng.randint(215, 255)
    image = Image.new("RGB", (width, height), (ground, ground, ground))
    path = matplotlib_font_dir() / rng.choice(["DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf"])
    font = ImageFont.truetype(str(path), font_px)
    text = str(rng.randint(*numbers))
    scene = Scene(image)
    room = width - font.getlength(text) - 4, height - 1.2 * font_px - 2
    Pen(scene, (rng.randint(0, 60),) * 3).write(
        text, font, 1 + max(rng.random() * room[1], 0), 2 + rng.random() * max(room[0], 0)
    )
    return TaskSample("read", scene, READ, text)


def draw_training(seed: int, index: int) -> TaskSample:
    """Counts and digits by turns; digits on images from 1:1 to 1:8 and 8:1."""
    rng = random.Random(f"study {seed} {index}")
    if index % 2:
        aspect = 2 ** rng.uniform(0, 3)
        height = rng.uniform(34, 96) / max(1, math.log2(aspect)) ** 0.5
        return turned(
            rng, lambda rng, h, w: draw_number(rng, h, w, rng.uniform(13, 22)), height, height * aspect
        )
    most = next((most for until, most in CURRICULUM if index < until), MOST)
    side = rng.uniform(*rng.choice(TRAINED_SIDES))
    return turned(
        rng, lambda rng, h, w: draw_count(rng, h, w, rng.randint(1, most)), side, side * rng.uniform(1, 1.3)
    )


def draw_view(rng: random.Random, rows: int, cols: int) -> dict:
    """A view such as any arm may see, with its labels: a whole picture padded around, or a window at any scale."""
    scene = draw_training(-1, rng.randrange(CURRICULUM[-1][0], 10**9)).scene
    height, width = scene.image.height, scene.image.width
    if rng.random() < 0.5:
        scale = min(rows * PATCH / height, cols * PATCH / width)
        place = (0.5, 0.5)
    else:
        scale = 2 ** rng.uniform(-1.0, 0.5)
        place = (rng.random(), rng.random())
    shown_height, shown_width = round(rows * PATCH / scale), round(cols * PATCH / scale)
    top, left = round(place[0] * (height - shown_height)), round(place[1] * (width - shown_width))
    view = Image.new("RGB", (shown_width, shown_height), (127, 127, 127))
    view.paste(scene.image, (-left, -top))
    pixels = view.resize((cols * PATCH, rows * PATCH), Image.Resampling.BICUBIC)
    box = (top, left, top + shown_height, left + shown_width)
    return {"pixels": np.asarray(pixels), "labels": label_cells(scene, box, (rows, cols))}


def turned(rng: random.Random, draw, height: float, width: float) -> TaskSample:
    sides = (round(height), round(width))
    return draw(rng, *(sides if rng.random() < 0.5 else sides[::-1]))


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
        image_token_id=processor.image_token_id,
        tie_word_embeddings=True,
    )
    model = VlmSliceForConditionalGeneration(config)
    model.stop_as(tokenizer)
    if eye is not None:
        adopt_dense_reader(eye, model.vision_encoder)
    freeze(model, "vision_encoder")
    return model


def optimize(
    model: nn.Module, batches: Iterator[dict], num_steps: int, learning_rate: float, name: str
) -> list[float]:
    """Trains with a warm-up and a linear decay over the last third; the loss of each step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50, 3 * (num_steps - step) / num_steps)
    )
    losses, model = [], model.train()
    progress = tqdm(range(num_steps), desc=name, mininterval=20)
    for _ in progress:
        output = model(**next(batches))
        output["loss"].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(output["loss"]))
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
    """Trains the encoder from which all arms start: what stands in each cell of views such as any of them sees."""
    torch.manual_seed(0)
    reader = DenseReader(vision_config())

    def batches() -> Iterator[dict]:
        rng = random.Random("eye")
        while True:
            grid = rng.choice([(2, 4), (4, 2), (3, 3), (4, 4), (4, 8), (8, 4), (9, 9)])
            yield dict(collate_crops([draw_view(rng, *grid) for _ in range(2 * BATCH)]))

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
    collate = TaskCollator(processor, dense=(), guide=False, points=False)
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


# --- tests --------------------------------------------------------------------------------------------------------

SEEN_SIDES, NEW_SIDES, LARGE_SIDES = (44, 52, 60, 120, 136, 152), (70, 78, 86, 94, 102), (192, 256, 384, 512)
AREAS, ASPECTS = (96, 192), (1, 2, 4, 8)
"""Images with digits have as many px as squares of these sides; the larger are never trained on."""
BALL_SIDES = tuple(range(40, 200, 8)) + (224, 256, 320, 384, 512)


def place_shapes(rng: random.Random, side: int, count: int, shared: bool) -> TaskSample:
    """Up to four shapes, all in parts that two or four of the 2 x 2 tiles of `overlap` share, or all in none of these.

    Tiles of 4 of 6 blocks share the middle third; shapes keep off its borders.
    """
    ground = rng.randint(215, 255)
    image = Image.new("RGB", (side, side), (ground, ground, ground))
    kind, color = rng.choice(KINDS), rng.choice([name for name in COLORS if name not in ("white", "yellow")])
    radius = 0.07
    cells = [(row, col) for row in range(3) for col in range(3) if (1 in (row, col)) == shared]
    shapes = []
    for row, col in rng.sample(cells, count):
        y, x = ((cell + rng.uniform(0.3, 0.7)) / 3 for cell in (row, col))
        shapes.append(draw_shape(image, kind, color, (y * side, x * side), radius * side, COLORS[color]))
    return TaskSample("count", Scene(image, shapes=shapes), COUNT, str(count))


def test_sets(per_set: int) -> dict[str, list[TaskSample]]:
    """Pictures by name of the set, the same for all models."""
    sets = {}
    for side in (*SEEN_SIDES, *NEW_SIDES, *LARGE_SIDES):
        rng = random.Random(f"count {side}")
        sets[f"count/{side}"] = [draw_count(rng, side, side, 1 + k % MOST) for k in range(per_set)]
    for shared in (False, True):
        rng = random.Random(f"place {shared}")
        sets[f"place/{'shared' if shared else 'alone'}"] = [
            place_shapes(rng, 144, 1 + k % 4, shared) for k in range(2 * per_set)
        ]
    for area, aspect in itertools.product(AREAS, ASPECTS):
        rng = random.Random(f"digit {area} {aspect}")
        short = area / aspect**0.5
        sets[f"digit/{area}/{aspect}"] = [
            turned(rng, lambda rng, h, w: draw_number(rng, h, w, 15), short, short * aspect)
            for _ in range(per_set)
        ]
    for side in BALL_SIDES:
        sets[f"balls/{side}"] = [TaskSample("count", Scene(draw_nine_balls(side)), COUNT, "9")]
    return sets


@torch.no_grad()
def ask(
    model: VlmSliceForConditionalGeneration, processor: VlmSliceProcessor, samples: list[TaskSample]
) -> list[str]:
    """Answers, in batches of 50."""
    texts: list[str] = []
    for at in range(0, len(samples), 50):
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": sample.scene.image},
                        {"type": "text", "text": sample.question},
                    ],
                }
            ]
            for sample in samples[at : at + 50]
        ]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        texts += processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


@app.command()
def answer(
    arm: Annotated[str, typer.Option(help=f"Of {', '.join(ARMS)}.")],
    seed: int = 0,
    per_set: int = 96,
    out: Path = Path("runs/slicing-study"),
) -> None:
    """Asks one trained model about every test picture."""
    folder = out / f"{arm}-{seed}"
    model = VlmSliceForConditionalGeneration.from_pretrained(folder).eval()
    processor = build_processor(arm)
    answers = {
        name: [
            (sample.answer, text)
            for sample, text in zip(samples, ask(model, processor, samples), strict=True)
        ]
        for name, samples in tqdm(test_sets(per_set).items(), desc=folder.name, mininterval=20)
    }
    (folder / "answers.json").write_text(json.dumps(answers))


# --- report -------------------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """A mean over seeds and pictures, with its 95 % interval, and the mean of each seed."""

    mean: float
    low: float
    high: float
    seeds: list[float]

    def show(self, percent: bool, sign: bool = False) -> str:
        scale, form = (100, "+.0f" if sign else ".0f") if percent else (1, "+.2f")
        low, high = self.low * scale, self.high * scale
        return f"{self.mean * scale:{form}} ({low:{form}} to {high:{form}})"


def summarize(values_SP: np.ndarray) -> Figure:
    """Of `float[seeds, pictures]`; resampled are seeds, and pictures, the same for all seeds."""
    rng = np.random.default_rng(0)
    num_seeds, num_pictures = values_SP.shape
    means = [
        values_SP[rng.integers(0, num_seeds, num_seeds)][
            :, rng.integers(0, num_pictures, num_pictures)
        ].mean()
        for _ in range(4000)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return Figure(float(values_SP.mean()), float(low), float(high), values_SP.mean(axis=1).tolist())


def read_values(out: Path, arm: str, names: list[str], value) -> np.ndarray:
    """`float[seeds, pictures]` of the pictures of some sets; `value` of truth and answer."""
    folders = sorted(out.glob(f"{arm}-[0-9]*/answers.json"))
    rows = []
    for path in folders:
        answers = json.loads(path.read_text())
        rows.append([value(truth, text) for name in names for truth, text in answers[name]])
    return np.array(rows, dtype=float)


def exact(truth: str, text: str) -> float:
    return text.strip() == truth


def signed(truth: str, text: str) -> float:
    """Error of a count; no number counts as 0 objects."""
    return (parse_count(text) or 0) - int(truth)


def counted(truth: str, text: str) -> float:
    return parse_count(text) or 0


@app.command()
def report(out: Path = Path("runs/slicing-study"), docs: Path = Path("docs")) -> None:
    """Tables, `docs/experiments/slicing_study.json` and `docs/images/slicing_study.png`."""
    counts = {
        "sizes trained on": [f"count/{side}" for side in SEEN_SIDES],
        "between them": [f"count/{side}" for side in NEW_SIDES],
        "larger": [f"count/{side}" for side in LARGE_SIDES],
    }
    places = {
        "objects that one tile shows": ["place/alone"],
        "objects that several show": ["place/shared"],
    }
    figures: dict[str, dict] = {}

    def table(title: str, columns: dict[str, list[str]], value, percent: bool) -> None:
        print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
        for arm in ARMS:
            row = {name: summarize(read_values(out, arm, sets, value)) for name, sets in columns.items()}
            figures.setdefault(title, {})[arm] = {name: figure._asdict() for name, figure in row.items()}
            print(f"| `{arm}` | {' | '.join(figure.show(percent) for figure in row.values())} |")

    def contrast(title: str, columns: dict[str, list[str]], value, percent: bool) -> None:
        """Of pairs of arms, seed by seed and picture by picture."""
        print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
        for one, other in CONTRASTS:
            row = {
                name: summarize(read_values(out, one, sets, value) - read_values(out, other, sets, value))
                for name, sets in columns.items()
            }
            figures.setdefault(title, {})[f"{one} - {other}"] = {
                name: figure._asdict() for name, figure in row.items()
            }
            shown = " | ".join(figure.show(percent, sign=True) for figure in row.values())
            print(f"| `{one}` less `{other}` | {shown} |")

    table("Exact counts, %", counts, exact, True)
    contrast("Exact counts, difference in points", counts, exact, True)
    table("Mean error of counts", counts, signed, False)
    new_sizes = {f"{side} px": [f"count/{side}"] for side in NEW_SIDES}
    table("Mean error of counts at sizes between those trained on", new_sizes, signed, False)
    contrast("The same, difference", new_sizes, signed, False)
    table("Mean error of counts by place", places, signed, False)
    print("\nMean error of objects that several show, less that of as many that one tile shows\n")
    for arm in ARMS:
        shared, alone = (read_values(out, arm, sets, signed) for sets in reversed(places.values()))
        figure = summarize(shared - alone)
        figures.setdefault("shared less alone", {})[arm] = figure._asdict()
        print(f"- `{arm}`: {figure.show(False)}")
    table("Exact counts by place, %", places, exact, True)
    for area in AREAS:
        digits = {f"1:{aspect}": [f"digit/{area}/{aspect}"] for aspect in ASPECTS}
        table(f"Digits of 15 px read right on as many px as {area} x {area}, %", digits, exact, True)
        contrast(f"The same, {area} x {area}, difference in points", digits, exact, True)
    balls = {arm: read_values(out, arm, [f"balls/{side}" for side in BALL_SIDES], counted) for arm in ARMS}
    figures["nine balls"] = {"sides": BALL_SIDES, **{arm: values.tolist() for arm, values in balls.items()}}
    training = {
        path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*-[0-9]*/training.json"))
    }
    (docs / "experiments" / "slicing_study.json").write_text(
        json.dumps({"figures": figures, "training": training}, indent=1)
    )
    draw(out, balls, docs / "images" / "slicing_study.png")


def draw(out: Path, balls: dict[str, np.ndarray], path: Path) -> None:
    from matplotlib import pyplot as plt

    sides = sorted((*SEEN_SIDES, *NEW_SIDES, *LARGE_SIDES))
    fig, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for arm in ARMS:
        error = [summarize(read_values(out, arm, [f"count/{side}"], signed)) for side in sides]
        share = [summarize(read_values(out, arm, [f"count/{side}"], exact)) for side in sides]
        number = [
            summarize(read_values(out, arm, [f"digit/{AREAS[1]}/{aspect}"], exact)) for aspect in ASPECTS
        ]
        for axis, x, figures, scale in (
            (axes[0, 0], sides, share, 100),
            (axes[0, 1], sides, error, 1),
            (axes[1, 1], ASPECTS, number, 100),
        ):
            mean = scale * np.array([figure.mean for figure in figures])
            [line] = axis.plot(x, mean, marker="o", markersize=4, label=arm)
            low, high = (scale * np.array([getattr(f, name) for f in figures]) for name in ("low", "high"))
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes[1, 0].plot(BALL_SIDES, balls[arm].mean(axis=0), color=line.get_color(), label=arm)
    axes[1, 0].axhline(9, color="black", linewidth=0.8)
    titles = (
        "exact counts, %",
        "mean error of counts",
        "the picture of nine balls: mean answer of the seeds",
        "digits of 15 px read right, %, on 192 x 192 px",
    )
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[:3]:
        ticks = (40, 64, 96, 160, 256, 512)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_xlabel("side of the image, px")
        for first, last in TRAINED_SIDES:
            axis.axvspan(first, last, color="black", alpha=0.06, linewidth=0)
    axes[1, 1].set_xticks(ASPECTS, [f"1:{aspect}" for aspect in ASPECTS])
    axes[1, 1].set_xlabel("shape of the image")
    axes[0, 0].legend(frameon=False)
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    app()
