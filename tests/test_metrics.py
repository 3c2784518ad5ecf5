"""Every metric against cases worked by hand, with empty and unparsable answers among them."""

import json

import pytest

from vlmslice import metrics
from vlmslice.metrics import (
    TASK_METRICS,
    Cell,
    Ratio,
    Truth,
    parse_count,
    parse_number,
    parse_table,
    score,
    summarize,
)


def value(ratio: Ratio) -> float:
    return ratio.numerator / ratio.denominator


class TestReading:
    @pytest.mark.parametrize(
        "answer,prediction,expected",
        [
            ("word", "ward", (1, 4)),
            ("word", "", (4, 4)),
            ("word", "words, words", (8, 4)),  # more edits than characters
            ("two  lines", "two\nlines\n", (0, 9)),
            ("é", "e\N{COMBINING ACUTE ACCENT}", (0, 1)),
            ("TOTAL", "Total", (4, 5)),
        ],
    )
    def test_character_errors(self, answer: str, prediction: str, expected: tuple[int, int]) -> None:
        assert metrics.character_errors(prediction, Truth(answer)) == expected

    def test_case_and_spaces(self) -> None:
        assert metrics.character_errors("Total", Truth("TOTAL", ignore_case=True)) == (0, 5)
        assert metrics.character_errors_without_spaces("TO TAL", Truth("T OTAL")) == (0, 5)

    def test_errors_are_shared_over_all_characters(self) -> None:
        """One error in 4 characters and none in 12: 1 in 16, not the mean of the two lines."""
        ratios = [
            metrics.character_errors(*pair) for pair in (("ward", Truth("word")), ("x" * 12, Truth("x" * 12)))
        ]
        figure = summarize(ratios, [0, 1])
        assert figure is not None and figure.value == 1 / 16

    def test_word_errors(self) -> None:
        assert metrics.word_errors("one too three four", Truth("one two three")) == (2, 3)
        assert metrics.word_errors("", Truth("one two three")) == (3, 3)

    def test_word_recall_counts_each_word_once(self) -> None:
        assert metrics.word_recall("b a c", Truth("a b b")) == (2, 3)
        assert metrics.word_recall("b b b b", Truth("a b b")) == (2, 3)
        assert metrics.word_recall("A", Truth("a b", ignore_case=True)) == (1, 2)
        assert metrics.word_recall("", Truth("a b b")) == (0, 3)

    def test_a_bag_of_words_has_no_order_to_err_in(self) -> None:
        bag = Truth("a b", unordered=True)
        scores = score("ocr-page", "b a", bag)
        assert scores["word_recall"] == (2, 2)
        assert scores["cer"].denominator == scores["wer"].denominator == 0

    @pytest.mark.parametrize(
        "answer,prediction,expected",
        [
            ("abcd", "ABCD", 1.0),
            ("abcd", "abcx", 0.75),
            ("abcd", "abxx", 0.0),  # a similarity of 0.5 is not above the threshold
            ("abcd", "", 0.0),
            (["no", "abcd"], "abcx", 0.75),
        ],
    )
    def test_anls(self, answer: object, prediction: str, expected: float) -> None:
        assert metrics.anls(prediction, Truth(answer)) == (expected, 1)

    @pytest.mark.parametrize(
        "answer,prediction,expected",
        [
            ("100", "105", 1),
            ("100", "94.9", 0),
            ("14,766", "$14766", 1),
            ("30.1", "30.1%", 1),
            ("-2", "2", 0),
            ("0", "0.01", 0),
            ("2019", "2018", 1),
            ("Eden Hazard", "eden  hazard", 1),
            ("Eden Hazard", "Hazard", 0),
            ("5", "The value is 5", 0),
            ("5", "", 0),
            ("May 5", "Jan 5", 0),
            (["5", "five"], "Five", 1),
        ],
    )
    def test_relaxed_accuracy(self, answer: object, prediction: str, expected: int) -> None:
        assert metrics.relaxed_accuracy(prediction, Truth(answer)) == (expected, 1)

    def test_exact(self) -> None:
        predictions = ["7", " 7\n", "17", "", "red"]
        assert [metrics.exact(p, Truth("7")).numerator for p in predictions] == [1, 1, 0, 0, 0]
        assert metrics.exact("red", Truth("Red")).numerator == 0
        assert metrics.exact("red", Truth("Red", ignore_case=True)).numerator == 1

    @pytest.mark.parametrize(
        "text,number",
        [
            ("$1,234.5", 1234.5),
            ("RM 8.60", 8.6),
            ("-3 %", -3),
            ("-$3", -3),
            ("$-3", -3),
            (".5", 0.5),
            ("12", 12),
        ]
        + [(text, None) for text in ("", "-", "$", "1,23", "12 px", "twelve", "1.2.3")],
    )
    def test_numbers(self, text: str, number: float | None) -> None:
        assert parse_number(text) == number


