"""A run of `vlmslice eval`: a suite through a model and its peers, into a folder, whatever interrupts it.

The folder holds

- `manifest.json`: what was run (model files, suite, prompt, decoding, slicing, versions, peers) and the seconds it took
- `predictions.jsonl`: one row for each sample, with the metrics of that row
- `results.json`, `results.md`: the figures with their intervals; without timings, so that two runs are equal byte for
  byte
- `report.html`: the figures and drawn cases, see `evaluation_report`

Rows are written batch by batch. Started again with the same settings, a run goes on behind the last complete row.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from vlmslice.evaluation_report import markdown_table, write_report
from vlmslice.inference import Answer, Assistant
from vlmslice.metrics import TASK_METRICS, Ratio, Truth, score, summarize
from vlmslice.model_files import find_model, read_slicing_config
from vlmslice.peers import Peer
from vlmslice.run_folder import (
    RunFolder,
    RunFolderError,
    describe_model,
    describe_versions,
    to_line,
    write_json,
    write_text,
)
from vlmslice.suites import ANSWER_SCHEMAS, DEFAULT_QUESTIONS, OCR_TASKS, Sample, Suite

MAX_NEW_TOKENS = {
    "ocr-page": 4608,
    "ocr-line": 128,
    "receipt-json": 512,
    "chart-qa": 96,
    "count": 512,
    "table-html": 6144,
    "flowchart-graph": 2048,
}
"""Most tokens of an answer, by task: enough to spell the truths of `dev` byte by byte, the longest tables excepted."""

_PACKAGES = (
    "jiwer",
    "llguidance",
    "numpy",
    "pillow",
    "rapidfuzz",
    "timm",
    "torch",
    "torchvision",
    "transformers",
    "vlmslice",
)
_PREDICTIONS = "predictions.jsonl"
_OUTPUTS = ("results.json", "results.md", "report.html")


class EvaluationError(RunFolderError):
    """A run cannot begin, or cannot go on with what its folder holds."""


@dataclass(frozen=True)
class EvaluationOptions:
    """How the model is asked.

    Attributes:
        policy: Slicing policy, instead of the model's own.
        max_visual_tokens: Most visual tokens of an image, instead of the model's own.
        max_new_tokens: Most tokens of an answer, instead of those of `MAX_NEW_TOKENS`.
        free_form: Answers that should be JSON are not held to their schema (`ANSWER_SCHEMAS`).
        batch_size: Questions asked at once. No part of what a run is: it changes no answer (see
            `Assistant.ask_batch`).
    """

    policy: str | None = None
    max_visual_tokens: int | None = None
    max_new_tokens: int | None = None
    free_form: bool = False
    batch_size: int = 8

    def token_cap(self, task: str) -> int:
        """Most tokens of an answer to a task."""
        return self.max_new_tokens or MAX_NEW_TOKENS[task]

    def json_schema(self, task: str, question: str) -> dict[str, Any] | None:
        """What the answers to a question are held to; questions of users' own may ask for other fields."""
        if self.free_form or question != DEFAULT_QUESTIONS.get(task):
            return None
        return ANSWER_SCHEMAS.get(task)


