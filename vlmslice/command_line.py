"""What commands share: reading their arguments, printing, and how an application ends.

Answers go to stdout and nothing else does; notes and errors go to stderr. An error of the user is one line and exit
code 2.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from vlmslice.errors import VlmSliceError

if TYPE_CHECKING:
    from PIL import Image


class UserError(VlmSliceError):
    """The arguments cannot be followed."""


def read_size(source: str) -> tuple[int, int]:
    """(height, width) of `WIDTHxHEIGHT` or of an image file."""
    size = re.fullmatch(r"(\d+) ?[xX×] ?(\d+)", source)
    if size:
        return int(size[2]), int(size[1])
    from vlmslice.image_loading import read_image_size

    return read_image_size(sys.stdin.buffer if source == "-" else source)


def picture_paths(path: Path, num_images: int) -> list[Path]:
    """Where the slice pictures go; raises before the model is asked if they cannot go there."""
    from PIL import Image

    Image.init()
    if Image.EXTENSION.get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"cannot write a picture to {str(path)!r}; expected a name such as slices.png")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {str(path.parent)!r} to write {path.name!r} to; make it first")
    if num_images == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{number}") for number in range(1, num_images + 1)]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture; a disk that does not take it is an error of the user."""
    try:
        picture.save(path)
    except OSError as error:
        raise UserError(
            f"cannot write {str(path)!r}: {error.strerror or error}; choose another place"
        ) from error


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows below a header, in columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    # Into a file or a pipe, nothing is folded.
    console = Console(width=None if sys.stdout.isatty() else 10_000, markup=False, highlight=False)
    with console.capture() as drawn:
        console.print(table)
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def print_json(fields: dict[str, Any]) -> None:
    """Prints one object."""
    print(json.dumps(fields, indent=2, ensure_ascii=False))


def print_note(line: str) -> None:
    """Prints a line to stderr, dim on a terminal."""
    from rich.console import Console

    Console(stderr=True).print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def run_application(application: typer.Typer, arguments: list[str], name: str) -> NoReturn:
    """Runs an application and leaves with its exit code; errors of the user become one line."""
    try:
        code = application(args=arguments, prog_name=name, standalone_mode=False)
    except (VlmSliceError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # the reader of the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code or 0)
