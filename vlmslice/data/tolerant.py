"""Training that outlives a few images that cannot be read: each is skipped, counted and listed, never replaced.

To train on another sample instead would change the data without a word (and to leave the batch smaller would change
the number of steps, and part the processes of a run). So the place of a sample that cannot be loaded is taken by one
with nothing to see and nothing to learn: its labels are all ignored.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlmslice.data.collator import Sample
from vlmslice.errors import VlmSliceError
from vlmslice.image_loading import ImageError

MIN_ASKED = 100
"""The share of skipped samples is taken of those asked for, but of no fewer than these."""

_log = logging.getLogger(__name__)


class TooManySkippedError(VlmSliceError, ValueError):
    """More samples could not be loaded than was allowed: a folder may be missing, or a disk failing."""


def blank_conversation(source: str) -> Sample:
    """A conversation without images or words, marked as `skipped`: no id of it is learned."""
    messages = [{"role": "user", "content": []}, {"role": "assistant", "content": []}]
    return Sample(messages=messages, source=source, skipped=True)


class TolerantDataset(Sequence[Any]):
    """A map-style dataset in which images that cannot be loaded are skipped.

    Only an `ImageError`, or an error raised from one, counts as such; every other error is raised as it is.

    Attributes:
        num_asked, num_skipped: samples asked for and skipped in this process.
    """

    def __init__(
        self,
        dataset: Any,
        log: str | Path,
        max_share: float,
        blank: Callable[[str], Any] = blank_conversation,
    ):
        """Wraps a dataset.

        Args:
            dataset: map-style.
            log: JSONL file to which each skipped sample is added once per process, as `{"index": ..., "error": ...}`.
            max_share: of skipped samples among those asked for (at least `MIN_ASKED`) in this process. 0.01 allows one
                among the first 100, and two of 200.
            blank: makes the sample that stands for a skipped one from its description.
        """
        self.dataset = dataset
        self.log = Path(log)
        self.max_share = max_share
        self.num_asked = self.num_skipped = 0
        self._blank = blank
        self._listed: set[int] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:  # type: ignore[override]  # no slices
        self.num_asked += 1
        try:
            return self.dataset[index]
        except VlmSliceError as error:
            if not isinstance(error, ImageError) and not isinstance(error.__cause__, ImageError):
                raise
            self._skip(index, error)
            return self._blank(f"sample {index}, skipped")

    def _skip(self, index: int, error: VlmSliceError) -> None:
        """Counts and lists a sample.

        Raises:
            TooManySkippedError: with this one there are too many.
        """
        self.num_skipped += 1
        if index not in self._listed:
            self._listed.add(index)
            _log.warning("skipping sample %d: %s", index, error)
            self.log.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"index": index, "error": str(error)}) + "\n"
            # One write of one line at the end: processes that share the file do not tear each other's lines.
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
        if self.num_skipped > self.max_share * max(self.num_asked, MIN_ASKED):
            raise TooManySkippedError(
                f"{self.num_skipped} of {self.num_asked} samples could not be loaded, expected a share of at most "
                f"{self.max_share}; they are listed in {self.log}, the last one is sample {index}: {error}"
            ) from error
