"""The number in an answer, and rows that survive JSON."""

from __future__ import annotations

import json

import pytest

from vlmslice.counting_test.answers import CountAnswer, read_count, record_answer
from vlmslice.counting_test.pictures import nine_balls_pictures


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("9", 9),
        ("There are 12.", 12),
        ("**16** balls", 16),
        ("nine", 9),
        ("Twenty-one of them, 7 in each row.", 21),
        ("twenty one", 21),
        ("I count thirty shapes", 30),
        ("sixteen, not six", 16),
        ("zero", 0),
        ("None.", 0),
        ("There are no red circles.", 0),
        ("There is no star", 0),
        ("3 rows of four", 3),
        ("someone said fortythree", None),
        ("4.5", None),
        ("", None),
        ("many", None),
        ("1234567", None),
    ],
)
def test_first_number_counts(text: str, count: int | None) -> None:
    assert read_count(text) == count


def test_rows() -> None:
    [picture] = nine_balls_pictures((256,))
    row = record_answer(picture, "adaptive", "ten")
    assert (row.count, row.truth, row.error, row.is_exact) == (10, 9, 1, False)
    assert len(row.boxes) == 9
    assert CountAnswer.from_dict(json.loads(json.dumps(row.to_dict()))) == row
    silent = record_answer(picture, "adaptive", "many")
    assert (silent.count, silent.error, silent.is_exact) == (None, None, False)
