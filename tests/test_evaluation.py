"""A run can be interrupted, batched and repeated, and comes to the same figures; it never mixes with another."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_suites import write_rows
from tiny_models import noise_image

from vlmslice.evaluation import EvaluationError, EvaluationOptions, evaluate
from vlmslice.inference import Assistant
from vlmslice.suites import ANSWER_SCHEMAS, DEFAULT_QUESTIONS, SYNTHETIC_TASKS, Suite, open_suite

OPTIONS = EvaluationOptions(max_new_tokens=6, batch_size=3)


class Parrot:
    """A peer that reads the same everywhere, until it tires."""

    name = "parrot"
    version = "1"

    def __init__(self, num_reads: int = 1000):
        self.num_left = num_reads

    def read(self, image: Image.Image, is_crop: bool) -> str:
        if not self.num_left:
            raise KeyboardInterrupt
        self.num_left -= 1
        return "a line" if is_crop else "a page"


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every task, with images of several sizes, big enough for slices."""
    folder = tmp_path_factory.mktemp("rows")
    for name, height, width in (("a.png", 100, 200), ("b.png", 60, 90), ("c.png", 40, 300)):
        noise_image(height, width, seed=height).save(folder / name)
    return write_rows(
        folder,
        *({"image": f"{name}.png", "task": "ocr-page", "answer": "a page"} for name in "abcab"),
        *({"image": "a.png", "bbox": [5 * i, 5, 90, 40], "answer": "a line"} for i in range(4)),
        {"image": "a.png", "task": "receipt-json", "answer": {"total": "8.60", "date": "1/2/2018"}},
        {"image": "b.png", "task": "chart-qa", "question": "Which?", "answer": "that"},
        {"image": "c.png", "task": "count", "question": "How many <b>?", "answer": 3},
        {"image": "a.png", "task": "table-html", "answer": "<tr><td>1<td>2"},
        {"image": "a.png", "task": "flowchart-graph", "answer": {"edges": [["a", "b"]]}},
    )


@pytest.fixture
def suite(rows_file: Path) -> Suite:
    return open_suite(str(rows_file))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The predictions of a run without their timings."""
    rows = [
        json.loads(line)
        for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
        if line
    ]
    for row in rows:
        assert all(0 <= value < 60 for value in row.pop("seconds").values())
    return rows


def test_what_a_run_leaves(saved_model: Path, suite: Suite, tmp_path: Path) -> None:
    results = evaluate(saved_model, suite, tmp_path, options=OPTIONS, peers=[Parrot()])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json", "predictions.jsonl", "report.html", "results.json", "results.md",
    ]  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert list(results["parts"]) == list(suite.parts)
    pages, lines = results["parts"]["ocr-page"], results["parts"]["ocr-line"]
    assert (pages["num_samples"], pages["num_images"], pages["num_cut_off"]) == (5, 3, 5)
    assert pages["peers"]["parrot"]["cer"] == {"value": 0, "low": 0, "high": 0}
    assert lines["peers"]["parrot"]["exact"]["value"] == 1
    assert lines["metrics"]["cer"]["value"] > 0
    assert results["parts"]["count"]["peers"] == {}
    assert results["parts"]["receipt-json"]["metrics"]["unreadable"]["value"] == 1

    rows = read_rows(tmp_path)
    assistant = Assistant.from_pretrained(saved_model)
    assert [row["id"] for row in rows] == suite.ids
    for i, row in enumerate(rows):
        sample = suite[i]
        schema = (
            ANSWER_SCHEMAS.get(sample.task) if sample.question == DEFAULT_QUESTIONS["receipt-json"] else None
        )
        said = assistant.ask([sample.image], sample.question, max_new_tokens=6, json_schema=schema)
        assert row["prediction"].startswith("{") == (schema is not None)
        assert (row["prediction"], row["num_visual_tokens"]) == (said.text, said.num_visual_tokens)
        assert (row["answer"], row["height"]) == (sample.truth.answer, sample.image.height)
    assert rows[0]["peers"]["parrot"] == {
        "prediction": "a page",
        "metrics": {"cer": 0, "wer": 0, "word_recall": 1},
    }

    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert set(manifest) == {
        "model", "suite", "prompt", "decoding", "slicing", "peers", "versions", "machine", "seconds",
    }  # fmt: skip
    assert manifest["decoding"]["max_new_tokens"]["ocr-page"] == 6
    assert manifest["decoding"]["json_schemas"] == ANSWER_SCHEMAS
    assert {"load", "process", "first_token", "decode", "parrot", "report"} <= set(manifest["seconds"])
    assert set(manifest["seconds"]["median_of_a_sample"]) == set(suite.parts)


def test_answers_to_other_questions_are_held_to_no_schema(saved_model: Path, tmp_path: Path) -> None:
    """A batch may hold both kinds."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    row = {"image": "a.png", "task": "receipt-json", "answer": {"number": "7"}}
    own = row | {"question": "Give the number as JSON."}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (row, own, row)))
    evaluate(saved_model, open_suite(str(tmp_path / "rows.jsonl")), tmp_path / "out", options=OPTIONS)
    held = [row["prediction"].startswith("{") for row in read_rows(tmp_path / "out")]
    assert held == [True, False, True]


def test_free_form_answers_are_held_to_no_schema(saved_model: Path, suite: Suite, tmp_path: Path) -> None:
    evaluate(saved_model, suite, tmp_path, options=EvaluationOptions(max_new_tokens=6, free_form=True))
    [row] = [row for row in read_rows(tmp_path) if row["task"] == "receipt-json"]
    assert not row["prediction"].startswith("{")
    assert json.loads((tmp_path / "manifest.json").read_text())["decoding"]["json_schemas"] == {}


