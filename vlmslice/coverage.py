"""Coverage: an answer that has begun to read once more what it has read is held back from it.

Legend: B samples, M visual tokens of a sample (padded; the last is a place where nothing is).

A small model that loses its line goes back to one that it has read, and reads on from there, page after page. So the
attention that each visual token gets is added up: the coverage of machine translation (Tu et al., 2016,
https://arxiv.org/abs/1601.04811; See et al., 2017, https://arxiv.org/abs/1704.04368), without weights of its own. Of
an answer that reads line by line next to nothing falls on what was covered before, of one that goes back nearly all of
it does. From the moment that this is so, what is covered is held back in its attention, and it reads on where it has
not been, or ends. Other answers stay as they are.

What an answer reads is told by the heads that the guide loss teaches to look at it (`attention_guide`): their attention
is sharp, and goes to what is being written. A letter may be larger than a patch, and a look touches few of its patches;
the others would do for reading it again. So a look covers as much as the letter is likely to, by the distance of the
looks at neighbouring letters.
"""

from __future__ import annotations

import torch

from vlmslice.first_fit import BEYOND

LAG = 16
"""Tokens for which what was read may be looked at again: letters share a patch, and some are spelt in several bytes."""
SHARP = 0.5
"""Attention to one token, from which on it is a look at what is read; brackets and quotes of JSON are read nowhere."""
FREE = 0.3
"""Looks, as sums of attention, that hold nothing back: a glance in passing."""
REACH = 1.2
"""How far a look covers up and down, in distances of neighbouring letters; to the sides it is half as far."""
AGAIN = 0.5
"""Share of the looks at what was covered before, from which on an answer reads again."""
MEMORY = 12
"""Tokens over which this share is taken, as the time constant of a moving average."""
_FINEST = 0.3
"""Blocks from letter to letter in the finest print there is; a gaze that does not move is no finer print."""
_FIRST_DISTANCE = 0.5
"""Blocks between letters while none are known."""


class Coverage:
    """How much each visual token of a batch has been looked at; one step of generation after the other.

    Attributes:
        covered: `float[B, M]` sums of attention, those of the last `LAG` steps not among them.
        distance: `float[B]` between neighbouring letters, in blocks, a moving average.
        again: `float[B]` share of the looks at what was covered before, likewise.
        is_held_back: `bool[B]`, whether the answer has begun to read again; it stays so.
    """

    def __init__(self, places_BM2: torch.Tensor, penalty: float):
        """`places_BM2`: rows and columns in blocks, see `VisualMemory.places`; `penalty`: in logits."""
        self.penalty = penalty
        self._is_somewhere_BM = (places_BM2 < BEYOND).all(dim=-1)
        self._places_BM2 = places_BM2.float()
        self.covered = torch.zeros_like(self._places_BM2[..., 0])
        self.distance = torch.full_like(self.covered[:, 0], _FIRST_DISTANCE)
        self.again = torch.zeros_like(self.distance)
        self.is_held_back = torch.zeros_like(self.distance, dtype=torch.bool)
        self._last_B2 = torch.full_like(self._places_BM2[:, 0], float("inf"))
        self._recent: list[torch.Tensor] = []

    def held_back(self) -> torch.Tensor:
        """`float[B, M]`, 0 to `penalty`: what is to be taken off the logits of attention; 0 where nothing is."""
        return self.penalty * (self.covered - FREE).clamp(0, 1) * self.is_held_back[:, None]

    def look(self, weights_BM: torch.Tensor) -> None:
        """Adds the attention with which one more token of each answer was read; rows sum to at most 1."""
        weights_BM = weights_BM.float().where(self._is_somewhere_BM, 0)
        most_B1, top_B1 = weights_BM.max(dim=1, keepdim=True)
        is_sharp_B1 = most_B1 > SHARP
        is_sharp_B = is_sharp_B1[:, 0]
        place_B2 = self._places_BM2.gather(1, top_B1[..., None].expand(-1, -1, 2))[:, 0]
        down_B, across_B = (place_B2 - self._last_B2).abs().unbind(1)
        is_next_letter_B = (down_B <= 3 * self.distance + 1) & (across_B <= 6 * self.distance + 2)
        moved_B = 0.85 * self.distance + 0.15 * across_B
        self.distance = moved_B.where(is_next_letter_B & is_sharp_B, self.distance)
        self._last_B2 = place_B2.where(is_sharp_B1, self._last_B2)
        # Of print finer than a block, several letters of a line and at last two lines are read from one token.
        letter_B = self.distance.clamp(_FINEST, 1)
        times_B = (weights_BM * self.covered).sum(dim=1) * letter_B
        before_B = (times_B - (0.5 / letter_B - 1).clamp_min(0)).clamp(0, 1)
        again_B = self.again + (before_B - self.again) / MEMORY
        self.again = again_B.where(is_sharp_B, self.again)
        self.is_held_back = self.is_held_back | (self.again > AGAIN)
        away_BM2 = (self._places_BM2 - place_B2[:, None]).abs()
        reach_B12 = REACH * self.distance[:, None, None] * away_BM2.new_tensor([1.0, 0.5])
        is_same_letter_BM = (away_BM2 <= reach_B12).all(dim=-1) & self._is_somewhere_BM & is_sharp_B1
        self._recent.append(torch.maximum(weights_BM, is_same_letter_BM * most_B1))
        if len(self._recent) > LAG:
            self.covered = self.covered + self._recent.pop(0)

    def reorder(self, rows: torch.Tensor) -> None:
        """Each answer goes on from that of another row, as in beam search; rows of one sample see the same tokens."""
        self.covered, self.distance = self.covered[rows], self.distance[rows]
        self.again, self.is_held_back = self.again[rows], self.is_held_back[rows]
        self._recent = [looks_BM[rows] for looks_BM in self._recent]
        self._last_B2 = self._last_B2[rows]
