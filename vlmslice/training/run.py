"""Runs a stage: from its last complete checkpoint to its saved model."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import Subset
from transformers import ProgressCallback, TrainingArguments, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from vlmslice.canvas_mixer import CanvasMixer
from vlmslice.conv_stem import ConvStem
from vlmslice.data.tolerant import TolerantDataset
from vlmslice.training.checkpoints import commit, last_complete_checkpoint, writing
from vlmslice.training.decay import start_at
from vlmslice.training.freezing import format_parts, measure_parts
from vlmslice.training.progress import SampleProgress
from vlmslice.training.record import RECORD_FILE, check_same_start, describe_stage, write_record
from vlmslice.training.stage import Stage, TrainingError, share_batch
from vlmslice.training.stopping import Interrupted, SignalStop
from vlmslice.training.trainer import StageTrainer, mean_loss

DEFAULT_REPORTERS = ["tensorboard"]

_EXTRAS = {"tensorboard": "train", "trackio": "trackio", "wandb": "wandb"}


def run_stage(
    stage: Stage, run_dir: Path, previous: Path | None, resume: bool = True, recipe: str | None = None
) -> Path:
    """Trains one stage and saves its model under `run_dir / stage.name / "final"`.

    A stage that has been saved is not run again; one that was interrupted goes on from its last complete checkpoint.
    Under a launcher, every process calls this with the same arguments and a `run_dir` that all of them see.

    Args:
        previous: the saved model of the stage before.
        resume: False deletes what the stage has left in `run_dir` and begins anew.
        recipe: name of the recipe, for `recipe.json`; see `record`.

    Returns:
        The folder of the saved model.

    Raises:
        TrainingError: the stage cannot be run as asked.
        Interrupted: SIGTERM or SIGINT came; a checkpoint was saved.
        CheckpointError: a checkpoint or the model cannot be written.
        DivergenceError: too many steps had to be skipped.
        LostProcessError: another process died or stands still.
    """
    folder = run_dir / stage.name
    final = folder / "final"
    if resume:
        check_same_start(stage, folder)
    if resume and final.exists():
        return final
    check_reporters(stage)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    seed = stage.arguments.get("seed", 42)
    # Built whole, before a DeepSpeed config exists: under ZeRO-3 transformers would otherwise initialise the parts in
    # another order, and the weights would not be those of a run without it.
    unset_hf_deepspeed_config()
    set_seed(seed)
    model = stage.model(previous)
    parts = format_parts(measure_parts(model))  # now: ZeRO-3 will take the weights away
    if stage.muon and stage.arguments.get("deepspeed"):
        raise TrainingError(
            f"stage {stage.name!r} gives matrices to Muon, which DeepSpeed would cut up; train it without --deepspeed, "
            "or with --adamw"
        )
    arguments = training_arguments(stage, folder, num_processes)
    if arguments.deepspeed:
        _lengthen_scalars(model)
    if is_deepspeed_zero3_enabled():
        _gather_whole(model)
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=whole_steps(stage, folder),
        eval_dataset=stage.eval_dataset,
        compute_metrics=mean_loss,
        data_collator=stage.collator,
        learning_rates=stage.learning_rates,
        muon=stage.muon,
        diagnostics_steps=stage.diagnostics_steps,
        guard=stage.guard,
    )
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(SampleProgress(stage.name, stage.step_batch_size, parts))
    if trainer.is_world_process_zero():
        shutil.rmtree(folder / "incomplete" if resume else folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    _train(trainer, stage, folder, describe_stage(stage, arguments, recipe, previous))
    trained = _whole_model(trainer, stage, previous)
    if trainer.is_world_process_zero():
        aside = folder / "incomplete" / "final"
        with writing(final):
            trainer.save_state()
            aside.mkdir(parents=True)
            stage.save(trained, aside)
            shutil.copy(folder / RECORD_FILE, aside)
            commit(aside, final)
    trainer.accelerator.wait_for_everyone()
    return final


def _train(trainer: StageTrainer, stage: Stage, folder: Path, record: dict[str, Any]) -> None:
    """Trains from the last complete checkpoint to the end, or to a signal; `record` tells what is run."""
    # Chosen in one process for all: reading it takes time, and they must not come to two answers.
    found = [last_complete_checkpoint(folder) if trainer.is_world_process_zero() else None]
    checkpoint = broadcast_object_list(found)[0]
    if checkpoint:
        trainer.check_layout(checkpoint)
        trainer.load_guard(checkpoint)
    elif stage.starts_at:
        start_at(trainer, stage.starts_at)
    if trainer.is_world_process_zero():
        with writing(folder / RECORD_FILE):
            write_record(folder, record, checkpoint)
    with SignalStop() as stop:
        trainer.add_callback(stop)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except RuntimeError as error:
            lost = trainer.whereabouts.explain(error)
            if lost is None:
                raise
            raise lost from error
        if stop.agreed:
            trainer.accelerator.wait_for_everyone()  # for the process that saves; a launcher ends all with the first
            step = trainer.state.global_step
            raise Interrupted(
                f"stage {stage.name!r} was stopped by a signal after step {step} and saved as "
                f"{folder / f'checkpoint-{step}'}; give the same command again to go on"
            )


def _lengthen_scalars(model: nn.Module) -> None:
    """Makes parameters without axes, such as gates, vectors of one; DeepSpeed cannot send the former."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))


