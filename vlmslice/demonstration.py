"""What the scripts in `demos/` share: rendered pictures whose truth is known, and how a script runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from vlmslice.command_line import picture_paths, run_application, save_picture
from vlmslice.errors import VlmSliceError

if TYPE_CHECKING:
    from PIL import Image, ImageFont

    from vlmslice.data.fonts import FontLibrary
    from vlmslice.inference import Assistant
    from vlmslice.marking import Marked

_MOST_TRIES, _FRAME_MS = 200, 700
_NUM_SENTENCES = 6

ImageArgument = Annotated[
    Path | None, typer.Argument(metavar="[IMAGE]", help="An image file.  [default: one is rendered]")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Each seed renders another picture.")]
ModelOption = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Folder of a saved model.  [default: the bundled one]")
]
PictureOption = Annotated[Path, typer.Option(metavar="OUT.png", help="Where the picture goes.")]


class DemonstrationError(VlmSliceError, ValueError):
    """A demo cannot be shown as asked."""


@dataclass(frozen=True)
class Exhibit:
    """A picture to ask about.

    Attributes:
        image: The picture.
        question: What to ask.
        truth: The answer; None if it is not known.
    """

    image: Image.Image
    question: str
    truth: str | None = None


def render_exhibit(
    task: str,
    questions: Collection[str],
    height: int,
    width: int,
    *,
    seed: int = 0,
    num_lines: tuple[int, int] = (4, 7),
    max_answer: int = 300,
) -> Exhibit:
    """A rendered picture as training has them, in words and a font held out from it, the same on every machine.

    Args:
        task: Key of `data.tasks.TASKS`.
        questions: The question is one of these.
        height: Of the picture, px; the task may keep the area and choose another shape.
        width: Likewise.
        seed: Each gives another picture.
        num_lines: See `data.samples.TaskConfig`.
        max_answer: Likewise.

    Raises:
        DemonstrationError: There are no fonts, or the task does not ask such questions.
    """
    from vlmslice.data.samples import TaskConfig
    from vlmslice.data.scenes import sample_rng
    from vlmslice.data.tasks import TASKS

    config = TaskConfig(
        num_lines=num_lines, max_answer=max_answer, max_questions=8, split="eval", accents=0.0, photo=0.0,
        matplotlib=0.0,
        vega=0.0,
    )  # fmt: skip
    fonts = demonstration_fonts()
    for number in range(_MOST_TRIES):
        rng = sample_rng(seed, f"demonstration-{task}", number)
        sample = TASKS[task](rng, config, fonts, height, width)
        for turn in sample.turns:
            if turn.question in questions:
                return Exhibit(sample.scene.image, turn.question, turn.answer)
    raise DemonstrationError(
        f"the task {task!r} asked none of {sorted(questions)} in {_MOST_TRIES} pictures; expected some of its own"
    )


def render_text(
    source: Path | None, font_px: int, width: int, seed: int = 0
) -> tuple[Image.Image, list[str]]:
    """A text as an image, dark on light, and its lines as they are broken there.

    Args:
        source: A UTF-8 file, whose line breaks count as spaces; by default sentences of words held out from training.
        font_px: Size of the font, px per em.
        width: Of the image, px; a longer word is cut.
        seed: For the sentences.

    Raises:
        DemonstrationError: The file cannot be read or is empty, or there are no fonts.
    """
    from vlmslice.data.fonts import load_font, spell
    from vlmslice.data.phrases import Phrases
    from vlmslice.data.scenes import Scene, paper_image, sample_rng
    from vlmslice.data.typesetting import Pen, line_height

    rng = sample_rng(seed, "demonstration-text", 0)
    font = load_font(str(_font_dir() / "DejaVuSerif.ttf"), font_px)
    if source is None:
        phrases = Phrases(rng, "eval")
        tokens = [token for _ in range(_NUM_SENTENCES) for token in phrases.sentence()]
    else:
        tokens = [spell(token, font) for token in _read_text(source).split()]
    margin, step = font_px, round(1.3 * line_height(font))
    lines = _break_lines(tokens, font, width - 2 * margin)
    scene = Scene(paper_image(rng, len(lines) * step + 2 * margin, width, (250, 250, 247)))
    pen = Pen(scene, (30, 30, 34))
    for number, line in enumerate(lines):
        pen.write(line, font, margin + number * step, margin)
    return scene.image, lines


def _read_text(source: Path) -> str:
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DemonstrationError(
            f"{str(source)!r} cannot be read: {reason}; expected a UTF-8 text file"
        ) from error
    if not text.strip():
        raise DemonstrationError(f"{str(source)!r} is empty; expected some words")
    return text


def _break_lines(tokens: Sequence[str], font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    from vlmslice.data.typesetting import cut

    lines = [""]
    for token in tokens:
        longer = f"{lines[-1]} {token}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(cut(token, font, width))
    return [line for line in lines if line]


def demonstration_fonts() -> FontLibrary:
    """The held-out fonts that matplotlib carries, so that pictures do not depend on the fonts of a machine.

    Raises:
        DemonstrationError: matplotlib is not installed.
    """
    from vlmslice.data.fonts import FontLibrary

    return FontLibrary("eval", [_font_dir()])


def _font_dir() -> Path:
    from vlmslice.data.fonts import matplotlib_font_dir

    folder = matplotlib_font_dir()
    if folder is None:
        raise DemonstrationError(
            "the pictures of the demos are rendered in the fonts of matplotlib, which is not installed; "
            "pip install matplotlib, or give an image of your own"
        )
    return folder


def open_exhibit(image: Path | None, question: str, render: Callable[[], Exhibit]) -> Exhibit:
    """A user's image, whose truth is not known, or else a rendered picture.

    Raises:
        ImageError: The image cannot be loaded.
    """
    if image is None:
        return render()
    from vlmslice.image_loading import load_image

    return Exhibit(load_image(image), question)


def load_assistant(model: str | None) -> Assistant:
    """The model of a folder, by default the bundled one, without a bar for its progress."""
    from transformers.utils.logging import disable_progress_bar

    from vlmslice.inference import Assistant

    disable_progress_bar()
    return Assistant.from_pretrained(model)


def ask_and_mark(
    assistant: Assistant,
    exhibit: Exhibit,
    mark: Callable[[str, str | None], Marked],
    json_schema: dict[str, Any] | None = None,
) -> tuple[str, Marked, Image.Image]:
    """The answer about an exhibit, its marks, and the picture of both.

    `mark`: compares an answer with its truth, see `marking`. `json_schema`: what the answer is held to.
    """
    from vlmslice.answer_sheet import draw_answer_sheet

    answer = assistant.ask(
        [exhibit.image], exhibit.question, max_new_tokens=512, json_schema=json_schema
    ).text
    marked = mark(answer, exhibit.truth)
    return answer, marked, draw_answer_sheet(exhibit.image, [(exhibit.question, marked)])


def show_exhibit(
    image: Path | None,
    question: str,
    render: Callable[[], Exhibit],
    mark: Callable[[str, str | None], Marked],
    picture: Path,
    model: str | None,
    json_schema: dict[str, Any] | None = None,
) -> None:
    """Asks about an image file or a rendered exhibit, prints the answer and how right it is, and draws both.

    Args:
        image: The file, if there is one.
        question: What to ask about it.
        render: Renders the exhibit instead.
        mark: Compares an answer with its truth, see `marking`.
        picture: Where the picture goes.
        model: Folder of a saved model, by default the bundled one.
        json_schema: What the answer is held to.
    """
    check_picture(picture)
    exhibit = open_exhibit(image, question, render)
    answer, marked, drawn = ask_and_mark(load_assistant(model), exhibit, mark, json_schema)
    print(answer)
    print(marked.summary)
    hand_over(drawn, picture)


def check_picture(path: Path) -> Path:
    """`path`, in a folder that exists from now on; raises before the model is asked if no picture can go there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    [path] = picture_paths(path, 1)
    return path


