"""Labelled photographs and scans of documents as task samples: receipts, their lines, blood cells, tables, flowcharts.

The sets lie in a folder of JSONL files, an object a line, `image` relative to the folder:

- `receipts.jsonl`: `answer` = {company, date, address, total}; ICDAR 2019 SROIE, CC BY 4.0.
- `receipt_lines.jsonl`: `bbox` = [left, top, right, bottom], `answer` = the text in it; of the same images.
- `counting.jsonl`: `question`, `answer`, `source`; only the blood cells (`bccd`, MIT) may train.
- `tables.jsonl`: `answer` = HTML; US government documents of the ICDAR 2013 table competition.
- `flowcharts.jsonl`: `nodes` with id, type and text, `edges` with src and dst; hdBPMN, CC BY 4.0.

Other sets of that folder are for evaluation only and are refused here. What is used is split once more, by what
several images share (company, document, drawn exercise), so that some of it stays apart for evaluation.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vlmslice.data.answer_places import locate_answer
from vlmslice.data.flowcharts import QUESTIONS as FLOWCHART_QUESTIONS
from vlmslice.data.receipts import QUESTIONS as RECEIPT_QUESTIONS
from vlmslice.data.receipts import compact_json
from vlmslice.data.samples import TaskSample
from vlmslice.data.scenes import Scene, sample_rng
from vlmslice.data.tables import HTML_QUESTIONS
from vlmslice.data.typesetting import add_evenly
from vlmslice.errors import VlmSliceError, suggestion
from vlmslice.image_loading import load_image

LINE_QUESTIONS = ("Read the text in capital letters.", "What is written here, in capital letters?")
"""Lines of receipts are transcribed in upper case, whatever the case in print."""
PART_QUESTIONS = ("Read all the text in capital letters.", "Transcribe the receipt in capital letters.")

FILES = {
    "receipt": "receipts.jsonl",
    "receipt-line": "receipt_lines.jsonl",
    "receipt-part": "receipt_lines.jsonl",
    "receipt-page": "receipt_lines.jsonl",
    "cells": "counting.jsonl",
    "table": "tables.jsonl",
    "flowchart": "flowcharts.jsonl",
}
"""Sets that may train weights, and their files; `receipt-part` shows a few printed rows of a receipt at once, and
`receipt-page` all of it."""

EVALUATION_ONLY = ("chartqa", "forms", "pages")
"""Sets whose licence, or the lack of one, forbids training."""

_EVAL_ONE_IN = 3
_MOST_ROWS = 8

Row = dict[str, Any]


class RealDataError(VlmSliceError, ValueError):
    """A set is not there, is not known, or may not be trained on."""


def split_of(group: str) -> str:
    """The side of a group of images, "train" (two in three) or "eval", by a checksum of its name."""
    letters = re.sub(r"[^a-z0-9]", "", group.lower())
    return "eval" if zlib.crc32(letters.encode()) % _EVAL_ONE_IN == 0 else "train"


def image_splits(data_root: str | Path) -> dict[str, str]:
    """The split of every image of the sets in `FILES`, for training and evaluation to agree on.

    Receipts of one company are on one side, so are tables of one document and drawings of one exercise.
    """
    root = Path(data_root)
    splits: dict[str, str] = {}
    for name in FILES:
        for row in _rows(root, name):
            if name == "receipt":
                splits[row["image"]] = split_of(row["answer"].get("company", row["image"]))
            elif not name.startswith("receipt-"):
                file_name = Path(row["image"]).name
                splits[row["image"]] = split_of(file_name if name == "cells" else file_name.split("_")[0])
    return splits


def _rows(root: Path, name: str) -> Iterable[Row]:
    path = root / FILES[name]
    if not path.is_file():
        raise RealDataError(
            f"there is no {FILES[name]} in {str(root)!r}; expected the folder of the labelled sets; give another "
            f"data_root, or leave {name!r} out"
        )
    with path.open() as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    if name == "receipt-part":
        return _following_lines(rows)
    if name == "receipt-page":
        return [{"image": image, "lines": lines} for image, lines in _by_image(rows).items()]
    if name == "receipt" and (root / FILES["receipt-line"]).is_file():
        printed = _by_image(_rows(root, "receipt-line"))
        return [row | {"lines": printed.get(row["image"], [])} for row in rows]
    return [row for row in rows if name != "cells" or row["source"] == "bccd"]


def _following_lines(lines: list[Row]) -> list[Row]:
    """For each line of a receipt, `lines`: this one and all that are printed below it or beside it."""
    return [
        {"image": image, "lines": [other for other in of_one if _middle(other) >= line["bbox"][1]]}
        for image, of_one in _by_image(lines).items()
        for line in of_one
    ]


def _by_image(lines: Iterable[Row]) -> dict[str, list[Row]]:
    of_image: dict[str, list[Row]] = {}
    for line in lines:
        of_image.setdefault(line["image"], []).append(line)
    return of_image


def _middle(line: Row) -> float:
    return (line["bbox"][1] + line["bbox"][3]) / 2


class RealDataset(Sequence[TaskSample]):
    """Samples of real sets, in the order of the files; images are loaded when a sample is asked for.

    Which question is asked and how a line is cropped is drawn from seed and index, as in rendered tasks. Where the box
    of a printed line is known, its characters are taken to be spread evenly over it, to tell where an answer stands.

    Args:
        data_root: folder of the JSONL files.
        names: sets, of `FILES`.
        split: "train" or "eval", see `image_splits`.
        seed: of the drawing.

    Raises:
        RealDataError: a set is unknown, missing, or for evaluation only.
    """

    def __init__(
        self, data_root: str | Path, names: Sequence[str] = tuple(FILES), split: str = "train", seed: int = 0
    ):
        for name in names:
            if name in EVALUATION_ONLY:
                raise RealDataError(
                    f"the set {name!r} is for evaluation only, its licence does not allow training; "
                    f"expected some of {', '.join(FILES)}"
                )
            if name not in FILES:
                raise RealDataError(
                    f"there is no set {name!r}; expected some of {', '.join(FILES)}{suggestion(name, FILES)}"
                )
        self.root, self.seed = Path(data_root), seed
        splits = image_splits(self.root)
        self._entries = [
            (name, row) for name in names for row in _rows(self.root, name) if splits[row["image"]] == split
        ]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> TaskSample:  # type: ignore[override]  # no slices
        name, row = self._entries[index]
        image = load_image(self.root / row["image"])
        rng = sample_rng(self.seed, f"real-{name}", range(len(self))[index])
        sample = _READERS[name](rng, row, Scene(image, is_listed=False))
        sample.places = locate_answer(sample.answer, sample.scene)
        return sample


def _read_receipt(rng: random.Random, row: Row, scene: Scene) -> TaskSample:
    fields: dict[str, str] = row["answer"]
    kind = rng.choice(["json", "json", *(name for name in fields if name in RECEIPT_QUESTIONS)])
    record = {name: fields.get(name, "") for name in ("company", "date", "address", "total")}
    answer = compact_json(record) if kind == "json" else fields[kind]
    _add_lines(scene, [line for printed in _printed_rows(row.get("lines", ())) for line in printed])
    return TaskSample("receipt", scene, rng.choice(RECEIPT_QUESTIONS[kind]), answer)


def _read_receipt_line(rng: random.Random, row: Row, scene: Scene) -> TaskSample:
    """The crop of one line, with up to a third of its height as margin."""
    left, top, right, bottom = row["bbox"]
    room = (bottom - top) / 3
    margins = [rng.uniform(0, room) for _ in range(4)]
    crop = _crop(scene, [row], *margins)
    return TaskSample("read", crop, rng.choice(LINE_QUESTIONS), row["answer"])


def _read_receipt_part(rng: random.Random, row: Row, scene: Scene) -> TaskSample:
    """The first few of the printed rows of `row`, as wide as the print; lines side by side are joined by a space."""
    printed = _printed_rows(row["lines"])[: rng.randint(2, _MOST_ROWS)]
    lines = [line for lines in printed for line in lines]
    _, first_top, _, first_bottom = lines[0]["bbox"]
    margin = (first_bottom - first_top) * rng.uniform(0.1, 0.4)
    crop = _crop(scene, lines, *[margin] * 4)
    return TaskSample("read", crop, rng.choice(PART_QUESTIONS), _join(printed))


def _read_receipt_page(rng: random.Random, row: Row, scene: Scene) -> TaskSample:
    printed = _printed_rows(row["lines"])
    _add_lines(scene, [line for lines in printed for line in lines])
    return TaskSample("read", scene, rng.choice(PART_QUESTIONS), _join(printed))


def _printed_rows(lines: Iterable[Row]) -> list[list[Row]]:
    """Lines from the top down, those side by side together from left to right."""
    printed: list[list[Row]] = []
    for line in sorted(lines, key=_middle):
        if printed and _middle(line) < printed[-1][0]["bbox"][3]:
            printed[-1].append(line)
        else:
            printed.append([line])
    return [sorted(of_row, key=lambda line: line["bbox"][0]) for of_row in printed]


def _join(printed: list[list[Row]]) -> str:
    return "\n".join(" ".join(line["answer"] for line in of_row) for of_row in printed)


def _crop(scene: Scene, lines: Sequence[Row], left: float, top: float, right: float, bottom: float) -> Scene:
    """The part of a picture that shows `lines`, with so much margin on each side as there is room for."""
    boxes = [line["bbox"] for line in lines]
    crop_left = max(0, round(min(box[0] for box in boxes) - left))
    crop_top = max(0, round(min(box[1] for box in boxes) - top))
    crop_right = min(scene.image.width, round(max(box[2] for box in boxes) + right))
    crop_bottom = min(scene.image.height, round(max(box[3] for box in boxes) + bottom))
    box = crop_left, crop_top, max(crop_right, crop_left + 1), max(crop_bottom, crop_top + 1)
    crop = Scene(scene.image.crop(box), is_listed=False)
    _add_lines(crop, lines, crop_top, crop_left)
    return crop


def _add_lines(scene: Scene, lines: Iterable[Row], crop_top: float = 0.0, crop_left: float = 0.0) -> None:
    for line in lines:
        left, top, right, bottom = line["bbox"]
        box = (top - crop_top, left - crop_left, bottom - crop_top, right - crop_left)
        add_evenly(scene, line["answer"], box)


def _count_cells(rng: random.Random, row: Row, scene: Scene) -> TaskSample:
    return TaskSample("count", scene, row["question"], str(row["answer"]))


def _read_table(rng: random.Random, row: Row, scene: Scene) -> TaskSample:
    return TaskSample("table", scene, rng.choice(HTML_QUESTIONS), row["answer"])


def _read_flowchart(rng: random.Random, row: Row, scene: Scene) -> TaskSample:
    """Edges by the texts of their ends; a symbol without text goes by its type."""
    named = {node["id"]: node["text"] or node["type"] for node in row["nodes"]}
    known = [edge for edge in row["edges"] if edge["src"] in named and edge["dst"] in named]
    answer = "\n".join(f"{named[edge['src']]} -> {named[edge['dst']]}" for edge in known)
    return TaskSample("flowchart", scene, rng.choice(FLOWCHART_QUESTIONS), answer)


_READERS: dict[str, Callable[[random.Random, Row, Scene], TaskSample]] = {
    "receipt": _read_receipt,
    "receipt-line": _read_receipt_line,
    "receipt-part": _read_receipt_part,
    "receipt-page": _read_receipt_page,
    "cells": _count_cells,
    "table": _read_table,
    "flowchart": _read_flowchart,
}
