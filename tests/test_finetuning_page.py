"""The commands of docs/finetuning.md, run from top to bottom in a folder of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlmslice.model_files import BUNDLED_MODEL

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(command: list[str] | str, folder: Path) -> str:
    """What a command prints to stdout."""
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        command, shell=isinstance(command, str), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    not (BUNDLED_MODEL / "model.safetensors").exists(), reason="the bundled model is not in this checkout"
)
def test_page_from_top_to_bottom(tmp_path: Path) -> None:
    """A model that learnt nothing would answer as before, and the answers of the page differ before and after."""
    (tmp_path / "train").symlink_to(ROOT / "train")
    languages = []
    for language, text in BLOCKS:
        languages.append(language)
        if language == "python":
            last = run([sys.executable, "-c", text], tmp_path)
        elif language == "sh":
            run(text, tmp_path)
        elif language == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                assert run(command, tmp_path) == output
    assert languages == ["json", "python", "console", "sh", "sh", "console", "python"]
    assert last == "Salt: 6.40 euros\n"
