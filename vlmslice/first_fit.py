"""First fit: the look-up by which an answer points at one object after the other.

Legend: B samples, L text tokens, M visual tokens of a sample (padded), N the same in the order of pointing, K head
width, E text width.

"The first object that fits, row by row, ahead of the last point" is hard for a softmax: what fits stands out by some
nats, and among all that fits the nearest must stand out again, from one row to the next of sixty. Where it does not,
attention is spread over two objects, and the answer takes its row from one and its column from the other. So here each
token fits or does not, by itself, and the first of those that fit is taken: with the probability f of a token that it
fits, it is found with f times the probability that none before it does (monotonic attention: Raffel et al., 2017,
https://arxiv.org/abs/1704.00784).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vlmslice.pointing import NOWHERE
from vlmslice.process_group import average_over_processes

BEYOND = 1 << 30
"""Row and column of what lies nowhere on the canvas, after all that does."""
_RARELY = -6.0
"""Logit with which tokens fit at first: of thousands, few."""
_NEVER = -1e4


class PointingOrder(NamedTuple):
    """The tokens of each sample in the order of pointing, row by row; what cannot be pointed at comes last.

    Attributes:
        tokens: `int64[B, N]` numbers of the tokens.
        rows, cols: `int64[B, N]` where they lie, in blocks; beyond all places for those that cannot be pointed at.
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    cols: torch.Tensor

    def candidates(self, points_BL3: torch.Tensor | None) -> torch.Tensor:
        """`bool[B, L or 1, N]`: what may come next.

        Args:
            points_BL3: see `pointing.last_points`, in blocks; None where there is none yet.
        """
        rows_B1N, cols_B1N = self.rows[:, None], self.cols[:, None]
        exists_B1N = rows_B1N < BEYOND
        if points_BL3 is None:
            return exists_B1N
        last_row, last_col, told_row = points_BL3.unsqueeze(-2).unbind(-1)
        ahead = (rows_B1N > last_row) | ((rows_B1N == last_row) & (cols_B1N > last_col))
        return exists_B1N & ahead & ((told_row == NOWHERE) | (rows_B1N == told_row))


def order_for_pointing(places_BM2: torch.Tensor, can_point_BM: torch.Tensor) -> PointingOrder:
    """Sorts tokens by row and column, those alike by number.

    Args:
        places_BM2: `int64[B, M, 2]` rows and columns, in blocks.
        can_point_BM: `bool[B, M]`, False for padding and for tokens of an overview.
    """
    rows, cols = (part.masked_fill(~can_point_BM, BEYOND) for part in places_BM2.unbind(-1))
    tokens = (rows * (1 << 31) + cols).argsort(dim=1, stable=True)
    return PointingOrder(tokens, rows.gather(1, tokens), cols.gather(1, tokens))


class FirstFit(nn.Module):
    """Adds to the hidden states what was found at the first token that fits; at first, nothing."""

    def __init__(self, text_dim: int, head_dim: int, scale: float = 1.0):
        """`scale`: root mean square of the visual tokens."""
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.RMSNorm(text_dim, eps=1e-6)
        self.query = nn.Linear(text_dim, head_dim, bias=False)
        self.key = nn.Linear(text_dim, head_dim, bias=False)
        self.value = nn.Linear(text_dim, head_dim, bias=False)
        self.output = nn.Linear(head_dim, text_dim, bias=False)
        self.threshold = nn.Parameter(torch.empty(()))
        self._scale = scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.query.weight, std=self.query.in_features**-0.5)
        for linear in (self.key, self.value):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5 / self._scale)
        nn.init.zeros_(self.output.weight)
        nn.init.ones_(self.norm.weight)
        nn.init.constant_(self.threshold, _RARELY)

    def project(self, tokens_BME: torch.Tensor, order_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, N, K]` in the order of pointing."""
        index = order_BN.unsqueeze(-1).expand(-1, -1, self.head_dim)
        return self.key(tokens_BME).gather(1, index), self.value(tokens_BME).gather(1, index)

    def forward(
        self,
        hidden_BLE: torch.Tensor,
        keys_BNK: torch.Tensor,
        values_BNK: torch.Tensor,
        candidates_BLN: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new hidden states, and `[B, L, N + 1]` log-probabilities of what is found; the last is nothing."""
        queries_BLK = self.query(self.norm(hidden_BLE))
        fits = (queries_BLK @ keys_BNK.transpose(-1, -2).to(queries_BLK.dtype)).float()
        fits = (fits / math.sqrt(self.head_dim) + self.threshold.float()).masked_fill(~candidates_BLN, _NEVER)
        none_up_to_BLN = -F.softplus(fits).cumsum(-1)
        # log f + log P(none before) = (x - softplus(x)) + (sum up to here + softplus(x))
        found_BLN = fits + none_up_to_BLN
        none_BL1 = none_up_to_BLN[..., -1:]
        output = self.output(found_BLN.exp().to(values_BNK.dtype) @ values_BNK)
        return hidden_BLE + output.to(hidden_BLE.dtype), torch.cat([found_BLN, none_BL1], dim=-1)


def first_fit_loss(
    log_probs: list[torch.Tensor], order: PointingOrder, entries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Surprise at what is to be found, in nats per entry, and the probability with which the last layer finds it.

    Entries that are no candidates are left out: of two objects in one patch, the second is passed with the first.

    Args:
        log_probs: `[B, L, N + 1]` of each layer.
        order: of the samples' tokens.
        entries: `int64[P, 3]` (sample, position, number of a visual token, or -1 for nothing).
    """
    samples, positions, tokens = entries.unbind(1)
    ranks_BM = order.tokens.argsort(dim=1)
    ranks = ranks_BM[samples, tokens.clamp_min(0)].where(tokens >= 0, order.tokens.shape[1])
    chosen = torch.stack([log_prob[samples, positions, ranks] for log_prob in log_probs])
    chosen = chosen[:, chosen[-1] > _NEVER / 2]
    divisor = average_over_processes(torch.tensor(float(chosen.shape[1]))).clamp_min(1)
    return -chosen.mean(dim=0).sum() / divisor, chosen[-1].detach().exp().mean()
