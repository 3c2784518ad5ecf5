"""The page needs nothing else, shows what is bad first, and obeys nothing that a model writes."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from test_suites import write_rows

from vlmslice.evaluation import summarize_rows
from vlmslice.evaluation_report import choose_cases, markdown_table, result_lines, write_report
from vlmslice.metrics import score
from vlmslice.suites import open_suite

HOSTILE = "<script>alert(1)</script>"


def build_row(suite: Any, index: int, prediction: str, **fields: Any) -> dict[str, Any]:
    sample = suite[index]
    metrics = {
        name: ratio.numerator / ratio.denominator
        for name, ratio in score(sample.task, prediction, sample.truth).items()
        if ratio.denominator
    }
    return {
        "id": sample.id,
        "part": sample.part,
        "task": sample.task,
        "image": sample.source,
        "height": 40,
        "width": 80,
        "pixels_sha256": "",
        "question": sample.question,
        "answer": sample.truth.answer,
        "ignore_case": False,
        "unordered": False,
        "prediction": prediction,
        "metrics": metrics,
        "num_visual_tokens": 4,
        "cut_off": False,
    } | fields


def settings(suite: Any) -> dict[str, Any]:
    return {
        "model": {"name": "tiny", "sha256": "0" * 64},
        "suite": {
            "name": suite.name,
            "sha256": suite.sha256,
            "num_samples": len(suite.ids),
            "parts": suite.parts,
        },
    }


class Reader(HTMLParser):
    """Collects tags, and the addresses of what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name == "src"]


def test_page(tmp_path: Path) -> None:
    rows_file = write_rows(
        tmp_path,
        *({"image": "a.png", "task": "ocr-page", "answer": f"word {i} & more"} for i in range(40)),
        {"image": "a.png", "task": "count", "question": HOSTILE, "answer": 3, "part": HOSTILE},
    )
    suite = open_suite(str(rows_file))
    rows = [build_row(suite, i, f"word {i} & more" if i % 2 else f"wor {i}{HOSTILE}") for i in range(40)]
    rows[0]["peers"] = {"parrot": {"prediction": HOSTILE, "metrics": rows[0]["metrics"]}}
    rows.append(build_row(suite, 40, "3\x00\x1b"))
    results = summarize_rows(rows, settings(suite), [])
    write_report(tmp_path / "report.html", results, rows, suite)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags
    assert reader.tags.count("article") == 12 + 12 + 1
    assert len(reader.sources) == 25 and all(
        source.startswith("data:image/jpeg") for source in reader.sources
    )
    assert "http" not in page and "\x00" not in page and "\x1b" not in page
    assert '<mark class="gap" title="missing: d">' in page
    # Of the even rows, all wrong, those with the shortest truths are worst; the odd ones are right.
    worst = re.findall(r'class="id">(ocr-page/\d+)', page)[:12]
    assert worst[:5] == [f"ocr-page/0000{i}" for i in (0, 2, 4, 6, 8)]


def test_cases_are_chosen_by_every_metric_in_turn(tmp_path: Path) -> None:
    row = {"image": "a.png", "task": "count", "question": "?", "answer": 3}
    suite = open_suite(str(write_rows(tmp_path, *[row] * 5)))
    rows = [build_row(suite, i, text) for i, text in enumerate(["3", "4", "30", "", "2"])]
    assert choose_cases(rows, range(5)) == ([2, 3, 1, 4], [0])
    assert choose_cases(rows, []) == ([], [])


def test_figures_as_tables(tmp_path: Path) -> None:
    row = {"image": "a.png", "task": "ocr-page", "answer": "abcd"}
    suite = open_suite(
        str(write_rows(tmp_path, row, {"image": "a.png", "task": "count", "question": "?", "answer": 3}))
    )
    reading = {"prediction": "abcd", "metrics": {}}
    rows = [build_row(suite, 0, "abcx", peers={"parrot": reading}), build_row(suite, 1, "5")]
    results = summarize_rows(rows, settings(suite), ["parrot"])
    header, lines = result_lines(results)
    assert header == ["part", "samples", "metric", "tiny", "parrot"]
    assert lines[0] == [
        "ocr-page", "1", "character error rate ↓", "25.0 % (25.0 to 25.0 %)", "0.0 % (0.0 to 0.0 %)",
    ]  # fmt: skip
    assert ["count", "1", "mean absolute error ↓", "2.00 (2.00 to 2.00)", "–"] in lines
    table = markdown_table(results)
    assert table.startswith(
        "| part | samples | metric | tiny | parrot |\n| --- | --- | --- | --- | --- |\n| ocr-page |"
    )
    assert table.count("\n") == 2 + len(lines)