def _gather_whole(model: nn.Module) -> None:
    """Has ZeRO-3 gather the weights of a module at its first use, where processes call its parts unequally often.

    Stem and mixer run once for each shape of canvas, of which one process may have more than another; gathered part by
    part, the weights of one would be mixed up with those of the other, or the processes would wait for ever.
    """
    from deepspeed.utils import set_z3_leaf_modules

    classes = {type(module) for module in model.modules()} & {CanvasMixer, ConvStem}
    if classes:
        set_z3_leaf_modules(model, list(classes))
    for module in model.modules():
        if isinstance(module, ConvStem):
            module.register_forward_pre_hook(_track_pixels)


def _track_pixels(stem: nn.Module, args: tuple) -> tuple:
    """Lets the backward pass reach the pixels: only there does ZeRO-3 learn that the stem's gradients are complete."""
    pixels, *rest = args
    return (pixels.detach().requires_grad_(torch.is_grad_enabled()), *rest)


def check_reporters(stage: Stage) -> None:
    """Raises `TrainingError` if the stage reports to what is not installed; the Trainer would, after minutes of work.

    Reporters are the Trainer's own, and one without an extra of this package is left to its judgement.
    """
    reporters = stage.arguments.get("report_to", DEFAULT_REPORTERS)
    for reporter in [reporters] if isinstance(reporters, str) else reporters:
        extra = _EXTRAS.get(reporter)
        if extra and find_spec(reporter) is None:
            raise TrainingError(
                f"stage {stage.name!r} reports to {reporter}, which is not installed; pip install 'vlmslice[{extra}]', "
                "or --set report_to=none"
            )


def training_arguments(stage: Stage, folder: Path, num_processes: int) -> TrainingArguments:
    """The Trainer's arguments for a stage whose batch is shared by `num_processes`."""
    use_cpu = stage.arguments.get("use_cpu", not torch.accelerator.is_available())
    batch_size, num_accumulations = share_batch(
        stage.arguments["per_device_train_batch_size"],
        stage.arguments.get("gradient_accumulation_steps", 1),
        num_processes,
    )
    defaults: dict[str, Any] = {"remove_unused_columns": False, "report_to": DEFAULT_REPORTERS}
    if use_cpu and num_processes > 1:
        defaults["ddp_backend"] = "gloo"
        if not dist.is_initialized():
            # transformers would do so as well, but with a timeout of half an hour, whatever ddp_timeout says.
            seconds = stage.arguments.get("ddp_timeout", TrainingArguments.ddp_timeout)
            dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    return TrainingArguments(
        **defaults
        | stage.arguments
        | {
            "output_dir": str(folder),
            "use_cpu": use_cpu,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": num_accumulations,
        }
    )


def whole_steps(stage: Stage, folder: Path | None = None) -> Subset:
    """The dataset without the samples that fill no whole step: an epoch is then the same on any number of processes."""
    dataset: Any = stage.dataset
    if stage.max_skipped_share is not None and folder is not None:
        dataset = TolerantDataset(dataset, folder / "skipped.jsonl", stage.max_skipped_share)
    num_samples = len(stage.dataset)  # type: ignore[arg-type]  # map-style datasets have a length
    if stage.fills_steps:
        num_filled = -(-num_samples // stage.step_batch_size) * stage.step_batch_size
        return Subset(dataset, [i % num_samples for i in range(num_filled)])
    num_steps = num_samples // stage.step_batch_size
    if not num_steps:
        raise TrainingError(
            f"stage {stage.name!r} has {num_samples} samples, fewer than one step of {stage.step_batch_size}; give it "
            "more data or a smaller per_device_train_batch_size"
        )
    return Subset(dataset, range(num_steps * stage.step_batch_size))


def _whole_model(trainer: StageTrainer, stage: Stage, previous: Path | None) -> nn.Module:
    """The trained model with all its weights in this process (meaningful in the first process only).

    DeepSpeed's engine keeps hold of the module it trained, and under ZeRO-3 that module has no weights of its own; so
    the weights are gathered and put into a fresh one.
    """
    if not trainer.is_deepspeed_enabled:
        return trainer.accelerator.unwrap_model(trainer.model)
    weights = trainer.accelerator.get_state_dict(trainer.deepspeed)
    unset_hf_deepspeed_config()
    model = stage.model(previous)
    if trainer.is_world_process_zero():
        # As they were before `_lengthen_scalars`.
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        model.load_state_dict({name: value.reshape(shapes[name]) for name, value in weights.items()})
    return model
