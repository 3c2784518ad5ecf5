"""What a model is evaluated on: frozen rendered pictures, the sets of real images, or rows of a JSONL file.

A suite is a list of samples in parts; a part has one task and one line in the results. A row of a file is an object of

- `image`: path, relative to the file
- `task`: a task of `metrics.TASK_METRICS`; may be left out where `bbox` is, which makes it `ocr-line`
- `answer`: see `metrics.Truth`; of a `flowchart-graph`, `nodes` and `edges` may stand instead
- `question`: by default that of the task, see `DEFAULT_QUESTIONS`
- `bbox`: left, top, right, bottom in pixels; the question is about this crop
- `case_insensitive`, `unordered`: true, for truths of that kind
- `part`: by default the task
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from vlmslice.answer_schemas import RECEIPT_SCHEMA
from vlmslice.data.fonts import FontLibrary
from vlmslice.data.nine_balls import NINE_BALLS_QUESTION, NINE_BALLS_SIZES, draw_nine_balls
from vlmslice.data.real_data import image_splits
from vlmslice.data.samples import READ_QUESTIONS
from vlmslice.data.tasks import Curriculum, TaskConfig, TaskDataset
from vlmslice.errors import VlmSliceError, suggestion
from vlmslice.image_loading import load_image
from vlmslice.metrics import TASK_METRICS, Truth, parse_table

OCR_TASKS = ("ocr-page", "ocr-line")

DEFAULT_QUESTIONS = {
    "ocr-page": READ_QUESTIONS[0],
    "ocr-line": READ_QUESTIONS[0],
    "receipt-json": "Give the company, date, address and total of this receipt as JSON.",
    "table-html": "Write this table as HTML.",
    "flowchart-graph": 'List the arrows of this flowchart as JSON: {"edges": [[from, to], ...]}.',
}

ANSWER_SCHEMAS = {"receipt-json": RECEIPT_SCHEMA}
"""JSON schemas of the answers to `DEFAULT_QUESTIONS`; flowcharts have none, as metrics take lines "A -> B" as well."""

SYNTHETIC_SEED = 20_261_122
SYNTHETIC_CONFIG = TaskConfig(megapixels=(0.05, 4.0), num_words=(1, 6), max_count=10, split="eval")
# Metrics and difficulty of each part; parts are rendered by the task of their name.
SYNTHETIC_TASKS = {
    "read": "ocr-line",
    "paragraph": "ocr-page",
    "count": "count",
    "crowd": "count",
    "plot": "chart-qa",
}
SYNTHETIC_CONFIGS = dict.fromkeys(SYNTHETIC_TASKS, SYNTHETIC_CONFIG) | {
    "crowd": replace(SYNTHETIC_CONFIG, max_count=30),
    # Values, names and labels; whole tables have another metric.
    "plot": replace(SYNTHETIC_CONFIG, max_answer=40),
}
SYNTHETIC_SIZE = 300

_BLOOD_CELLS = {
    "How many red blood cells are in the image?": "count-red-blood-cells",
    "How many white blood cells are in the image?": "count-white-blood-cells",
    "How many platelets are in the image?": "count-platelets",
}


class SuiteError(VlmSliceError, ValueError):
    """There is no such suite, or one of its rows cannot be used."""


@dataclass(frozen=True)
class Sample:
    """A question about an image, with its truth.

    Attributes:
        id: Part and number, `receipt-lines/00042`; the number is that in the whole part, whatever the limit.
        part: Line of the results that it counts for.
        task: Key of `metrics.TASK_METRICS`.
        question: As it is asked.
        truth: What the answer is compared with.
        image: The picture as it is asked about, cropped.
        source: Name of the image: samples of one image are not independent.
        is_crop: True if the image is a crop to one line.
    """

    id: str
    part: str
    task: str
    question: str
    truth: Truth
    image: Image.Image
    source: str
    is_crop: bool = False


class Suite(Protocol):
    """Samples by index; their images are loaded or rendered one at a time.

    Attributes:
        name: As it was asked for.
        sha256: Of all that makes the samples what they are.
        parts: Name of each part in order, with its task.
        ids: Of the samples, in order; those of a part are neighbours.
    """

    name: str
    sha256: str
    parts: dict[str, str]
    ids: list[str]

    def __getitem__(self, index: int) -> Sample: ...


def open_suite(
    name: str,
    *,
    data_root: Path | None = None,
    limit: int | None = None,
    parts: Sequence[str] | None = None,
) -> Suite:
    """Opens a suite by its name.

    Args:
        name: `synthetic`, `nine-balls`, `dev`, or the path of a JSONL file.
        data_root: Folder of the real images, for `dev` only.
        limit: Most samples of each part; a smaller limit takes some of those that a larger one takes.
        parts: Names of the parts to keep; by default all.

    Raises:
        SuiteError: There is no such suite or part, or a row cannot be used.
    """
    if data_root is not None and name != "dev":
        raise SuiteError(
            f"got a data root with the suite {name!r}; expected one with 'dev' only, as rows of a JSONL file name "
            "their images relative to it; leave --data-root out"
        )
    if name == "synthetic":
        chosen = _choose_parts(SYNTHETIC_TASKS, parts)
        return SyntheticSuite({part: limit or SYNTHETIC_SIZE for part in chosen})
    if name == "nine-balls":
        _choose_parts(["nine-balls"], parts)
        return NineBallsSuite(NINE_BALLS_SIZES[:limit])
    if name == "dev":
        if data_root is None:
            raise SuiteError(
                "the suite 'dev' needs the folder of the real images; expected --data-root FOLDER with receipts.jsonl "
                "and the others in it"
            )
        rows = _dev_rows(data_root)
        return FileSuite(name, data_root, {part: rows[part] for part in _choose_parts(rows, parts)}, limit)
    path = Path(name)
    if not path.is_file():
        known = ("synthetic", "nine-balls", "dev")
        raise SuiteError(
            f"there is no suite {name!r}; expected 'synthetic', 'nine-balls', 'dev' or the path of a JSONL file"
            f"{suggestion(name, known)}"
        )
    grouped: dict[str, list[_Row]] = {}
    for row in _read_rows(path):
        grouped.setdefault(row.part, []).append(row)
    return FileSuite(path.stem, path.parent, {p: grouped[p] for p in _choose_parts(grouped, parts)}, limit)


def _choose_parts(known: Iterable[str], wanted: Sequence[str] | None) -> list[str]:
    names = list(known)
    for name in wanted or ():
        if name not in names:
            raise SuiteError(
                f"the suite has no part {name!r}; expected one of {', '.join(names)}{suggestion(name, names)}"
            )
    return [name for name in names if not wanted or name in wanted]


# Rendered pictures


class SyntheticSuite:
    """Rendered pictures that training never saw: held-out fonts, held-out words, a seed of their own.

    Sample i of a part is always the same, however many there are, on a machine with the same fonts; what fonts it has
    is a part of `sha256`.
    """

    name = "synthetic"

    def __init__(self, num_samples: dict[str, int]):
        """Draws nothing yet.

        Args:
            num_samples: Of each part; parts are named after the tasks of `data.tasks`.

        Raises:
            SuiteError: The machine has no held-out fonts, or no library to find them with.
        """
        try:
            fonts = FontLibrary("eval")
        except ModuleNotFoundError as error:
            raise SuiteError(
                f"the suite 'synthetic' needs {error.name} to find fonts; pip install 'vlmslice[train]'"
            ) from error
        except FileNotFoundError as error:
            raise SuiteError(str(error)) from error
        self.parts = {part: SYNTHETIC_TASKS[part] for part in num_samples}
        self.ids = [f"{part}/{i:05}" for part, number in num_samples.items() for i in range(number)]
        self._datasets = {
            part: TaskDataset(
                [Curriculum(number, SYNTHETIC_CONFIGS[part], {part: 1.0})],
                fonts,
                SYNTHETIC_SEED,
                group=1,
                name=f"evaluation-{part}",
            )
            for part, number in num_samples.items()
        }
        paths = sorted({font.path for cuts in fonts.families.values() for font in cuts})
        configs = {part: asdict(SYNTHETIC_CONFIGS[part]) for part in num_samples}
        recipe = {"seed": SYNTHETIC_SEED, "configs": configs, "num_samples": num_samples}
        self.sha256 = _digest(recipe, map(Path, paths))

    def __getitem__(self, index: int) -> Sample:
        id = self.ids[index]
        part, _, number = id.partition("/")
        drawn = self._datasets[part][int(number)]
        return Sample(
            id, part, self.parts[part], drawn.question, Truth(drawn.answer), drawn.scene.image, source=id
        )


class NineBallsSuite:
    """The same nine balls at growing sizes: of a model whose slices overlap one reads of 9, then 12, then 16."""

    name = "nine-balls"

    def __init__(self, sides: Sequence[int] = NINE_BALLS_SIZES):
        """`sides`: of the square pictures, px."""
        self.parts = {"nine-balls": "count"}
        self.ids = [f"nine-balls/{side:05}" for side in sides]
        self.sha256 = _digest({"sides": sides, "question": NINE_BALLS_QUESTION}, ())

    def __getitem__(self, index: int) -> Sample:
        id = self.ids[index]
        image = draw_nine_balls(int(id.rpartition("/")[2]))
        return Sample(id, "nine-balls", "count", NINE_BALLS_QUESTION, Truth("9"), image, source=id)


# Rows of files


@dataclass(frozen=True)
class _Row:
    """A checked row."""

    part: str
    task: str
    image: str
    question: str
    truth: Truth
    bbox: tuple[int, int, int, int] | None


class FileSuite:
    """Samples of rows with images in files, which must all be there.

    With a limit, the rows of a part are those with the smallest hashes, so that they come from all over it and a
    larger limit only adds to them; they stay in the order of the file.
    """

    def __init__(self, name: str, folder: Path, rows: dict[str, list[_Row]], limit: int | None = None):
        """Looks for every image; opens none.

        Raises:
            SuiteError: An image is missing, or a part has several tasks.
        """
        for part, some in rows.items():
            tasks = sorted({row.task for row in some})
            if len(tasks) > 1:
                raise SuiteError(
                    f"the part {part!r} has rows of {' and '.join(tasks)}; expected one task in a part; name them apart"
                )
        self.name = name
        self.parts = {part: some[0].task for part, some in rows.items()}
        self._folder = folder
        self._rows: list[_Row] = []
        self.ids: list[str] = []
        for part, some in rows.items():
            for i in _smallest_hashes(some, limit):
                self.ids.append(f"{part}/{i:05}")
                self._rows.append(some[i])
        for image in self.images:
            if not (folder / image).is_file():
                raise SuiteError(
                    f"image {image!r} of the suite {name!r} is not in {str(folder)!r}; expected a file there; "
                    "check the paths of the rows"
                )
        self.sha256 = _digest([asdict(row) for row in self._rows], (folder / image for image in self.images))
        # The lines of a page follow each other.
        self._load = lru_cache(maxsize=2)(load_image)

    @property
    def images(self) -> list[str]:
        """Paths of all images, relative to the folder, sorted."""
        return sorted({row.image for row in self._rows})

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        image = self._load(self._folder / row.image)
        if row.bbox is not None:
            image = image.crop(row.bbox)
        return Sample(
            self.ids[index],
            row.part,
            row.task,
            row.question,
            row.truth,
            image,
            source=row.image,
            is_crop=row.bbox is not None,
        )


def _smallest_hashes(rows: list[_Row], limit: int | None) -> list[int]:
    if limit is None or limit >= len(rows):
        return list(range(len(rows)))
    hashes = [hashlib.sha256(repr(row).encode()).digest() for row in rows]
    return sorted(sorted(range(len(rows)), key=lambda i: (hashes[i], i))[:limit])


def _digest(description: Any, files: Iterable[Path]) -> str:
    """SHA-256 of a description and of the contents of files."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _read_objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place, object) of every line of a JSONL file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(
            f"{str(path)!r} cannot be read: {error}; expected a JSONL file in UTF-8; check the path"
        ) from error
    objects = []
    for number, line in enumerate(lines, start=1):
        place = f"{path.name} line {number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise SuiteError(f"{place} is no JSON: {error}; expected one object a line") from error
        if not isinstance(fields, dict):
            raise SuiteError(f"{place} is a {type(fields).__name__}; expected one JSON object a line")
        objects.append((place, fields))
    if not objects:
        raise SuiteError(f"{str(path)!r} has no rows; expected one JSON object a line")
    return objects


