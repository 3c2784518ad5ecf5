"""Suites are what they were the last time, and say what is wrong with a row."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny_models import noise_image

from vlmslice.data.overlap import find_overlap
from vlmslice.data.real_data import image_splits, split_of
from vlmslice.data.samples import READ_QUESTIONS
from vlmslice.data.tasks import TASKS
from vlmslice.data.text import words
from vlmslice.metrics import TASK_METRICS, Truth
from vlmslice.suites import DEFAULT_QUESTIONS, SYNTHETIC_TASKS, Suite, SuiteError, open_suite

TABLE = "<table><tr><td>a</td></tr></table>"


def write_rows(folder: Path, *rows: dict, name: str = "rows.jsonl") -> Path:
    """A JSONL file, and the images that its rows name."""
    for row in rows:
        if isinstance(row["image"], str) and not (image := folder / row["image"]).exists():
            image.parent.mkdir(exist_ok=True)
            noise_image(40, 80, seed=len(image.name)).save(image)
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def samples(suite: Suite) -> list:
    return [suite[i] for i in range(len(suite.ids))]


class TestSynthetic:
    def test_parts_are_rendered_tasks(self) -> None:
        assert SYNTHETIC_TASKS.keys() <= TASKS.keys()
        assert set(SYNTHETIC_TASKS.values()) <= TASK_METRICS.keys()

    @pytest.mark.parametrize("part", SYNTHETIC_TASKS)
    def test_frozen(self, part: str) -> None:
        first, again = (open_suite("synthetic", limit=3, parts=[part]) for _ in range(2))
        assert first.sha256 == again.sha256
        for one, other in zip(samples(first), samples(again), strict=True):
            assert (one.part, one.task) == (part, SYNTHETIC_TASKS[part])
            assert (one.question, one.truth) == (other.question, other.truth)
            assert one.image.tobytes() == other.image.tobytes()
            assert 0.04e6 <= one.image.height * one.image.width <= 4.1e6

    def test_the_limit_changes_no_sample(self) -> None:
        few, many = (open_suite("synthetic", limit=n, parts=["read"]) for n in (1, 50))
        assert (few[0].id, few[0].truth) == (many[0].id, many[0].truth)
        assert few.sha256 != many.sha256
        assert len(open_suite("synthetic").ids) == 300 * len(SYNTHETIC_TASKS)

    def test_words_are_held_out(self) -> None:
        trained = {word for word in words("train") if len(word) > 3}
        for sample in samples(open_suite("synthetic", limit=10, parts=["read"])):
            assert not trained & set(sample.truth.answer.lower().split())


class TestNineBalls:
    def test_every_size_shows_nine(self) -> None:
        """Each ball is a patch of its own, whatever the size."""
        suite = open_suite("nine-balls")
        sides = [sample.image.width for sample in samples(suite)]
        assert len(sides) == 24 and (sides[0], sides[-1]) == (224, 4096) and sides == sorted(sides)
        for sample in (suite[0], suite[11], suite[23]):
            assert sample.image.height == sample.image.width and sample.truth == Truth("9")
            is_ball = sample.image.resize((128, 128)).getchannel("R").point(lambda level: 255 * (level < 150))
            num_patches = 0
            while is_ball.getbbox():
                row, col = np.argwhere(np.asarray(is_ball))[0]
                ImageDraw.floodfill(is_ball, (int(col), int(row)), 0)
                num_patches += 1
            assert num_patches == 9

    def test_the_picture_is_the_same_at_every_size(self) -> None:
        suite = open_suite("nine-balls")
        small, large = (np.asarray(suite[i].image.resize((128, 128)), dtype=float) for i in (5, 23))
        assert np.abs(small - large).mean() < 2


class TestRows:
    def test_all_that_a_row_may_say(self, tmp_path: Path) -> None:
        graph = {
            "nodes": [
                {"id": 1, "type": "startEvent", "text": ""},
                {"id": 2, "type": "task", "text": " pay "},
            ],
            "edges": [{"src": 1, "dst": 2}],
        }
        path = write_rows(
            tmp_path,
            {"image": "a.png", "task": "ocr-page", "answer": "one\u2028two", "unordered": True},
            {
                "image": "a.png",
                "bbox": [10, 5, 30, 25],
                "answer": "X",
                "case_insensitive": True,
                "part": "lines",
            },
            {"image": "in/b.png", "task": "chart-qa", "question": "Which?", "answer": ["a", "b"]},
            {"image": "a.png", "task": "flowchart-graph", **graph},
        )
        suite = open_suite(str(path))
        page, line, chart, flowchart = samples(suite)
        assert suite.name == "rows"
        assert suite.parts == {
            "ocr-page": "ocr-page", "lines": "ocr-line", "chart-qa": "chart-qa", "flowchart-graph": "flowchart-graph",
        }  # fmt: skip
        assert suite.ids == ["ocr-page/00000", "lines/00000", "chart-qa/00000", "flowchart-graph/00000"]
        assert page.truth == Truth("one\u2028two", unordered=True) and page.question == READ_QUESTIONS[0]
        assert (page.image.height, page.image.width, page.is_crop) == (40, 80, False)
        assert line.truth == Truth("X", ignore_case=True) and line.is_crop
        assert line.image.tobytes() == page.image.crop((10, 5, 30, 25)).tobytes()
        assert (chart.question, chart.source) == ("Which?", "in/b.png")
        assert flowchart.truth.answer == {"edges": [["startEvent", "pay"]]}

    def test_default_questions_are_for_tasks(self) -> None:
        assert DEFAULT_QUESTIONS.keys() == TASK_METRICS.keys() - {"chart-qa", "count"}

    def test_a_smaller_limit_takes_some_of_the_same_rows(self, tmp_path: Path) -> None:
        path = write_rows(
            tmp_path, *({"image": "a.png", "task": "ocr-page", "answer": f"page {i}"} for i in range(40))
        )
        chosen = [open_suite(str(path), limit=n).ids for n in (5, 20, 40, 99)]
        assert [len(ids) for ids in chosen] == [5, 20, 40, 40]
        assert set(chosen[0]) < set(chosen[1]) < set(chosen[2])
        assert all(ids == sorted(ids) for ids in chosen)
        assert chosen[0] != chosen[2][:5]

    def test_hash_tells_rows_and_pixels(self, tmp_path: Path) -> None:
        row = {"image": "a.png", "task": "ocr-page", "answer": "one"}
        path = str(write_rows(tmp_path, row))
        before = open_suite(path).sha256
        assert open_suite(path).sha256 == before
        write_rows(tmp_path, row | {"answer": "two"})
        changed = open_suite(path).sha256
        noise_image(40, 80, seed=99).save(tmp_path / "a.png")
        assert len({before, changed, open_suite(path).sha256}) == 3

    @pytest.mark.parametrize(
        "change,message",
        [
            ({"task": "ocr-pag"}, "line 1 has the task 'ocr-pag'.*did you mean 'ocr-page'"),
            ({"task": None}, "task None"),
            ({"image": 3}, "image 3"),
            ({"question": " "}, "question ' '"),
            ({"task": "count", "answer": 3}, "count has no default question"),
            ({"answer": " "}, "answer ' '; expected some text"),
            ({"task": "count", "question": "?", "answer": "three"}, "'three'; expected a whole number"),
            ({"task": "count", "question": "?", "answer": True}, "expected a whole number"),
            ({"task": "receipt-json", "answer": "x"}, "expected an object"),
            ({"task": "table-html", "answer": "<table>"}, "at least one cell"),
            ({"task": "chart-qa", "question": "?", "answer": []}, "some text, or a list"),
            ({"task": "flowchart-graph", "answer": {"edges": []}}, "at least one edge"),
            ({"task": "flowchart-graph", "answer": "x"}, "has no flowchart"),
            ({"bbox": [5, 5, 5, 9]}, r"bbox \[5, 5, 5, 9\]"),
            ({"part": 7}, "part 7"),
        ],
    )
    def test_bad_rows(self, tmp_path: Path, change: dict, message: str) -> None:
        path = write_rows(tmp_path, {"image": "a.png", "task": "ocr-page", "answer": "one"} | change)
        with pytest.raises(SuiteError, match=message):
            open_suite(str(path))

    def test_bad_files(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.jsonl"
        for content, message in (("", "no rows"), ("{", "line 1 is no JSON"), ("\n[]", "line 2 is a list")):
            path.write_text(content)
            with pytest.raises(SuiteError, match=message):
                open_suite(str(path))
        path.write_bytes(b"\xff")
        with pytest.raises(SuiteError, match="UTF-8"):
            open_suite(str(path))

    def test_missing_image(self, tmp_path: Path) -> None:
        path = write_rows(tmp_path, {"image": "a.png", "task": "ocr-page", "answer": "one"})
        (tmp_path / "a.png").unlink()
        with pytest.raises(SuiteError, match="image 'a.png' of the suite 'rows' is not in"):
            open_suite(str(path))

    def test_a_part_has_one_task(self, tmp_path: Path) -> None:
        rows = [
            {"image": "a.png", "answer": "x", "part": "mixed", "task": task}
            for task in ("ocr-page", "ocr-line")
        ]
        with pytest.raises(SuiteError, match="'mixed' has rows of ocr-line and ocr-page"):
            open_suite(str(write_rows(tmp_path, *rows)))

    def test_unknown_names(self, tmp_path: Path) -> None:
        with pytest.raises(SuiteError, match="did you mean 'synthetic'"):
            open_suite("syntetic")
        with pytest.raises(SuiteError, match="no part 'reed'.*did you mean 'read'"):
            open_suite("synthetic", parts=["reed"])
        with pytest.raises(SuiteError, match="--data-root FOLDER"):
            open_suite("dev")
        with pytest.raises(SuiteError, match="leave --data-root out"):
            open_suite("synthetic", data_root=tmp_path)
        with pytest.raises(SuiteError, match=r"receipt_lines.jsonl.*cannot be read"):
            open_suite("dev", data_root=tmp_path)


def image_on(side: str, name: str) -> str:
    """A file name that `split_of` puts on a side."""
    return next(f"{name}{i}.png" for i in range(100) if split_of(f"{name}{i}.png") == side)


def test_dev(tmp_path: Path) -> None:
    """One row of each file, in the form of the real sets."""
    receipt, cells, table, chart = (image_on("eval", name) for name in "rbtw")
    files: dict[str, list[dict]] = {
        "receipt_lines": [
            {"image": receipt, "bbox": [0, 0, 9, 9], "answer": "ACME", "case_insensitive": True},
            {"image": receipt, "bbox": [0, 9, 9, 18], "answer": "8.60", "case_insensitive": True},
        ],
        "receipts": [{"image": receipt, "task": "receipt-json", "answer": {"total": "8.60"}}],
        "pages": [{"image": "p.png", "task": "ocr-page", "answer": "page"}],
        "forms": [
            {"image": "f.png", "words": [["TO:", [0, 0, 5, 5]], ["Bob", [6, 0, 9, 5]]], "entities": []}
        ],
        "chartqa": [{"image": "c.png", "task": "chart-qa", "question": "?", "answer": "1", "kind": "human"}],
        "counting": [
            {"image": cells, "task": "count", "question": question, "answer": 3, "source": source}
            for question, source in (
                ("How many red blood cells are in the image?", "bccd"),
                ("How many cups?", "coco"),
            )
        ],
        "tables": [{"image": table, "task": "table-html", "answer": TABLE, "rows": 1, "cols": 1}],
        "flowcharts": [
            {
                "image": chart,
                "task": "flowchart-graph",
                "nodes": [{"id": "a", "type": "task", "text": "x"}],
                "edges": [{"src": "a", "dst": "a", "type": "sequenceFlow", "label": ""}],
            }
        ],
    }
    for name, rows in files.items():
        write_rows(tmp_path, *rows, name=f"{name}.jsonl")
    suite = open_suite("dev", data_root=tmp_path)
    assert suite.parts == {
        "receipt-lines": "ocr-line",
        "receipt-pages": "ocr-page",
        "receipt-json": "receipt-json",
        "book-pages": "ocr-page",
        "forms": "ocr-page",
        "charts": "chart-qa",
        "count-red-blood-cells": "count",
        "count-coco": "count",
        "tables": "table-html",
        "flowcharts": "flowchart-graph",
    }
    truths = {sample.part: sample.truth for sample in samples(suite)}
    assert truths["receipt-pages"] == Truth("ACME\n8.60", ignore_case=True)
    assert truths["forms"] == Truth("TO: Bob", unordered=True)
    assert len(open_suite("dev", data_root=tmp_path, limit=1).ids) == 10
    assert open_suite("dev", data_root=tmp_path, parts=["tables", "charts"]).ids == [
        "charts/00000",
        "tables/00000",
    ]


def write_both_sides(tmp_path: Path) -> dict[str, str]:
    """A folder of the real sets with an image that may train and one that is kept apart; returns their names."""
    images = {side: image_on(side, "b") for side in ("train", "eval")}
    question = "How many platelets are in the image?"
    cells = [{"image": name, "task": "count", "question": question, "answer": 3} for name in images.values()]
    files: dict[str, list[dict]] = {
        "counting": [row | {"source": "bccd"} for row in cells],
        "receipts": [
            {"image": name, "task": "receipt-json", "answer": {"company": name, "total": "1"}}
            for name in images.values()
        ],
        "receipt_lines": [
            {"image": name, "bbox": [0, 0, 9, 9], "answer": name, "task": "ocr-line"}
            for name in images.values()
        ],
        "tables": [{"image": name, "task": "table-html", "answer": TABLE} for name in images.values()],
        "flowcharts": [
            {"image": name, "task": "flowchart-graph", "answer": {"edges": [["a", "b"]]}}
            for name in images.values()
        ],
        "pages": [{"image": "p.png", "task": "ocr-page", "answer": "page"}],
        "forms": [{"image": "f.png", "words": [["TO:", [0, 0, 5, 5]]]}],
        "chartqa": [{"image": "c.png", "task": "chart-qa", "question": "?", "answer": "1"}],
    }
    for name, rows in files.items():
        write_rows(tmp_path, *rows, name=f"{name}.jsonl")
    return images


def test_dev_leaves_out_what_may_train(tmp_path: Path) -> None:
    images = write_both_sides(tmp_path)
    suite = open_suite("dev", data_root=tmp_path)
    used = {sample.source for sample in samples(suite)}
    assert used == {images["eval"], "p.png", "f.png", "c.png"}
    trained = {image for image, side in image_splits(tmp_path).items() if side == "train"}
    assert trained == {images["train"]}


def test_overlap_finds_the_same_file_and_near_copies(tmp_path: Path) -> None:
    images = write_both_sides(tmp_path)
    trained, evaluated = tmp_path / images["train"], tmp_path / images["eval"]
    assert trained.read_bytes() == evaluated.read_bytes()
    assert find_overlap(tmp_path).same_files == [images["eval"]]

    noise_image(300, 200, seed=1).save(evaluated)
    noise_image(300, 200, seed=2).save(trained)
    apart = find_overlap(tmp_path)
    assert (apart.num_trained, apart.num_evaluated, apart.same_files) == (1, 4, [])
    assert max(likeness for *_, likeness in apart.pairs) < 0.5

    with Image.open(evaluated) as image:
        image.convert("L").resize((180, 270)).save(trained, quality=60)
    alike = find_overlap(tmp_path)
    assert not alike.same_files
    assert alike.pairs[0][:2] == (images["eval"], images["train"]) and alike.pairs[0][2] > 0.97
    assert alike.pairs[1][2] < 0.5
