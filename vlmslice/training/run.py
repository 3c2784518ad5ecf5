"""Runs a stage: from its last complete checkpoint to its saved model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset
from transformers import ProgressCallback, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vlmslice.training.checkpoints import commit, last_complete_checkpoint
from vlmslice.training.decay import start_at
from vlmslice.training.progress import SampleProgress
from vlmslice.training.record import RECORD_FILE, check_same_start, describe_stage, write_record
from vlmslice.training.stage import Stage, TrainingError, share_batch
from vlmslice.training.trainer import StageTrainer, mean_loss


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
    """
    folder = run_dir / stage.name
    final = folder / "final"
    if resume:
        check_same_start(stage, folder)
    if resume and final.exists():
        return final
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    seed = stage.arguments.get("seed", 42)
    # Built whole, before a DeepSpeed config exists: under ZeRO-3 transformers would otherwise initialise the parts in
    # another order, and the weights would not be those of a run without it.
    unset_hf_deepspeed_config()
    set_seed(seed)
    model = stage.model(previous)
    if stage.muon and stage.arguments.get("deepspeed"):
        raise TrainingError(
            f"stage {stage.name!r} gives matrices to Muon, which DeepSpeed would cut up; train it without --deepspeed, "
            "or with --adamw"
        )
    arguments = _training_arguments(stage, folder, num_processes)
    trainer = StageTrainer(
        model=model,
        args=arguments,
        train_dataset=_whole_steps(stage),
        eval_dataset=stage.eval_dataset,
        compute_metrics=mean_loss,
        data_collator=stage.collator,
        learning_rates=stage.learning_rates,
        muon=stage.muon,
    )
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(SampleProgress(stage.name, stage.step_batch_size))
    if trainer.is_world_process_zero():
        shutil.rmtree(folder / "incomplete" if resume else folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint:
        trainer.check_layout(checkpoint)
    elif stage.starts_at:
        start_at(trainer, stage.starts_at)
    if trainer.is_world_process_zero():
        write_record(folder, describe_stage(stage, arguments, recipe, previous), checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_state()
    trained = _whole_model(trainer, stage, previous)
    if trainer.is_world_process_zero():
        aside = folder / "incomplete" / "final"
        aside.mkdir(parents=True)
        stage.save(trained, aside)
        shutil.copy(folder / RECORD_FILE, aside)
        commit(aside, final)
    trainer.accelerator.wait_for_everyone()
    return final


def _training_arguments(stage: Stage, folder: Path, num_processes: int) -> TrainingArguments:
    use_cpu = stage.arguments.get("use_cpu", not torch.accelerator.is_available())
    batch_size, num_accumulations = share_batch(
        stage.arguments["per_device_train_batch_size"],
        stage.arguments.get("gradient_accumulation_steps", 1),
        num_processes,
    )
    defaults: dict[str, Any] = {"remove_unused_columns": False, "report_to": ["tensorboard"]}
    if use_cpu and num_processes > 1:
        defaults["ddp_backend"] = "gloo"
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


def _whole_steps(stage: Stage) -> Dataset:
    """The dataset without the samples that fill no whole step: an epoch is then the same on any number of processes."""
    num_samples = len(stage.dataset)  # type: ignore[arg-type]  # map-style datasets have a length
    if stage.fills_steps:
        num_filled = -(-num_samples // stage.step_batch_size) * stage.step_batch_size
        return Subset(stage.dataset, [i % num_samples for i in range(num_filled)])
    num_steps = num_samples // stage.step_batch_size
    if not num_steps:
        raise TrainingError(
            f"stage {stage.name!r} has {num_samples} samples, fewer than one step of {stage.step_batch_size}; give it "
            "more data or a smaller per_device_train_batch_size"
        )
    return Subset(stage.dataset, range(num_steps * stage.step_batch_size))


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
        model.load_state_dict(weights)
    return model
