"""Answers that go round in circles: a small model that loses its place writes the same piece over and over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

LEAST_REPEATS = 4
LEAST_LENGTH = 160
"""Tokens. Rulings, dotted lines and rows of empty cells repeat a piece of text as well, but not for so long."""


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether the last tokens are one piece, written at least `LEAST_REPEATS` times and over `LEAST_LENGTH` tokens.

    Example: `[7] + 80 * [5, 6]` does, `[7] + 79 * [5, 6]` does not.
    """
    for period in range(1, len(ids) // LEAST_REPEATS + 1):
        if ids[-1] != ids[-1 - period]:
            continue
        length = max(LEAST_REPEATS * period, LEAST_LENGTH)
        if length > len(ids):
            continue
        if all(ids[-k] == ids[-k - period] for k in range(1, length - period + 1)):
            return True
    return False


class StopLoops(StoppingCriteria):
    """Ends each answer of a batch that goes round in circles; `stopped` holds the tokens of each that it ended."""

    def __init__(self, num_prompt_ids: int):
        """`num_prompt_ids`: ids that stand before the answers."""
        self._start = num_prompt_ids
        self.stopped: dict[int, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        length = input_ids.shape[1] - self._start
        if length >= LEAST_LENGTH:
            for row, ids in enumerate(input_ids[:, self._start :].tolist()):
                if row not in self.stopped and ends_in_loop(ids):
                    self.stopped[row] = length
        stopped = [row in self.stopped for row in range(len(input_ids))]
        return torch.tensor(stopped, device=input_ids.device)
