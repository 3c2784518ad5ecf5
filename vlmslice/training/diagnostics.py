"""Figures that tell which part of a model learns, and a warning that names the part that has stopped.

Every so many steps, for each part of the model (see `part_of`) that is trained:

- `PART/grad_norm`: norm of its gradient as the optimizer gets it, after clipping
- `PART/update_ratio`: root mean square (RMS) of a step's update over the RMS of the weights. Around 1e-3 is common for
  weights that learn (A. Karpathy, https://cs231n.github.io/neural-networks-3/#ratio); a fresh bias has a larger one
- `connector/effective_rank`: in how many directions its visual tokens spread, see `effective_rank`
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict

import torch
from torch import nn
from transformers import TrainerCallback

from vlmslice.training.freezing import part_of
from vlmslice.training.throughput import find_vlm

_log = logging.getLogger(__name__)

MIN_UPDATE_RATIO = 1e-6
"""Below it a part stands still: fp32 holds a weight to 6e-8 of its size, and updates near to that are rounded away."""

MIN_RANK_SHARE = 0.1
"""Of the highest effective rank that was measured, both less 1; below it the visual tokens have become alike."""

PATIENCE = 3
"""Measurements in a row before a warning."""

_NUM_MEASUREMENTS = 10
_MAX_ELEMENTS = 2**16
_MAX_TOKENS = 1024


def trained_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters that are trained, by part."""
    parts = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[part_of(name)].append(parameter)
    return dict(parts)


def effective_rank(rows: torch.Tensor) -> float:
    """Effective rank of `[N, D]` (Roy and Vetterli, 2007, https://ieeexplore.ieee.org/document/7098875).

    `exp` of the entropy of the singular values, each taken as a share of their sum: 1 if all rows are multiples of one,
    k if they spread alike in k directions. 0 if all rows are 0.
    """
    singular_values = torch.linalg.svdvals(rows.detach().float())
    shares = singular_values / singular_values.sum()
    return float(torch.special.entr(shares).sum().exp()) if singular_values.any() else 0.0


class Diagnostics(TrainerCallback):
    """Measures every `steps` optimizer steps; `take` hands the figures to the log.

    Measured is in the first process, as weights and gradients are the same in all. In the update ratio, 65,536 elements
    spread over a weight stand for the rest, so it needs little memory whatever the model; in the effective rank, 1,024
    visual tokens for those of a batch.

    Under DeepSpeed, which cuts gradients up and steps inside of the backward pass, only the effective rank is measured.

    Args:
        steps: by default every tenth log, or oftener where a stage is too short for ten measurements; 0 for never.
    """

    def __init__(self, steps: int | None = None):
        self._steps = steps
        self._figures: dict[str, float] = {}
        self._is_measuring = self._sees_weights = False
        self._before: dict[str, list[torch.Tensor]] = {}
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._num_failures: dict[str, int] = defaultdict(int)
        self._highest_rank = 0.0

    def take(self) -> dict[str, float]:
        """The figures measured since the last call."""
        figures, self._figures = self._figures, {}
        return {name: float(f"{value:.4g}") for name, value in figures.items()}

    def on_train_begin(self, args, state, control, **kwargs):
        if self._steps is None:
            every = max(1, state.logging_steps)
            self._steps = every * min(10, max(1, state.max_steps // every // _NUM_MEASUREMENTS))
        self._sees_weights = args.deepspeed is None
        if self._steps and not self._sees_weights and state.is_world_process_zero:
            _log.warning(
                "no gradient norms and update ratios of parts will be logged: DeepSpeed cuts gradients up; leave "
                "--deepspeed out to see them"
            )

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        is_due = bool(self._steps) and (state.global_step + 1) % self._steps == 0
        self._is_measuring = is_due and state.is_world_process_zero
        vlm = find_vlm(model)
        if self._is_measuring and vlm is not None:
            self._hook = vlm.connector.register_forward_hook(self._measure_rank)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self._is_measuring or not self._sees_weights:
            return
        for part, parameters in trained_parts(model).items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            self._figures[f"{part}/grad_norm"] = float(nn.utils.get_total_norm(gradients))
            self._before[part] = [_sample(p).clone() for p in parameters]

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self._before:
            return
        for part, parameters in trained_parts(model).items():
            update = weight = 0.0
            for parameter, before in zip(parameters, self._before[part], strict=True):
                elements_per_sample = parameter.numel() / before.numel()
                update += elements_per_sample * _sum_of_squares(_sample(parameter) - before)
                weight += elements_per_sample * _sum_of_squares(before)
            if weight:
                self._figures[f"{part}/update_ratio"] = math.sqrt(update / weight)
        self._before = {}

    def on_step_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._is_measuring:
            self._warn_of_problems(state.global_step)
        self._is_measuring = False

    def _measure_rank(self, module: nn.Module, args: tuple, outputs: tuple) -> None:
        tokens_VQE, valid_VQ = outputs
        tokens = tokens_VQE.detach()[valid_VQ]
        stride = max(1, math.ceil(len(tokens) / _MAX_TOKENS))
        self._figures["connector/effective_rank"] = effective_rank(tokens[::stride])

    def _warn_of_problems(self, step: int) -> None:
        """Counts for how many measurements each figure has been bad, and warns when there are `PATIENCE` in a row."""
        for name, value in self._figures.items():
            part, _, figure = name.partition("/")
            if figure == "grad_norm":
                is_bad, means = value == 0, "gets no gradient; does the loss depend on it?"
            elif figure == "update_ratio":
                is_bad = value < MIN_UPDATE_RATIO
                means = f"has stopped learning, below {MIN_UPDATE_RATIO:g}; look at its learning rate and its gradient"
            else:
                self._highest_rank = max(self._highest_rank, value)
                is_bad = value - 1 < MIN_RANK_SHARE * (self._highest_rank - 1)
                means = (
                    f"gives visual tokens that have become alike (they spread in {self._highest_rank:.4g} directions "
                    "before); try a lower learning rate for it"
                )
            self._num_failures[name] = self._num_failures[name] + 1 if is_bad else 0
            if self._num_failures[name] == PATIENCE:
                _log.warning(
                    "step %d: part %r %s (%s %.3g, %d measurements in a row)",
                    *(step, part, means, figure, value, PATIENCE),
                )


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """At most `_MAX_ELEMENTS` elements of a weight, in steps of an odd number so that no column is left out."""
    elements = weight.detach().flatten()
    return elements[:: math.ceil(len(elements) / _MAX_ELEMENTS) | 1]


def _sum_of_squares(elements: torch.Tensor) -> float:
    return float(elements.float().square().sum())
