"""The runs and stages under a folder, and how far they have come. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from vlmslice.errors import VlmSliceError
from vlmslice.training.checkpoints import last_complete_checkpoint

_log = logging.getLogger(__name__)

_STATE = "trainer_state.json"
_NO_FIGURES = {"epoch", "step", "loss", "samples_per_second", "total_flos", "train_loss"}

_PLAIN = {"grad_norm", "learning_rate", "tokens_per_second", "flops_share"}


class RunsError(VlmSliceError, ValueError):
    """A folder has no runs to tell of."""


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run, as its files tell.

    Attributes:
        run: folder of the run.
        stage: name of the stage.
        step, max_steps: optimizer steps done when the state was last saved, and in all; None before that.
        last_loss, best_loss: of those logged.
        samples_per_second: as last logged.
        figures: all others, as last logged.
        finished: whether the trained model is saved.
        last_activity: when a file of the stage was last written to; the tensorboard log grows with every line.
    """

    run: Path
    stage: str
    step: int | None
    max_steps: int | None
    last_loss: float | None
    best_loss: float | None
    samples_per_second: float | None
    figures: dict[str, float]
    finished: bool
    last_activity: datetime

    def to_dict(self) -> dict[str, Any]:
        """The record, ready for JSON; a figure that is no number becomes None."""
        fields = vars(self) | {"run": str(self.run), "last_activity": self.last_activity.isoformat()}
        fields["figures"] = {name: _finite(value) for name, value in self.figures.items()}
        return {k: _finite(v) if isinstance(v, float) else v for k, v in fields.items()}


def find_runs(folder: Path) -> list[StageRecord]:
    """Every stage under `folder`, runs by name, the stages of a run in the order in which they began.

    `folder` may hold many runs, be the folder of one, or of one stage.

    Raises:
        RunsError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise RunsError(
            f"{str(folder)!r} is no folder; give one that holds runs, as train.py --output-dir made them"
        )
    records = [(_read_stage(path), _began(path)) for path in sorted(set(_stage_folders(folder.resolve())))]
    if not records:
        raise RunsError(
            f"no run lies under {str(folder)!r}; expected folders with a {_STATE} or a tensorboard log, as train.py "
            "makes them"
        )
    return [record for record, _ in sorted(records, key=lambda pair: (str(pair[0].run), pair[1]))]


def _stage_folders(folder: Path) -> Iterator[Path]:
    # Unlike `rglob`, `walk` does not mind when a run deletes a checkpoint meanwhile.
    for parent, folders, files in os.walk(folder):
        path = Path(parent)
        folders[:] = [name for name in folders if name not in ("incomplete", "final")]
        if _STATE in files:
            yield path.parent if path.name.startswith("checkpoint-") else path
        # STAGE/runs/DATE_HOST/events.out.tfevents.*
        if path.parent.name == "runs" and any(name.startswith("events.out.tfevents.") for name in files):
            yield path.parents[1]


def _read_stage(folder: Path) -> StageRecord:
    state = _last_state(folder)
    history = state.get("log_history", [])
    losses = [entry["loss"] for entry in history if "loss" in entry]
    figures: dict[str, float] = {}
    for entry in history:
        figures |= {k: v for k, v in entry.items() if isinstance(v, int | float)}
    return StageRecord(
        run=folder.parent,
        stage=folder.name,
        step=state.get("global_step"),
        max_steps=state.get("max_steps"),
        last_loss=losses[-1] if losses else None,
        best_loss=min((loss for loss in losses if math.isfinite(loss)), default=None),
        samples_per_second=figures.get("samples_per_second"),
        figures={k: v for k, v in figures.items() if k not in _NO_FIGURES},
        finished=(folder / "final").is_dir(),
        last_activity=datetime.fromtimestamp(max(_times(folder))).astimezone(),
    )


def _last_state(folder: Path) -> dict[str, Any]:
    """The Trainer's state at its furthest step: of the stage, written at its end, or of the newest whole checkpoint.

    A stage that was begun anew in the same folder may have a state that is older than its checkpoints.
    """
    checkpoint = last_complete_checkpoint(folder)
    states = []
    for path in [folder / _STATE, *([checkpoint / _STATE] if checkpoint else [])]:
        with contextlib.suppress(FileNotFoundError):
            try:
                states.append(json.loads(path.read_text(encoding="utf-8")))
            except json.JSONDecodeError:
                _log.warning("passing over %s: it is cut off", path)
    return max(states, key=lambda state: state["global_step"], default={})


def _times(folder: Path) -> Iterator[float]:
    """When files of the stage were written, those of a checkpoint excepted, which its folder's time stands for."""
    yield folder.stat().st_mtime
    for pattern in ("*", "runs/*/*"):
        for path in folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # dropped meanwhile
                yield path.stat().st_mtime


def _began(folder: Path) -> tuple[float, int]:
    """The time in the name of the first tensorboard log; without a log, that of the oldest file.

    The names are `events.out.tfevents.TIME.HOST.PROCESS.NUMBER`. TIME is in whole seconds, in which two small stages
    may begin; NUMBER counts the logs of a process.
    """
    parts = [path.name.split(".") for path in folder.glob("runs/*/events.out.tfevents.*")]
    return min([(float(part[3]), int(part[-1])) for part in parts] or [(min(_times(folder)), 0)])


def run_lines(records: list[StageRecord], now: datetime) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table of stages for people; the name of a run stands in the first of its lines."""
    header = ["run", "stage", "steps", "loss", "best", "samples/s", "state", "last activity", "figures"]
    lines = []
    before = None
    for record in records:
        figures = {k: v for k, v in record.figures.items() if k not in _PLAIN and not k.startswith("train_")}
        lines.append(
            [
                _short(record.run) if record.run != before else "",
                record.stage,
                "-" if record.step is None else f"{record.step:,} / {record.max_steps:,}",
                *(_number(x) for x in (record.last_loss, record.best_loss, record.samples_per_second)),
                "finished" if record.finished else "not finished",
                _ago((now - record.last_activity).total_seconds()),
                "  ".join(f"{name} {_number(value)}" for name, value in figures.items() if "/" not in name),
            ]
        )
        before = record.run
    return header, lines


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None