class TestCounting:
    @pytest.mark.parametrize(
        "text,count",
        [("7", 7), (" There are 12.", 12), ("1,200 cells", 1200), ("-3", -3), ("0", 0)]
        + [(text, None) for text in ("", "none", "3.5", "1" * 7, "1" * 5000)],
    )
    def test_parsing(self, text: str, count: int | None) -> None:
        assert parse_count(text) == count

    @pytest.mark.parametrize(
        "answer,prediction,expected",
        [  # exact, off by one, error, unreadable
            (7, "7", (1, 1, 0, 0)),
            (7, "8", (0, 1, 1, 0)),
            (7, "17", (0, 0, 10, 0)),
            (7, "", (0, 0, 7, 1)),
            (0, "many", (0, 0, 1, 1)),
            ("7", "7", (1, 1, 0, 0)),
        ],
    )
    def test_metrics(self, answer: int | str, prediction: str, expected: tuple[int, ...]) -> None:
        assert tuple(map(value, score("count", prediction, Truth(answer)).values())) == expected


class TestReceipts:
    TRUTH = Truth(
        {"company": "ACME SDN BHD", "date": "05/03/2018", "address": "1 LONG STREET", "total": "RM 8.60"}
    )

    def values(self, prediction: str) -> dict[str, float]:
        return {
            name: round(value(ratio), 4)
            for name, ratio in score("receipt-json", prediction, self.TRUTH).items()
        }

    def test_all_right(self) -> None:
        fields = {"Company": "Acme  Sdn Bhd", "date": "05/03/2018", "address": "1 Long Street", "total": 8.6}
        values = self.values(f"Here it is:\n```json\n{json.dumps(fields)}\n```")
        assert values.pop("unreadable") == 0
        assert values.pop("field_anls") < 1  # ANLS compares characters, and 8.6 is not RM 8.60
        assert set(values.values()) == {1}

    def test_some_right(self) -> None:
        """Two of three given fields are right, of four: F1 = 2 * 2 / (3 + 4)."""
        values = self.values(
            '{"company": "ACME SDN BHD", "date": "05/03/2018", "total": "8.06", "address": null}'
        )
        assert values["field_f1"] == round(4 / 7, 4)
        assert (values["date"], values["total"], values["date_and_total"]) == (1, 0, 0)
        assert values["address"] == 0

    def test_anls_forgives_a_letter(self) -> None:
        """13 letters with one wrong: 12/13; the others are missing: (12/13 + 0 + 0 + 0) / 4."""
        assert self.values('{"address": "1 LONG STREFT"}')["field_anls"] == round(12 / 13 / 4, 4)

    @pytest.mark.parametrize(
        "prediction", ["", "ACME", '{"company": "ACME SDN BHD"', "[1]", "{" * 5000, '{"a": }']
    )
    def test_unparsable_scores_nothing_and_is_counted(self, prediction: str) -> None:
        values = self.values(prediction)
        assert values.pop("unreadable") == 1
        assert set(values.values()) == {0}

    def test_fields_that_the_truth_lacks_do_not_apply(self) -> None:
        scores = score("receipt-json", '{"total": "1"}', Truth({"total": "1"}))
        assert scores["date"].denominator == scores["date_and_total"].denominator == 0
        assert value(scores["field_f1"]) == 1


