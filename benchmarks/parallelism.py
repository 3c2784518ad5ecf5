"""Is a run on two processes the run on one? ZeRO-0 to 3, with images on both, with some samples, on one process only.

    python benchmarks/parallelism.py                                  # the whole matrix
    python benchmarks/parallelism.py --zero 0 --zero 2 --connector cross_attention

Every cell trains a tiny model for a few steps, on two processes and on one, from the same weights with the same
samples, and prints the largest difference in the loss of a step and in a weight at the end. The exit code is 1 if one
is above the tolerance, or if a run fails or hangs. Checkpointing is that of activations ("gradient checkpointing").
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import itertools
import json
import random
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from forked import free_port, preload, start, wait

ROOT = Path(__file__).parent.parent
SAMPLES_PER_BATCH = 2
DATA = ("all image", "mixed", "one rank text-only")
LOSS_TOLERANCE = 2e-5
WEIGHT_TOLERANCE = 1e-4


def build_samples(data: str, num_batches: int) -> list[dict[str, Any]]:
    """Samples in the order of the batches, which go to the two processes in turn."""
    import numpy as np
    from PIL import Image

    rng = random.Random(0)
    samples: list[dict[str, Any]] = []
    for index in range(num_batches * SAMPLES_PER_BATCH):
        batch, place = divmod(index, SAMPLES_PER_BATCH)
        has_image = {
            "all image": True,
            "mixed": (batch + place) % 2 == 0,
            "one rank text-only": batch % 2 == 0,
        }[data]
        size = rng.randint(20, 150), rng.randint(20, 150)
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        question = [{"type": "image"}] * has_image + [{"type": "text", "text": "What is it?"}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "abcdefgh"[: rng.randint(1, 8)]},
        ]
        samples.append({"messages": messages, "images": [Image.fromarray(pixels)] if has_image else []})
    return samples


def build_config(connector: str) -> Any:
    """Of everything there is: convolutional stem and mixer over the canvas, first fit in cross-attention."""
    from transformers import LlamaConfig

    from vlmslice import VlmSliceConfig
    from vlmslice.slicing import SlicingConfig
    from vlmslice.tokenization import build_byte_tokenizer
    from vlmslice.vision_encoder import VlmSliceVisionConfig

    tokenizer = build_byte_tokenizer()
    slicing = SlicingConfig(
        scale_resolution=64,
        overview_resolution=32,
        max_slice_nums=6,
        max_visual_tokens=32,
        tokens_per_view=4 if connector == "resampler" else None,
    )
    return VlmSliceConfig(
        vision_config=VlmSliceVisionConfig(
            hidden_size=32,
            stem="conv",
            canvas_dilations=[1],
            timm_kwargs={
                "depth": 2,
                "num_heads": 2,
                "global_pool": "",
                "class_token": False,
                "pos_embed_grid_size": (4, 4),
            },
        ),
        text_config=LlamaConfig(
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
        ),
        slicing=slicing.to_dict(),
        connector=connector,
        connector_heads=4,
        connector_head_dim=16,
        first_fit_layers=[0] if connector == "cross_attention" else [],
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
    )


def build_model(connector: str, previous: Path | None) -> Any:
    from vlmslice import VlmSliceForConditionalGeneration

    return VlmSliceForConditionalGeneration(build_config(connector))


def save_model(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def train(
    folder: Path, connector: str, zero: int, data: str, accumulation: int, checkpointing: bool, num_steps: int
) -> None:
    """One run of a cell, in as many processes as the environment says."""
    from vlmslice import VlmSliceImageProcessorPil, VlmSliceProcessor
    from vlmslice.data.collator import VlmSliceCollator
    from vlmslice.tokenization import build_byte_tokenizer
    from vlmslice.training import Stage, run_stage

    config = build_config(connector)
    processor = VlmSliceProcessor(
        VlmSliceImageProcessorPil(**config.slicing),
        build_byte_tokenizer(),
        one_placeholder=connector == "cross_attention",
    )
    arguments = {
        "per_device_train_batch_size": SAMPLES_PER_BATCH,
        "gradient_accumulation_steps": 2 * accumulation,  # in one process; two share them
        "gradient_checkpointing": checkpointing,
        "max_steps": num_steps,
        "train_sampling_strategy": "sequential",
        "learning_rate": 3e-3,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 0,
        "disable_tqdm": True,
        "report_to": [],
        "ddp_timeout": 60,
    }
    if zero:
        arguments["deepspeed"] = str(ROOT / "train" / "deepspeed" / f"zero{zero}.json")
    stage = Stage(
        name="cell",
        model=partial(build_model, connector),
        dataset=build_samples(data, 2 * accumulation * num_steps),
        collator=VlmSliceCollator(processor),
        arguments=arguments,
        save=save_model,
    )
    run_stage(stage, folder, None)


def figures(folder: Path) -> tuple[list[float], dict[str, Any]]:
    from safetensors.torch import load_file

    history = json.loads((folder / "cell" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return losses, load_file(folder / "cell" / "final" / "model.safetensors")


def run(folder: Path, world_size: int, seconds: float, *cell: Any) -> str:
    """Trains a cell; returns what went wrong, or nothing."""
    folder.mkdir(parents=True)
    port = free_port()
    children = [
        start(partial(train, folder, *cell), folder / f"log-{rank}", rank, world_size, port)
        for rank in range(world_size)
    ]
    begun = time.monotonic()
    codes = wait(children, seconds)
    if not any(codes):
        return ""
    if time.monotonic() - begun > seconds:
        return f"hangs for {seconds:.0f} s"
    last = [(folder / f"log-{rank}").read_text().strip().splitlines()[-1:] for rank in range(world_size)]
    return f"exit codes {codes}: {last}"


def main(
    zero: Annotated[list[int], typer.Option(help="ZeRO stages; 0 is plain DDP. Repeatable.")] = [0, 1, 2, 3],  # noqa: B006
    data: Annotated[list[str], typer.Option(help="Where the images are. Repeatable.")] = list(DATA),  # noqa: B006
    accumulation: Annotated[list[int], typer.Option(help="Accumulated batches of each process.")] = [1, 2],  # noqa: B006
    checkpointing: Annotated[list[str], typer.Option(help="Of activations: off, on.")] = ["off", "on"],  # noqa: B006
    connector: Annotated[str, typer.Option(help="Connector of the model.")] = "spatial_resampler",
    num_steps: Annotated[int, typer.Option(help="Optimizer steps of each run.")] = 5,
    seconds: Annotated[float, typer.Option(help="A run that takes longer hangs.")] = 180.0,
    output_dir: Annotated[Path | None, typer.Option(help="Keeps the runs in this new folder.")] = None,
) -> None:
    """Compares training on two processes with training on one, in all cells of the matrix."""
    preload()
    begun = time.monotonic()
    folder = output_dir or Path(tempfile.mkdtemp(prefix="parallelism-"))
    typer.echo(f"{connector}, {num_steps} steps of {SAMPLES_PER_BATCH} samples x 2 processes x accumulation")
    typer.echo("zero  data                accumulation  checkpointing  loss         weights")
    num_failed = 0
    for what, number in itertools.product(data, accumulation):
        alone = folder / f"{what}-{number}-one"
        problem = run(alone, 1, seconds, connector, 0, what, number, False, num_steps)
        if problem:
            raise SystemExit(f"the run on one process ({what}, accumulation {number}) failed: {problem}")
        expected_losses, expected = figures(alone)
        for stage, is_on in itertools.product(zero, checkpointing):
            cell = folder / f"{what}-{number}-{stage}-{is_on}"
            problem = run(cell, 2, seconds, connector, stage, what, number, is_on == "on", num_steps)
            result = problem
            if not problem:
                losses, weights = figures(cell)
                loss_gap = max(abs(a - b) for a, b in zip(losses, expected_losses, strict=True))
                weight_gap = max(float((weights[k] - v).abs().max()) for k, v in expected.items())
                is_near = loss_gap <= LOSS_TOLERANCE and weight_gap <= WEIGHT_TOLERANCE
                result = f"{loss_gap:<11.1e}  {weight_gap:.1e}" + ("" if is_near else "  TOO LARGE")
                problem = "" if is_near else result
            num_failed += bool(problem)
            typer.echo(f"{stage:<4}  {what:<18}  {number:<12}  {is_on:<13}  {result}")
    typer.echo(
        f"tolerances: {LOSS_TOLERANCE:.0e} in a loss, {WEIGHT_TOLERANCE:.0e} in a weight; "
        f"{num_failed} cells failed; {time.monotonic() - begun:.0f} s"
    )
    if output_dir is None and not num_failed:
        shutil.rmtree(folder)
    else:
        typer.echo(f"runs and logs: {folder}")
    raise typer.Exit(1 if num_failed else 0)


if __name__ == "__main__":
    typer.run(main)