def _read_rows(path: Path, **fields: Any) -> list[_Row]:
    """The rows of a file; `fields` win over what they say."""
    return [_check_row(place, row | fields) for place, row in _read_objects(path)]


def _check_row(place: str, fields: dict[str, Any]) -> _Row:
    task = fields.get("task", "ocr-line" if "bbox" in fields else None)
    if task not in TASK_METRICS:
        raise SuiteError(
            f"{place} has the task {task!r}; expected one of {', '.join(TASK_METRICS)}{suggestion(task, TASK_METRICS)}"
        )
    image = fields.get("image")
    if not isinstance(image, str) or not image:
        raise SuiteError(f"{place} has the image {image!r}; expected a path relative to the file")
    question = fields.get("question", DEFAULT_QUESTIONS.get(task))
    if not isinstance(question, str) or not question.strip():
        raise SuiteError(
            f"{place} has the question {question!r}; expected text, as {task} has no default question"
            if task not in DEFAULT_QUESTIONS
            else f"{place} has the question {question!r}; expected text, or none for {DEFAULT_QUESTIONS[task]!r}"
        )
    answer = _flowchart_answer(place, fields) if task == "flowchart-graph" else fields.get("answer")
    expected = _ANSWERS[task]
    if not expected.fits(answer):
        raise SuiteError(f"{place} has the answer {str(answer)[:80]!r}; expected {expected.description}")
    bbox = fields.get("bbox")
    if bbox is not None and not _is_box(bbox):
        raise SuiteError(f"{place} has the bbox {bbox!r}; expected [left, top, right, bottom] with an area")
    part = fields.get("part", task)
    if not isinstance(part, str) or not part:
        raise SuiteError(f"{place} has the part {part!r}; expected a name")
    truth = Truth(answer, bool(fields.get("case_insensitive")), bool(fields.get("unordered")))
    return _Row(part, task, image, question, truth, tuple(bbox) if bbox else None)


