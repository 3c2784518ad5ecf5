"""Sizes of samples without their pixels, and batches of samples of like length."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import CONNECTORS, noise_image, tiny_processor

from vlmslice.data.collator import VlmSliceCollator
from vlmslice.data.conversations import ConversationDataset
from vlmslice.data.fonts import FontLibrary, matplotlib_font_dir
from vlmslice.data.lengths import (
    LengthError,
    LengthSortedDataset,
    SampleSize,
    measure_conversation,
    measure_dataset,
    measure_task,
)
from vlmslice.data.task_collator import TaskCollator
from vlmslice.data.tasks import Curriculum, TaskConfig, TaskDataset

LINES = [
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Four."}]},
    {
        # A control token and a mark that a user only spells, two images, an accent.
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<image>\nIs <|image|> like <image>? Très!"},
            {"role": "assistant", "content": "No <|end|>."},
        ],
        "images": ["a.png", "b.jpg"],
    },
]


@pytest.fixture
def conversations(tmp_path) -> ConversationDataset:
    noise_image(100, 200).save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    noise_image(64, 300).save(tmp_path / "b.jpg", exif=turned)
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES))
    return ConversationDataset(path)


def num_ids_of(collator, sample) -> int:
    return int(collator([sample])["attention_mask"].sum())


@pytest.mark.parametrize("connector", CONNECTORS)
def test_sizes_are_those_of_the_collator(connector, conversations):
    processor = tiny_processor(connector)
    collator = VlmSliceCollator(processor)
    sizes = measure_dataset(conversations.without_pixels(), partial(measure_conversation, processor))
    assert [size.num_ids for size in sizes] == [num_ids_of(collator, sample) for sample in conversations]
    plans = [processor.image_processor.plan(*size) for size in ((100, 200), (300, 64))]
    assert [size.num_visual_tokens for size in sizes] == [0, sum(plan.num_visual_tokens for plan in plans)]


def test_arrays_are_measured_as_images_are():
    processor = tiny_processor()
    image = noise_image(100, 200)
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    of_image, of_tensor = (
        measure_conversation(processor, {"messages": messages, "images": [source]})
        for source in (image, torch.zeros(3, 100, 200))
    )
    assert of_tensor == of_image


def test_no_pixel_is_decoded(conversations):
    # Cut off in the middle: the header is whole.
    path = conversations.image_root / "a.png"
    path.write_bytes(path.read_bytes()[:2000])
    assert len(
        measure_dataset(conversations.without_pixels(), partial(measure_conversation, tiny_processor()))
    )


def test_tasks_are_measured_with_their_points():
    steps = [Curriculum(8, TaskConfig(megapixels=(0.01, 0.03)), {"count": 0.5, "read": 0.5})]
    dataset = TaskDataset(steps, FontLibrary("train", [matplotlib_font_dir()]))
    processor = tiny_processor("cross_attention")
    for points in (True, False):
        collator = TaskCollator(processor, dense=(), guide=False, points=points)
        for sample in dataset:
            assert measure_task(processor, sample, points).num_ids == num_ids_of(collator, sample)


def test_a_sample_with_too_few_images_is_named():
    sample = {"messages": [{"role": "user", "content": [{"type": "image"}]}], "source": "data.jsonl:7"}
    with pytest.raises(LengthError, match=r"data\.jsonl:7 has 0 images but 1"):
        measure_conversation(tiny_processor(), sample)


def test_a_cache_is_used_until_it_no_longer_fits(tmp_path):
    measured = []

    def measure(sample: str) -> SampleSize:
        measured.append(sample)
        return SampleSize(len(sample), 0)

    samples = ["x" * (number % 17 + 1) for number in range(400)]
    cache = tmp_path / "folder" / "sizes.json"
    sizes = measure_dataset(samples, measure, cache)
    assert len(measured) == 400
    measured.clear()
    assert measure_dataset(samples, measure, cache) == sizes
    assert len(measured) < 50
    # Other samples, more samples.
    for others in (["y" + sample for sample in samples], samples[:100]):
        measured.clear()
        assert measure_dataset(others, measure, cache) == [SampleSize(len(sample), 0) for sample in others]
        assert len(measured) >= len(others)
    assert [path.name for path in cache.parent.iterdir()] == ["sizes.json"]


lengths_strategy = st.lists(st.integers(1, 100), max_size=70)


@given(lengths_strategy, st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_batches_hold_neighbours_in_length(lengths, batch_size, batches_of_window, seed):
    sizes = [SampleSize(length, 0) for length in lengths]
    window = batch_size * batches_of_window
    dataset = LengthSortedDataset(range(len(lengths)), sizes, batch_size, window, seed)
    order = [dataset[i] for i in range(len(dataset))]
    assert sorted(order) == list(range(len(lengths)))
    assert order == LengthSortedDataset(range(len(lengths)), sizes, batch_size, window, seed).order
    for start in range(0, len(order), window):
        assert sorted(order[start : start + window]) == list(range(start, min(start + window, len(order))))
        inside = [lengths[i] for i in order[start : start + window]]
        spans = [
            (min(b), max(b)) for b in (inside[i : i + batch_size] for i in range(0, len(inside), batch_size))
        ]
        for (_, high), (low, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
            assert high <= low


def test_length_sorting_needs_whole_batches_and_all_sizes():
    sizes = [SampleSize(1, 0)] * 6
    with pytest.raises(LengthError, match="window is 7, expected a multiple of batch_size=2"):
        LengthSortedDataset(range(6), sizes, 2, window=7)
    with pytest.raises(LengthError, match="got 6 sizes for 5 samples"):
        LengthSortedDataset(range(5), sizes, 2)
