import json

import pytest

from vlmslice.marking import Mark, Marked, mark_edges, mark_fields, mark_table, mark_text

RECORD = json.dumps(
    {"company": "ACME LTD", "date": "22-06-2022", "address": "1 Road, Town", "total": "1,225.40"}
)
TABLE = "Name,Value\nOne,13\nTwo,6\n"
EDGES = "Start -> Check\nCheck -> Stop\nCheck -> Start"


def marks(marked: Marked) -> list[list[tuple[str, str]]]:
    return [[(cell.text, cell.mark.value) for cell in row] for row in marked.rows]


@pytest.mark.parametrize(
    "mark,truth,summary",
    [
        (mark_fields, RECORD, "4 of 4 fields right"),
        (mark_table, TABLE, "6 of 6 cells right"),
        (mark_edges, EDGES, "3 of 3 edges right"),
        (mark_text, "two lines\nof text", "right"),
    ],
)
def test_truth_is_right_and_nothing_else_is(mark, truth: str, summary: str) -> None:
    marked = mark(truth, truth)
    assert marked.summary == summary
    assert {cell.mark for row in marked.rows for cell in row} <= {Mark.RIGHT, Mark.NONE}
    for answer in ("", "nonsense"):
        poor = mark(answer, truth)
        assert poor.summary != summary
        assert Mark.RIGHT not in {cell.mark for row in poor.rows for cell in row}
    unknown = mark(truth, None)
    assert unknown.summary == "not scored, as the truth is not known"
    assert {cell.mark for row in unknown.rows for cell in row} == {Mark.NONE}


def test_fields() -> None:
    answer = '{"company":"Acme Ltd","date":"23-06-2022","total":"RM 1225.4","tax":"3"}'
    marked = mark_fields(answer, RECORD)
    assert marked.summary == "2 of 4 fields right"
    assert marks(marked) == [
        [("company", "none"), ("Acme Ltd", "right")],
        [("date", "none"), ("23-06-2022", "wrong")],
        [("", "none"), ("22-06-2022", "missed")],
        [("address", "none"), ("1 Road, Town", "missed")],
        [("total", "none"), ("RM 1225.4", "right")],
        [("tax", "none"), ("3", "wrong")],
    ]


def test_answer_that_is_no_json_is_shown() -> None:
    marked = mark_fields("a receipt\nof sorts", RECORD)
    assert marked.summary == "0 of 4 fields right: the answer is no JSON object"
    assert marks(marked)[:2] == [[("a receipt", "wrong")], [("of sorts", "wrong")]]


def test_table() -> None:
    marked = mark_table("Name,Value\nOne,18\nTwo,6\nThree,1\n", TABLE)
    assert marked.summary == "5 of 6 cells right, 3 wrong"
    assert marks(marked)[1:] == [
        [("One", "right"), ("18", "wrong")],
        [("Two", "right"), ("6", "right")],
        [("Three", "wrong"), ("1", "wrong")],
    ]
    assert marks(mark_table("Name,Value\n", TABLE))[1] == [("One", "missed"), ("13", "missed")]


def test_edges() -> None:
    marked = mark_edges("start -> check\nStop -> Check", EDGES)
    assert marked.summary == "1 of 3 edges right, 1 invented"
    assert marks(marked) == [
        [("Start -> Check", "right")],
        [("stop -> check", "wrong")],
        [("Check -> Stop", "missed")],
        [("Check -> Start", "missed")],
    ]


def test_text() -> None:
    marked = mark_text("two limes\nof text", "two lines\nof text")
    assert marked.summary == "1 character errors in 17 (5.9%)"
    assert [[mark for _, mark in row] for row in marks(marked)] == [["wrong"], ["missed"], ["right"]]
