import json
from collections import Counter
from pathlib import Path

import pytest

from vlmslice.data.conversations import ConversationError
from vlmslice.data.sources import ConversationMixture, Source, SourceError, parse_source


def write_questions(path: Path, num: int) -> Path:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{path.stem}{i}"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(num)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def questions(mixture: ConversationMixture) -> list[str]:
    return [mixture[i]["messages"][0]["content"][0]["text"] for i in range(len(mixture))]


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("a.jsonl", "a.jsonl", 1.0),
        ("a.jsonl:0.5", "a.jsonl", 0.5),
        ("a.jsonl:3", "a.jsonl", 3.0),
        ("b:one.jsonl", "b:one.jsonl", 1.0),
        ("b:one.jsonl:2e-1", "b:one.jsonl", 0.2),
    ],
)
def test_parse_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str, weight: float
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("a.jsonl", "b:one.jsonl"):
        Path(file).touch()
    assert parse_source(text) == Source(Path(name), weight)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipts.jsonl", "there is no file 'recipts.jsonl'; did you mean 'receipts.jsonl'"),
        ("recipts.jsonl:0.5", "there is no file 'recipts.jsonl'; did you mean 'receipts.jsonl'"),
        ("zzz", "there is no file 'zzz'; expected a JSONL file of conversations"),
        ("nowhere/a.jsonl", "there is no file 'nowhere/a.jsonl'; expected"),
        ("receipts.jsonl:0", "has the weight 0; expected a number above 0"),
        ("receipts.jsonl:-1", "has the weight -1"),
        ("receipts.jsonl:nan", "has the weight nan"),
        ("receipts.jsonl:inf", "has the weight inf"),
    ],
)
def test_errors_name_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("receipts.jsonl").touch()
    with pytest.raises(SourceError) as caught:
        parse_source(text)
    assert message in str(caught.value)


def test_weights_are_passes_through_a_file(tmp_path: Path) -> None:
    a, b, c = (write_questions(tmp_path / f"{name}.jsonl", 10) for name in "abc")
    mixture = ConversationMixture([Source(a), Source(b, 0.5), Source(c, 2.3)])
    counts = Counter(questions(mixture))
    assert {counts[f"a{i}"] for i in range(10)} == {1}
    assert sorted(counts[f"b{i}"] for i in range(10)) == [0] * 5 + [1] * 5
    assert sorted(counts[f"c{i}"] for i in range(10)) == [2] * 7 + [3] * 3
    assert len(mixture) == 10 + 5 + 23


def test_a_part_of_a_file_is_chosen_by_the_seed(tmp_path: Path) -> None:
    source = Source(write_questions(tmp_path / "a.jsonl", 40), 0.25)
    first, again, other = (questions(ConversationMixture([source], seed)) for seed in (0, 0, 1))
    assert first == again
    assert set(first) != set(other)
    assert len(questions(ConversationMixture([Source(source.path, 0.001)]))) == 1


def test_files_are_checked_at_once(tmp_path: Path) -> None:
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.write_text("\n")
    broken.write_text("{}\n")
    with pytest.raises(SourceError, match="empty.jsonl' holds no conversation"):
        ConversationMixture([Source(empty)])
    with pytest.raises(ConversationError, match="broken.jsonl:1: got no messages"):
        ConversationMixture([Source(broken)])
