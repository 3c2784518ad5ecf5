"""Conversations -> one training batch whose labels cover the answers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from transformers import BatchFeature

from vlmslice.errors import VlmSliceError
from vlmslice.image_loading import ImageSource
from vlmslice.processing import PlaceholderError, VlmSliceProcessor
from vlmslice.spatial_schema import ASSISTANT, END

IGNORED = -100
"""Label of a position that the loss skips, as torch's cross-entropy has it."""


class Sample(TypedDict, total=False):
    """One conversation.

    Keys:
        messages: `{"role": ..., "content": ...}` dicts; content is a string, or a list of `{"type": "text", "text":
            ...}` and `{"type": "image"}` blocks.
        images: One per image block, in order: PIL image, path, bytes or array. May be left out if there is none.
        source: Where the sample comes from, for error messages; optional.
        skipped: True if it stands for a sample that could not be loaded (see `tolerant`): no id of it is learned.
    """

    messages: list[dict[str, Any]]
    images: Sequence[ImageSource]
    source: str
    skipped: bool


class CollatorError(VlmSliceError, ValueError):
    """A sample cannot be trained on: too long, without an answer, or with too few or too many images."""


class VlmSliceCollator:
    """Batches conversations for training, through the same chat path that inference takes.

    The ids of a prompt are therefore a strict prefix of the ids trained on here. Batches are padded on the right and
    may mix samples with and without images.

    For "<|user|>2+2?<|end|><|assistant|>4<|end|>" the labels are -100 up to `<|assistant|>`, then `4` and `<|end|>`.

    Attributes:
        processor: Makes the model inputs.
        pad_to_multiple_of: Padded lengths are multiples of this, so that few distinct shapes occur.
        max_length: Longest sample in ids; longer ones raise, since cutting would lose visual tokens or the answer.
    """

    def __init__(
        self, processor: VlmSliceProcessor, pad_to_multiple_of: int = 16, max_length: int | None = None
    ):
        self.processor = processor
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_length = max_length
        self._assistant_id, self._end_id = processor.tokenizer.convert_tokens_to_ids([ASSISTANT, END])

    def __call__(self, samples: Sequence[Sample]) -> BatchFeature:
        """Builds the model inputs of B samples, and `labels`: `int64[B, L]`."""
        try:
            batch = self.processor.apply_chat_template(
                [sample["messages"] for sample in samples],
                tokenize=True,
                return_dict=True,
                processor_kwargs={
                    "images": [sample.get("images", []) for sample in samples],
                    "padding_side": "right",
                    "pad_to_multiple_of": self.pad_to_multiple_of,
                },
            )
        except PlaceholderError as error:
            raise CollatorError(f"{_name(samples, error.sample_index)}: {error}") from error
        answers = self.answer_mask(batch["input_ids"])
        self._check(samples, batch["attention_mask"].sum(1), answers)
        answers[[bool(sample.get("skipped")) for sample in samples]] = False
        batch["labels"] = batch["input_ids"].masked_fill(~answers, IGNORED)
        return batch

    def answer_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`bool[B, L]`, true on what the assistant says: all ids after `<|assistant|>` up to `<|end|>`, inclusive.

        Control tokens never come from the text of a message, so the ids alone tell who speaks.
        """
        positions = torch.arange(1, input_ids.shape[1] + 1).expand_as(input_ids)
        last_assistant = positions.where(input_ids == self._assistant_id, 0).cummax(1).values
        last_end = positions.where(input_ids == self._end_id, 0).cummax(1).values
        answers = torch.zeros_like(input_ids, dtype=torch.bool)
        answers[:, 1:] = last_assistant[:, :-1] > last_end[:, :-1]
        return answers

    def _check(self, samples: Sequence[Sample], lengths: torch.Tensor, answers: torch.Tensor) -> None:
        for index, (length, has_answer) in enumerate(
            zip(lengths.tolist(), answers.any(1).tolist(), strict=True)
        ):
            if self.max_length is not None and length > self.max_length:
                raise CollatorError(
                    f"{_name(samples, index)} has {length} ids; expected at most max_length={self.max_length}; "
                    "raise max_length, lower max_visual_tokens, or shorten the text"
                )
            if not has_answer:
                raise CollatorError(
                    f"{_name(samples, index)} has no assistant message; expected at least one answer to train on"
                )


def _name(samples: Sequence[Sample], index: int) -> str:
    return samples[index].get("source", f"sample {index} of the batch")
