"""What an answer is worth: the metrics of every task, each a ratio of sums with a bootstrap interval.

A metric turns one answer into a numerator and a denominator; its value over many answers is the sum of the numerators
divided by the sum of the denominators. A mean has denominators of 1, an error rate has the lengths of the truths, an F1
has predicted plus true items. What a row cannot tell has a denominator of 0 and takes no part.

An answer that is empty or cannot be parsed is never left out: it scores as nothing, and `unreadable` counts it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any, NamedTuple

import jiwer
import numpy as np
from rapidfuzz.distance import Levenshtein

BOOTSTRAP_SEED = 20_261_122
NUM_RESAMPLES = 2_000

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05

# A count of more digits is a model repeating itself, not a number of things in a picture.
_MAX_COUNT_DIGITS = 6
_MAX_SPAN = 1_000  # as the HTML standard caps colspan


class Ratio(NamedTuple):
    """One answer's share of a metric; a denominator of 0 means that the metric does not apply."""

    numerator: float
    denominator: float


@dataclass(frozen=True)
class Truth:
    """What an answer is compared with.

    Attributes:
        answer: Text; a list of texts of which any will do; a number for `count`; a flat object for `receipt-json`;
            HTML for `table-html`; `{"edges": [[from, to], ...]}` for `flowchart-graph`.
        ignore_case: Compare text without case, because the truth has lost its own.
        unordered: The truth is a bag of words: only what ignores their order is measured.
    """

    answer: Any
    ignore_case: bool = False
    unordered: bool = False


@dataclass(frozen=True)
class Metric:
    """A figure of a task.

    Attributes:
        name: Key in the results.
        title: What a table calls it.
        unit: `%` for shares and rates, which are fractions in the results, or empty.
        lower_is_better: True for errors.
        measure: Prediction and truth to the ratio of one answer.
    """

    name: str
    title: str
    unit: str
    lower_is_better: bool
    measure: Callable[[str, Truth], Ratio]

    def format(self, value: float | None) -> str:
        """The value as a table shows it: `12.3 %`, `0.45`, or a dash."""
        if value is None:
            return "–"
        return f"{value:.1%}".replace("%", " %") if self.unit == "%" else f"{value:.2f}"


