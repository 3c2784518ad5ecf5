"""Reports of tests that asked little: nothing is missing but what was not asked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from vlmslice.counting_test.analysis import NO_FAULT, analyse
from vlmslice.counting_test.answerers import ScriptedAnswerer
from vlmslice.counting_test.answers import record_answer
from vlmslice.counting_test.pictures import Picture, nine_balls_pictures, seam_pictures
from vlmslice.counting_test.report import result_lines, write_report
from vlmslice.slicing import SlicingConfig


@pytest.mark.parametrize(
    ("pictures", "text"),
    [
        (nine_balls_pictures((224, 900)), "12"),
        (nine_balls_pictures((224,)), "I see <b>many</b>"),
        (seam_pictures(SlicingConfig(policy="overlap"), num=1), "400"),
    ],
    ids=["nine balls", "no number", "one pair"],
)
def test_reports_of_little(pictures: list[Picture], text: str, tmp_path: Path) -> None:
    arm = pictures[0].policy or "adaptive"
    answers = [record_answer(picture, arm, text) for picture in pictures]
    results = {"answerer": {"name": "a <model> & co"}, "seed": 1, **analyse(answers)}
    write_report(
        tmp_path, results, answers, {picture.id: picture for picture in pictures}, ScriptedAnswerer("perfect")
    )
    page = (tmp_path / "report.html").read_text()
    assert "a &lt;model&gt; &amp; co" in page and "<model>" not in page
    shown = "no number" if "many" in text else text
    assert len(re.findall(rf'<b class="wrong">{shown}</b> of {answers[0].truth}', page)) == len(pictures)
    with Image.open(tmp_path / "report.png") as sheet:
        assert sheet.format == "PNG"
    header, rows, findings = result_lines(results)
    assert len(rows) == 1 and len(header) == len(rows[0]) and findings == [NO_FAULT]
