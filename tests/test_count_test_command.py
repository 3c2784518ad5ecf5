"""`vlmslice count-test`, whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import Vlmslice, assert_user_error
from PIL import Image

from vlmslice.counting_test import answerers, report
from vlmslice.counting_test.analysis import NO_FAULT
from vlmslice.counting_test.arms import Arm
from vlmslice.slicing_policies import POLICIES

COMMAND = ("count-test", "--limit", 6, "--policy", "adaptive", "--scripted")


class Killed(Exception):
    pass


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are drawn in the tests that look at them; they take longer than all the rest."""
    monkeypatch.setattr(report, "write_report", lambda *arguments: None)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_a_planted_double_counter_is_found_and_named(vlmslice_command: Vlmslice, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = vlmslice_command(*COMMAND, "double-counter", "--out", out)
    assert result.code == 0, result.err
    assert "Objects on seams are counted twice: +1.00 an object on a seam" in result.out
    assert f"report written to {out / 'report.html'}" in result.err
    results = json.loads((out / "results.json").read_text())
    assert results["findings"][0]["name"] == "double-counting on seams"
    page = (out / "report.html").read_text()
    assert "Objects on seams are counted twice" in page
    # Nothing is fetched by the page.
    links = re.findall(r'(?:src|href)="(.{10})', page)
    assert links and all(link.startswith("data:image") for link in links)
    assert "http" not in re.sub(r"data:image[^\"]*", "", page)
    with Image.open(out / "report.png") as sheet:
        assert sheet.width > 1500 and sheet.height > 1000


def test_a_perfect_counter_has_no_fault(vlmslice_command: Vlmslice, tmp_path: Path) -> None:
    result = vlmslice_command(*COMMAND, "perfect", "--out", tmp_path / "out")
    assert result.code == 0 and result.out.splitlines()[-1] == NO_FAULT
    assert NO_FAULT in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("without_report")
def test_a_killed_run_goes_on_to_the_same_bytes(
    vlmslice_command: Vlmslice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert vlmslice_command(*COMMAND, "seam-misser", "--out", whole).code == 0

    answer = answerers.ScriptedAnswerer.answer
    calls: list[int] = []

    def answer_twice(self: answerers.ScriptedAnswerer, pictures: list, arm: Arm) -> list[str]:
        if len(calls) == 2:
            raise Killed
        calls.append(len(pictures))
        return answer(self, pictures, arm)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(answerers.ScriptedAnswerer, "answer", answer_twice)
        vlmslice_command(*COMMAND, "seam-misser", "--out", cut)
    assert len(rows(cut)) == sum(calls) < len(rows(whole))
    # The kill came within a batch, while a row was written.
    content = (cut / "answers.jsonl").read_bytes()
    (cut / "answers.jsonl").write_bytes(content[:-40])
    assert len(content.splitlines()[-1]) > 40
    assert vlmslice_command(*COMMAND, "seam-misser", "--out", cut).code == 0
    for name in ("answers.jsonl", "results.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    # A finished run asks nothing.
    monkeypatch.delattr(answerers.ScriptedAnswerer, "_count")
    assert vlmslice_command(*COMMAND, "seam-misser", "--out", cut).code == 0


@pytest.mark.usefixtures("without_report")
def test_all_policies_count_the_nine_balls(vlmslice_command: Vlmslice, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("count-test", "--scripted", "double-counter", "--limit", 6, "--max-visual-tokens", 50_000)
    result = vlmslice_command(*command, "--out", out, "--json")
    assert result.code == 0, result.err
    results = json.loads(result.out)
    assert results == json.loads((out / "results.json").read_text())
    assert list(results["arms"]) == list(POLICIES)
    for policy, arm in results["arms"].items():
        assert len(arm["nine_balls"]) == 6
        assert set(arm["sets"]) == {"nine-balls"} or policy == "adaptive"
    # One view counts nothing twice; slices that overlap or part balls do.
    assert set(results["arms"]["uniform"]["nine_balls"].values()) == {9}
    assert max(results["arms"]["overlap"]["nine_balls"].values()) > 9


def test_what_a_policy_cannot_plan_is_reported(vlmslice_command: Vlmslice, tmp_path: Path) -> None:
    command = (
        "count-test",
        "--scripted",
        "perfect",
        "--limit",
        3,
        "--policy",
        "internvl",
        "--max-visual-tokens",
        600,
    )
    result = vlmslice_command(*command, "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    arm = json.loads(result.out)["arms"]["internvl"]
    assert sum(arm["not_asked"].values()) > 0 and "max_visual_tokens is 600" in " ".join(arm["not_asked"])
    assert arm["overall"]["exact"]["value"] == 1
    assert "Not asked" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("without_report")
def test_models_and_arms(
    vlmslice_command: Vlmslice, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answerers, "_MAX_NEW_TOKENS", 3)
    command = ("count-test", "--model", saved_model, "--limit", 1, "--max-visual-tokens", 40)
    arms = ("--arm", "no-overview", "--arm", "no-overview,no-schema")
    result = vlmslice_command(*command, *arms, "--policy", "adaptive", "--out", tmp_path / "ours", "--json")
    assert result.code == 0, result.err
    names = ["adaptive", "adaptive, no overview", "adaptive, no overview, no schema"]
    assert list(json.loads(result.out)["arms"]) == names
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    assert manifest["answerer"]["name"] == saved_model.name and manifest["answerer"]["sha256"]
    assert manifest["arms"] == names and manifest["seconds"]["ask"] > 0
    assert manifest["versions"]["vlmslice"]
    texts = {arm: [row["text"] for row in rows(tmp_path / "ours") if row["arm"] == arm] for arm in names}
    assert len({tuple(some) for some in texts.values()}) == 3

    options = ("--model-kind", "transformers", "--model", saved_model, "--limit", 1)
    result = vlmslice_command("count-test", *options, "--out", tmp_path / "any", "--json")
    assert result.code == 0, result.err
    assert list(json.loads(result.out)["arms"]) == ["as it is"]


@pytest.mark.usefixtures("without_report")
def test_default_folder(vlmslice_command: Vlmslice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert vlmslice_command(*COMMAND, "constant").code == 0
    assert (tmp_path / "runs" / "count-test" / "constant" / "results.json").is_file()
    assert_user_error(
        vlmslice_command(*COMMAND, "constant", "--seed", 3), "seed (20261123, now 3)", "--restart"
    )
    assert vlmslice_command(*COMMAND, "constant", "--seed", 3, "--restart").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--scripted", "doublecounter"), "did you mean 'double-counter'"),
        (("--policy", "internlv", "--scripted", "perfect"), "did you mean 'internvl'"),
        (("--arm", "no-overvew", "--scripted", "perfect"), "did you mean 'no-overview'"),
        (("--arm", "no-overview", "--scripted", "perfect"), "means nothing to a script"),
        (("--model-kind", "transformer", "--model", "x"), "did you mean 'transformers'"),
        (("--model-kind", "transformers"), "give its folder with --model"),
        (("--model", "nowhere"), "config.json"),
        (("--model", "x", "--scripted", "perfect"), "leave all but one out"),
        (("--endpoint", "http://localhost:1"), "give both"),
        (("--endpoint", "localhost:1", "--endpoint-model", "m"), "expected a URL"),
        (("--endpoint", "http://localhost:1", "--endpoint-model", "m"), "cannot be reached"),
        (("--limit", "0"), "greater than or equal to 1"),
    ],
)
def test_errors_are_one_sentence(
    vlmslice_command: Vlmslice, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    assert_user_error(vlmslice_command("count-test", "--out", tmp_path / "out", *arguments), words)