def normalize_text(text: str, ignore_case: bool = False) -> str:
    """Text as it is compared: Unicode NFC, every run of spaces and line breaks one space, none at the ends."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.casefold() if ignore_case else text


# Reading


def character_errors(prediction: str, truth: Truth) -> Ratio:
    """Character error rate: (substitutions + deletions + insertions) / characters of the truth.

    Over several answers it is the sum of edits divided by the sum of lengths, not a mean of rates; it can exceed 1.
    One wrong letter in "word" and none in 12 characters make 1/16. Computed by jiwer, on `normalize_text` of both.
    Source: Morris, Maier, Green 2004, "From WER and RIL to MER and WIL", at the level of characters.
    """
    if truth.unordered:
        return Ratio(0, 0)
    expected, got = _text_pair(prediction, truth)
    return _edits(jiwer.process_characters(expected, got))


def character_errors_without_spaces(prediction: str, truth: Truth) -> Ratio:
    """`character_errors` after every space is dropped, as line recognisers are usually compared (PP-OCR)."""
    expected, got = _text_pair(prediction, truth)
    return _edits(jiwer.process_characters(expected.replace(" ", ""), got.replace(" ", "")))


def word_errors(prediction: str, truth: Truth) -> Ratio:
    """Word error rate: (substitutions + deletions + insertions) / words of the truth; a word ends at a space.

    Computed by jiwer, on `normalize_text` of both. Source: as `character_errors`.
    """
    if truth.unordered:
        return Ratio(0, 0)
    return _edits(jiwer.process_words(*_text_pair(prediction, truth)))


def word_recall(prediction: str, truth: Truth) -> Ratio:
    """Words of the truth that the answer has, in any order, divided by words of the truth.

    Words are counted with multiplicity: |truth ∩ answer| / |truth| of two multisets. "a b b" against "b a c": 2/3.
    Source: the recall of end-to-end word spotting, without places (ICDAR 2019 SROIE, task 2).
    """
    expected, got = (Counter(text.split()) for text in _text_pair(prediction, truth))
    return Ratio((expected & got).total(), expected.total())


def anls(prediction: str, truth: Truth) -> Ratio:
    """Normalised Levenshtein similarity of an answer, 0 below the threshold; its mean is ANLS.

    s = 1 - edits / max(lengths); s if s > 0.5, else 0, of the truth that fits best; without case.
    Source: Biten et al. 2019, "Scene Text Visual Question Answering" (normalised distance < 0.5 counts).
    """
    answer = normalize_text(prediction, ignore_case=True)
    return Ratio(max(_similarity(answer, normalize_text(t, ignore_case=True)) for t in _texts(truth)), 1)


def exact(prediction: str, truth: Truth) -> Ratio:
    """1 if the answer equals a truth after `normalize_text`, else 0."""
    answer = normalize_text(prediction, truth.ignore_case)
    return Ratio(answer in [normalize_text(text, truth.ignore_case) for text in _texts(truth)], 1)


def relaxed_accuracy(prediction: str, truth: Truth) -> Ratio:
    """1 if the answer is a truth: numbers within 5 % of it, |answer - truth| <= 0.05 |truth|; else text without case.

    A number may carry a currency sign, thousands commas and a percent sign, which are dropped from both sides.
    Years are numbers too: 2018 passes for 2019, here as in every published figure.
    Source: Masry et al. 2022, "ChartQA", after Methani et al. 2020, "PlotQA".
    """
    return Ratio(any(_relaxed_match(prediction, text) for text in _texts(truth)), 1)


def _text_pair(prediction: str, truth: Truth) -> tuple[str, str]:
    return normalize_text(truth.answer, truth.ignore_case), normalize_text(prediction, truth.ignore_case)


def _texts(truth: Truth) -> list[str]:
    return [str(text) for text in truth.answer] if isinstance(truth.answer, list) else [str(truth.answer)]


def _edits(output: jiwer.CharacterOutput | jiwer.WordOutput) -> Ratio:
    missed = output.substitutions + output.deletions
    return Ratio(missed + output.insertions, missed + output.hits)


def _similarity(one: str, other: str) -> float:
    similarity = Levenshtein.normalized_similarity(one, other)
    return similarity if similarity > ANLS_THRESHOLD else 0.0


def _relaxed_match(prediction: str, expected: str) -> bool:
    answer, number = parse_number(prediction), parse_number(expected)
    if answer is not None and number is not None:
        return abs(answer - number) <= RELAXED_TOLERANCE * abs(number)
    return normalize_text(prediction, ignore_case=True) == normalize_text(expected, ignore_case=True)


# Codes are named: any letters at all would make `May 5` a number, and the same one as `Jan 5`.
_NUMBER = re.compile(
    r"(-?)\s*(?:RM|MYR|US|USD|EUR|GBP|Rs\.?)?\s*[$€£¥]?\s*(-?)(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?\s*%?",
    re.IGNORECASE,
)


def parse_number(text: str) -> float | None:
    """`$1,234.5`, `RM 8.60`, `-3 %` or `12` as a number; None if the text is anything more or less."""
    found = _NUMBER.fullmatch(text.strip())
    if found is None or (found[3] is None and found[4] is None):
        return None
    value = float((found[3] or "0").replace(",", "") + (found[4] or ""))
    return -value if found[1] or found[2] else value


# Counting


def parse_count(text: str) -> int | None:
    """The first number of an answer, `There are 12.` -> 12; None if there is none, or it is no whole number."""
    found = re.search(r"-?\d+(?:,\d{3})*(\.\d+)?", text)
    if found is None or found[1] or sum(map(str.isdigit, found[0])) > _MAX_COUNT_DIGITS:
        return None
    return int(found[0].replace(",", ""))


def count_exact(prediction: str, truth: Truth) -> Ratio:
    """1 if the count is right. Its mean is the share of right counts."""
    return Ratio(parse_count(prediction) == int(truth.answer), 1)


def count_off_by_one(prediction: str, truth: Truth) -> Ratio:
    """1 if |count - truth| <= 1. Its mean is the share of counts that are nearly right."""
    count = parse_count(prediction)
    return Ratio(count is not None and abs(count - int(truth.answer)) <= 1, 1)


def count_error(prediction: str, truth: Truth) -> Ratio:
    """|count - truth|. Its mean is the mean absolute error (MAE).

    An answer without a count errs by max(truth, 1): as if it had seen nothing, and never as if it were right.
    """
    count, expected = parse_count(prediction), int(truth.answer)
    return Ratio(max(expected, 1) if count is None else abs(count - expected), 1)


def count_unreadable(prediction: str, truth: Truth) -> Ratio:
    """1 if the answer holds no count of at most 6 digits."""
    return Ratio(parse_count(prediction) is None, 1)


# Receipts


def parse_fields(prediction: str) -> dict[str, str] | None:
    """The fields of the JSON object in an answer, whatever stands round it; None if there is none.

    Empty fields and nulls are left out; the names are compared without case.
    """
    parsed = _parse_json(prediction, "{", "}")
    if not isinstance(parsed, dict):
        return None
    texts = {name.casefold(): _field_text(value) for name, value in parsed.items()}
    return {name: text for name, text in texts.items() if text}


def field_exact(*names: str) -> Callable[[str, Truth], Ratio]:
    """The metric that is 1 if all these fields are right; it applies where the truth has all of them.

    Two fields are equal if both are amounts of the same value (`RM 8.60`, `8.6`), or texts that are equal without
    case after `normalize_text`. Source: exact match of ICDAR 2019 SROIE, task 3.
    """

    def measure(prediction: str, truth: Truth) -> Ratio:
        expected, got = _expected_fields(truth), parse_fields(prediction) or {}
        if not all(name in expected for name in names):
            return Ratio(0, 0)
        return Ratio(all(_same_field(got.get(name, ""), expected[name]) for name in names), 1)

    return measure


def field_f1(prediction: str, truth: Truth) -> Ratio:
    """F1 of fields: 2 * right / (fields of the answer + fields of the truth), summed over all receipts.

    Source: ICDAR 2019 SROIE, task 3 (F1 of exactly matched fields).
    """
    expected, got = _expected_fields(truth), parse_fields(prediction) or {}
    right = sum(_same_field(text, expected.get(name, "")) for name, text in got.items())
    return Ratio(2 * right, len(expected) + len(got))


def field_anls(prediction: str, truth: Truth) -> Ratio:
    """Mean over the fields of the truth of the similarity of `anls`: credit for an address that is nearly right."""
    expected, got = _expected_fields(truth), parse_fields(prediction) or {}
    similarities = [
        _similarity(normalize_text(got.get(name, ""), True), normalize_text(text, True))
        for name, text in expected.items()
    ]
    return Ratio(sum(similarities), len(expected))


def fields_unreadable(prediction: str, truth: Truth) -> Ratio:
    """1 if the answer holds no JSON object."""
    return Ratio(parse_fields(prediction) is None, 1)


def _expected_fields(truth: Truth) -> dict[str, str]:
    texts = {name.casefold(): _field_text(value) for name, value in truth.answer.items()}
    return {name: text for name, text in texts.items() if text}


def _field_text(value: Any) -> str:
    if value is None:
        return ""
    return normalize_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _same_field(one: str, other: str) -> bool:
    amount = parse_number(one)
    if amount is not None and amount == parse_number(other):
        return True
    return bool(one) and normalize_text(one, True) == normalize_text(other, True)


def _parse_json(text: str, opening: str, closing: str) -> Any:
    """What stands from the first opening to the last closing bracket; None if it is no JSON."""
    try:
        return json.loads(text[text.index(opening) : text.rindex(closing) + 1])
    except (ValueError, RecursionError):  # no bracket, no JSON, or brackets without end
        return None


# Tables


class Cell(NamedTuple):
    """A cell of a table and the place of its upper left corner on the grid, spans counted."""

    row: int
    col: int
    row_span: int
    col_span: int
    text: str


def parse_table(html: str) -> list[Cell] | None:
    """The cells of the first table of an answer; None if there is no cell.

    Rows and cells need no end tags, and rows without a cell are passed over. Cells are laid out as browsers do: from
    the left, past what spans from above.
    """
    reader = _TableReader()
    reader.feed(html)
    reader.close()
    rows = [row for row in reader.rows if row]
    if not rows:
        return None
    cells: list[Cell] = []
    taken: set[tuple[int, int]] = set()
    for row, found in enumerate(rows):
        col = 0
        for row_span, col_span, text in found:
            while (row, col) in taken:
                col += 1
            row_span = min(row_span, len(rows) - row)  # a table ends with its last row
            taken |= {(row + i, col + j) for i in range(row_span) for j in range(col_span)}
            cells.append(Cell(row, col, row_span, col_span, normalize_text("".join(text))))
            col += col_span
    return cells


def cell_f1(prediction: str, truth: Truth) -> Ratio:
    """F1 of cells: 2 * common / (cells of the answer + cells of the truth), summed over all tables.

    Cells are the same if row, column, spans and text are; empty ones are left out, so that a blank grid earns
    nothing. One row too many makes every cell below it wrong; `adjacency_f1` forgives that.
    """
    return _f1(*(Counter(cell for cell in cells if cell.text) for cells in _tables(prediction, truth)))


def adjacency_f1(prediction: str, truth: Truth) -> Ratio:
    """F1 of adjacency relations: 2 * common / (relations of the answer + of the truth), summed over all tables.

    A relation is (text, text, direction) of a cell and the next one to its right or below it, past empty cells; a
    spanning cell has one to each neighbour. A table of a single cell has none, and does not apply.
    Source: Göbel et al. 2012, "A Methodology for Evaluating Algorithms for Table Understanding in PDF Documents", the
    measure of the ICDAR 2013 table competition.
    """
    return _f1(*(adjacency_relations(cells) for cells in _tables(prediction, truth)))


def adjacency_relations(cells: list[Cell]) -> Counter[Hashable]:
    """The multiset of relations of a table; see `adjacency_f1`."""
    filled = {
        (cell.row + i, cell.col + j): cell
        for cell in cells
        if cell.text
        for i in range(cell.row_span)
        for j in range(cell.col_span)
    }
    pairs: set[tuple[Cell, Cell, str]] = set()
    for axis, direction in ((0, "right"), (1, "below")):
        places = sorted(filled, key=lambda place: (place[axis], place[1 - axis]))
        for place, following in zip(places, places[1:], strict=False):
            if place[axis] == following[axis] and filled[place] != filled[following]:
                pairs.add((filled[place], filled[following], direction))
    return Counter((one.text, other.text, direction) for one, other, direction in pairs)


def table_unreadable(prediction: str, truth: Truth) -> Ratio:
    """1 if the answer holds no table cell."""
    return Ratio(parse_table(prediction) is None, 1)


def _tables(prediction: str, truth: Truth) -> tuple[list[Cell], list[Cell]]:
    return parse_table(prediction) or [], parse_table(truth.answer) or []


def _f1(got: Counter[Any], expected: Counter[Any]) -> Ratio:
    return Ratio(2 * (got & expected).total(), got.total() + expected.total())


class _TableReader(HTMLParser):
    """Collects (row span, column span, pieces of text) of the cells of each row of the first table."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[tuple[int, int, list[str]]]] = []
        self._ended = False
        self._in_cell = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self._ended:
            return
        if tag == "tr":
            self.rows.append([])
            self._in_cell = False
        elif tag in ("td", "th"):
            spans = dict(attributes)
            if not self.rows:
                self.rows.append([])
            self.rows[-1].append((_span(spans.get("rowspan")), _span(spans.get("colspan")), []))
            self._in_cell = True
        elif tag == "br":
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "tr"):
            self._in_cell = False
        elif tag == "table":
            self._ended = True

    def handle_data(self, data: str) -> None:
        if self._in_cell and not self._ended:
            self.rows[-1][-1][2].append(data)


