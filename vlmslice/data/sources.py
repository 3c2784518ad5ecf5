"""Files of the user's own conversations as one dataset: `receipts.jsonl` whole, and half of `captions.jsonl:0.5`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Dataset, Subset

from vlmslice.data.collator import Sample
from vlmslice.data.conversations import ConversationDataset
from vlmslice.data.mixture import ShuffledDataset
from vlmslice.errors import VlmSliceError, suggestion


class SourceError(VlmSliceError, ValueError):
    """A file of conversations is not there, is empty, or its weight is no number above 0."""


@dataclass(frozen=True)
class Source:
    """A file of conversations (see `conversations`) and how often an epoch goes through it.

    Attributes:
        path: JSONL file, or JSON array.
        weight: times that a sample comes up in an epoch. 2 has every sample twice, 0.5 a half of them once.
    """

    path: Path
    weight: float = 1.0


def parse_source(text: str) -> Source:
    """`"a.jsonl"` or `"a.jsonl:0.5"` -> a `Source`.

    What follows the last colon is a weight if it is a number, and a part of the name else.

    Raises:
        SourceError: there is no such file, or the weight is not above 0.
    """
    name, _, number = text.rpartition(":")
    try:
        weight = float(number) if name else 1.0
    except ValueError:
        name, weight = text, 1.0
    path = Path(name or text)
    if not (math.isfinite(weight) and weight > 0):
        raise SourceError(
            f"{text!r} has the weight {number}; expected a number above 0, such as 2 for every sample twice "
            "an epoch, or 0.5 for a half of them"
        )
    if not path.is_file():
        others = [str(p) for p in path.parent.glob("*.json*")] if path.parent.is_dir() else []
        hint = (
            suggestion(str(path), others)
            or "; expected a JSONL file of conversations, see docs/finetuning.md"
        )
        raise SourceError(f"there is no file {str(path)!r}{hint}")
    return Source(path, weight)


class ConversationMixture(Dataset):
    """The conversations of several files, one file after the other, each as often as its weight says.

    A weight of 2.5 has a file twice, and then a half of its samples, chosen by `seed`; at least one. The order is for
    the Trainer to shuffle.
    """

    def __init__(self, sources: Sequence[Source], seed: int = 0):
        """Opens and checks the files.

        Raises:
            ConversationError: a line is not a conversation.
            SourceError: a file has none.
        """
        self.sources, self.seed = list(sources), seed
        parts: list[Any] = []  # they have a length and are indexed, which is all that is asked for
        for source in self.sources:
            conversations: Any = ConversationDataset(source.path)
            if not len(conversations):
                raise SourceError(
                    f"{str(source.path)!r} holds no conversation; expected one JSON object per line"
                )
            number = max(1, round(source.weight * len(conversations)))
            parts += [conversations] * (number // len(conversations))
            if rest := number % len(conversations):
                shuffled: Any = ShuffledDataset(conversations, seed)
                parts.append(Subset(shuffled, range(rest)))
        self._samples: ConcatDataset[Sample] = ConcatDataset(parts)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]