def hand_over(picture: Image.Image | list[Image.Image], path: Path) -> None:
    """Writes a picture, or several as an animation, and tells where it is."""
    if isinstance(picture, list):
        first, *others = picture
        first.save(path, save_all=True, append_images=others, duration=_FRAME_MS, loop=0)
    else:
        save_picture(picture, path)
    print(f"picture written to {path}", file=sys.stderr)


def shrink_picture(path: Path, max_bytes: int = 150_000, max_width: int = 1200) -> None:
    """Writes a PNG again, no wider and larger than allowed: in all its colours if these fit, else in a palette."""
    from PIL import Image

    picture = Image.open(path).convert("RGB")
    width = min(picture.width, max_width)
    while True:
        size = (width, max(round(picture.height * width / picture.width), 1))
        # Hamming has no rings beside sharp edges.
        small = picture.resize(size, Image.Resampling.HAMMING) if size != picture.size else picture
        for version in (small, small.quantize(256, dither=Image.Dither.NONE)):
            version.save(path, optimize=True)
            if path.stat().st_size <= max_bytes:
                return
        width = round(0.85 * width)


def run_demo(command: Callable[..., None]) -> NoReturn:
    """Runs a script with the arguments of its process; errors of the user become one line and exit code 2."""
    # Threads that spin while they wait slow everything else on the machine; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    application = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
    )
    application.command(context_settings={"help_option_names": ["-h", "--help"]})(command)
    run_application(application, sys.argv[1:], f"python {sys.argv[0]}")
