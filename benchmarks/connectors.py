"""Compares ways to bring pictures to a language model: tiny models, the same data, steps or FLOPs, and seed.

    python benchmarks/connectors.py --steps 500
    python benchmarks/connectors.py --steps 500 --language frozen

A byte-level language model first learns to count in texts ("red ring, blue star. How many shapes are there?"). Each
candidate then gets a copy of it and an encoder that knows nothing, and learns to count shapes in pictures
(`vlmslice.data.counting`). What came of it: docs/experiments/adapters.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import itertools
import random
import time
from collections import Counter
from enum import StrEnum
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, get_constant_schedule_with_warmup

from vlmslice import (
    VlmSliceConfig,
    VlmSliceForConditionalGeneration,
    VlmSliceImageProcessorPil,
    VlmSliceProcessor,
)
from vlmslice.data.collator import VlmSliceCollator
from vlmslice.data.counting import COUNT_QUESTIONS, plural
from vlmslice.data.fonts import FontLibrary
from vlmslice.data.shapes import COLORS, KINDS
from vlmslice.data.task_collator import TaskCollator
from vlmslice.data.tasks import Curriculum, TaskConfig, TaskDataset, TaskSample
from vlmslice.metrics import parse_count
from vlmslice.slicing import SlicingConfig
from vlmslice.tokenization import build_byte_tokenizer
from vlmslice.training.freezing import freeze
from vlmslice.vision_encoder import VlmSliceVisionConfig

WIDTH = 64
# Pictures of 50 to 69 px a side are one view of some 4 x 4 patches, and each patch is a visual token.
SLICING = SlicingConfig(scale_resolution=64, merge_size=1, max_slice_nums=4, max_visual_tokens=80)
TASK = TaskConfig(megapixels=(0.003, 0.004), max_aspect=1.2)
TOKENS_PER_VIEW = 16  # of the resampler: as many as a picture has patches
DENSE = ("kind", "center")

CANDIDATES: dict[str, dict] = {
    "resampler": {"connector": "resampler"},
    "pixel_unshuffle": {"connector": "pixel_unshuffle"},
    "visual expert": {"connector": "pixel_unshuffle", "visual_expert_interval": 1},
    "cross_attention": {"connector": "cross_attention", "cross_attention_interval": 1},
}


class Language(StrEnum):
    trained = "trained"
    frozen = "frozen"


class Equal(StrEnum):
    steps = "steps"
    flops = "flops"


class Data(NamedTuple):
    """Samples with the same answers for all candidates; what is evaluated was never trained on."""

    train: list[TaskSample]
    held_out: list[TaskSample]


class Outcome(NamedTuple):
    """What a candidate reached.

    `flops`: of a sample, forward and backward; `loss`: of held-out answers, per id; `accuracy`: share of exact counts;
    `seconds`: of the processor, for training.
    """

    num_trained: int
    flops: float
    num_steps: int
    loss: float
    accuracy: float
    seconds: float


def draw_samples(
    num_samples: int, max_count: int, every_question: bool, seed: int, name: str
) -> list[TaskSample]:
    """Pictures of shapes; without `every_question` only those whose question counts everything that is shown."""
    config = TaskConfig(**vars(TASK) | {"max_count": max_count})
    dataset = TaskDataset(
        [Curriculum(10**9, config, {"count": 1.0})], FontLibrary("train"), seed=seed, name=name
    )
    samples = (dataset[index] for index in itertools.count())
    return list(
        itertools.islice((s for s in samples if every_question or is_about_everything(s)), num_samples)
    )


def split(samples: list[TaskSample], size: int) -> list[list[TaskSample]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def is_about_everything(sample: TaskSample) -> bool:
    return len(sample.points) == len(sample.scene.shapes)


def text_samples(rng: random.Random, num_samples: int, max_count: int) -> list[dict]:
    """Conversations that name shapes and ask how many there are."""
    samples = []
    for _ in range(num_samples):
        shapes = [(rng.choice(list(COLORS)), rng.choice(KINDS)) for _ in range(rng.randint(1, max_count))]
        color, kind = rng.choice(shapes)
        things, number = rng.choice(
            [
                ("shapes", len(shapes)),
                (f"{color} shapes", sum(c == color for c, _ in shapes)),
                (plural(kind), sum(k == kind for _, k in shapes)),
                (f"{color} {plural(kind)}", shapes.count((color, kind))),
            ]
        )
        question = ", ".join(f"{c} {k}" for c, k in shapes) + ". "
        question += rng.choice(COUNT_QUESTIONS).format(things=things)
        samples.append(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": question}]},
                    {"role": "assistant", "content": [{"type": "text", "text": str(number)}]},
                ],
                "images": [],
            }
        )
    return samples


def build_processor(connector: str) -> VlmSliceProcessor:
    slicing = SLICING.to_dict() | {"tokens_per_view": TOKENS_PER_VIEW if connector == "resampler" else None}
    return VlmSliceProcessor(
        VlmSliceImageProcessorPil(**slicing),
        build_byte_tokenizer(),
        one_placeholder=connector == "cross_attention",
    )


def build_language_model() -> LlamaForCausalLM:
    tokenizer = build_byte_tokenizer()
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=len(tokenizer),
            initializer_range=0.04,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_model(
    candidate: dict, language_model: LlamaForCausalLM, dense_weight: float, processor: VlmSliceProcessor
) -> VlmSliceForConditionalGeneration:
    """A model with a copy of `language_model`."""
    embeddings = language_model.get_input_embeddings().weight
    vision_config = VlmSliceVisionConfig(
        hidden_size=WIDTH,
        stem="conv",
        timm_kwargs={
            "depth": 2,
            "num_heads": 4,
            "global_pool": "",
            "class_token": False,
            "pos_embed_grid_size": (4, 4),
        },
    )
    config = VlmSliceConfig(
        vision_config=vision_config,
        text_config=language_model.config,
        slicing=processor.image_processor.slicing_config.to_dict(),
        connector_heads=4,
        connector_head_dim=16,
        connector_scale=float(embeddings.detach().square().mean().sqrt()),
        dense_loss_weight=dense_weight,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=True,
        **candidate,
    )
    model = VlmSliceForConditionalGeneration(config)
    model.stop_as(processor.tokenizer)
    model.language_model.load_state_dict(language_model.state_dict())
    if model.visual_expert is not None:
        model.visual_expert.reset_parameters()
    return model


def optimize(model: nn.Module, batches, num_steps: int, learning_rate: float) -> list[float]:
    """Trains on `num_steps` of `batches`; the loss of each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=20)
    losses = []
    model.train()
    for batch in itertools.islice(batches, num_steps):
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses


