"""Marks an answer part by part: what is right, what is wrong, what is missed. For people; figures are in `metrics`."""

from __future__ import annotations

import csv
import json
from collections import Counter
from enum import Enum
from itertools import zip_longest
from typing import NamedTuple, cast

from vlmslice.data.tables import table_to_html
from vlmslice.metrics import (
    Truth,
    cell_f1,
    character_errors,
    edge_f1,
    exact,
    field_exact,
    normalize_text,
    parse_edges,
    parse_fields,
)


class Mark(Enum):
    """What a part of an answer is worth; `NONE` where nothing is known."""

    NONE = "none"
    RIGHT = "right"
    WRONG = "wrong"
    MISSED = "missed"
    NOTE = "note"


class Cell(NamedTuple):
    """A piece of text in a row of the sheet."""

    text: str
    mark: Mark = Mark.NONE


Row = tuple[Cell, ...]
"""Cells side by side; those of neighbouring rows with as many cells stand in columns."""


class Marked(NamedTuple):
    """An answer in rows.

    Attributes:
        rows: The parts of the answer in its order, then what is missed.
        summary: One sentence, such as "3 of 4 fields right".
    """

    rows: list[Row]
    summary: str


_UNKNOWN = "not scored, as the truth is not known"


def mark_fields(answer: str, truth: str | None) -> Marked:
    """A flat JSON object, field by field; see `metrics.field_exact` for when two fields are the same.

    Args:
        answer: As the model gave it.
        truth: JSON; None if it is not known.
    """
    got = parse_fields(answer)
    if truth is None:
        found = [(Cell(name), Cell(text)) for name, text in (got or {}).items()]
        return Marked(list(found) or _raw(answer, Mark.NONE), _UNKNOWN)
    expected: dict[str, str] = json.loads(truth)
    if got is None:
        return Marked(
            [*_raw(answer, Mark.WRONG), *((Cell(k, Mark.NOTE), Cell(v, Mark.MISSED)) for k, v in expected.items())],
            f"0 of {len(expected)} fields right: the answer is no JSON object",
        )  # fmt: skip
    rows: list[Row] = []
    num_right = 0
    for name, text in expected.items():
        is_right = bool(field_exact(name)(answer, Truth(expected)).numerator)
        num_right += is_right
        if name in got:
            rows.append((Cell(name), Cell(got[name], Mark.RIGHT if is_right else Mark.WRONG)))
        if not is_right:
            rows.append((Cell("" if name in got else name), Cell(text, Mark.MISSED)))
    rows += [(Cell(name), Cell(text, Mark.WRONG)) for name, text in got.items() if name not in expected]
    return Marked(rows, f"{num_right} of {len(expected)} fields right")


def mark_table(answer: str, truth: str | None) -> Marked:
    """A CSV table, cell by cell; the number of right cells is that of `metrics.cell_f1`.

    Args:
        answer: As the model gave it.
        truth: CSV; None if it is not known.
    """
    got = _read_csv(answer)
    if truth is None:
        return Marked([tuple(Cell(text) for text in row) for row in got], _UNKNOWN)
    expected = _read_csv(truth)
    rows: list[Row] = []
    for got_row, expected_row in zip_longest(got, expected):
        cells = []
        for text, true in zip_longest(got_row or [], expected_row or []):
            if text is None:
                cells.append(Cell(true, Mark.MISSED))
            elif true is not None and normalize_text(text) == normalize_text(true):
                cells.append(Cell(text, Mark.RIGHT))
            else:
                cells.append(Cell(text, Mark.WRONG))
        rows.append(tuple(cells))
    common = cell_f1(table_to_html(got) if got else "", Truth(table_to_html(expected))).numerator / 2
    num_cells = sum(bool(text.strip()) for row in expected for text in row)
    num_got = sum(bool(text.strip()) for row in got for text in row)
    return Marked(rows, f"{common:.0f} of {num_cells} cells right" + _too_many(num_got - common, "wrong"))


def mark_edges(answer: str, truth: str | None) -> Marked:
    """Arrows "A -> B", one a line; the number of right ones is that of `metrics.edge_f1`.

    Args:
        answer: As the model gave it.
        truth: Likewise; None if it is not known.
    """
    got = cast("Counter[tuple[str, str]] | None", parse_edges(answer))
    if truth is None:
        return Marked([(Cell(" -> ".join(edge)),) for edge in got or ()] or _raw(answer, Mark.NONE), _UNKNOWN)
    # Names are compared without case, and shown as they stand in the picture.
    spelled = {
        tuple(normalize_text(name, True) for name in line.split("->")): line for line in truth.splitlines()
    }
    right = [edge for edge in got or () if edge in spelled]
    rows: list[Row] = [(Cell(spelled[edge], Mark.RIGHT),) for edge in right]
    rows += [(Cell(" -> ".join(edge), Mark.WRONG),) for edge in (got or {}) if edge not in spelled]
    if got is None:
        rows = _raw(answer, Mark.WRONG)
    rows += [(Cell(line, Mark.MISSED),) for edge, line in spelled.items() if edge not in right]
    ratio = edge_f1(answer, Truth({"edges": [line.split(" -> ") for line in truth.splitlines()]}))
    num_right = ratio.numerator / 2
    num_invented = (got.total() if got else 0) - num_right
    return Marked(
        rows, f"{num_right:.0f} of {len(spelled)} edges right" + _too_many(num_invented, "invented")
    )


def mark_text(answer: str, truth: str | None) -> Marked:
    """Lines of text, each right if it is the line of the truth; the sum is `metrics.character_errors`.

    Args:
        answer: As the model gave it.
        truth: Likewise; None if it is not known.
    """
    got = answer.splitlines() or [""]
    if truth is None:
        return Marked([(Cell(line),) for line in got], _UNKNOWN)
    rows: list[Row] = []
    for line, true in zip_longest(got, truth.splitlines()):
        is_right = line is not None and true is not None and normalize_text(line) == normalize_text(true)
        if line is not None:
            rows.append((Cell(line, Mark.RIGHT if is_right else Mark.WRONG),))
        if true is not None and not is_right:
            rows.append((Cell(true, Mark.MISSED),))
    if exact(answer, Truth(truth)).numerator:
        return Marked(rows, "right")
    errors = character_errors(answer, Truth(truth))
    return Marked(
        rows,
        f"{errors.numerator:.0f} character errors in {errors.denominator:.0f} "
        f"({errors.numerator / errors.denominator:.1%})",
    )


def _raw(answer: str, mark: Mark) -> list[Row]:
    return [(Cell(line, mark),) for line in answer.splitlines() or ["(an empty answer)"]]


def _read_csv(text: str) -> list[list[str]]:
    return [row for row in csv.reader(text.splitlines()) if row]


def _too_many(number: float, what: str) -> str:
    return f", {number:.0f} {what}" if number else ""
