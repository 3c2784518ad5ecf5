"""Samples that cannot be loaded: skipped and counted, never replaced by another."""

import json
from pathlib import Path

import pytest
import torch

from vlmslice.data.collator import IGNORED, VlmSliceCollator
from vlmslice.data.conversations import ConversationDataset
from vlmslice.data.tolerant import TolerantDataset, TooManySkippedError
from vlmslice.image_loading import ImageError


@pytest.fixture
def conversations(tmp_path: Path, draw_image) -> ConversationDataset:
    """Four conversations: the image of the second is cut off, that of the third is missing, the last has none."""
    draw_image().save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:100])
    lines = []
    for index in range(4):
        question = {"role": "user", "content": "<image>\nWhat?" if index < 3 else "What?"}
        messages = [question, {"role": "assistant", "content": f"answer {index}"}]
        lines.append({"messages": messages, "images": [f"{index}.png"] if index < 3 else []})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return ConversationDataset(tmp_path / "a.jsonl")


def test_skipped_samples_are_listed_once(conversations, tmp_path: Path) -> None:
    dataset = TolerantDataset(conversations, tmp_path / "run" / "skipped.jsonl", max_share=0.5)
    assert len(dataset) == 4
    for _ in range(2):
        samples = [dataset[index] for index in range(4)]
    assert [bool(sample.get("skipped")) for sample in samples] == [False, True, True, False]
    assert samples[3] == conversations[3]
    assert (dataset.num_asked, dataset.num_skipped) == (8, 4)
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["index"] for entry in listed] == [1, 2]
    assert "a.jsonl:2" in listed[0]["error"] and "1.png" in listed[0]["error"]
    assert "a.jsonl:3" in listed[1]["error"] and "No such file" in listed[1]["error"]


def test_nothing_is_learned_in_the_place_of_a_skipped_sample(
    conversations, tmp_path: Path, tiny_processor
) -> None:
    dataset = TolerantDataset(conversations, tmp_path / "skipped.jsonl", max_share=0.5)
    collator = VlmSliceCollator(tiny_processor)
    batch = collator([dataset[index] for index in range(4)])
    assert len(batch["input_ids"]) == 4 and len(batch["num_views"]) == 1
    learnt = (batch["labels"] != IGNORED).any(dim=1)
    assert learnt.tolist() == [True, False, False, True]
    expected = collator([conversations[0]])  # what is left is what it was
    length = int(expected["attention_mask"].sum())
    assert torch.equal(batch["labels"][0, :length], expected["labels"][0, :length])
    assert (collator([dataset[1]])["labels"] == IGNORED).all()


def test_too_many_end_the_run(tmp_path: Path) -> None:
    class Broken(list):
        def __getitem__(self, index):
            raise ImageError(f"{index}.png is gone")

    dataset = TolerantDataset(Broken(range(1000)), tmp_path / "skipped.jsonl", max_share=0.02)
    dataset[0], dataset[1]
    with pytest.raises(
        TooManySkippedError, match=r"^3 of 3 samples .* at most 0.02; .*skipped.jsonl.* 2.png is gone"
    ):
        dataset[2]


def test_share_grows_with_what_was_asked_for(tmp_path: Path) -> None:
    class Rare(list):
        def __getitem__(self, index):
            if index % 100 == 7:
                raise ImageError("gone")
            return index

    dataset = TolerantDataset(Rare(range(1000)), tmp_path / "skipped.jsonl", max_share=0.02)
    assert sum(isinstance(dataset[index], int) for index in range(1000)) == 990


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), OSError("disk")])
def test_other_errors_are_no_skipped_samples(tmp_path: Path, error: Exception) -> None:
    class Faulty(list):
        def __getitem__(self, index):
            raise error

    with pytest.raises(type(error)):
        TolerantDataset(Faulty([0]), tmp_path / "skipped.jsonl", max_share=1.0)[0]
    assert not (tmp_path / "skipped.jsonl").exists()