def _span(value: str | None) -> int:
    """A span as browsers read it: 1 for what is no number or none."""
    if value is None or not re.fullmatch(r"\d{1,9}", value.strip(), re.ASCII):
        return 1
    return min(max(int(value), 1), _MAX_SPAN)


# Flowcharts


def parse_edges(prediction: str) -> Counter[Hashable] | None:
    """The arrows of an answer, as (from, to) in lower case; None if it holds none.

    Two forms are read: a JSON object with `edges`, each `[from, to]` or an object whose first two values they are,
    and plain lines `from -> to`.
    """
    parsed = _parse_json(prediction, "{", "}")
    if isinstance(parsed, dict) and isinstance(parsed.get("edges"), list):
        pairs = [list(edge.values()) if isinstance(edge, dict) else edge for edge in parsed["edges"]]
        named = [pair[:2] for pair in pairs if isinstance(pair, list) and len(pair) >= 2]
    else:
        lines = [line.split("->") for line in prediction.splitlines()]
        named = [line for line in lines if len(line) == 2]
    edges = Counter(tuple(normalize_text(str(name), True) for name in pair) for pair in named)
    return Counter(edges) if edges else None


def edge_f1(prediction: str, truth: Truth) -> Ratio:
    """F1 of arrows: 2 * common / (arrows of the answer + of the truth), summed over all flowcharts.

    Arrows are the same if the texts at both ends are, without case; those of equal texts are counted one by one.
    """
    return _f1(parse_edges(prediction) or Counter(), parse_edges(json.dumps(truth.answer)) or Counter())