def evaluate(
    model: str | Path | None,
    suite: Suite,
    folder: Path,
    *,
    options: EvaluationOptions = EvaluationOptions(),
    peers: Sequence[Peer] = (),
    restart: bool = False,
) -> dict[str, Any]:
    """Asks, scores and reports; returns what `results.json` holds.

    Args:
        model: Folder of a saved model, by default the bundled one.
        suite: See `suites.open_suite`.
        folder: Where everything is written; made if need be.
        options: How the model is asked.
        peers: Engines to score on the OCR rows too.
        restart: Delete what an earlier run left in `folder`, instead of going on with it.

    Raises:
        EvaluationError: `folder` holds another run.
        ModelError: There is no such model.
        ImageError: An image of the suite cannot be loaded.
    """
    start = time.perf_counter()
    if peers and not any(task in OCR_TASKS for task in suite.parts.values()):
        raise EvaluationError(
            f"got the peer {peers[0].name} with the suite {suite.name!r}, which has no task that it can do; expected "
            f"one of {', '.join(OCR_TASKS)}; leave --peer out"
        )
    path = find_model(model)
    settings = describe_run(path, suite, options, peers)
    run = RunFolder(folder, _PREDICTIONS, _OUTPUTS, EvaluationError)
    rows = run.open(settings, len(suite.ids), restart)
    timings: dict[str, float] = {}
    if len(rows) < len(suite.ids):
        loading = time.perf_counter()
        assistant = Assistant.from_pretrained(path)
        timings["load"] = time.perf_counter() - loading
        settings["machine"] |= {"device": str(assistant.model.device), "threads": torch.get_num_threads()}
        write_json(run.manifest, settings)
        with run.rows.open("a", encoding="utf-8") as file:
            for batch in _answer(assistant, suite, len(rows), options, peers):
                file.writelines(to_line(row) for row in batch)
                file.flush()
                rows += batch
    else:
        settings["machine"] = run.read_manifest()["machine"]
    summing = time.perf_counter()
    results = summarize_rows(rows, settings, [peer.name for peer in peers])
    write_json(folder / "results.json", results)
    write_text(folder / "results.md", markdown_table(results))
    timings["summarize"] = time.perf_counter() - summing
    drawing = time.perf_counter()
    write_report(folder / "report.html", results, rows, suite)
    timings["report"] = time.perf_counter() - drawing
    timings["this_sitting"] = time.perf_counter() - start
    write_json(run.manifest, settings | {"seconds": _seconds(rows, timings)})
    return results


def describe_run(
    model: Path, suite: Suite, options: EvaluationOptions, peers: Sequence[Peer]
) -> dict[str, Any]:
    """The manifest of a run: all that decides its answers, and under `machine` where it began."""
    overrides: dict[str, Any] = {"policy": options.policy, "max_visual_tokens": options.max_visual_tokens}
    slicing = replace(
        read_slicing_config(model), **{name: value for name, value in overrides.items() if value is not None}
    )
    tasks = sorted(set(suite.parts.values()))
    return {
        "model": describe_model(model),
        "suite": {
            "name": suite.name,
            "sha256": suite.sha256,
            "num_samples": len(suite.ids),
            "parts": dict(suite.parts),
        },
        "prompt": {
            "default_questions": {
                task: DEFAULT_QUESTIONS[task] for task in tasks if task in DEFAULT_QUESTIONS
            }
        },
        "decoding": {
            "method": "greedy",
            "max_new_tokens": {task: options.token_cap(task) for task in tasks},
            "json_schemas": {
                task: schema
                for task in tasks
                if (schema := options.json_schema(task, DEFAULT_QUESTIONS.get(task, "")))
            },
        },
        "slicing": slicing.to_dict(),
        "peers": {peer.name: peer.version for peer in peers},
        "versions": describe_versions(_PACKAGES),
        "machine": {"platform": platform.platform()},
    }


def _answer(
    assistant: Assistant, suite: Suite, num_done: int, options: EvaluationOptions, peers: Sequence[Peer]
) -> Iterator[list[dict[str, Any]]]:
    """Rows of the samples from `num_done` on, a batch at a time; a batch never mixes parts."""
    # Silent where nobody watches, as in a log.
    with tqdm(total=len(suite.ids), initial=num_done, unit="sample", disable=None) as progress:
        for part, indices in groupby(range(num_done, len(suite.ids)), _part_of(suite)):
            progress.set_description(part)
            for chunk in _chunks(list(indices), options.batch_size):
                samples = [suite[i] for i in chunk]
                answers: list[Answer] = []
                for schema, alike in groupby(samples, _schema_of(options)):
                    answers += assistant.ask_batch(
                        [([sample.image], sample.question) for sample in alike],
                        policy=options.policy,
                        max_visual_tokens=options.max_visual_tokens,
                        max_new_tokens=options.token_cap(suite.parts[part]),
                        json_schema=schema,
                    )
                yield [
                    _build_row(sample, answer, peers) for sample, answer in zip(samples, answers, strict=True)
                ]
                progress.update(len(chunk))


def _part_of(suite: Suite) -> Callable[[int], str]:
    return lambda index: suite.ids[index].rpartition("/")[0]


def _schema_of(options: EvaluationOptions) -> Callable[[Sample], dict[str, Any] | None]:
    return lambda sample: options.json_schema(sample.task, sample.question)


