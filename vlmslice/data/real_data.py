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

from vlmslice.data.flowcharts import QUESTIONS as FLOWCHART_QUESTIONS
from vlmslice.data.receipts import QUESTIONS as RECEIPT_QUESTIONS
from vlmslice.data.receipts import compact_json
from vlmslice.data.samples import TaskSample
from vlmslice.data.scenes import Region, Scene, sample_rng
from vlmslice.data.tables import HTML_QUESTIONS
from vlmslice.errors import VlmSliceError, suggestion
from vlmslice.image_loading import load_image

LINE_QUESTIONS = ("Read the text in capital letters.", "What is written here, in capital letters?")
"""Lines of receipts are transcribed in upper case, whatever the case in print."""
PART_QUESTIONS = ("Read all the text in capital letters.", "Transcribe the receipt in capital letters.")

FILES = {
    "receipt": "receipts.jsonl",
    "receipt-line": "receipt_lines.jsonl",
    "receipt-part": "receipt_lines.jsonl",
    "cells": "counting.jsonl",
    "table": "tables.jsonl",
    "flowchart": "flowcharts.jsonl",
}
"""Sets that may train weights, and their files; `receipt-part` shows a few printed rows of a receipt at once."""

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
    return [row for row in rows if name != "cells" or row["source"] == "bccd"]


def _following_lines(lines: list[Row]) -> list[Row]:
    """For each line of a receipt, `lines`: this one and all that are printed below it or beside it."""
    of_image: dict[str, list[Row]] = {}
    for line in lines:
        of_image.setdefault(line["image"], []).append(line)
    return [
        {"image": image, "lines": [other for other in of_one if _middle(other) >= line["bbox"][1]]}
        for image, of_one in of_image.items()
        for line in of_one
    ]


def _middle(line: Row) -> float:
    return (line["bbox"][1] + line["bbox"][3]) / 2


class RealDataset(Sequence[TaskSample]):
    """Samples of real sets, in the order of the files; images are loaded when a sample is asked for.

    Which question is asked and how a line is cropped is drawn from seed and index, as in rendered tasks.

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
        return _READERS[name](rng, row, Scene(image, is_listed=False))


def _read_receipt(rng: random.Random, row: Row, scene: Scene) -> TaskSample:
    fields: dict[str, str] = row["answer"]
    kind = rng.choice(["json", "json", *(name for name in fields if name in RECEIPT_QUESTIONS)])
    record = {name: fields.get(name, "") for name in ("company", "date", "address", "total")}
    answer = compact_json(record) if kind == "json" else fields[kind]
    return TaskSample("receipt", scene, rng.choice(RECEIPT_QUESTIONS[kind]), answer)


def _read_receipt_line(rng: random.Random, row: Row, scene: Scene) -> TaskSample:
    """The crop of one line, with up to a third of its height as margin."""
    left, top, right, bottom = row["bbox"]
    room = (bottom - top) / 3
    crop_left, crop_top = (
        max(0, round(left - rng.uniform(0, room))),
        max(0, round(top - rng.uniform(0, room))),
    )
    crop_right = min(scene.image.width, round(right + rng.uniform(0, room)))
    crop_bottom = min(scene.image.height, round(bottom + rng.uniform(0, room)))
    crop = scene.image.crop(
        (crop_left, crop_top, max(crop_right, crop_left + 1), max(crop_bottom, crop_top + 1))
    )
    box = (top - crop_top, left - crop_left, bottom - crop_top, right - crop_left)
    lines = [Region("line", row["answer"], box)]
    return TaskSample(
        "read", Scene(crop, regions=lines, is_listed=False), rng.choice(LINE_QUESTIONS), row["answer"]
    )


def _read_receipt_part(rng: random.Random, row: Row, scene: Scene) -> TaskSample:
    """The first few of the printed rows of `row`, as wide as the print; lines side by side are joined by a space."""
    printed: list[list[Row]] = []
    for line in sorted(row["lines"], key=_middle):
        if printed and _middle(line) < printed[-1][0]["bbox"][3]:
            printed[-1].append(line)
        else:
            printed.append([line])
    printed = printed[: rng.randint(2, _MOST_ROWS)]
    boxes = [line["bbox"] for lines in printed for line in lines]
    margin = round((boxes[0][3] - boxes[0][1]) * rng.uniform(0.1, 0.4))
    left, right = min(box[0] for box in boxes), max(box[2] for box in boxes)
    top, bottom = min(box[1] for box in boxes), max(box[3] for box in boxes)
    crop = scene.image.crop(
        (
            max(0, left - margin),
            max(0, top - margin),
            min(scene.image.width, right + margin),
            min(scene.image.height, bottom + margin),
        )
    )
    rows = (
        " ".join(line["answer"] for line in sorted(lines, key=lambda x: x["bbox"][0])) for lines in printed
    )
    return TaskSample("read", Scene(crop, is_listed=False), rng.choice(PART_QUESTIONS), "\n".join(rows))


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
    "cells": _count_cells,
    "table": _read_table,
    "flowchart": _read_flowchart,
}
