"""The README's commands run, and print what it shows."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlmslice.model_files import BUNDLED_MODEL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# The bundled model is trained by the recipe `nano` and then copied there.
HAS_MODEL = (BUNDLED_MODEL / "model.safetensors").exists()


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def sessions() -> list[tuple[str, str]]:
    """(command, output) of every `$` line of the console blocks."""
    found = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


def shell_lines() -> list[str]:
    return [line.partition("  #")[0].strip() for block in blocks("sh") for line in block.splitlines() if line]


def run(command: str) -> subprocess.CompletedProcess[str]:
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def mask_times(text: str) -> str:
    return re.sub(r"\d+\.\d+ s\b", "# s", text)


def needs_model(command: str) -> bool:
    return "vlmslice ask" in command or "vlmslice doctor" in command


@pytest.mark.parametrize("command,output", sessions())
def test_console_output(command: str, output: str) -> None:
    if needs_model(command) and not HAS_MODEL:
        pytest.skip("the bundled model is not in this checkout")
    done = run(command)
    assert done.returncode == 0, done.stdout
    assert mask_times(done.stdout) == mask_times(output)


@pytest.mark.parametrize("command", [line for line in shell_lines() if "vlmslice " in line])
def test_vlmslice_commands(command: str) -> None:
    if needs_model(command) and not HAS_MODEL:
        pytest.skip("the bundled model is not in this checkout")
    done = run(command)
    assert done.returncode == 0, done.stdout


def test_make_targets() -> None:
    """These two cannot be run from within one of them."""
    targets = [line.split()[1] for line in shell_lines() if line.startswith("make ")]
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in targets)
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_demo_prints_what_the_readme_shows() -> None:
    """`make demo` runs the command of the README's first `vlmslice ask`, and draws its slices."""
    (demo,) = re.findall(r"vlmslice ask .*", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert any(demo.startswith(line) for line in [*shell_lines(), *(command for command, _ in sessions())])


def test_python_sessions() -> None:
    parser = doctest.DocTestParser()
    text = "\n".join(blocks("pycon"))
    result = doctest.DocTestRunner().run(parser.get_doctest(text, {}, "README", None, 0))
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.skipif(not HAS_MODEL, reason="the bundled model is not in this checkout")
def test_python_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})  # noqa: S102  # our own README


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "demos/images/README.md"]
)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


def test_every_demo_image_is_attributed() -> None:
    attributions = (ROOT / "demos" / "images" / "README.md").read_text(encoding="utf-8")
    images = [path for path in (ROOT / "demos" / "images").iterdir() if path.suffix in (".png", ".jpg")]
    assert images and all(f"`{path.name}`" in attributions for path in images)