def count_flops(model: nn.Module, batch: dict) -> float:
    """FLOPs of a sample, forward and backward; plain attention, as fused kernels of the CPU are not counted."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model.train()(**batch).loss.backward()
    model.zero_grad()
    return counter.get_total_flops() / len(batch["input_ids"])


def ask(sample: TaskSample) -> list[dict]:
    image = {"type": "image", "image": sample.scene.image}
    return [{"role": "user", "content": [image, {"type": "text", "text": sample.question}]}]


@torch.no_grad()
def evaluate(
    model: VlmSliceForConditionalGeneration, processor: VlmSliceProcessor, samples: list[TaskSample]
) -> tuple[float, float]:
    """Loss per id of the answers, and share of counts that are exact."""
    collate = TaskCollator(processor, dense=(), guide=False, points=False)
    losses, num_right = [], 0
    for part in split(samples, 64):
        losses.append(model(**collate(part)).loss.item() * len(part))
        inputs = processor.apply_chat_template(
            [ask(sample) for sample in part],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        num_right += sum(
            parse_count(answer) == int(s.answer) for answer, s in zip(answers, part, strict=True)
        )
    return sum(losses) / len(samples), num_right / len(samples)


def teach_language(seed: int, num_steps: int, max_count: int) -> tuple[LlamaForCausalLM, float]:
    """A language model that counts in texts, and its last loss."""
    torch.manual_seed(seed)
    model = build_language_model()
    collate, rng = VlmSliceCollator(build_processor("pixel_unshuffle")), random.Random(seed)
    batches = (dict(collate(text_samples(rng, 32, max_count))) for _ in itertools.count())
    losses = optimize(model, batches, num_steps, learning_rate=2e-3)
    return model, sum(losses[-20:]) / len(losses[-20:])


def run_candidate(
    candidate: dict,
    language_model: LlamaForCausalLM,
    data: Data,
    num_steps: int,
    flops_to_match: float | None,
    batch_size: int,
    frozen: bool,
    dense_weight: float,
    learning_rate: float,
    seed: int,
) -> Outcome:
    """Trains and evaluates one; with `flops_to_match` for as many steps as cost what `num_steps` of these would."""
    torch.manual_seed(seed)
    processor = build_processor(candidate["connector"])
    model = build_model(candidate, language_model, dense_weight, processor)
    sizes = freeze(model, *(["language_model"] if frozen else []))
    collate = TaskCollator(processor, dense=DENSE if dense_weight else (), guide=False, points=False)
    batches = [dict(collate(part)) for part in split(data.train, batch_size)]
    flops = count_flops(model, batches[0])
    if flops_to_match is not None:
        num_steps = round(num_steps * flops_to_match / flops)
    started = time.process_time()
    optimize(model, itertools.cycle(batches), num_steps, learning_rate)
    seconds = time.process_time() - started
    loss, accuracy = evaluate(model, processor, data.held_out)
    return Outcome(
        sum(size.num_trained for part, size in sizes.items() if part != "dense_head"),
        flops,
        num_steps,
        loss,
        accuracy,
        seconds,
    )


def main(
    steps: Annotated[int, typer.Option(help="Optimizer steps of each candidate.")] = 500,
    equal: Annotated[
        Equal, typer.Option(help="Whether all take as many steps, or as many FLOPs as the first in them.")
    ] = Equal.steps,
    language: Annotated[
        Language, typer.Option(help="Whether the language model trains, too.")
    ] = Language.trained,
    candidates: Annotated[str, typer.Option(help=f"Of {', '.join(CANDIDATES)}.")] = ",".join(CANDIDATES),
    max_count: Annotated[int, typer.Option(help="Most shapes to count.")] = 3,
    every_question: Annotated[
        bool, typer.Option("--every-question", help="Also count by colour and kind, among other shapes.")
    ] = False,
    dense_weight: Annotated[
        float, typer.Option(help="Weight of the loss by which the encoder learns what lies where.")
    ] = 1.0,
    language_steps: Annotated[int, typer.Option(help="Steps in which the language model learns.")] = 200,
    num_samples: Annotated[int, typer.Option(help="Distinct pictures; more steps go round again.")] = 2048,
    num_held_out: Annotated[int, typer.Option(help="Pictures of the evaluation.")] = 256,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> None:
    """Trains each candidate alike and prints one table."""
    console = Console(width=100)
    data = Data(
        draw_samples(min(num_samples, steps * batch_size), max_count, every_question, seed, "train"),
        draw_samples(num_held_out, max_count, every_question, seed, "held-out"),
    )
    numbers = Counter(sample.answer for sample in data.held_out)
    language_model, text_loss = teach_language(seed, language_steps, max_count)
    console.print(
        f"language model: loss {text_loss:.3f} on texts; always the same number: "
        f"{max(numbers.values()) / num_held_out:.1%} of counts"
    )
    table = Table("", "trained", "MFLOPs/sample", "steps", "held-out loss", "exact counts", "CPU seconds")
    flops_to_match = None
    for name in candidates.split(","):
        outcome = run_candidate(
            CANDIDATES[name], language_model, data, steps, flops_to_match, batch_size,
            language is Language.frozen, dense_weight, learning_rate, seed,
        )  # fmt: skip
        if equal is Equal.flops and flops_to_match is None:
            flops_to_match = outcome.flops
        table.add_row(
            name,
            f"{outcome.num_trained / 1e3:.0f}k",
            f"{outcome.flops / 1e6:.1f}",
            str(outcome.num_steps),
            f"{outcome.loss:.3f}",
            f"{outcome.accuracy:.1%}",
            f"{outcome.seconds:.0f}",
        )
        console.print(f"{name}: loss {outcome.loss:.3f}, {outcome.accuracy:.1%} exact")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
