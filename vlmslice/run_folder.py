"""The folder of a run that asks a model many questions: rows that outlive a kill, beside what made them.

`manifest.json` tells all that decides the rows; a file of rows grows by whole lines. Opened again with the same
manifest, the run goes on behind the last complete row; with another one it is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from vlmslice.errors import VlmSliceError
from vlmslice.model_files import find_weights

_FREE = ("machine", "seconds")  # keys of a manifest that change no row


class RunFolderError(VlmSliceError, ValueError):
    """A folder cannot hold a run, or holds another one."""


class RunFolder:
    """Where a run keeps its manifest and its rows.

    Attributes:
        folder: Made when opened, if need be.
        manifest: Path of `manifest.json`.
        rows: Path of the rows, one JSON object a line.
    """

    def __init__(
        self, folder: Path, rows: str, outputs: Sequence[str], error: type[RunFolderError] = RunFolderError
    ):
        """`rows`: name of their file. `outputs`: names of what else a run writes. `error`: what is raised."""
        self.folder = folder
        self.manifest = folder / "manifest.json"
        self.rows = folder / rows
        self._outputs = outputs
        self._error = error

    def open(self, settings: dict[str, Any], num_rows: int, restart: bool) -> list[dict[str, Any]]:
        """The rows of an earlier run with these settings; none if there was no run, or it got nowhere.

        Args:
            settings: The manifest. `machine` may differ, and is set to that of the earlier run.
            num_rows: Of the whole run.
            restart: Delete what an earlier run left.

        Raises:
            RunFolderError: The folder holds another run, or cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._error(
                f"{str(self.folder)!r} cannot be the folder of a run: {error.strerror}; choose another with --out"
            ) from error
        if restart:
            for path in (self.manifest, self.rows, *(self.folder / name for name in self._outputs)):
                path.unlink(missing_ok=True)
        rows = self._read_rows()
        if not rows:
            write_json(self.manifest, settings)
            return []
        if not self.manifest.exists():
            raise self._error(
                f"{str(self.folder)!r} has {self.rows.stem} without a manifest.json to tell what made them; choose "
                "another folder with --out, or --restart"
            )
        before = self.read_manifest()
        compared = [name for name in settings if name not in _FREE]
        differences = list(
            _differences({k: before.get(k) for k in compared}, {k: settings[k] for k in compared})
        )
        if differences:
            raise self._error(
                f"{str(self.folder)!r} holds another run, which differs in {'; '.join(differences[:4])}"
                f"{f' and {len(differences) - 4} more' if len(differences) > 4 else ''}; choose another folder with "
                "--out, or --restart to delete that run"
            )
        settings["machine"] = before["machine"]
        if len(rows) > num_rows:
            raise self._error(
                f"{str(self.rows)!r} has {len(rows)} rows; expected at most {num_rows}; --restart to begin anew"
            )
        return rows

    def read_manifest(self) -> dict[str, Any]:
        """What `manifest.json` holds."""
        try:
            return json.loads(self.manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise self._error(
                f"{str(self.manifest)!r} is damaged: {error}; --restart to begin anew"
            ) from error

    def _read_rows(self) -> list[dict[str, Any]]:
        """The complete rows; a last line that an interruption cut off is removed from the file."""
        if not self.rows.exists():
            return []
        content = self.rows.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        try:
            rows = [json.loads(line) for line in complete.splitlines()]
        except ValueError as error:
            raise self._error(
                f"{str(self.rows)!r} is damaged: {error}; expected one JSON object a line; --restart to begin anew"
            ) from error
        if complete != content:
            os.truncate(self.rows, len(complete))
        return rows


def describe_model(folder: Path) -> dict[str, Any]:
    """Name and hashes of a saved model, for a manifest.

    Raises:
        ModelError: The folder has no weights.
    """
    from vlmslice.weight_import import file_digest  # imports torch and timm

    find_weights(folder)
    digests = {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
    return {
        "name": folder.resolve().name,
        "sha256": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(),
        "files": digests,
    }


def describe_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of installed packages, for a manifest."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def to_line(fields: dict[str, Any]) -> str:
    """A row as a line of JSON."""
    return json.dumps(fields, ensure_ascii=False) + "\n"


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Writes a file of JSON as a whole or not at all."""
    write_text(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """`suite.sha256 ('ab12...', now 'cd34...')` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name} ({_shorten(before)}, now {_shorten(now)})"


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f'{text[:12]}..."'
