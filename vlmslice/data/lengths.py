"""How long samples are, without their pixels; and batches of samples of like length.

dataset -> `measure_dataset` -> sizes -> `LengthSortedDataset`, or `packing.PackedDataset`
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vlmslice.data.collator import Sample
from vlmslice.data.scenes import sample_rng
from vlmslice.data.tasks import TaskSample
from vlmslice.errors import VlmSliceError
from vlmslice.processing import VlmSliceProcessor

_NUM_PROBES = 32
"""Samples that are measured again to see whether a cache still fits."""

_log = logging.getLogger(__name__)


class LengthError(VlmSliceError, ValueError):
    """A sample cannot be measured, or batches cannot be cut as asked."""


class SampleSize(NamedTuple):
    """Ids of a sample, its placeholders among them; and its visual tokens, whether they stand in the prompt or not."""

    num_ids: int
    num_visual_tokens: int


def measure_conversation(processor: VlmSliceProcessor, sample: Sample) -> SampleSize:
    """The size that a conversation will have, from its text and the headers of its images.

    A question of 20 ids about an image that is planned as an overview of 25 and 4 slices of 49 visual tokens has 221
    placeholders among its ids, or 1 with a processor of `one_placeholder=True`.

    Raises:
        LengthError: more or fewer images than places for them; the text begins with the sample's source.
    """
    images = sample.get("images", [])
    # The tokens of the spatial schema are control tokens: text around them is split alike with one or with all of them.
    ids = _encode(processor, processor.apply_chat_template(sample["messages"]))
    num_places = sum(number == processor.image_token_id for number in ids)
    if len(images) != num_places:
        raise LengthError(
            f"{sample.get('source', 'a sample')} has {len(images)} images but {num_places} image placeholders; give it "
            "one image per placeholder"
        )
    image_processor = processor.image_processor
    plans = [image_processor.plan(*image_processor.source_size(image)) for image in images]
    spelled = [processor.replace_image_token({"plans": plans}, number) for number in range(len(plans))]
    num_ids = len(ids) + sum(len(_encode(processor, text)) - 1 for text in spelled)
    return SampleSize(num_ids, sum(plan.num_visual_tokens for plan in plans))


def _encode(processor: VlmSliceProcessor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]


def measure_task(processor: VlmSliceProcessor, sample: TaskSample, points: bool = True) -> SampleSize:
    """The size that a `TaskSample` will have; `points` as of its `TaskCollator`."""
    places = [[(0, 0)] * len(turn.points) if points else [] for turn in sample.turns]
    return measure_conversation(
        processor, {"messages": sample.messages(places), "images": [sample.scene.image]}
    )


def measure_dataset(
    samples: Sequence[Any], measure: Callable[[Any], SampleSize], cache: Path | None = None
) -> list[SampleSize]:
    """The sizes of all samples.

    Args:
        samples: what is measured; of a `ConversationDataset` take its `without_pixels()`.
        measure: for example `functools.partial(measure_conversation, processor)`.
        cache: a file that keeps the sizes. It is used if it holds as many, and 32 samples spread over the dataset still
            measure the same; else all are measured again and it is overwritten.
    """
    if cache is not None and cache.exists():
        sizes = [SampleSize(*size) for size in json.loads(cache.read_text())]
        probes = range(0, len(samples), max(1, len(samples) // _NUM_PROBES))
        if len(sizes) == len(samples) and all(measure(samples[i]) == sizes[i] for i in probes):
            return sizes
        _log.warning("%s is of other samples or another processor; measuring again", cache)
    numbers = tqdm(range(len(samples)), desc="measuring", unit=" samples", delay=5, dynamic_ncols=True)
    sizes = [measure(samples[i]) for i in numbers]
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        aside = cache.with_name(f"{cache.name}.{os.getpid()}")  # every process of a launch may write it
        aside.write_text(json.dumps(sizes))
        aside.rename(cache)
    return sizes


class LengthSortedDataset(Dataset):
    """The samples of another dataset, reordered so that each batch holds samples of like length.

    Of every `window` samples in their order, the longest make one batch, the next longest another, and so on; the
    batches of a window then come in an order drawn from the seed. A sample stays within its window, so a dataset that
    grows harder still does, and place i always holds the same sample. Needs `train_sampling_strategy="sequential"`.

    Args:
        dataset: map-style.
        sizes: of its samples, see `measure_dataset`.
        batch_size: `per_device_train_batch_size` of the stage.
        window: samples sorted together, a multiple of `batch_size`.
        seed: of the order of batches.
    """

    def __init__(
        self,
        dataset: Sequence[Any],
        sizes: Sequence[SampleSize],
        batch_size: int,
        window: int = 512,
        seed: int = 0,
    ):
        check_sizes(dataset, sizes)
        if window % batch_size:
            raise LengthError(f"window is {window}, expected a multiple of batch_size={batch_size}")
        self.dataset = dataset
        self.order: list[int] = []
        for start in range(0, len(sizes), window):
            numbers = range(start, min(start + window, len(sizes)))
            by_length = sorted(numbers, key=lambda i: (-sizes[i].num_ids, i))
            batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
            rest = batches.pop() if len(batches[-1]) < batch_size else []
            sample_rng(seed, "length-sorted", start).shuffle(batches)
            self.order += [number for batch in [*batches, rest] for number in batch]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.order[index]]


def check_sizes(dataset: Sequence[Any], sizes: Sequence[SampleSize]) -> None:
    """Raises `LengthError` if there is not one size for each sample."""
    if len(dataset) != len(sizes):
        raise LengthError(
            f"got {len(sizes)} sizes for {len(dataset)} samples, expected one for each; call measure_dataset on them"
        )
