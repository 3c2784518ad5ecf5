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

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vlmslice.errors import VlmSliceError

MANIFEST = "manifest.json"

_log = logging.getLogger(__name__)


class CheckpointError(VlmSliceError, OSError):
    """A checkpoint or model cannot be written: the disk is full, or the folder read-only."""


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns whatever a writer of `target` raises when the disk refuses into a `CheckpointError`.

    What is half written, in `incomplete/` beside it, is dropped; so is not what bears a name already.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's writer of archives raises RuntimeErrors, as do errors that have nothing to do with files.
        is_refused = not isinstance(error, RuntimeError) or "inline_container" in str(error)
        if not is_refused or isinstance(error, VlmSliceError):
            raise
        shutil.rmtree(target.parent / "incomplete", ignore_errors=True)
        raise CheckpointError(
            f"{target} cannot be written: {_first_line(error)} ({_free_space(target.parent)}); checkpoints that are "
            "there already are whole; make room or mend the folder, and give the same command again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _free_space(folder: Path) -> str:
    while not folder.is_dir():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free in {folder}"


def seal_checkpoint(folder: Path, layout: dict[str, int]) -> None:
    """Flushes all files of `folder` to the disk, and then a manifest: their sizes, SHA-256, the optimizer's layout."""
    sizes, digests = {}, {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _flush(path)
        name = str(path.relative_to(folder))
        sizes[name], digests[name] = path.stat().st_size, _digest(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"layout": layout, "files": sizes, "sha256": digests}, indent=1) + "\n")
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
    """The newest of `complete_checkpoints` whose files are, bit for bit, those that were written; or None.

    Only here are the files read and hashed: what rots or is changed on the disk keeps its size.
    """
    for path in reversed(complete_checkpoints(folder)):
        problem = _find_changed_file(path)
        if problem is None:
            return path
        _log.warning("passing over %s: %s", path, problem)
    return None


def _find_changed_file(checkpoint: Path) -> str | None:
    # Those written before there were digests are known by their sizes alone.
    digests = json.loads((checkpoint / MANIFEST).read_text()).get("sha256", {})
    for name, digest in digests.items():
        if _digest(checkpoint / name) != digest:
            return f"{name} is not what was written: its SHA-256 differs"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_problem(checkpoint: Path) -> str | None:
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (FileNotFoundError, NotADirectoryError):
        return f"it has no {MANIFEST}"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
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
