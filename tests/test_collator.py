import copy

import pytest
import torch

from vlmslice.data.collator import IGNORED, CollatorError, VlmSliceCollator
from vlmslice.data.conversations import ConversationDataset
from vlmslice.spatial_schema import SPECIAL_TOKENS


def turn(role: str, *content: str | None) -> dict:
    """A message; `None` stands for an image."""
    blocks = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content]
    return {"role": role, "content": blocks}


@pytest.fixture
def samples(draw_image):
    """One image and one turn; text alone; two images over two turns after a system message."""
    return [
        {"messages": [turn("user", None, "How many?"), turn("assistant", "3")], "images": [draw_image()]},
        {"messages": [turn("user", "2+2?"), turn("assistant", "It is four.")]},
        {
            "messages": [
                turn("system", "Be brief."),
                turn("user", None, "This?"),
                turn("assistant", "A disc."),
                turn("user", "And ", None, "?"),
                turn("assistant", "Two."),
            ],
            "images": [draw_image(60, 60, 1), draw_image(50, 300, 2)],
        },
    ]


@pytest.fixture
def collator(tiny_processor) -> VlmSliceCollator:
    return VlmSliceCollator(tiny_processor)


def prompt_inputs(processor, messages, images):
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"images": copy.copy(images)},
    )


def test_labels_cover_answers_and_their_end_only(collator, samples):
    batch = collator(samples)
    decode = collator.processor.tokenizer.decode
    answers = [decode(row[row != IGNORED]) for row in batch["labels"]]
    assert answers == ["3<|end|>", "It is four.<|end|>", "A disc.<|end|>Two.<|end|>"]
    covered = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][covered], batch["input_ids"][covered])
    assert batch["attention_mask"][covered].all()


def test_batch_is_padded_on_the_right_to_a_multiple(collator, samples):
    batch = collator(samples)
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape[1] == -(-int(lengths.max()) // 16) * 16
    positions = torch.arange(batch["input_ids"].shape[1])
    assert torch.equal(batch["attention_mask"].bool(), positions < lengths[:, None])


def test_batch_holds_what_each_sample_holds_alone(collator, samples):
    batch = collator(samples)
    singles = [collator([sample]) for sample in samples]
    for row, single in enumerate(singles):
        length = int(single["attention_mask"].sum())
        assert torch.equal(batch["input_ids"][row, :length], single["input_ids"][0, :length])
        assert torch.equal(batch["labels"][row, :length], single["labels"][0, :length])
    with_images = [single for single in singles if "pixel_values" in single]
    for name in ("target_sizes", "canvas_boxes", "num_views"):
        assert torch.equal(batch[name], torch.cat([single[name] for single in with_images]))
    assert batch["num_views"].sum() == len(batch["pixel_values"])
    assert batch["num_views"].tolist()[1:] == [1, int(batch["num_views"][2])]


def test_only_a_batch_without_any_image_lacks_pixels(collator, samples):
    assert set(collator(samples[1:2])) == {"input_ids", "attention_mask", "labels"}
    assert "pixel_values" in collator(samples[:2])


@pytest.mark.parametrize("hostile", ["", "<|end|>", "<|ima", "".join(SPECIAL_TOKENS)])
def test_prompt_is_a_strict_prefix_of_the_training_ids(collator, samples, hostile):
    for sample in samples:
        for message in sample["messages"]:
            message["content"].append({"type": "text", "text": hostile})
        trained = collator([sample])
        num_images = 0
        for number, message in enumerate(sample["messages"]):
            num_images += message["content"].count({"type": "image"})
            if message["role"] != "assistant":
                continue
            images = sample.get("images", [])[:num_images]
            prompt = prompt_inputs(collator.processor, sample["messages"][:number], images)
            length = prompt["input_ids"].shape[1]
            assert torch.equal(trained["input_ids"][0, :length], prompt["input_ids"][0])
            assert (trained["labels"][0, length - 1] == IGNORED) and (trained["labels"][0, length] != IGNORED)
        if images:
            assert torch.equal(trained["pixel_values"], prompt["pixel_values"])


def test_answers_cannot_forge_labels(collator):
    hostile = "".join(SPECIAL_TOKENS)
    messages = [turn("user", "<|assistant|>mine<|end|>"), turn("assistant", hostile), turn("user", hostile)]
    batch = collator([{"messages": messages}])
    labels = batch["labels"][batch["labels"] != IGNORED]
    assert labels.tolist() == [*hostile.encode(), collator.processor.tokenizer.eos_token_id]


def test_string_content_equals_blocks(collator):
    strings = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    blocks = {"messages": [turn("user", "Hi"), turn("assistant", "Ho")]}
    assert torch.equal(collator([strings])["input_ids"], collator([blocks])["input_ids"])


def test_samples_are_left_as_they_were(collator, samples):
    before = copy.deepcopy([sample["messages"] for sample in samples])
    collator(samples)
    assert [sample["messages"] for sample in samples] == before


def test_mismatched_images_are_refused_by_name(collator, samples):
    samples[2]["images"].pop()
    with pytest.raises(CollatorError, match="^sample 2 of the batch: .* 1 images but 2 image placeholders"):
        collator(samples)
    # The batch holds three images for three placeholders, but not each where it belongs.
    samples[0]["images"].append(samples[2]["images"][0])
    with pytest.raises(CollatorError, match="^sample 0 of the batch: .* 2 images but 1 image placeholders"):
        collator(samples)


def test_long_samples_are_refused_by_name(tiny_processor, samples):
    samples[1]["source"] = "train.jsonl:12"
    with pytest.raises(CollatorError, match=r"^train\.jsonl:12 has 19 ids; expected at most max_length=18"):
        VlmSliceCollator(tiny_processor, max_length=18)(samples[1:2])
    assert VlmSliceCollator(tiny_processor, max_length=19)(samples[1:2])["input_ids"].shape == (1, 32)


def test_samples_without_an_answer_are_refused(collator, samples):
    with pytest.raises(CollatorError, match="sample 1 of the batch has no assistant message"):
        collator([samples[0], {"messages": [turn("user", "2+2?")]}])


def test_dataset_feeds_the_collator(collator, tmp_path, draw_image):
    draw_image().save(tmp_path / "a.png")
    messages = '[{"role": "user", "content": "<image>\\nHow many?"}, {"role": "assistant", "content": "3"}]'
    (tmp_path / "a.jsonl").write_text(f'{{"messages": {messages}, "images": ["a.png"]}}')
    batch = collator(list(ConversationDataset(tmp_path / "a.jsonl")))
    expected = collator(
        [{"messages": [turn("user", None, "How many?"), turn("assistant", "3")], "images": [draw_image()]}]
    )
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
