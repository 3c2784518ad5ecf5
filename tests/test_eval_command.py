"""`vlmslice eval`, whole."""

import json
from pathlib import Path

import pytest
from conftest import Vlmslice, assert_user_error
from test_suites import write_rows


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_rows(
        tmp_path,
        *({"image": "a.png", "task": "ocr-page", "answer": f"page {i}"} for i in range(3)),
        {"image": "a.png", "task": "count", "question": "How many?", "answer": 3},
    )


def test_table_and_folder(
    vlmslice_command: Vlmslice, saved_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("eval", "--model", saved_model, "--suite", rows_file, "--out", out, "--max-new-tokens", 4)
    first = vlmslice_command(*arguments)
    assert first.code == 0
    lines = first.out.splitlines()
    assert lines[0].split() == ["part", "samples", "metric", saved_model.name]
    assert lines[1].startswith("ocr-page") and "character error rate ↓" in lines[1]
    assert len(lines) == 1 + 3 + 4
    assert f"report written to {out / 'report.html'}" in first.err
    assert vlmslice_command(*arguments).out == first.out
    assert_user_error(vlmslice_command(*arguments, "--limit", 1), "suite.num_samples (4, now 2)", "--restart")
    fewer = vlmslice_command(*arguments, "--limit", 1, "--restart", "--json")
    assert json.loads(fewer.out) == json.loads((out / "results.json").read_text())
    assert json.loads(fewer.out)["suite"]["num_samples"] == 2


def test_default_folder(
    vlmslice_command: Vlmslice,
    saved_model: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--part", "count", "--policy", "uhd", "--max-visual-tokens", 20, "--batch-size", 1)
    result = vlmslice_command("eval", "--model", saved_model, "--suite", rows_file, *options)
    assert result.code == 0, result.err
    folder = tmp_path / "runs" / "eval" / f"{saved_model.name}-rows"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["slicing"]["policy"], manifest["slicing"]["max_visual_tokens"]) == ("uhd", 20)
    assert list(manifest["suite"]["parts"]) == ["count"]


def test_errors(vlmslice_command: Vlmslice, saved_model: Path, rows_file: Path, tmp_path: Path) -> None:
    def fails(*arguments: object, suite: object = rows_file) -> None:
        *options, words = arguments
        command = ("eval", "--model", saved_model, "--out", tmp_path / "out", "--suite", suite)
        assert_user_error(vlmslice_command(*command, *options), str(words))
        assert not (tmp_path / "out").exists()

    fails("did you mean 'synthetic'?", suite="syntetic")
    fails("--data-root FOLDER", suite="dev")
    fails("--part", "counts", "did you mean 'count'?")
    fails("--peer", "teseract", "did you mean 'tesseract'?")
    fails("--policy", "uhdd", "did you mean 'uhd'?")
    fails("--limit", 0, "greater than or equal to 1")
    assert_user_error(vlmslice_command("eval", "--model", tmp_path, "--suite", rows_file), "config.json")
    assert_user_error(vlmslice_command("eval"), "Missing option '--suite'")
