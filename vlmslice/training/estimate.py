"""What a run will cost, before it begins: sizes, FLOPs, memory and time of each stage, measured on real batches."""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel, set_seed

from vlmslice.matmul_peak import matmul_peak
from vlmslice.training.freezing import measure_parts
from vlmslice.training.run import training_arguments, whole_steps
from vlmslice.training.stage import Stage, share_batch
from vlmslice.training.throughput import FlopCounter, count_tokens
from vlmslice.training.trainer import StageTrainer

_NUM_BATCHES = 3


@dataclass(frozen=True)
class BytesPerParameter:
    """What a parameter takes: of the weight, and if it is trained of its gradient and of what the optimizer keeps."""

    weight: float
    gradient: float
    optimizer: float


def memory_per_rank(
    num_parameters: int, num_trained: int, size: BytesPerParameter, zero_stage: int, world_size: int
) -> float:
    """Bytes of the model states of one process, after section 5 of ZeRO (https://arxiv.org/abs/1910.02054).

    Stage 0 keeps all in every process. Stage 1 shares out what the optimizer keeps, stage 2 the gradients, too, and
    stage 3 the weights, too. A model of 7.5e9 parameters in mixed precision (2, 2 and 12 bytes) takes 120, 31.4, 16.6
    and 1.9 GB on 64 processes. Activations, buffers and fragmentation come on top.
    """
    weights, gradients, optimizer = (
        num_parameters * size.weight,
        num_trained * size.gradient,
        num_trained * size.optimizer,
    )
    if zero_stage >= 1:
        optimizer /= world_size
    if zero_stage >= 2:
        gradients /= world_size
    if zero_stage >= 3:
        weights /= world_size
    return weights + gradients + optimizer


@dataclass(frozen=True)
class StageEstimate:
    """What one stage will cost.

    Attributes:
        name: of the stage.
        parameters: trained and frozen parameters by part.
        num_steps, step_batch_size: optimizer steps, and samples of each.
        world_size: processes that share a step.
        batch_size, num_accumulations: of each process.
        visual_tokens, text_tokens: mean per sample, without padding; see `throughput.count_tokens`.
        num_measured: samples that these, the FLOPs and the time were measured with.
        forward_flops, flops: of a sample, forward and in all. The backward pass is counted, too, not taken for twice
            the forward pass: a trained part costs about twice its forward pass, a frozen one once if gradients pass
            through it and nothing if not.
        data_seconds: making and collating a sample.
        sample_seconds: forward and backward pass of a sample.
        optimizer_seconds: clipping gradients and a step of the optimizer.
        overlaps_data: worker processes make the samples meanwhile.
        dtype: of the matrix products.
        peak: FLOP/s of the machine in it, see `matmul_peak`.
        memory: bytes per process under ZeRO-0 to 3; see `memory_per_rank`.
    """

    name: str
    parameters: dict[str, tuple[int, int]]
    num_steps: int
    step_batch_size: int
    world_size: int
    batch_size: int
    num_accumulations: int
    visual_tokens: float
    text_tokens: float
    num_measured: int
    forward_flops: float
    flops: float
    data_seconds: float
    sample_seconds: float
    optimizer_seconds: float
    overlaps_data: bool
    dtype: torch.dtype
    peak: float
    memory: tuple[float, float, float, float]

    @property
    def step_seconds(self) -> float:
        """Of an optimizer step, each process on a machine like this one, communication not included."""
        num_samples = self.batch_size * self.num_accumulations
        if self.overlaps_data:
            return num_samples * self.sample_seconds + self.optimizer_seconds
        return num_samples * (self.sample_seconds + self.data_seconds) + self.optimizer_seconds

    @property
    def seconds(self) -> float:
        """Of the whole stage."""
        return self.num_steps * self.step_seconds


def estimate_run(
    stages: Sequence[Stage], run_dir: Path, only: str | None = None, world_size: int = 1
) -> Iterator[StageEstimate]:
    """Measures each stage with a few real batches, in this process; nothing of it stays on the disk.

    A stage starts from the saved model of the one before, if `run_dir` has it; if not, from an untrained one, which is
    kept in a temporary folder meanwhile.

    Args:
        only: the name of the stage to be measured; all by default.
        world_size: processes of the run to come.
    """
    with tempfile.TemporaryDirectory(prefix="vlmslice-dry-run-") as folder:
        previous = None
        for stage in stages:
            aside = Path(folder) / stage.name
            set_seed(stage.arguments.get("seed", 42))
            model = stage.model(previous)
            if only is None or stage.name == only:
                yield _measure(stage, model, aside, world_size)
            if stage.name == only:
                return
            previous = run_dir / stage.name / "final"
            if not previous.exists():
                previous = aside / "final"
                previous.mkdir(parents=True)
                stage.save(model, previous)


