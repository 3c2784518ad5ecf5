"""Loss weighting: what one answer id counts, beside those of its own sample and of all others.

With samples s of a step, n_s answer ids in sample s, and the surprise l_si = -log p(id i of sample s), the loss is ::

    loss = sum_s w(n_s) sum_i l_si / sum_s w(n_s) n_s

    per_token     w(n) = 1            every id counts the same: a long answer counts by its length
    per_sample    w(n) = 1 / n        every sample counts the same: an id of a long answer counts little
    square_root   w(n) = 1 / sqrt(n)  in between: a sample counts sqrt(n); InternVL 2.5's "square averaging"
                                      (Chen et al., 2024, https://arxiv.org/abs/2412.05271)

An answer of 4 ids beside one of 100 counts 1 : 25, 1 : 1 and 1 : 5. The sums go over a whole optimizer step, all its
accumulated batches and all processes, so it does not matter which samples share a row, a batch or a process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vlmslice.data.collator import IGNORED
from vlmslice.errors import VlmSliceError, suggestion

_POWERS = {"per_token": 0.0, "per_sample": -1.0, "square_root": -0.5}

WEIGHTINGS = tuple(_POWERS)
"""Names of the weightings."""


class WeightingError(VlmSliceError, ValueError):
    """There is no weighting of this name."""


class WeightingCollator:
    """Another collator's batch of one sample per row, with `loss_weights`: `float32[B, L]`.

    The model takes them, and `StageTrainer` divides by their sum over the step. For packed rows wrap in this order:
    `PackingCollator(WeightingCollator(VlmSliceCollator(processor), "square_root"), max_length=1024)`.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], Any], weighting: str):
        """`weighting`: one of `WEIGHTINGS`."""
        if weighting not in _POWERS:
            raise WeightingError(
                f"loss weighting is {weighting!r}, expected one of {', '.join(WEIGHTINGS)}"
                f"{suggestion(weighting, WEIGHTINGS)}"
            )
        self.collator = collator
        self.weighting = weighting

    def __call__(self, samples: Sequence[Any]) -> Any:
        batch = self.collator(samples)
        batch["loss_weights"] = weigh_answers(batch["labels"], self.weighting)
        return batch


def weigh_answers(labels: torch.Tensor, weighting: str) -> torch.Tensor:
    """`float32[B, L]`: the weight of each answer id of B samples, 0 where there is none.

    Args:
        labels: `int64[B, L]`, one sample per row.
        weighting: one of `WEIGHTINGS`.
    """
    is_answer = labels != IGNORED
    num_ids = is_answer.sum(dim=1, keepdim=True).clamp_min(1)
    return is_answer * num_ids.float() ** _POWERS[weighting]


def weighted_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean surprise of the labels, in nats, each with its weight.

    Args:
        logits: `[B, L, vocabulary]`; those at a position foretell the label of the next.
        labels: `int64[B, L]`.
        weights: `[B, L]` of the labels.
    """
    surprise = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    weights = weights[:, 1:].flatten().to(surprise.dtype)
    return (weights * surprise).sum() / weights.sum().clamp_min(1e-9)  # without any answer, 0


def total_weight(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """By what the loss of a batch is divided: the sum of its `loss_weights`, or without them its answer ids."""
    if "loss_weights" in batch:
        return batch["loss_weights"][:, 1:].float().sum()
    return (batch["labels"][:, 1:] != IGNORED).sum()