def test_batched_single_and_repeated_agree(saved_model: Path, suite: Suite, tmp_path: Path) -> None:
    contents = []
    for batch_size in (1, 3, 3, 8):
        folder = tmp_path / str(len(contents))
        options = EvaluationOptions(max_new_tokens=6, batch_size=batch_size)
        evaluate(saved_model, suite, folder, options=options)
        names = ("results.json", "results.md", "report.html")
        contents.append([(folder / name).read_bytes() for name in names] + [read_rows(folder)])
    assert all(content == contents[0] for content in contents)


@pytest.mark.parametrize("num_reads", [0, 4])
def test_goes_on_after_an_interruption(
    saved_model: Path, suite: Suite, tmp_path: Path, num_reads: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluate(saved_model, suite, whole, options=OPTIONS, peers=[Parrot()])
    with pytest.raises(KeyboardInterrupt):
        evaluate(saved_model, suite, parts, options=OPTIONS, peers=[Parrot(num_reads)])
    kept = (parts / "predictions.jsonl").read_bytes()
    assert kept.count(b"\n") == {0: 0, 4: 3}[num_reads]  # whole batches
    (parts / "predictions.jsonl").write_bytes(kept + b'{"id": "ocr-page/0000')  # as a kill would leave it
    peer = Parrot()
    evaluate(saved_model, suite, parts, options=EvaluationOptions(max_new_tokens=6), peers=[peer])
    assert peer.num_left == 1000 - 9 + kept.count(b"\n")
    assert (parts / "predictions.jsonl").read_bytes().startswith(kept)
    assert read_rows(parts) == read_rows(whole)
    for name in ("results.json", "results.md", "report.html"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_a_finished_run_asks_nothing(
    saved_model: Path, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(saved_model, suite, tmp_path, options=OPTIONS)
    machine = json.loads((tmp_path / "manifest.json").read_text())["machine"]
    monkeypatch.setattr(Assistant, "from_pretrained", None)
    assert evaluate(saved_model, suite, tmp_path, options=OPTIONS) == first
    assert json.loads((tmp_path / "manifest.json").read_text())["machine"] == machine


def test_another_run_is_refused(saved_model: Path, suite: Suite, rows_file: Path, tmp_path: Path) -> None:
    evaluate(saved_model, suite, tmp_path, options=OPTIONS)
    before = read_rows(tmp_path)
    fewer = open_suite(str(rows_file), limit=1)
    for asked, options, peers, named in (
        (suite, EvaluationOptions(max_new_tokens=7), [], r"decoding.max_new_tokens.chart-qa \(6, now 7\)"),
        (suite, EvaluationOptions("uhd", max_new_tokens=6), [], r'slicing.policy \("adaptive", now "uhd"\)'),
        (
            suite,
            EvaluationOptions(max_visual_tokens=9, max_new_tokens=6),
            [],
            r"max_visual_tokens \(64, now 9\)",
        ),
        (suite, OPTIONS, [Parrot()], r'peers.parrot \(null, now "1"\)'),
        (fewer, OPTIONS, [], r"suite.num_samples \(14, now 7\).*--restart"),
    ):
        with pytest.raises(EvaluationError, match=named):
            evaluate(saved_model, asked, tmp_path, options=options, peers=peers)
    assert read_rows(tmp_path) == before
    evaluate(saved_model, fewer, tmp_path, options=OPTIONS, restart=True)
    assert len(read_rows(tmp_path)) == 7


def test_what_got_nowhere_is_no_run(saved_model: Path, suite: Suite, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(saved_model, suite, tmp_path, options=OPTIONS, peers=[Parrot(0)])
    evaluate(saved_model, suite, tmp_path, options=OPTIONS)
    assert len(read_rows(tmp_path)) == 14


def test_another_model_is_refused(saved_model: Path, suite: Suite, tmp_path: Path) -> None:
    evaluate(saved_model, suite, tmp_path, options=OPTIONS)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["model"]["files"]["model.safetensors"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EvaluationError, match=r'model.files.model.safetensors \("00000000000..."'):
        evaluate(saved_model, suite, tmp_path, options=OPTIONS)


def test_damaged_folders(saved_model: Path, suite: Suite, tmp_path: Path) -> None:
    evaluate(saved_model, suite, tmp_path, options=OPTIONS)
    predictions = tmp_path / "predictions.jsonl"
    content = predictions.read_text()
    for damaged, words in (("{\n" + content, "is damaged"), (content + content, "has 28 rows")):
        predictions.write_text(damaged)
        with pytest.raises(EvaluationError, match=words):
            evaluate(saved_model, suite, tmp_path, options=OPTIONS)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(EvaluationError, match="without a manifest"):
        evaluate(saved_model, suite, tmp_path, options=OPTIONS)
    with pytest.raises(EvaluationError, match="choose another with --out"):
        evaluate(saved_model, suite, predictions, options=OPTIONS)


def test_a_peer_needs_something_to_read(saved_model: Path, rows_file: Path, tmp_path: Path) -> None:
    counts = open_suite(str(rows_file), parts=["count"])
    with pytest.raises(EvaluationError, match="leave --peer out"):
        evaluate(saved_model, counts, tmp_path, peers=[Parrot()])


def test_synthetic(saved_model: Path, tmp_path: Path) -> None:
    suite = open_suite("synthetic", limit=1)
    results = evaluate(saved_model, suite, tmp_path, options=OPTIONS)
    assert list(results["parts"]) == list(SYNTHETIC_TASKS)
    assert all(part["num_samples"] == 1 for part in results["parts"].values())
