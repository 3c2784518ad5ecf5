"""All rendered tasks by name, three simple ones (read a line, count shapes, read a bar chart), and their mixture.

Every task is a function from a random source and a `TaskConfig` to a `TaskSample`; `TaskDataset` mixes them by weight.
Sample i of a seed is always the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import ImageDraw

from vlmslice.data.charts import chart_question, chart_scene
from vlmslice.data.crowds import count_crowd
from vlmslice.data.flowcharts import read_flowchart
from vlmslice.data.fonts import FontLibrary, load_font
from vlmslice.data.paragraphs import find_line, read_page, read_paragraph, read_place
from vlmslice.data.plots import read_plot
from vlmslice.data.receipts import read_receipt
from vlmslice.data.samples import Mention, Task, TaskConfig, TaskSample, Turn, find_places, reshape
from vlmslice.data.scenes import (
    Scene,
    Shape,
    add_camera_effects,
    draw_line,
    ink_and_paper,
    line_size,
    paper_image,
    sample_rng,
)
from vlmslice.data.screens import read_screen
from vlmslice.data.shapes import KINDS, scatter_shapes, visible_colors
from vlmslice.data.tables import read_table
from vlmslice.data.text import random_words

__all__ = [
    "TASKS", "Curriculum", "Task", "TaskConfig", "TaskDataset", "TaskSample", "count_shapes", "picture_size", "plural",
    "read_chart", "read_line",
]  # fmt: skip

READ_QUESTIONS = (
    "Read the text.",
    "What does the text say?",
    "What is written in the image?",
    "Transcribe the text in this picture.",
    "Which words are shown?",
    "Read this.",
)

COUNT_QUESTIONS = (
    "How many {things} are there?",
    "How many {things} do you see?",
    "Count the {things}.",
    "What is the number of {things} in the image?",
)


def picture_size(rng: random.Random, config: TaskConfig) -> tuple[int, int]:
    """Height and width, even in the logarithm of area and of aspect ratio."""
    low, high = config.megapixels
    area = 1e6 * math.exp(rng.uniform(math.log(low), math.log(high)))
    aspect = math.exp(rng.uniform(-1, 1) * math.log(config.max_aspect))
    return max(32, round(math.sqrt(area / aspect))), max(32, round(math.sqrt(area * aspect)))


def read_line(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> TaskSample:
    """One line of text anywhere on the picture; the answer is the text."""
    words = random_words(rng, rng.randint(*config.num_words), config.split).split()
    while len(words) > 1 and len(" ".join(words)) > config.max_characters:
        words.pop()
    low, high = config.font_px
    size = math.exp(rng.uniform(math.log(low), math.log(high)))
    font = fonts.draw(rng, round(size))
    # What does not fit loses size first and, at the smallest size, words and then letters.
    while True:
        text = " ".join(words)
        line_height, line_width = line_size(font, text)
        room = min(0.96 * width / line_width, 0.96 * height / line_height)
        if room >= 1 or text in (text[:1], ""):
            break
        if size > low:
            size = max(low, min(size * room, size - 1))
            font = load_font(str(font.path), int(size))
        elif len(words) > 1:
            words.pop()
        else:
            words = [text[:-1]]
    ink, paper = ink_and_paper(rng)
    image = paper_image(rng, height, width, paper)
    top = rng.uniform(0, max(0, height - line_height))
    left = rng.uniform(0, max(0, width - line_width))
    glyphs = draw_line(ImageDraw.Draw(image), text, font, top, left, ink)
    scene = Scene(add_camera_effects(rng, image), glyphs)
    return TaskSample("read", scene, rng.choice(READ_QUESTIONS), text, find_places(text, glyphs))


def count_shapes(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> TaskSample:
    """Shapes of one or several kinds and colours; the question asks for all, one kind, one colour, or both."""
    _, paper = ink_and_paper(rng)
    image = paper_image(rng, height, width, paper)
    colors = visible_colors(paper)
    count = rng.randint(1, config.max_count)
    asked_kind, asked_color = rng.choice(KINDS), rng.choice(colors)
    form = rng.choice(("all", "kind", "color", "both"))
    side = min(height, width)
    # The most shapes that may come must fit without a hopeless search: they cover a sixth of the picture at most.
    num_others = 0 if form == "all" else rng.randint(0, 5)
    fitting = math.sqrt(height * width / (6 * math.pi * (count + num_others)))
    largest = min(fitting, side / 4, 160.0)
    smallest = min(max(9.0, 0.012 * side), largest)
    base = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
    radii = (0.8 * base, min(largest, 1.25 * base))
    if form == "all":
        one = rng.random() < 0.5
        wanted = [
            (asked_kind, asked_color) if one else (rng.choice(KINDS), rng.choice(colors))
            for _ in range(count)
        ]
        things = "shapes" if not one or rng.random() < 0.5 else plural(asked_kind)
    elif form == "kind":
        wanted = [(asked_kind, rng.choice(colors)) for _ in range(count)]
        wanted += [(_other(rng, KINDS, asked_kind), rng.choice(colors)) for _ in range(num_others)]
        things = plural(asked_kind)
    elif form == "color":
        wanted = [(rng.choice(KINDS), asked_color) for _ in range(count)]
        wanted += [(rng.choice(KINDS), _other(rng, colors, asked_color)) for _ in range(num_others)]
        things = f"{asked_color} shapes"
    else:
        wanted = [(asked_kind, asked_color)] * count
        for _ in range(num_others):
            same_kind = rng.random() < 0.5
            kind = asked_kind if same_kind else _other(rng, KINDS, asked_kind)
            wanted.append((kind, _other(rng, colors, asked_color) if same_kind else rng.choice(colors)))
        things = f"{asked_color} {plural(asked_kind)}"
    placed = scatter_shapes(rng, image, wanted, radii)
    # A shape that found no room is not there: the answer counts what was drawn.
    centers = [s.center for s in placed if _matches(s.kind, s.color, form, asked_kind, asked_color, things)]
    scene = Scene(add_camera_effects(rng, image), shapes=placed)
    question = rng.choice(COUNT_QUESTIONS).format(things=things)
    first = Turn(
        question, str(len(centers)), points=centers, mentions=_find_mentions(question, things, placed)
    )
    turns = [first]
    if config.max_questions > 1:
        turns += [_ask_count(rng, placed, colors) for _ in range(rng.randrange(config.max_questions))]
        rng.shuffle(turns)
    first, *follow_ups = turns
    return TaskSample(
        "count",
        scene,
        first.question,
        first.answer,
        points=first.points,
        mentions=first.mentions,
        follow_ups=follow_ups,
    )


def _ask_count(rng: random.Random, shapes: Sequence[Shape], colors: Sequence[str]) -> Turn:
    """A question about shapes as they lie; most often about some that are there."""
    kind, color = rng.choice(KINDS), rng.choice(colors)
    if shapes and rng.random() < 0.8:
        kind = rng.choice(shapes).kind
    if shapes and rng.random() < 0.8:
        color = rng.choice(shapes).color
    form = rng.choice(("all", "kind", "kind", "color", "color", "both", "both", "both"))
    things = {
        "all": "shapes",
        "kind": plural(kind),
        "color": f"{color} shapes",
        "both": f"{color} {plural(kind)}",
    }[form]
    centers = [s.center for s in shapes if _matches(s.kind, s.color, form, kind, color, things)]
    question = rng.choice(COUNT_QUESTIONS).format(things=things)
    mentions = _find_mentions(question, things, shapes)
    return Turn(question, str(len(centers)), points=centers, mentions=mentions)


def _find_mentions(question: str, things: str, shapes: Sequence[Shape]) -> list[Mention]:
    """What each word of `things` names: all shapes of a colour, of a kind, or all."""
    mentions = []
    start = question.index(things)
    for word in things.split():
        named = [s.center for s in shapes if word in (s.color, plural(s.kind), "shapes")]
        mentions.append(Mention(start, start + len(word), named))
        start += len(word) + 1
    return mentions


def plural(kind: str) -> str:
    """circle -> circles, cross -> crosses."""
    return kind + ("es" if kind.endswith("s") else "s")


def _other(rng: random.Random, options, taken: str) -> str:
    return rng.choice([o for o in options if o != taken])


def _matches(kind: str, color: str, form: str, asked_kind: str, asked_color: str, things: str) -> bool:
    if form == "all":
        return things == "shapes" or kind == asked_kind
    return (form == "color" or kind == asked_kind) and (form == "kind" or color == asked_color)


def read_chart(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> TaskSample:
    """A bar chart with labelled bars, of an aspect ratio of at most 1.8; see `charts`."""
    height, width = reshape(height, width, (1 / 1.8, 1.8))
    scene, chart = chart_scene(rng, fonts, height, width, config.split)
    question, answer = chart_question(rng, chart)
    return TaskSample("chart", scene, question, answer)


TASKS: dict[str, Task] = {
    "read": read_line,
    "count": count_shapes,
    "chart": read_chart,
    "paragraph": read_paragraph,
    "line": find_line,
    "place": read_place,
    "page": read_page,
    "receipt": read_receipt,
    "screenshot": read_screen,
    "table": read_table,
    "plot": read_plot,
    "crowd": count_crowd,
    "flowchart": read_flowchart,
}
"""Every rendered task by name."""


@dataclass(frozen=True)
class Curriculum:
    """What is drawn up to which sample.

    Attributes:
        until: sample index at which the next step begins.
        config: difficulty.
        weights: task name -> share.
    """

    until: int
    config: TaskConfig
    weights: dict[str, float] = field(default_factory=lambda: {"read": 1.0})


class TaskDataset(Sequence[TaskSample]):
    """Rendered samples that grow harder with the index.

    Batches of `group` consecutive samples share the size of their pictures, hence the slice plan, so that no view is
    padded; receipts, charts and flowcharts alone may be of another shape.
    """

    def __init__(
        self, steps: list[Curriculum], fonts: FontLibrary, seed: int = 0, group: int = 16, name: str = "task"
    ):
        self.steps, self.fonts, self.seed, self.group, self.name = steps, fonts, seed, group, name

    def __len__(self) -> int:
        return self.steps[-1].until

    def __getitem__(self, index: int) -> TaskSample:  # type: ignore[override]  # no slices
        step = next((s for s in self.steps if index < s.until), None)
        if step is None:
            raise IndexError(f"sample {index} of {len(self)}")
        size_rng = sample_rng(self.seed, f"{self.name}-size", index // self.group)
        height, width = picture_size(size_rng, step.config)
        rng = sample_rng(self.seed, self.name, index)
        task = rng.choices(list(step.weights), list(step.weights.values()))[0]
        return TASKS[task](rng, step.config, self.fonts, height, width)
