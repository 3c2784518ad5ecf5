"""LLaVA's spelling of conversations: `conversations` of `from` and `value`, one `image`, often one JSON array."""

import json

import pytest

from vlmslice.data.conversations import ConversationDataset, ConversationError, parse_conversation

RECORD = {
    "id": "7",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "3"}],
}


def test_same_as_messages():
    ours = {
        "messages": [
            {"role": "user", "content": "<image>\nHow many?"},
            {"role": "assistant", "content": "3"},
        ],
        "images": ["a.png"],
    }
    assert parse_conversation(json.dumps(RECORD), "f:1") == parse_conversation(json.dumps(ours), "f:1")
    several = RECORD | {"image": ["a.png"]}
    assert parse_conversation(json.dumps(several), "f:1") == parse_conversation(json.dumps(ours), "f:1")


def test_without_image():
    record = {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2+2?"}]}
    messages, images = parse_conversation(json.dumps(record), "f:1")
    assert [message["role"] for message in messages] == ["system", "user"] and images == []


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"conversations": [{"from": "bot", "value": "x"}]}, "expected an object with a role of"),
        ({"conversations": ["x"]}, "message 0 is 'x'"),
        ({"conversations": []}, "got no messages"),
        ({"image": ["a.png", "b.png"]}, "places for 1 images but images lists 2"),
        ({"image": 3}, "images is 3; expected a list of paths"),
    ],
)
def test_bad_records(change, complaint):
    with pytest.raises(ConversationError, match=f"^f:1: ?.*{complaint}"):
        parse_conversation(json.dumps(RECORD | change), "f:1")


def test_array_file(tmp_path, draw_image):
    draw_image(40, 60).save(tmp_path / "a.png")
    path = tmp_path / "llava.json"
    path.write_text("\n " + json.dumps([RECORD, RECORD | {"image": "gone.png"}], indent=1))
    dataset = ConversationDataset(path)
    assert len(dataset) == 2
    assert dataset[0]["images"][0].size == (60, 40) and dataset[0]["source"] == f"{path}: record 1"
    with pytest.raises(ConversationError, match=r"llava\.json: record 2: .*gone\.png"):
        dataset[-1]
    with pytest.raises(IndexError):
        dataset[2]


def test_broken_array(tmp_path):
    path = tmp_path / "llava.json"
    path.write_text("[{")
    with pytest.raises(ConversationError, match="not valid JSON"):
        ConversationDataset(path)
    path.write_text(json.dumps([RECORD, {"id": 1}]))
    with pytest.raises(ConversationError, match="record 2: got no messages"):
        ConversationDataset(path)
