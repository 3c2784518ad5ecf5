"""An answer as a table, if it is one: JSON, HTML, Markdown or comma-separated values."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any


@dataclass(frozen=True)
class AnswerTable:
    """A header and rows, all of one length."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def find_table(text: str) -> AnswerTable | None:
    """The table that an answer spells, or None.

    `"item,price\\ntea,3"` has the header `("item", "price")`. A JSON object becomes rows of field and value, a list of
    objects one row for each. Rows that are too short are filled up with empty cells. What is cut off halfway counts as
    far as it goes in HTML and Markdown, and as no table in JSON.
    """
    text = re.sub(r"\A```\w*\n(.*?)(\n```)?\s*\Z", r"\1", text.strip(), flags=re.DOTALL)
    if re.match(r"[\[{]", text):
        return _from_json(text)
    if "<tr" in text.lower():
        return _from_rows(_read_html(text))
    lines = text.splitlines()
    if len(lines) > 1 and re.fullmatch(r"\s*\|?(\s*:?-+:?\s*\|)+(\s*:?-+:?)?\s*", lines[1]):
        return _from_rows([_markdown_cells(line) for line in (lines[0], *lines[2:])])
    rows = [row for row in csv.reader(lines, skipinitialspace=True) if row]
    # A comma alone makes no table: prose has them, too.
    if len(rows) > 1 and len(rows[0]) > 1 and len({len(row) for row in rows}) == 1:
        return _from_rows(rows)
    return None


def _from_rows(rows: Sequence[Sequence[str]]) -> AnswerTable | None:
    if not rows:
        return None
    width = max(map(len, rows))
    header, *body = (tuple(row) + ("",) * (width - len(row)) for row in rows)
    return AnswerTable(header, tuple(body))


def _from_json(text: str) -> AnswerTable | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if isinstance(value, dict):
        lists = [part for part in value.values() if _is_records(part)]
        if len(value) == 1 and lists:  # {"items": [{...}, ...]}
            value = lists[0]
        else:
            return _from_rows([("field", "value"), *((name, _cell(part)) for name, part in value.items())])
    if _is_records(value):
        header = list(dict.fromkeys(name for record in value for name in record))
        return _from_rows([header, *([_cell(record.get(name)) for name in header] for record in value)])
    if isinstance(value, list) and value and all(isinstance(row, list) for row in value):
        return _from_rows([[_cell(part) for part in row] for row in value])
    if isinstance(value, list) and value:
        return _from_rows([["value"], *([_cell(part)] for part in value)])
    return None


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _markdown_cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def _read_html(text: str) -> list[list[str]]:
    reader = _TableReader()
    reader.feed(text)
    reader.close()
    return [row for row in reader.rows if row]


class _TableReader(HTMLParser):
    """Cells of all rows; what stands outside of cells is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        self._in_cell = tag in ("td", "th") and bool(self.rows) or self._in_cell and tag != "tr"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "tr", "table"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data
