"""Useful tokens/s of packed rows against padded batches: forward and backward, one model, one mixture, one run.

    python benchmarks/packing.py
    python benchmarks/packing.py --connector cross_attention --hidden-size 128

A useful token is an id of a sample; padding is none. All ways get the same samples, and batches about as many ids.
Times are of the process on the CPU, so that what else the machine does hardly shows; batches are made beforehand, and
the ways take turns.
"""

from __future__ import annotations

import os

# Before torch is loaded: OpenMP threads that spin while they wait slow a busy machine down by ten times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import random
import time
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig

from vlmslice import (
    VlmSliceConfig,
    VlmSliceForConditionalGeneration,
    VlmSliceImageProcessor,
    VlmSliceProcessor,
)
from vlmslice.data.collator import Sample, VlmSliceCollator
from vlmslice.data.fonts import FontLibrary, matplotlib_font_dir
from vlmslice.data.lengths import LengthSortedDataset, SampleSize, measure_conversation
from vlmslice.data.mixture import ShuffledDataset
from vlmslice.data.packing import PackedDataset, PackingCollator
from vlmslice.data.tasks import TASKS, TaskConfig
from vlmslice.slicing import SlicingConfig
from vlmslice.tokenization import build_byte_tokenizer
from vlmslice.vision_encoder import VlmSliceVisionConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

MIXTURE = {"text": 0.4, "read": 0.3, "paragraph": 0.15, "receipt": 0.15}
TASK = TaskConfig(num_words=(1, 4), max_characters=30, font_px=(12, 30), num_lines=(4, 12))
PIXELS = {"read": (48, 192), "paragraph": (224, 320), "receipt": (420, 200)}
"""Height and width of the pictures."""

SLICING = SlicingConfig(
    scale_resolution=128, overview_resolution=64, max_slice_nums=12, max_visual_tokens=256
)


def make_samples(num_samples: int) -> list[Sample]:
    """Conversations of all kinds in an order drawn from a seed: text alone, one line, paragraphs, receipts."""
    rng = random.Random(0)
    fonts = FontLibrary("train", [matplotlib_font_dir()])
    samples: list[Sample] = []
    for kind in rng.choices(list(MIXTURE), list(MIXTURE.values()), k=num_samples):
        if kind == "text":
            a, b = rng.randint(1, 99), rng.randint(1, 99)
            question = [{"type": "text", "text": f"What is {a} + {b}?"}]
            answer = [{"type": "text", "text": str(a + b)}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            samples.append({"messages": messages})
        else:
            task = TASKS[kind](rng, TASK, fonts, *PIXELS[kind])
            samples.append({"messages": task.messages(), "images": [task.scene.image]})
    return samples


def build_processor(connector: str) -> VlmSliceProcessor:
    return VlmSliceProcessor(
        VlmSliceImageProcessor(**slicing(connector).to_dict()),
        build_byte_tokenizer(),
        one_placeholder=connector == "cross_attention",
    )


def slicing(connector: str) -> SlicingConfig:
    fields = SLICING.to_dict()
    return SlicingConfig(**fields | ({"tokens_per_view": 16} if connector == "resampler" else {}))


def build_model(connector: str, processor: VlmSliceProcessor, hidden_size: int) -> Any:
    """Random weights; the language model is the larger part, as it is in models that are used."""
    torch.manual_seed(0)
    text_config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(processor.tokenizer),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    vit = {"depth": 2, "num_heads": 2, "global_pool": "", "class_token": False, "pos_embed_grid_size": (8, 8)}
    return VlmSliceForConditionalGeneration(
        VlmSliceConfig(
            vision_config=VlmSliceVisionConfig(hidden_size=64, timm_kwargs=vit),
            text_config=text_config,
            slicing=slicing(connector).to_dict(),
            connector=connector,
            connector_heads=4,
            connector_head_dim=16,
            image_token_id=processor.image_token_id,
        )
    ).train()


def make_batches(dataset: Any, batch_size: int, collator: Any) -> list[Any]:
    numbers = range(0, len(dataset), batch_size)
    return [collator([dataset[i] for i in range(n, min(n + batch_size, len(dataset)))]) for n in numbers]


def time_way(model: Any, batches: Sequence[Any]) -> float:
    """Seconds of the CPU for forward and backward of all batches."""
    start = time.process_time()
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
    return time.process_time() - start


@app.command(epilog="Example: python benchmarks/packing.py --connector pixel_unshuffle --num-samples 80")
def main(
    connector: Annotated[str, typer.Option(help="Connector of the model.")] = "pixel_unshuffle",
    num_samples: Annotated[int, typer.Option(help="Samples of the mixture.")] = 80,
    batch_size: Annotated[int, typer.Option(help="Samples of a batch that is not packed.")] = 8,
    max_length: Annotated[int, typer.Option(help="Positions of a packed row.")] = 512,
    max_visual_tokens: Annotated[int | None, typer.Option(help="Visual tokens of a packed row.")] = None,
    hidden_size: Annotated[int, typer.Option(help="Width of the language model.")] = 256,
    rounds: Annotated[int, typer.Option(help="How often every way is timed; the fastest counts.")] = 2,
) -> None:
    """Prints useful tokens/s of padded, length-sorted and packed batches of one mixture."""
    processor = build_processor(connector)
    samples = make_samples(num_samples)
    sizes = [measure_conversation(processor, sample) for sample in samples]
    num_useful = sum(size.num_ids for size in sizes)
    model = build_model(connector, processor, hidden_size)
    collator = VlmSliceCollator(processor)
    packed = PackedDataset(samples, sizes, max_length, max_visual_tokens)
    rows = max(1, round(len(packed) * batch_size / num_samples))
    ways = {
        "padded, random order": make_batches(ShuffledDataset(samples), batch_size, collator),
        "padded, length-sorted": make_batches(
            LengthSortedDataset(samples, sizes, batch_size, window=num_samples // batch_size * batch_size),
            batch_size,
            collator,
        ),
        "packed": make_batches(packed, rows, PackingCollator(collator, processor, max_length)),
    }
    seconds = {way: float("inf") for way in ways}
    for number in range(rounds + 1):
        for way, batches in ways.items():
            taken = time_way(model, batches)
            if number:  # the first time kernels are set up
                seconds[way] = min(seconds[way], taken)
    print_table(connector, model, sizes, ways, seconds, num_useful, (rows, max_length))


def print_table(
    connector: str,
    model: Any,
    sizes: list[SampleSize],
    ways: dict[str, list[Any]],
    seconds: dict[str, float],
    num_useful: int,
    rows: tuple[int, int],
) -> None:
    lengths = sorted(size.num_ids for size in sizes)
    num_parameters = sum(p.numel() for p in model.parameters()) / 1e6
    typer.echo(
        f"{connector}, {num_parameters:.1f}M parameters; {len(sizes)} samples of {lengths[0]} to {lengths[-1]} ids, "
        f"median {lengths[len(lengths) // 2]}; packed in batches of {rows[0]} rows of up to {rows[1]}\n"
    )
    typer.echo("| batches | positions | useful | useful tokens/s | ratio |\n|---|---|---|---|---|")
    base = next(iter(seconds.values()))
    for way, batches in ways.items():
        num_positions = sum(batch["input_ids"].numel() for batch in batches)
        typer.echo(
            f"| {way} | {num_positions:,} | {num_useful / num_positions:.0%} | {num_useful / seconds[way]:,.0f} "
            f"| {base / seconds[way]:.2f} |"
        )


if __name__ == "__main__":
    app()