def edges_unreadable(prediction: str, truth: Truth) -> Ratio:
    """1 if the answer holds no arrow."""
    return Ratio(parse_edges(prediction) is None, 1)


_CER = Metric("cer", "character error rate", "%", True, character_errors)
_WER = Metric("wer", "word error rate", "%", True, word_errors)
_RECALL = Metric("word_recall", "word recall", "%", False, word_recall)
_ANLS = Metric("anls", "ANLS", "%", False, anls)
_EXACT = Metric("exact", "exact", "%", False, exact)


def _unreadable(measure: Callable[[str, Truth], Ratio]) -> Metric:
    return Metric("unreadable", "unreadable answers", "%", True, measure)


TASK_METRICS: dict[str, tuple[Metric, ...]] = {
    "ocr-page": (_CER, _WER, _RECALL),
    "ocr-line": (
        _CER,
        Metric(
            "cer_no_spaces", "character error rate, no spaces", "%", True, character_errors_without_spaces
        ),
        _WER,
        _EXACT,
    ),
    "receipt-json": (
        Metric("field_f1", "field F1", "%", False, field_f1),
        Metric("date_and_total", "date and total exact", "%", False, field_exact("date", "total")),
        *(
            Metric(f, f"{f} exact", "%", False, field_exact(f))
            for f in ("company", "date", "address", "total")
        ),
        Metric("field_anls", "field ANLS", "%", False, field_anls),
        _unreadable(fields_unreadable),
    ),
    "chart-qa": (
        Metric("relaxed_accuracy", "relaxed accuracy", "%", False, relaxed_accuracy),
        _EXACT,
        _ANLS,
    ),
    "count": (
        Metric("exact", "exact", "%", False, count_exact),
        Metric("off_by_one", "at most one off", "%", False, count_off_by_one),
        Metric("mae", "mean absolute error", "", True, count_error),
        _unreadable(count_unreadable),
    ),
    "table-html": (
        Metric("cell_f1", "cell F1", "%", False, cell_f1),
        Metric("adjacency_f1", "adjacency F1", "%", False, adjacency_f1),
        _unreadable(table_unreadable),
    ),
    "flowchart-graph": (Metric("edge_f1", "edge F1", "%", False, edge_f1), _unreadable(edges_unreadable)),
}
"""The metrics of each task; the first one that applies orders its cases in the report."""


