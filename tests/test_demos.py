"""The demos as a user runs them: each on the bundled model, one of them in a process of its own."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from vlmslice.demonstration import ask_and_mark, load_assistant, render_text, run_demo
from vlmslice.inference import Assistant
from vlmslice.marking import mark_edges, mark_fields, mark_table
from vlmslice.model_files import read_slicing_config
from vlmslice.page.server import PageError, import_gradio

DEMOS = Path(__file__).parent.parent / "demos"
SCRIPTS = sorted(path.stem for path in DEMOS.glob("*.py"))


@pytest.fixture(scope="session")
def assistant() -> Assistant:
    return load_assistant(None)


def load_demo(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMOS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_in_process(
    name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", [f"demos/{name}.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        run_demo(load_demo(name).main)
    return exit.value.code, *capsys.readouterr()  # type: ignore[return-value]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_examples(name: str, monkeypatch, capsys) -> None:
    code, out, _ = run_in_process(name, "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert f"python demos/{name}.py" in out


@pytest.mark.parametrize("name", SCRIPTS)
def test_page_about_the_demos_names_each(name: str) -> None:
    assert f"{name}.py" in (DEMOS / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,mark", [("read_receipt", mark_fields), ("chart_table", mark_table), ("flowchart", mark_edges)]
)
def test_rendered_exhibit(name: str, mark: Callable, assistant: Assistant) -> None:
    exhibit = load_demo(name).render()
    answer, marked, drawn = ask_and_mark(assistant, exhibit, mark)
    assert answer == assistant.ask([exhibit.image], exhibit.question, max_new_tokens=512).text
    assert " of " in marked.summary and " right" in marked.summary
    assert drawn.width > exhibit.image.width and len(np.unique(np.asarray(drawn))) > 50


@pytest.mark.slow
def test_long_text(assistant: Assistant) -> None:
    demo = load_demo("long_text")
    image, lines = render_text(None, 22, 400)
    asked = demo.questions(lines[:3])
    assert [truth for _, truth in asked] == ["\n".join(lines[:3]), lines[0], lines[1], lines[2]]
    marked, num_visual_tokens, drawn = demo.show(assistant, image, asked[1:2])
    assert [question for question, _ in marked] == ["Read the first line."]
    assert num_visual_tokens == assistant.processor.image_processor.plan(*image.size[::-1]).num_visual_tokens
    assert drawn.width > image.width


@pytest.mark.slow
def test_where_it_looked_goes_along_the_line(assistant: Assistant) -> None:
    demo = load_demo("where_it_looked")
    image = Image.open(demo.RECEIPT_LINE).convert("RGB")
    attention, drawn = demo.show(assistant, image, demo.QUESTION)
    middles = attention.boxes[:, [1, 3]].mean(axis=1)
    places = [part.weights @ middles / part.weights.sum() for part in attention.parts()]
    assert len(places) == len(attention.answer.split()) >= 2
    assert places == sorted(places)
    assert drawn.height > image.height


def test_counting_test_shows_who_counts_twice(tmp_path: Path, monkeypatch, capsys) -> None:
    arguments = ["--scripted", "double-counter", "--picture", str(tmp_path / "out.png")]
    code, out, err = run_in_process("counting_test", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    counts = dict(line.split(": ") for line in out.splitlines())
    assert "9 at 224 px" in counts["overlap"] and "16 at 480 px" in counts["overlap"]
    assert "13 at 480 px" in counts["overlap_dedup"] and counts["pad"].count("9 at ") == 7
    assert Image.open(tmp_path / "out.png").width > 500


@pytest.mark.slow
def test_counting_test_asks_the_model(assistant: Assistant) -> None:
    demo = load_demo("counting_test")
    results, _ = demo.show(demo.AssistantAnswerer(assistant), policies=["adaptive"], sides=[224])
    [(side, count)] = results["arms"]["adaptive"]["nine_balls"].items()
    assert side == "224" and 6 <= count <= 12


@pytest.mark.slow
def test_as_a_user_runs_it(tmp_path: Path) -> None:
    picture = tmp_path / "receipt.png"
    done = subprocess.run(
        [sys.executable, str(DEMOS / "read_receipt.py"), "--picture", str(picture)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "of 4 fields right" in done.stdout
    assert done.stderr == f"picture written to {picture}\n"
    assert Image.open(picture).width > 500


@pytest.mark.slow
def test_gallery(tmp_path: Path, monkeypatch, capsys) -> None:
    arguments = ["--folder", str(tmp_path), "--only", "slicing_explorer.png"]
    code, _, err = run_in_process("make_gallery", *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["slicing_explorer.png"]
    assert (tmp_path / "slicing_explorer.png").stat().st_size <= 150_000


def test_explorer_draws_a_size_or_an_image(tmp_path: Path, monkeypatch, capsys) -> None:
    Image.new("RGB", (400, 300), (0, 0, 255)).save(tmp_path / "in.png")
    for source in ("400x300", str(tmp_path / "in.png")):
        out = tmp_path / f"{len(source)}.png"
        code, _, err = run_in_process(
            "slicing_explorer", source, "--picture", str(out), monkeypatch=monkeypatch, capsys=capsys
        )
        assert (code, err) == (0, f"picture written to {out}\n")
    first, second = (Image.open(path) for path in sorted(tmp_path.glob("[0-9]*.png")))
    assert first.size == second.size and first != second


@pytest.mark.parametrize(
    "name,arguments,words",
    [
        ("flowchart", ["missing.png"], "missing.png"),
        ("read_receipt", ["--picture", "out.xyz"], "cannot write a picture"),
        ("slicing_explorer", ["0x10", "--picture", "out.png"], "sides of at least 1 px"),
        ("long_text", ["missing.txt"], "cannot be read"),
        ("make_gallery", ["--only", "flowchart.pgn"], "did you mean 'flowchart.png'"),
    ],
)
def test_errors_are_one_line(
    name: str, arguments: list[str], words: str, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run_in_process(name, *arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_explorer_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(PageError, match="pip install --no-deps gradio"):
        load_demo("slicing_explorer").build_page(read_slicing_config(), 300, 400)


@pytest.mark.slow
def test_page_of_the_explorer(tmp_path: Path) -> None:
    gradio = import_gradio()
    page = load_demo("slicing_explorer").build_page(read_slicing_config(), 300, 400)
    functions = {function.fn.__name__: function.fn for function in page.fns.values()}
    Image.new("RGB", (5000, 40), "blue").save(tmp_path / "long.png")
    (tmp_path / "bad.png").write_text("no picture")
    high, wide = functions["take_size"](str(tmp_path / "long.png"), 300, 400)
    assert (high.value, wide.value, wide.maximum) == (40, 5000, 5000)
    assert functions["draw"](40, 5000, 4096, str(tmp_path / "long.png")) != functions["draw"](
        40, 5000, 4096, None
    )
    for name, arguments in (("take_size", (300, 400)), ("draw", (300, 400, 4096))):
        bad = str(tmp_path / "bad.png")
        with pytest.raises(gradio.Error, match="is not recognised"):
            functions[name](*((bad, *arguments) if name == "take_size" else (*arguments, bad)))