def _chunks(indices: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _build_row(sample: Sample, answer: Answer, peers: Sequence[Peer]) -> dict[str, Any]:
    image, truth = sample.image, sample.truth
    row: dict[str, Any] = {
        "id": sample.id,
        "part": sample.part,
        "task": sample.task,
        "image": sample.source,
        "height": image.height,
        "width": image.width,
        "pixels_sha256": _pixel_digest(image),
        "question": sample.question,
        **asdict(truth),
        "prediction": answer.text,
        "metrics": _row_metrics(sample.task, answer.text, truth),
        "num_visual_tokens": answer.num_visual_tokens,
        "num_new_tokens": answer.num_new_tokens,
        "cut_off": answer.finish_reason != "stop",
    }
    seconds: dict[str, float] = dict(answer.seconds)
    if peers and sample.task in OCR_TASKS:
        row["peers"] = {}
        for peer in peers:
            start = time.perf_counter()
            text = peer.read(image, sample.is_crop)
            seconds[peer.name] = time.perf_counter() - start
            row["peers"][peer.name] = {
                "prediction": text,
                "metrics": _row_metrics(sample.task, text, truth),
            }
    row["seconds"] = {stage: round(value, 4) for stage, value in seconds.items()}
    return row


def _pixel_digest(image: Image.Image) -> str:
    digest = hashlib.sha256(f"{image.height}x{image.width} {image.mode} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def _row_metrics(task: str, prediction: str, truth: Truth) -> dict[str, float | None]:
    """The metrics of one row; those that do not apply are null."""
    return {
        name: round(ratio.numerator / ratio.denominator, 4) if ratio.denominator else None
        for name, ratio in score(task, prediction, truth).items()
    }


def summarize_rows(
    rows: Sequence[dict[str, Any]], settings: dict[str, Any], peers: Sequence[str]
) -> dict[str, Any]:
    """The figures of each part, of the model and of each peer, computed anew from the predictions.

    Args:
        rows: As in `predictions.jsonl`.
        settings: As in `manifest.json`.
        peers: Names of the engines whose readings the OCR rows hold.
    """
    parts: dict[str, Any] = {}
    for part, task in settings["suite"]["parts"].items():
        some = [row for row in rows if row["part"] == part]
        parts[part] = {
            "task": task,
            "num_samples": len(some),
            "num_images": len({row["image"] for row in some}),
            "num_empty": sum(not row["prediction"].strip() for row in some),
            "num_cut_off": sum(row["cut_off"] for row in some),
            "metrics": _figures(task, some, [row["prediction"] for row in some]),
            "peers": {
                peer: _figures(task, some, [row["peers"][peer]["prediction"] for row in some])
                for peer in (peers if task in OCR_TASKS else ())
            },
        }
    asked = [[row["id"], row["pixels_sha256"], row["question"], row["answer"]] for row in rows]
    return {
        "model": {name: settings["model"][name] for name in ("name", "sha256")},
        "suite": {name: settings["suite"][name] for name in ("name", "sha256", "num_samples")},
        "samples_sha256": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "parts": parts,
    }


def _figures(
    task: str, rows: Sequence[dict[str, Any]], predictions: Sequence[str]
) -> dict[str, dict[str, float]]:
    scores: list[dict[str, Ratio]] = [
        score(task, prediction, Truth(row["answer"], row["ignore_case"], row["unordered"]))
        for row, prediction in zip(rows, predictions, strict=True)
    ]
    images = [row["image"] for row in rows]
    figures = {
        metric.name: summarize([of_row[metric.name] for of_row in scores], images)
        for metric in TASK_METRICS[task]
    }
    return {name: asdict(figure) for name, figure in figures.items() if figure is not None}


def _seconds(rows: Sequence[dict[str, Any]], timings: dict[str, float]) -> dict[str, Any]:
    """Seconds of each stage in all, and the median of each part for one sample."""
    totals: dict[str, float] = {}
    by_part: dict[str, list[float]] = {}
    for row in rows:
        for stage, value in row["seconds"].items():
            totals[stage] = totals.get(stage, 0.0) + value
        peers = row.get("peers", {})
        own = sum(value for stage, value in row["seconds"].items() if stage not in peers)
        by_part.setdefault(row["part"], []).append(own)
    return {
        **{stage: round(value, 3) for stage, value in (timings | totals).items()},
        "median_of_a_sample": {part: round(median(values), 4) for part, values in by_part.items()},
    }
