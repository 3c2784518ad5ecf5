"""Tables: ruled, striped or bare; asked for as HTML, as CSV, or by the cell."""

from __future__ import annotations

import csv
import html
import io
import random
from collections.abc import Sequence

from vlmslice.data.fonts import FontLibrary, load_font, spell
from vlmslice.data.photo_effects import photograph
from vlmslice.data.phrases import Phrases
from vlmslice.data.samples import TaskConfig, TaskSample, ask_several, font_size, reshape
from vlmslice.data.scenes import Scene, ink_and_paper, paper_image
from vlmslice.data.typesetting import Font, Pen, line_height

_SMALLEST = 9  # px per em
_MIN_AREA = 200 * 160

HTML_QUESTIONS = (
    "Write this table as HTML.",
    "Read the table as HTML.",
    "Give the table as HTML.",
    "Transcribe the table in HTML.",
)
CSV_QUESTIONS = (
    "Read the table as CSV.",
    "Give the table as CSV.",
    "Write the table as comma-separated values.",
)

Cells = list[list[str]]
"""Rows of cells, the header first."""


def table_to_html(cells: Sequence[Sequence[str]]) -> str:
    """[["a", "b"], ["1", "2"]] becomes `<table><tr><td>a</td><td>b</td></tr><tr><td>1</td><td>2</td></tr></table>`."""
    rows = ("".join(f"<td>{html.escape(cell, quote=False)}</td>" for cell in row) for row in cells)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def table_to_csv(cells: Sequence[Sequence[object]]) -> str:
    """Rows as comma-separated values, quoted where a cell needs it, without a line break at the end."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(cells)
    return out.getvalue().removesuffix("\n")


def random_table(phrases: Phrases, num_rows: int, num_columns: int) -> Cells:
    """A header and `num_rows` rows; the names in the header and in the first column are distinct."""
    fillings = (
        phrases.number,
        phrases.number,
        phrases.amount,
        phrases.percent,
        phrases.word,
        phrases.numeric_date,
    )
    kinds = [phrases.rng.choice(fillings) for _ in range(num_columns - 1)]
    names = phrases.distinct_words(num_rows + num_columns, longest=9)
    return [names[:num_columns]] + [[name, *(kind() for kind in kinds)] for name in names[num_columns:]]


def read_table(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> TaskSample:
    """A table of 2-5 columns; asks for HTML, CSV, a row, or a cell. Small pictures grow until two columns fit."""
    height, width = reshape(height, width, (0.5, config.max_aspect), _MIN_AREA)
    phrases = Phrases(rng, config.split, config.accents)
    size = font_size(rng, config, max(_SMALLEST, min(height, width) / 8))
    font = fonts.draw(rng, size)
    num_rows = max(1, rng.randint(*config.num_lines))
    cells = random_table(phrases, num_rows, rng.randint(2, 5))
    cells = [[spell(cell, font) for cell in row] for row in cells]
    pad = rng.uniform(0.3, 0.9)
    while len(table_to_html(cells)) > 2 * config.max_answer and len(cells) > 2:
        cells.pop()
    font, cells = _fit(font, cells, pad, 0.96 * height, 0.96 * width)
    scene = _draw(rng, font, cells, pad, height, width)
    scene = photograph(rng, scene, config.photo)
    return ask_several(rng, config, "table", scene, lambda: _ask(rng, cells))


def _fit(font: Font, cells: Cells, pad: float, height: float, width: float) -> tuple[Font, Cells]:
    """A size at which the table fits; rows, then columns, are dropped where it would be too small to read.

    Hinted fonts do not shrink in proportion, so each size is measured.
    """
    while True:
        natural_height = len(cells) * (line_height(font) + pad * font.size)
        natural_width = sum(_column_widths(font, cells, pad))
        scale = min(1.0, height / natural_height, width / natural_width)
        can_be_less = len(cells) > 2 or len(cells[0]) > 2
        if scale == 1.0 or (font.size <= 6 and not can_be_less):
            return font, cells
        if font.size * scale >= _SMALLEST or not can_be_less:
            font = load_font(str(font.path), max(6, int(font.size * scale)))
        elif len(cells) > 2 and (height / natural_height <= width / natural_width or len(cells[0]) <= 2):
            cells = cells[:-1]
        else:
            cells = [row[:-1] for row in cells]


def _column_widths(font: Font, cells: Cells, pad: float) -> list[float]:
    return [max(map(font.getlength, column)) + 2 * pad * font.size for column in zip(*cells, strict=True)]


def _draw(rng: random.Random, font: Font, cells: Cells, pad: float, height: int, width: int) -> Scene:
    ink, paper = ink_and_paper(rng, 90.0)
    scene = Scene(paper_image(rng, height, width, paper))
    pen = Pen(scene, ink)
    widths = _column_widths(font, cells, pad)
    # Wide pictures stretch the columns, tall ones the rows, each by a share of what is free.
    spread = 1 + rng.uniform(0, 1) * (max(1.0, 0.98 * width / sum(widths)) - 1)
    widths = [w * spread for w in widths]
    row_height = line_height(font) + pad * font.size
    row_height *= 1 + min(1.0, rng.uniform(0, 1) * (max(1.0, 0.98 * height / (row_height * len(cells))) - 1))
    top = rng.uniform(0.01, 0.99) * max(0.0, height - row_height * len(cells) - 2)
    left = rng.uniform(0.01, 0.99) * max(0.0, width - sum(widths) - 2)
    right, bottom = left + sum(widths), top + row_height * len(cells)
    rules = rng.choice(("grid", "rows", "header", "none", "grid"))
    striped = rng.random() < 0.3
    line = max(1, round(font.size / 16))
    edges = [left]
    for w in widths:
        edges.append(edges[-1] + w)
    towards_ink = tuple(round(p + 0.12 * (i - p)) for p, i in zip(paper, ink, strict=True))
    if striped or rng.random() < 0.3:
        for r in range(len(cells)):
            if r == 0 or (striped and r % 2 == 0):
                y = top + r * row_height
                pen.draw.rectangle((left, y, right, y + row_height), fill=towards_ink)
    numeric = [all(any(c.isdigit() for c in row[j]) for row in cells[1:]) for j in range(len(widths))]
    aligned_right = rng.random() < 0.6
    for r, row in enumerate(cells):
        y = top + r * row_height + (row_height - line_height(font)) / 2
        for j, cell in enumerate(row):
            if numeric[j] and aligned_right:
                pen.write_right(cell, font, y, edges[j + 1] - pad * font.size)
            else:
                pen.write(cell, font, y, edges[j] + pad * font.size)
            pen.mark("cell", cell, (top + r * row_height, edges[j], top + (r + 1) * row_height, edges[j + 1]))
    if rules in ("grid", "rows"):
        for r in range(len(cells) + 1):
            pen.draw.line((left, top + r * row_height, right, top + r * row_height), fill=ink, width=line)
    elif rules == "header":
        for y in (top, top + row_height, bottom):
            pen.draw.line((left, y, right, y), fill=ink, width=line)
    if rules == "grid":
        for x in edges:
            pen.draw.line((x, top, x, bottom), fill=ink, width=line)
    return scene


def _ask(rng: random.Random, cells: Cells) -> tuple[str, str]:
    draw = rng.random()
    if draw < 0.3:
        return rng.choice(HTML_QUESTIONS), table_to_html(cells)
    if draw < 0.5:
        return rng.choice(CSV_QUESTIONS), table_to_csv(cells)
    header, row = cells[0], rng.choice(cells[1:])
    if draw < 0.6:
        return f"Read the row of {row[0]} as CSV.", table_to_csv([row])
    if draw < 0.68:
        return rng.choice(
            (
                ("How many rows are below the header?", str(len(cells) - 1)),
                ("How many columns does the table have?", str(len(header))),
                ("Read the header as CSV.", table_to_csv([header])),
            )
        )
    j = rng.randrange(1, len(header))
    question = rng.choice(
        (
            "What is the {column} of {row}?",
            "What stands in row {row}, column {column}?",
            "{row}: what is the {column}?",
        )
    )
    return question.format(column=header[j], row=row[0]), row[j]
