"""Run every demo, and keep its picture, small, in docs/images/gallery."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from vlmslice.demonstration import DemonstrationError, ModelOption, run_demo, shrink_picture
from vlmslice.errors import suggestion

DEMOS = Path(__file__).parent
GALLERY = {
    "counting_test.png": ["counting_test.py"],
    "slicing_explorer.png": ["slicing_explorer.py", "800x600", "--max-visual-tokens", "8192"],
    "slicing_explorer_strip.png": ["slicing_explorer.py", "2400x300"],
    "read_receipt.png": ["read_receipt.py"],
    "chart_table.png": ["chart_table.py"],
    "long_text.png": ["long_text.py"],
    "flowchart.png": ["flowchart.py"],
    "where_it_looked.png": ["where_it_looked.py"],
    "where_it_counted.png": [
        "where_it_looked.py",
        str(DEMOS / "images" / "shapes.png"),
        "How many red shapes are there?",
    ],
}
"""Script and arguments of each picture."""


def main(
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = DEMOS.parent
    / "docs/images/gallery",
    only: Annotated[
        list[str] | None, typer.Option(metavar="PICTURE", help="This picture only; repeatable.")
    ] = None,
    model: ModelOption = None,
) -> None:
    """Run every demo, and keep its picture, of at most 150 KB, for the gallery.

    - `python demos/make_gallery.py`
    - `python demos/make_gallery.py --folder /tmp/gallery --only flowchart.png`
    """
    for name in only or ():
        if name not in GALLERY:
            raise DemonstrationError(
                f"there is no picture {name!r}; expected one of {', '.join(GALLERY)}{suggestion(name, GALLERY)}"
            )
    for name, (script, *arguments) in GALLERY.items():
        if only and name not in only:
            continue
        print(f"# {name}", flush=True)
        path = folder / name
        options = ["--picture", str(path), *(["--model", model] if model else [])]
        subprocess.run([sys.executable, str(DEMOS / script), *arguments, *options], check=True)
        shrink_picture(path)


if __name__ == "__main__":
    run_demo(main)
