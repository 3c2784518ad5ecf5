"""Rendered task samples as plain conversations, to be mixed with files of them."""

from __future__ import annotations

from collections.abc import Sequence

from vlmslice.data.collator import Sample
from vlmslice.data.tasks import TaskSample


class TaskConversations(Sequence[Sample]):
    """The samples of a `TaskDataset` as `VlmSliceCollator` takes them: questions and answers, without points."""

    def __init__(self, dataset: Sequence[TaskSample]):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]  # no slices
        sample = self.dataset[index]
        return Sample(
            messages=sample.messages(),
            images=[sample.scene.image],
            source=f"rendered sample {index} ({sample.task})",
        )
