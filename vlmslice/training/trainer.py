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
from vlmslice.loss_weighting import total_weight
from vlmslice.matmul_peak import matmul_peak
from vlmslice.training.checkpoints import (
    MANIFEST,
    commit,
    complete_checkpoints,
    discard,
    seal_checkpoint,
    writing,
)
from vlmslice.training.diagnostics import Diagnostics
from vlmslice.training.guards import DivergenceError, GuardConfig, StepGuard
from vlmslice.training.optimizer import MuonAdamW, find_matrices
from vlmslice.training.stage import TrainingError
from vlmslice.training.throughput import Throughput
from vlmslice.training.whereabouts import Whereabouts

_GUARD = "guard.json"


def mean_loss(sums: EvalPrediction) -> dict[str, float]:
    """Mean loss of an answer id over a whole evaluation, from what `StageTrainer.prediction_step` gives."""
    return {"loss": float(np.sum(sums.predictions) / np.sum(sums.label_ids))}


class StageTrainer(Trainer):
    """Trainer whose steps do not depend on the number of processes, with checkpoints that survive a kill.

    It also averages the figures in a model output's `metrics` and logs them with the loss, and what all processes
    compute: samples and tokens (visual and text, without padding) per second, and FLOP/s as a share of `matmul_peak`.
    """

    def __init__(
        self,
        *args,
        learning_rates: dict[str, float] | None = None,
        muon: tuple[str, ...] = (),
        diagnostics_steps: int | None = None,
        guard: GuardConfig | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.guard = StepGuard(guard or GuardConfig(), self.args.device)
        self.whereabouts = Whereabouts()
        self._learning_rates = learning_rates or {}
        self._muon = muon
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._last_log: tuple[float, int] | None = None
        self._writing_aside = False
        assert self.model is not None
        self._throughput = Throughput(self.model, counts_flops=not self.args.torch_compile)
        self._diagnostics = Diagnostics(diagnostics_steps)
        self.add_callback(self._diagnostics)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As the Trainer's, which counts answer ids; batches with `loss_weights` have these added up instead."""
        self._tell("reads its batch")
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if num_items is not None and "loss_weights" in batches[0]:
            total = torch.stack([total_weight(batch) for batch in batches]).sum().to(device)
            num_items = self.accelerator.gather(total).sum()
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss, weighted so that every answer id of a step counts the same, or by its `loss_weights`.

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
            num_items = total_weight(inputs)
            # Gradients are averaged over the processes afterwards, and summed over the accumulated batches. A step all
            # of whose samples were skipped (see `data.tolerant`) has no items.
            share = num_items / max(num_items_in_batch, 1) * self.accelerator.num_processes
            auxiliary_loss = outputs.get("auxiliary_loss")
            if auxiliary_loss is None:
                loss = loss * share
            else:
                loss = (
                    loss - auxiliary_loss
                ) * share + auxiliary_loss / self.args.gradient_accumulation_steps
        self._tell("computes gradients")
        return (loss, outputs) if return_outputs else loss

    def _tell(self, doing: str) -> None:
        self.whereabouts.tell(self.state.global_step + 1, doing)

    def _run_epoch(self, *args, **kwargs):
        """One epoch; none if the last step was taken before the run was interrupted.

        The Trainer looks whether it is done after each step only, and would take one too many.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_num_items_in_batch(self, *args, **kwargs):
        self._tell("has read its batch")
        return super()._get_num_items_in_batch(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        self._tell("computes the loss")
        with self._throughput.count(inputs):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.guard.add_loss(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradient norm, after the guard has been asked. Gradients that are not to be used are dropped.

        Without gradients an optimizer leaves weights and its own state as they are, bit for bit.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        norm = float(grad_norm)
        if self.accelerator.scaler is not None and not math.isfinite(norm):
            norm = 0.0  # fp16: the loss scaler looks for its scale by such steps, and skips them itself
        step = self.state.global_step + 1
        is_admitted = self.guard.admits(norm, step)
        if not is_admitted:
            if self.is_deepspeed_enabled and not self.accelerator.optimizer_step_was_skipped:
                raise DivergenceError(
                    f"step {step}: the loss is not finite but its gradients are; DeepSpeed has taken the step, so "
                    "the weights of this process are of no use; give the same command again to go on from the last "
                    "checkpoint, or run without DeepSpeed, where such a step is skipped"
                )
            model.zero_grad()
        return grad_norm

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
            logs |= self._diagnostics.take()
            if self.guard.counts.skipped:
                logs["skipped_steps"] = self.guard.counts.skipped
            self._sums, self._counts = {}, {}
            now = time.perf_counter()
            if self._last_log is not None:
                before, step = self._last_log
                num_samples = (self.state.global_step - step) * self.get_total_train_batch_size(self.args)
                logs["samples_per_second"] = round(num_samples / (now - before), 2)
                logs |= self._throughput_figures(now - before)
            self._throughput.reset()
            self._last_log = time.perf_counter(), self.state.global_step
        super().log(logs, *args, **kwargs)

    def _throughput_figures(self, seconds: float) -> dict[str, float]:
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        counts = [
            (
                self._throughput.num_tokens,
                self._throughput.num_flops,
                matmul_peak(dtype, self.args.device.type),
            )
        ]
        num_tokens, num_flops, peak = (sum(values) for values in zip(*gather_object(counts), strict=True))
        figures = {"tokens_per_second": round(num_tokens / seconds, 1)}
        if num_flops:
            figures["flops_share"] = round(num_flops / seconds / peak, 4)
        return figures

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
        """Has the Trainer write the checkpoint aside, then commits it and drops the oldest complete ones.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._tell("saves a checkpoint")
        folder = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        aside = folder / "incomplete" / name
        with writing(folder / name):
            self._writing_aside = True
            super()._save_checkpoint(model, trial)
            self._writing_aside = False
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        with writing(folder / name):
            (aside / _GUARD).write_text(json.dumps(self.guard.state_dict()) + "\n")
            seal_checkpoint(aside, self._layout())
            commit(aside, folder / name)
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

    def load_guard(self, checkpoint: Path) -> None:
        """Gives the guard what it knew when `checkpoint` was written."""
        path = checkpoint / _GUARD
        if path.exists():  # not in those written before there was a guard
            self.guard.load_state_dict(json.loads(path.read_text()))

    def check_layout(self, checkpoint: Path) -> None:
        """Raises `TrainingError` if `checkpoint` was written under another ZeRO stage or number of processes."""
        got = json.loads((checkpoint / MANIFEST).read_text())["layout"]
        if got != self._layout():
            raise TrainingError(
                f"{checkpoint} was written with {got}, this run has {self._layout()}; resume it with the launcher and "
                "the DeepSpeed config it was begun with (without DeepSpeed the number of processes is free)"
            )
