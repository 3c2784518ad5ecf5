"""Steps that would spoil the weights are not taken: by none of the processes, or by all.

One batch with a loss that is not a number makes every weight NaN, and the average of gradients carries it from one
process to all. So before each optimizer step the processes tell one another their loss and gradient norm; each sees the
same figures, and comes to the same decision.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from vlmslice.errors import VlmSliceError

_log = logging.getLogger(__name__)


class DivergenceError(VlmSliceError, ArithmeticError):
    """Too many steps had a loss or gradients that are no numbers, or stood out."""


@dataclass(frozen=True)
class GuardConfig:
    """When a step is skipped, and when a run is given up.

    Attributes:
        max_in_a_row: this many skipped steps one after the other end the run.
        max_share: so does a larger share of skipped steps among all, counted from `min_steps` on.
        min_steps: before so many steps the share says little.
        spike_factor: a loss or gradient norm above this multiple of its median over the last `window` steps is a
            spike; it is told in the log.
        window: steps of that median; spikes are looked for once a quarter of them are there.
        skip_spikes: spikes are skipped, too. Not under DeepSpeed, which steps by itself.
    """

    max_in_a_row: int = 5
    max_share: float = 0.1
    min_steps: int = 50
    spike_factor: float = 10.0
    window: int = 64
    skip_spikes: bool = False


@dataclass
class _Counts:
    steps: int = 0
    skipped: int = 0
    in_a_row: int = 0
    spikes: int = 0


class StepGuard:
    """Decides for each step whether it is taken; the same in every process.

    Attributes:
        counts: of steps, skipped steps (in all, and in a row) and spikes.
    """

    def __init__(self, config: GuardConfig, device: torch.device):
        self.config = config
        self.counts = _Counts()
        self._device = device
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self._loss = 0.0

    def add_loss(self, loss: torch.Tensor) -> None:
        """Counts in the loss of one of the batches that the step accumulates."""
        self._loss += loss.item()

    def admits(self, grad_norm: float, step: int) -> bool:
        """Whether the step is to be taken, after all gradients are there; collective.

        A skipped step counts as a step of the run and of its schedule, so all that follows comes when it would have.

        Args:
            grad_norm: of the whole gradient; NaN or infinite if any part of it is.
            step: number of this step, for the log.

        Raises:
            DivergenceError: too many were skipped; in all processes at once.
        """
        figures = _gather([self._loss, grad_norm], self._device)
        self._loss = 0.0
        self.counts.steps += 1
        reason = self._find_fault(figures)
        is_skipped = reason is not None
        if reason is None:
            loss = statistics.fmean(loss for loss, _ in figures)
            norm = max(norm for _, norm in figures)
            reason = self._find_spike(loss, norm)
            if reason is not None:
                self.counts.spikes += 1
                is_skipped = self.config.skip_spikes
            if not is_skipped:
                self._losses.append(loss)
                self._norms.append(norm)
        self.counts.skipped += is_skipped
        self.counts.in_a_row = self.counts.in_a_row + 1 if is_skipped else 0
        if reason is not None:
            end = "; the step is skipped" if is_skipped else ""
            if not dist.is_initialized() or dist.get_rank() == 0:
                _log.warning("step %d: %s%s", step, reason, end)
            self._check(reason, step)
        return not is_skipped

    def _find_fault(self, figures: list[list[float]]) -> str | None:
        faulty = [rank for rank, (loss, _) in enumerate(figures) if not math.isfinite(loss)]
        if faulty:
            return f"the loss is {figures[faulty[0]][0]} on rank {', '.join(map(str, faulty))}"
        norms = [norm for _, norm in figures if not math.isfinite(norm)]
        return f"the gradient norm is {norms[0]}" if norms else None

    def _find_spike(self, loss: float, norm: float) -> str | None:
        if len(self._losses) < max(self.config.window // 4, 1):
            return None
        for name, value, earlier in (("loss", loss, self._losses), ("gradient norm", norm, self._norms)):
            median = statistics.median(earlier)
            if value > self.config.spike_factor * median > 0:
                return f"the {name} is {value:.4g}, {value / median:.1f} times its median {median:.4g}"
        return None

    def _check(self, reason: str, step: int) -> None:
        counts = self.counts
        share = counts.skipped / counts.steps
        if counts.in_a_row >= self.config.max_in_a_row:
            much = (
                f"{counts.in_a_row} steps in a row were skipped, max_in_a_row is {self.config.max_in_a_row}"
            )
        elif counts.steps >= self.config.min_steps and share > self.config.max_share:
            much = (
                f"{counts.skipped} of {counts.steps} steps were skipped, max_share is {self.config.max_share}"
            )
        else:
            return
        raise DivergenceError(
            f"{much}; at step {step} {reason}. No skipped step has touched a weight. Lower learning_rate, set "
            "max_grad_norm, or look at the data of these steps; then give the same command again to go on from the "
            "last checkpoint"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide as an undisturbed one; for JSON."""
        return {"counts": asdict(self.counts), "losses": list(self._losses), "norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = _Counts(**state["counts"])
        # Steps in a row are those of one process: a run that is started again gets its chance.
        self.counts.in_a_row = 0
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])


def _gather(values: list[float], device: torch.device) -> list[list[float]]:
    """`values` of every process, by rank."""
    if not dist.is_initialized():
        return [values]
    mine = torch.tensor(values, device=device, dtype=torch.float32)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).tolist()