def score(task: str, prediction: str, truth: Truth) -> dict[str, Ratio]:
    """Every metric of a task on one answer."""
    return {metric.name: metric.measure(prediction, truth) for metric in TASK_METRICS[task]}


@dataclass(frozen=True)
class Figure:
    """The value of a metric over many answers, with its 95 % interval."""

    value: float
    low: float
    high: float


def summarize(ratios: Sequence[Ratio], groups: Sequence[Hashable]) -> Figure | None:
    """Sum of numerators / sum of denominators, and a 95 % bootstrap interval; None if no row applies.

    Percentile bootstrap (Efron and Tibshirani 1993, chapter 13) with a fixed seed. What is drawn again are groups, not
    rows: the lines of one receipt share its print and its light, and 50 of them tell less than 50 receipts.

    Args:
        ratios: One for each answer.
        groups: The image (or whatever rows have in common) of each answer.
    """
    places: dict[Hashable, int] = {}
    sums: list[list[float]] = []
    for ratio, group in zip(ratios, groups, strict=True):
        if ratio.denominator:
            place = places.setdefault(group, len(sums))
            if place == len(sums):
                sums.append([0.0, 0.0])
            sums[place][0] += ratio.numerator
            sums[place][1] += ratio.denominator
    if not sums:
        return None
    sums_G2 = np.array(sums)
    num_groups = len(sums)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    # As many draws at a time as fit in some megabytes.
    rows_at_once = max(1, 500_000 // num_groups)
    draws_R2 = np.concatenate(
        [
            sums_G2[
                rng.integers(num_groups, size=(min(rows_at_once, NUM_RESAMPLES - start), num_groups))
            ].sum(axis=1)
            for start in range(0, NUM_RESAMPLES, rows_at_once)
        ]
    )
    low, high = np.percentile(draws_R2[:, 0] / draws_R2[:, 1], (2.5, 97.5))
    numerator, denominator = sums_G2.sum(axis=0)
    return Figure(float(numerator / denominator), float(low), float(high))