def _is_box(bbox: Any) -> bool:
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(n, int) for n in bbox):
        return False
    left, top, right, bottom = bbox
    return 0 <= left < right and 0 <= top < bottom


@dataclass(frozen=True)
class _AnswerForm:
    """What the answer of a task must be."""

    description: str
    fits: Any


def _is_text(answer: Any) -> bool:
    return isinstance(answer, str) and bool(answer.strip())


_TEXT = _AnswerForm("some text", _is_text)
_ANSWERS = {
    "ocr-page": _TEXT,
    "ocr-line": _TEXT,
    "receipt-json": _AnswerForm(
        "an object of texts, such as {'total': '8.60'}",
        lambda answer: isinstance(answer, dict) and any(map(_is_text, answer.values())),
    ),
    "chart-qa": _AnswerForm(
        "some text, or a list of texts of which any will do",
        lambda answer: (
            all(map(_is_text, answer)) and answer if isinstance(answer, list) else _is_text(answer)
        ),
    ),
    "count": _AnswerForm(
        "a whole number",
        lambda answer: str(answer).isdecimal() and not isinstance(answer, bool),
    ),
    "table-html": _AnswerForm(
        "HTML with at least one cell that is not empty",
        lambda answer: isinstance(answer, str) and any(cell.text for cell in parse_table(answer) or ()),
    ),
    "flowchart-graph": _AnswerForm("at least one edge", lambda answer: bool(answer["edges"])),
}


