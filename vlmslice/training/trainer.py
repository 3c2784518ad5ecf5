"""The Trainer's step, log, optimizer and checkpoints as a stage wants them."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from transformers import EvalPrediction, Trainer

from vlmslice.data.collator import IGNORED
from vlmslice.training.checkpoints import MANIFEST, commit, complete_checkpoints, discard, seal_checkpoint
from vlmslice.training.optimizer import MuonAdamW, find_matrices
from vlmslice.training.stage import TrainingError


def mean_loss(sums: EvalPrediction) -> dict[str, float]:
    """Mean loss of an answer id over a whole evaluation, from what `StageTrainer.prediction_step` gives."""
    return {"loss": float(np.sum(sums.predictions) / np.sum(sums.label_ids))}


class StageTrainer(Trainer):
    """Trainer whose steps do not depend on the number of processes, with checkpoints that survive a kill.

    It also averages the figures in a model output's `metrics` and logs them, and samples per second, with the loss.
    """

    def __init__(
        self,
        *args,
        learning_rates: dict[str, float] | None = None,
        muon: tuple[str, ...] = (),
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self._learning_rates = learning_rates or {}
        self._muon = muon
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._last_log: tuple[float, int] | None = None
        self._writing_aside = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss, weighted so that every answer id of a step counts the same.

        A model gives the mean over its own batch. With 10 answer ids here and 30 in the other process, the mean of
        the two means would give an id here three times the weight of one there.
        """
        outputs = model(**inputs)
        for name, value in (outputs.get("metrics") or {}).items():
            value = float(value)
            if math.isfinite(value):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            num_items = (inputs["labels"][:, 1:] != IGNORED).sum()
            # Gradients are averaged over the processes afterwards, and summed over the accumulated batches.
            share = num_items / num_items_in_batch * self.accelerator.num_processes
            auxiliary_loss = outputs.get("auxiliary_loss")
            if auxiliary_loss is None:
                loss = loss * share
            else:
                loss = (
                    loss - auxiliary_loss
                ) * share + auxiliary_loss / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """For each sample the sum of the losses of its answer ids, and their number, in place of logits and labels.

        The Trainer's own figure, a mean over batches, would depend on how samples are batched.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits_BLV = model(**inputs)["logits"][:, :-1].float()
        labels_BL = inputs["labels"][:, 1:]
        losses_BL = F.cross_entropy(
            logits_BLV.transpose(1, 2), labels_BL, reduction="none", ignore_index=IGNORED
        )
        return None, losses_BL.sum(1), (labels_BL != IGNORED).sum(1)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            sums: dict[str, list[float]] = {}
            for name, value, count in gather_object([(n, v, self._counts[n]) for n, v in self._sums.items()]):
                pair = sums.setdefault(name, [0.0, 0.0])
                pair[0] += value
                pair[1] += count
            logs = logs | {name: round(value / count, 4) for name, (value, count) in sums.items()}
            self._sums, self._counts = {}, {}
            now = time.perf_counter()
            if self._last_log is not None:
                before, step = self._last_log
                num_samples = (self.state.global_step - step) * self.get_total_train_batch_size(self.args)
                logs["samples_per_second"] = round(num_samples / (now - before), 2)
            self._last_log = now, self.state.global_step
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        """AdamW as the Trainer makes it, its groups split by `learning_rates`, the matrices of `muon` given to Muon."""
        # Under DeepSpeed the Trainer asks twice; the second time the factors are in already.
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not (self._learning_rates or self._muon) or not is_new:
            return optimizer
        assert self.model is not None
        names = {id(p): n for n, p in self.model.named_parameters()}
        matrices = {id(p) for p in find_matrices(self.model, self._muon)} if self._muon else set()
        groups = []
        for group in optimizer.param_groups:
            parts: dict[tuple[float, bool], list] = {}
            for parameter in group["params"]:
                name = names[id(parameter)]
                factor = next(
                    (f for prefix, f in self._learning_rates.items() if name.startswith(prefix)), 1.0
                )
                parts.setdefault((factor, id(parameter) in matrices), []).append(parameter)
            rest = {k: v for k, v in group.items() if k != "params"}
            # The Trainer logs the first group's rate: let it be the undiminished one.
            ordered = sorted(parts.items(), key=lambda item: item[0][0] != 1.0)
            groups += [
                rest
                | {"params": ps, "lr": rest["lr"] * factor}
                | ({"is_matrix": is_matrix} if self._muon else {})
                for (factor, is_matrix), ps in ordered
            ]
        if self._muon:
            kept = ("params", "lr", "weight_decay", "is_matrix")
            self.optimizer = MuonAdamW(
                [{key: group[key] for key in kept} for group in groups],
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
            return self.optimizer
        optimizer.param_groups.clear()
        for group in groups:
            optimizer.add_param_group(group)
        return optimizer

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, "incomplete") if self._writing_aside else folder

    def _save_checkpoint(self, model, trial) -> None:
        """Has the Trainer write the checkpoint aside, then commits it and drops the oldest complete ones."""
        self._writing_aside = True
        super()._save_checkpoint(model, trial)
        self._writing_aside = False
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        folder = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        seal_checkpoint(folder / "incomplete" / name, self._layout())
        commit(folder / "incomplete" / name, folder / name)
        if self.args.save_total_limit:
            for path in complete_checkpoints(folder)[: -self.args.save_total_limit]:
                discard(path)

    def _layout(self) -> dict[str, int]:
        """How the optimizer is spread over processes; a checkpoint only fits the layout it was written in."""
        if not self.is_deepspeed_enabled:
            return {"zero_stage": 0}
        return {
            "zero_stage": self.args.hf_deepspeed_config.config["zero_optimization"]["stage"],
            "num_processes": self.args.world_size,
        }

    def check_layout(self, checkpoint: Path) -> None:
        """Raises `TrainingError` if `checkpoint` was written under another ZeRO stage or number of processes."""
        got = json.loads((checkpoint / MANIFEST).read_text())["layout"]
        if got != self._layout():
            raise TrainingError(
                f"{checkpoint} was written with {got}, this run has {self._layout()}; resume it with the launcher and "
                "the DeepSpeed config it was begun with (without DeepSpeed the number of processes is free)"
            )
