import json
import pickle

import pytest
from PIL import ImageChops

from vlmslice.data.conversations import ConversationDataset, ConversationError, parse_conversation

QUESTION = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "content": "3"}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


IMAGE = {"type": "image"}


@pytest.fixture
def jsonl(tmp_path, draw_image):
    """A file of three conversations, with a blank line, and two images beside it."""
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        draw_image(40, 60, number).save(tmp_path / f"images/{number}.png")
    user = {"role": "user", "content": "<image>\nand <image> é?"}
    lines = [
        json.dumps({"messages": [QUESTION, ANSWER], "id": 7}),
        "",
        json.dumps(
            {"messages": [user, ANSWER], "images": ["images/1.png", "images/2.png"]}, ensure_ascii=False
        ),
        json.dumps(
            {"messages": [{"role": "user", "content": [text("<image>"), IMAGE]}], "images": ["images/2.png"]}
        ),
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_dataset_loads_conversations_and_images(jsonl, draw_image):
    dataset = ConversationDataset(jsonl)
    assert len(dataset) == 3
    assert dataset[0]["messages"] == [{"role": "user", "content": [text("How many?")]}] + [
        {"role": "assistant", "content": [text("3")]}
    ]
    assert dataset[0]["images"] == []
    sample = dataset[1]
    assert sample["messages"][0]["content"] == [IMAGE, text("and "), IMAGE, text(" é?")]
    assert sample["source"] == f"{jsonl}:3"
    for image, number in zip(sample["images"], (1, 2), strict=True):
        assert ImageChops.difference(image, draw_image(40, 60, number)).getbbox() is None
    assert dataset[2]["messages"][0]["content"] == [text("<image>"), IMAGE]
    assert [sample["source"] for sample in dataset] == [dataset[index]["source"] for index in range(3)]


def test_image_root_replaces_the_folder_of_the_file(jsonl, tmp_path):
    moved = tmp_path / "elsewhere" / "train.jsonl"
    moved.parent.mkdir()
    jsonl.rename(moved)
    assert len(ConversationDataset(moved, image_root=tmp_path)[1]["images"]) == 2
    with pytest.raises(ConversationError, match=r"train\.jsonl:3: .*1\.png"):
        ConversationDataset(moved)[1]


def test_dataset_travels_to_worker_processes(jsonl):
    copy = pickle.loads(pickle.dumps(ConversationDataset(jsonl)))
    assert copy[1]["messages"] == ConversationDataset(jsonl)[1]["messages"]


def test_damaged_image_is_named_with_its_line(jsonl):
    (jsonl.parent / "images/2.png").write_bytes(b"not an image")
    with pytest.raises(ConversationError, match=r"train\.jsonl:4: "):
        ConversationDataset(jsonl)[2]


def test_building_names_the_first_bad_line(jsonl):
    with jsonl.open("a") as file:
        file.write('\n{"messages": ')
    with pytest.raises(ConversationError, match=r"train\.jsonl:5: not valid JSON"):
        ConversationDataset(jsonl)


@pytest.mark.parametrize(
    ("content", "blocks"),
    [
        ("no mark", [text("no mark")]),
        ("<image>", [IMAGE]),
        ("<image>\n\nWhat?", [IMAGE, text("\nWhat?")]),
        ("What?\n<image>", [text("What?\n"), IMAGE]),
        ("<image><image>\nboth", [IMAGE, IMAGE, text("both")]),
        ("", []),
    ],
)
def test_image_marks_become_blocks(content, blocks):
    line = json.dumps(
        {"messages": [{"role": "user", "content": content}], "images": ["a.png"] * content.count("<")}
    )
    assert parse_conversation(line, "f:1")[0][0]["content"] == blocks


def test_mark_in_an_answer_is_text():
    line = json.dumps({"messages": [{"role": "assistant", "content": "write <image>"}]})
    assert parse_conversation(line, "f:1")[0][0]["content"] == [text("write <image>")]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ([], "got no messages"),
        ({"messages": []}, "got no messages"),
        ({"conversations": []}, "got no messages"),
        ({"messages": [QUESTION], "images": "a.png"}, "expected a list of paths"),
        ({"messages": [QUESTION], "images": [None]}, "expected a list of paths"),
        ({"messages": ["hi"]}, "message 0 is 'hi'"),
        ({"messages": [QUESTION, {"role": "bot", "content": "3"}]}, "message 1 is .*'bot'"),
        ({"messages": [{"role": "user"}]}, "has the content None"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "holds the block"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "holds the block"),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}]}, "answer with an image"),
        ({"messages": [QUESTION], "images": ["a.png"]}, "places for 0 images but images lists 1"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "places for 1 images but images lists 0"),
    ],
)
def test_bad_lines_are_refused(record, complaint):
    with pytest.raises(ConversationError, match=f"^f:1: .*{complaint}"):
        parse_conversation(json.dumps(record), "f:1")