def _flowchart_answer(place: str, fields: dict[str, Any]) -> dict[str, Any]:
    """`{"edges": [[from, to], ...]}`, of `answer` or of nodes and edges by id; a node without text goes by its type."""
    try:
        if "answer" in fields:
            return {"edges": [[str(start), str(end)] for start, end in fields["answer"]["edges"]]}
        names = {node["id"]: node["text"].strip() or node["type"] for node in fields["nodes"]}
        return {"edges": [[names[edge["src"]], names[edge["dst"]]] for edge in fields["edges"]]}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SuiteError(
            f"{place} has no flowchart: {type(error).__name__} {error}; expected an answer "
            '{"edges": [[from, to], ...]}, or nodes (id, type, text) and edges (src, dst) between them'
        ) from error


def _dev_rows(root: Path) -> dict[str, list[_Row]]:
    """The parts of the real sets; their README describes the files.

    Of sets that may train weights, only the images kept apart for evaluation are taken.
    """
    lines = [(place, row) for place, row in _read_objects(root / "receipt_lines.jsonl")]
    texts: dict[str, list[str]] = {}
    for _, row in lines:
        texts.setdefault(row["image"], []).append(row["answer"])
    parts = {
        "receipt-lines": [_check_row(p, row | {"part": "receipt-lines"}) for p, row in lines],
        "receipt-pages": [
            _check_row(
                "receipt_lines.jsonl",
                {
                    "image": image,
                    "task": "ocr-page",
                    "answer": "\n".join(answers),
                    "case_insensitive": True,
                    "part": "receipt-pages",
                },
            )
            for image, answers in texts.items()
        ],
        "receipt-json": _read_rows(root / "receipts.jsonl", part="receipt-json"),
        "book-pages": _read_rows(root / "pages.jsonl", part="book-pages"),
        # Words are listed by entity, not in reading order.
        "forms": [
            _check_row(
                place,
                {
                    "image": row["image"],
                    "task": "ocr-page",
                    "answer": " ".join(word for word, _ in row["words"]),
                    "unordered": True,
                    "part": "forms",
                },
            )
            for place, row in _read_objects(root / "forms.jsonl")
        ],
        "charts": _read_rows(root / "chartqa.jsonl", part="charts"),
    }
    for place, row in _read_objects(root / "counting.jsonl"):
        part = _BLOOD_CELLS.get(row["question"], f"count-{row['source']}")
        parts.setdefault(part, []).append(_check_row(place, row | {"part": part}))
    parts["tables"] = _read_rows(root / "tables.jsonl", part="tables")
    parts["flowcharts"] = _read_rows(root / "flowcharts.jsonl", part="flowcharts")
    splits = image_splits(root)
    kept = {part: [row for row in rows if splits.get(row.image) != "train"] for part, rows in parts.items()}
    return {part: rows for part, rows in kept.items() if rows}
