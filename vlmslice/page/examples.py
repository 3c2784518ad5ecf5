"""Examples for the page, drawn in code: the same on every machine, and nothing to install beside the package."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from vlmslice.data.fonts import FontLibrary, matplotlib_font_dir
from vlmslice.data.nine_balls import draw_nine_balls
from vlmslice.data.samples import TaskConfig
from vlmslice.data.tasks import TASKS

_CONFIG = TaskConfig(num_words=(3, 5), max_characters=40, photo=0, accents=0, split="eval")

_RENDERED = (  # name, task, seed, height and width in px
    ("Shapes", "count", 4, 480, 720),
    ("Line", "read", 13, 200, 900),
    ("Strip", "read", 11, 96, 1600),
    ("Paragraph", "paragraph", 8, 360, 560),
)


@dataclass(frozen=True)
class Example:
    """A picture and a question that fits it."""

    name: str
    image: Image.Image
    question: str


def draw_examples() -> list[Example]:
    """Pictures of what the bundled model was trained on, in shapes that show what slicing does.

    All but the first are drawn with the fonts that matplotlib brings; without it there is only that one.
    """
    examples = [Example("Nine balls", draw_nine_balls(448), "How many shapes are there?")]
    folder = matplotlib_font_dir()
    if folder is not None:
        fonts = FontLibrary("eval", [folder])
        for name, task, seed, height, width in _RENDERED:
            sample = TASKS[task](random.Random(seed), _CONFIG, fonts, height, width)
            examples.append(Example(name, sample.scene.image, sample.question))
    return examples
