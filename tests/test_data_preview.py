import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vlmslice.data.fonts import FontLibrary, matplotlib_font_dir
from vlmslice.data.preview import UnknownTaskError, contact_sheet, draw_samples, measure_speed, with_boxes
from vlmslice.data.samples import TaskConfig
from vlmslice.data.scenes import Glyph, Scene

ROOT = Path(__file__).parents[1]
CONFIG = TaskConfig(megapixels=(0.02, 0.05), matplotlib=0, vega=0)


def fonts() -> FontLibrary:
    return FontLibrary("eval", [matplotlib_font_dir()])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which also tells on stderr if it loaded torch."""
    code = (
        "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
        "from vlmslice_command import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "data", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_preview_as_a_user_runs_it(tmp_path):
    done = run(
        "preview",
        "--task",
        "receipt",
        "--task",
        "table",
        "-o",
        f"{tmp_path}/sheet.png",
        "--num",
        "2",
        "--boxes",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "4 samples drawn to" in done.stderr and done.stderr.endswith("False\n")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 4 * 320 + 50 and sheet.height > 200


def test_speed_as_a_user_runs_it():
    done = run("speed", "--task", "crowd", "--num", "3", "--megapixels", "0.02", "0.02")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"task +samples/s +ms/sample +megapixels\ncrowd +\d+ +[\d.]+ +0\.02\n", done.stdout)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("preview", "--task", "recipt", "-o", "x.png"), r"no task 'recipt'; .* did you mean 'receipt'\?"),
        (("preview", "-o", "x.doc"), "cannot write a picture to 'x.doc'"),
        (
            ("preview", "--data-root", ".", "--task", "receipt-pages", "-o", "x.png"),
            r"no set 'receipt-pages'.*did you mean 'receipt-page'",
        ),
        (("speed", "--split", "test"), "--split is 'test'.*expected train or eval"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert re.search(rf"^error: .*{message}", done.stderr) and done.stdout == ""


def test_sheet_holds_every_sample():
    samples = [*draw_samples("paragraph", 3, CONFIG, fonts()), *draw_samples("crowd", 2, CONFIG, fonts())]
    sheet = contact_sheet(samples, columns=2, tile=150)
    assert sheet.width == 2 * 150 + 30
    assert sheet.height > contact_sheet(samples[:2], columns=2, tile=150).height


def test_boxes_are_drawn():
    scene = Scene(Image.new("RGB", (50, 40), "white"), [Glyph("a", (10, 20, 30, 35))])
    drawn = with_boxes(scene)
    assert drawn.getpixel((20, 15)) == drawn.getpixel((27, 10)) == (230, 60, 60)
    assert scene.image.getpixel((20, 15)) == (255, 255, 255)


def test_speed_is_measured():
    rate, area = measure_speed("crowd", CONFIG, fonts(), 3)
    assert rate > 1 and 0.019 < area < 0.051


def test_unknown_task():
    with pytest.raises(
        UnknownTaskError, match=r"there is no task 'plots'; expected one of .*; did you mean 'plot'\?"
    ):
        draw_samples("plots", 1, CONFIG, fonts())