class TestTables:
    HTML = '<table><tr><td rowspan="2">a</td><td colspan="2">b</td></tr><tr><td>c</td><td>d</td></tr></table>'

    def test_cells_lie_where_browsers_put_them(self) -> None:
        cells = [Cell(0, 0, 2, 1, "a"), Cell(0, 1, 1, 2, "b"), Cell(1, 1, 1, 1, "c"), Cell(1, 2, 1, 1, "d")]
        assert parse_table(self.HTML) == cells
        without_ends = "<tr><th rowspan=2>a<td colspan=2>b <tr></tr><tr><td>c<td>d"
        assert parse_table(without_ends) == cells

    def test_spans_beyond_the_table_and_beyond_sense(self) -> None:
        assert parse_table('<td rowspan="999999999" colspan="x">a') == [Cell(0, 0, 1, 1, "a")]
        assert parse_table('<td rowspan="0" colspan="-1">a') == [Cell(0, 0, 1, 1, "a")]

    def test_cell_f1(self) -> None:
        """x is common to 1 and 2 cells: 2 * 1 / (1 + 2). A blank grid has no cells."""
        assert value(metrics.cell_f1(self.HTML, Truth(self.HTML))) == 1
        wrong = "<table><tr><td>x</td></tr></table>"
        assert metrics.cell_f1(wrong, Truth("<tr><td>x<td>y")) == (2, 3)
        assert metrics.cell_f1("<tr><td></td><td></td>", Truth("<tr><td>x<td>y")) == (0, 2)

    def test_adjacency(self) -> None:
        """a-b, a-c and c-d to the right; b-c and b-d below."""
        assert metrics.adjacency_f1(self.HTML, Truth(self.HTML)) == (10, 10)
        no_spans = "<tr><td>a<td>b<tr><td>c<td>d"  # a-b, c-d; a-c, b-d below: a-b, c-d and b-d are common
        assert metrics.adjacency_f1(no_spans, Truth(self.HTML)) == (6, 9)

    def test_adjacency_passes_over_empty_cells_and_forgives_a_row(self) -> None:
        truth = Truth("<tr><td>a<td><td>b")
        assert metrics.adjacency_f1("<tr><td>a<td>b", truth) == (2, 2)
        shifted = "<tr><td>head<tr><td>a<td>b"  # one relation more, head-a
        assert metrics.adjacency_f1(shifted, truth) == (2, 3)
        assert metrics.cell_f1(shifted, truth) == (0, 5)

    @pytest.mark.parametrize("prediction", ["", "a | b", "<table></table>", "<table><tr></tr>", "<<<td"])
    def test_unparsable_scores_nothing_and_is_counted(self, prediction: str) -> None:
        values = {
            name: value(ratio) for name, ratio in score("table-html", prediction, Truth(self.HTML)).items()
        }
        assert values == {"cell_f1": 0, "adjacency_f1": 0, "unreadable": 1}


class TestFlowcharts:
    TRUTH = Truth({"edges": [["Start", "pay"], ["pay", "end"], ["pay", "end"]]})

    @pytest.mark.parametrize(
        "prediction,expected",
        [
            ('{"edges": [["start", "PAY"], ["pay", "end"], ["pay", "end"]]}', (6, 6)),
            ('```{"edges": [["start", "pay"]]}```', (2, 4)),
            ('{"edges": [{"from": "start", "to": "pay"}, {"from": "end", "to": "pay"}]}', (2, 5)),
            ("start -> pay\npay -> end", (4, 5)),
        ],
    )
    def test_edge_f1(self, prediction: str, expected: tuple[int, int]) -> None:
        assert score("flowchart-graph", prediction, self.TRUTH) == {"edge_f1": expected, "unreadable": (0, 1)}

    @pytest.mark.parametrize(
        "prediction", ["", "start, pay", '{"edges": [["start"', '{"edges": []}', '{"edges": [7]}']
    )
    def test_unparsable_scores_nothing_and_is_counted(self, prediction: str) -> None:
        assert score("flowchart-graph", prediction, self.TRUTH) == {"edge_f1": (0, 3), "unreadable": (1, 1)}


class TestSummaries:
    def test_interval_is_fixed_and_holds_the_value(self) -> None:
        ratios = [Ratio(i % 2, 1) for i in range(100)]
        first, again = (summarize(ratios, range(100)) for _ in range(2))
        assert first == again and first is not None
        assert first.value == 0.5
        # Of a share of 100 rows, the standard error is sqrt(0.5 * 0.5 / 100) = 0.05.
        assert (first.low, first.high) == (pytest.approx(0.4, abs=0.02), pytest.approx(0.6, abs=0.02))

    def test_rows_of_one_image_are_drawn_together(self) -> None:
        """Ten images of ten equal rows tell what ten rows would."""
        ratios = [Ratio(i // 10 % 2, 1) for i in range(100)]
        grouped = summarize(ratios, [i // 10 for i in range(100)])
        alone = summarize(ratios, range(100))
        assert grouped is not None and alone is not None
        assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)

    def test_what_does_not_apply_takes_no_part(self) -> None:
        assert summarize([Ratio(0, 0)], ["a"]) is None
        figure = summarize([Ratio(0, 0), Ratio(1, 2)], ["a", "b"])
        assert figure is not None and (figure.value, figure.low, figure.high) == (0.5, 0.5, 0.5)

    def test_how_values_are_shown(self) -> None:
        share, error = TASK_METRICS["count"][0], TASK_METRICS["count"][2]
        assert [share.format(0.1234), share.format(None), error.format(1.5)] == ["12.3 %", "–", "1.50"]
