"""Folders of checkpoints and models that are whole, or do not bear their name.

A run folder::

    RUN/STAGE/checkpoint-500/     weights, optimizer, schedule, random states; manifest.json lists every file
    RUN/STAGE/incomplete/         a checkpoint or model being written; worthless after a kill
    RUN/STAGE/runs/               tensorboard
    RUN/STAGE/trainer_state.json  all logged figures
    RUN/STAGE/final/              the trained model, as `Stage.save` writes it

Checkpoints and the final model are written aside, flushed to the disk and renamed into place, so a folder either bears
its name and is whole, or does not bear it. (The Trainer itself writes in place, and then fails on what a kill leaves.)
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

MANIFEST = "manifest.json"

_log = logging.getLogger(__name__)


def seal_checkpoint(folder: Path, layout: dict[str, int]) -> None:
    """Flushes all files of `folder` to the disk, and then a manifest with their sizes and the optimizer's layout."""
    sizes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _flush(path)
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"layout": layout, "files": sizes}, indent=1) + "\n")
    _flush(manifest)
    _flush(folder)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Every `checkpoint-N` in `folder` whose manifest and files are whole, oldest first.

    Others are left where they are and named in a warning: a copy that broke off, or another program's.
    """
    complete = []
    for path in folder.glob("checkpoint-*"):
        problem = _find_problem(path)
        if problem:
            _log.warning("passing over %s: %s", path, problem)
        else:
            complete.append(path)
    return sorted(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest of `complete_checkpoints`, or None."""
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def _find_problem(checkpoint: Path) -> str | None:
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (json.JSONDecodeError, KeyError):
        return f"its {MANIFEST} is cut off"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(aside: Path, target: Path) -> None:
    """Renames a finished folder into place; what bears the name is dropped."""
    if target.exists():
        discard(target)
    aside.rename(target)
    _flush(target.parent)


def discard(path: Path) -> None:
    """Deletes a folder in two steps, so that a kill never leaves half of it under its name."""
    aside = path.parent / "incomplete" / f"old-{path.name}"
    aside.parent.mkdir(exist_ok=True)
    path.rename(aside)
    shutil.rmtree(aside)