def _measure(stage: Stage, model: nn.Module, folder: Path, world_size: int) -> StageEstimate:
    batch_size, num_accumulations = share_batch(
        stage.arguments["per_device_train_batch_size"],
        stage.arguments.get("gradient_accumulation_steps", 1),
        world_size,
    )
    unlogged = dataclasses.replace(stage, arguments=stage.arguments | {"report_to": []})
    trainer = StageTrainer(
        model=model,
        args=training_arguments(unlogged, folder, num_processes=1),
        learning_rates=stage.learning_rates,
        muon=stage.muon,
    )
    arguments = trainer.args
    if arguments.activation_checkpointing:  # as the Trainer does when it begins
        options: dict[str, Any] = dict(arguments.activation_checkpointing_kwargs or {})  # type: ignore[arg-type]
        cast(PreTrainedModel, model).activation_checkpointing_enable(
            every_n_layers=options.pop("every_n_layers", 1),
            offload=options.pop("offload", False),
            activation_checkpointing_kwargs=options or None,
        )
    dataset = whole_steps(stage)
    num_steps = arguments.max_steps
    if num_steps <= 0:
        num_steps = math.ceil(arguments.num_train_epochs * len(dataset) / stage.step_batch_size)
    prepared = trainer.accelerator.prepare(model)  # autocast, and the device
    optimizer = trainer.create_optimizer()

    num_samples = min(len(dataset), num_steps * stage.step_batch_size)
    dataset[0]  # what the first sample sets up is no part of the others' time
    counts: list[tuple[int, int, int, int]] = []
    seconds: list[tuple[float, float, float]] = []
    for number in range(_NUM_BATCHES):
        # From a batch's first sample: datasets give samples of one size to a batch.
        first = (2 * number + 1) * (num_samples // batch_size) // (2 * _NUM_BATCHES) * batch_size
        start = time.perf_counter()
        batch = stage.collator([dataset[i] for i in range(first, first + batch_size)])
        data_seconds = time.perf_counter() - start
        # Counting slows a pass down, and so does a shape that was never seen: the second pass is timed.
        flops = _count_flops(trainer, prepared, batch)
        _step(trainer, prepared, optimizer)
        start = time.perf_counter()
        trainer.accelerator.backward(_loss(trainer, prepared, batch))
        middle = _now(arguments.device)
        _step(trainer, prepared, optimizer)
        visual, text = count_tokens(model, batch)
        counts.append((int(visual), int(text), *flops))
        seconds.append((data_seconds, middle - start, _now(arguments.device) - middle))

    num_measured = _NUM_BATCHES * batch_size
    visual_tokens, text_tokens, forward_flops, flops_in_all = (
        sum(values) / num_measured for values in zip(*counts, strict=True)
    )
    data, passes, steps = zip(*seconds, strict=True)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    return StageEstimate(
        name=stage.name,
        parameters={
            part: (size.num_trained, size.num_parameters - size.num_trained)
            for part, size in measure_parts(model).items()
        },
        num_steps=num_steps,
        step_batch_size=stage.step_batch_size,
        world_size=world_size,
        batch_size=batch_size,
        num_accumulations=num_accumulations,
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        num_measured=num_measured,
        forward_flops=forward_flops,
        flops=flops_in_all,
        data_seconds=sum(data) / num_measured,
        sample_seconds=sum(passes) / num_measured,
        optimizer_seconds=statistics.median(steps),
        overlaps_data=arguments.dataloader_num_workers > 0,
        dtype=dtype,
        peak=matmul_peak(dtype, arguments.device.type),
        memory=_memory_by_zero_stage(model, optimizer, bool(stage.muon), dtype, world_size),
    )


def _loss(trainer: StageTrainer, model: nn.Module, batch: dict) -> torch.Tensor:
    model.train()
    with trainer.compute_loss_context_manager():
        return trainer.compute_loss(model, trainer._prepare_inputs(batch))


def _count_flops(trainer: StageTrainer, model: nn.Module, batch: dict) -> tuple[int, int]:
    """FLOPs of the forward pass, and of forward and backward pass."""
    with FlopCounter() as counter:
        loss = _loss(trainer, model, batch)
        forward = counter.num_flops
        trainer.accelerator.backward(loss)
        return forward, counter.num_flops


def _step(trainer: StageTrainer, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if trainer.args.max_grad_norm > 0:
        trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _memory_by_zero_stage(
    model: nn.Module, optimizer: torch.optim.Optimizer, has_muon: bool, dtype: torch.dtype, world_size: int
) -> tuple[float, float, float, float]:
    """Stage 0 as this process holds it; the others as DeepSpeed does.

    DeepSpeed holds weights and gradients in bf16 if the stage trains in it, and gives the optimizer an fp32 copy of
    the weights in any case. It runs AdamW where the recipe has Muon.
    """
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    num_parameters, num_trained = (sum(p.numel() for p in ps) for ps in (parameters, trained))
    states = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    kept = sum(x.numel() * x.element_size() for x in states) / num_trained
    plain = BytesPerParameter(
        weight=sum(p.numel() * p.element_size() for p in parameters) / num_parameters,
        gradient=sum(p.numel() * p.element_size() for p in trained) / num_trained,
        optimizer=kept,
    )
    shared_out = BytesPerParameter(dtype.itemsize, dtype.itemsize, 4 + (8 if has_muon else kept))
    sizes = (plain, shared_out, shared_out, shared_out)
    zero_0, zero_1, zero_2, zero_3 = (
        memory_per_rank(num_parameters, num_trained, size, zero_stage, world_size)
        for zero_stage, size in enumerate(sizes)
    )
    return zero_0, zero_1, zero_2, zero_3


def table_of(estimate: StageEstimate) -> Table:
    """The estimate of a stage for people."""
    e = estimate
    shared = f", in each batches of {e.batch_size}"
    if e.num_accumulations > 1:
        shared += f", {e.num_accumulations} accumulated"
    title = (
        f"{e.name}: {e.num_steps:,} steps of {e.step_batch_size} samples; processes: {e.world_size}{shared}"
    )
    table = Table(
        "", "", "", title=title, title_justify="left", title_style="bold", box=None, show_header=False
    )
    for number, (part, (trained, frozen)) in enumerate(e.parameters.items()):
        counts = [f"{count:,} {what}" for count, what in ((trained, "trained"), (frozen, "frozen")) if count]
        table.add_row("" if number else "parameters", part, ", ".join(counts))
    trained, frozen = (sum(counts) for counts in zip(*e.parameters.values(), strict=True))
    table.add_row("", "in all", f"{trained:,} trained, {frozen:,} frozen")
    tokens = f"{e.visual_tokens:.1f} visual, {e.text_tokens:.1f} text"
    table.add_row("tokens", "per sample", f"{tokens}, the mean of {e.num_measured} samples")
    table.add_row(
        "FLOPs", "per sample", f"{_si(e.forward_flops)} forward, {_si(e.flops)} with backward (counted)"
    )
    table.add_row("", "per step", _si(e.flops * e.step_batch_size))
    explained = (
        "weights, gradients, optimizer states; activations not included",
        "optimizer states shared out by DeepSpeed",
        "gradients, too",
        "weights, too",
    )
    for stage, (size, what) in enumerate(zip(e.memory, explained, strict=True)):
        table.add_row("" if stage else "memory", f"ZeRO-{stage}", f"{_si(size)}B per process ({what})")
    table.add_row(
        "time",
        "per sample",
        f"{describe_seconds(e.data_seconds)} to make it, {describe_seconds(e.sample_seconds)} forward and backward",
    )
    share = e.flops / e.sample_seconds / e.peak
    peak = f"{_si(e.peak)}FLOP/s in {str(e.dtype).removeprefix('torch.')}"
    table.add_row("", "", f"{share:.1%} of the matmul peak, {peak}")
    optimizer = f"of which {describe_seconds(e.optimizer_seconds)} for the optimizer"
    table.add_row("", "per step", f"{describe_seconds(e.step_seconds)}, {optimizer}")
    table.add_row(
        "", "in all", f"{describe_seconds(e.seconds)} for {e.num_steps * e.step_batch_size:,} samples"
    )
    return table


def _si(value: float) -> str:
    """`31_400_000_000` -> `31.4 G`."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def describe_seconds(seconds: float) -> str:
    """`0.0042` -> `4.2 ms`, `5025` -> `1 h 24 min`."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
