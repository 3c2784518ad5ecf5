import json

import pytest

from vlmslice.data.tables import table_to_csv, table_to_html
from vlmslice.page.answer_table import AnswerTable, find_table

_CELLS = [["item", "price, RM"], ["tea & milk", "3.20"], ['"old" <cake>', ""]]
_TABLE = AnswerTable(("item", "price, RM"), (("tea & milk", "3.20"), ('"old" <cake>', "")))


@pytest.mark.parametrize("spell", [table_to_html, table_to_csv], ids=["html", "csv"])
def test_tables_as_the_model_is_taught_to_spell_them(spell) -> None:
    assert find_table(spell(_CELLS)) == _TABLE


@pytest.mark.parametrize(
    "text",
    [
        '| item | price, RM |\n|---|---:|\n| tea & milk | 3.20 |\n| "old" <cake> |  |',
        '```csv\nitem,"price, RM"\ntea & milk,3.20\n"""old"" <cake>",\n```',
        json.dumps([{"item": "tea & milk", "price, RM": "3.20"}, {"item": '"old" <cake>'}]),
        json.dumps({"items": [{"item": "tea & milk", "price, RM": "3.20"}, {"item": '"old" <cake>'}]}),
        json.dumps(_CELLS),
        "<table><thead><tr><th>item</th><th>price, RM</th></tr></thead> \n <tr><td>tea &amp; milk<td>3.20</tr>"
        '<tr><td>"old" &lt;cake&gt;</td></tr></table>',
    ],
    ids=["markdown", "fenced csv", "records", "named records", "lists", "loose html"],
)
def test_other_spellings(text: str) -> None:
    assert find_table(text) == _TABLE


def test_an_object_becomes_fields_and_values() -> None:
    record = {"company": "TEA & CO", "total": 12.5, "paid": True, "items": [{"name": "tea"}], "note": None}
    assert find_table(json.dumps(record)) == AnswerTable(
        ("field", "value"),
        (
            ("company", "TEA & CO"),
            ("total", "12.5"),
            ("paid", "true"),
            ("items", '[{"name": "tea"}]'),
            ("note", ""),
        ),
    )


def test_a_cut_off_html_table_counts_as_far_as_it_goes() -> None:
    assert find_table("<table><tr><td>a</td><td>b</td></tr><tr><td>1") == AnswerTable(
        ("a", "b"), (("1", ""),)
    )


@pytest.mark.parametrize(
    "text",
    [
        "", "9", "KIKU JAPANESE RESTAURANT", "one, two", "Yes, it is\nred.", "a line\nand another", '{"cut": "o', "[]",
        "{}", "[1", "a < b", "first, second\nthird, fourth, fifth",
    ],
)  # fmt: skip
def test_other_answers_are_no_tables(text: str) -> None:
    table = find_table(text)
    assert table is None or (text == "{}" and table.rows == ())
