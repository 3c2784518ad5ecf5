"""A model before and after: size, seconds, and what it gets right on a few rendered pictures."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from vlmslice.evaluation import EvaluationOptions, evaluate
from vlmslice.evaluation_report import result_lines
from vlmslice.inference import Assistant
from vlmslice.model_files import find_weights
from vlmslice.suites import open_suite

_CHECKED = ("read", "count")
_NUM_LOADS = 3


@dataclass(frozen=True)
class Measurement:
    """What a saved model costs and what it can do.

    Attributes:
        num_parameters: Without the scales of int8 matrices.
        file_bytes: Of its weights on the disk.
        memory_bytes: Of its weights once loaded.
        load_seconds: The quickest of three loads.
        answer_seconds: Median of a picture, by part of the suite; `{}` without a check.
        figures: Samples, metric and figure with its 95 % interval, by part and metric; `{}` without a check.
    """

    num_parameters: int
    file_bytes: int
    memory_bytes: int
    load_seconds: float
    answer_seconds: dict[str, float]
    figures: dict[tuple[str, str], tuple[str, str]]


def measure(folder: Path, num_check: int) -> Measurement:
    """Measures a saved model.

    Args:
        folder: Of the model.
        num_check: Lines to read, and as many pictures to count in, from the suite `synthetic`; 0 asks nothing.

    Raises:
        SuiteError: There are no fonts to render the suite with.
        ModelError: There is no such model.
    """
    seconds = []
    for _ in range(_NUM_LOADS):
        start = time.perf_counter()
        model = Assistant.from_pretrained(folder).model
        seconds.append(time.perf_counter() - start)
    weights = dict(model.named_parameters())
    answer_seconds: dict[str, float] = {}
    figures: dict[tuple[str, str], tuple[str, str]] = {}
    if num_check:
        with tempfile.TemporaryDirectory() as run:
            results = evaluate(
                folder,
                open_suite("synthetic", limit=num_check, parts=_CHECKED),
                Path(run),
                options=EvaluationOptions(batch_size=1),
            )
            manifest = json.loads((Path(run) / "manifest.json").read_text(encoding="utf-8"))
        answer_seconds = manifest["seconds"]["median_of_a_sample"]
        for part, num_samples, metric, figure in result_lines(results)[1]:
            figures[part, metric] = (num_samples, figure)
    return Measurement(
        num_parameters=sum(p.numel() for name, p in weights.items() if not name.endswith(".weight_scale")),
        file_bytes=sum(path.stat().st_size for path in find_weights(folder)),
        memory_bytes=sum(p.numel() * p.element_size() for p in weights.values()),
        load_seconds=min(seconds),
        answer_seconds=answer_seconds,
        figures=figures,
    )


def comparison_rows(before: Measurement, after: Measurement) -> list[tuple[str, str, str]]:
    """Rows of a table: what, before, after."""
    rows = [
        ("parameters", f"{before.num_parameters / 1e6:.2f}M", f"{after.num_parameters / 1e6:.2f}M"),
        ("weights on disk", f"{before.file_bytes / 1e6:.1f} MB", f"{after.file_bytes / 1e6:.1f} MB"),
        ("weights in memory", f"{before.memory_bytes / 1e6:.1f} MB", f"{after.memory_bytes / 1e6:.1f} MB"),
        ("load", f"{before.load_seconds:.2f} s", f"{after.load_seconds:.2f} s"),
    ]
    rows += [
        (f"{part}: median answer", f"{seconds:.2f} s", f"{after.answer_seconds[part]:.2f} s")
        for part, seconds in before.answer_seconds.items()
    ]
    rows += [
        (f"{part}: {metric} of {num_samples}", figure, after.figures[part, metric][1])
        for (part, metric), (num_samples, figure) in before.figures.items()
    ]
    return rows
