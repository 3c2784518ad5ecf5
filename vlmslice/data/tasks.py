"""All rendered tasks by name, the simplest of them (read a line), and their mixture.

Every task is a function from a random source and a `TaskConfig` to a `TaskSample`; `TaskDataset` mixes them by weight.
Sample i of a seed is always the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import ImageDraw

from vlmslice.data.answer_places import locate_answer
from vlmslice.data.blood_cells import count_blood_cells
from vlmslice.data.counting import count_shapes
from vlmslice.data.crowds import count_crowd
from vlmslice.data.flowcharts import read_flowchart
from vlmslice.data.fonts import FontLibrary, load_font
from vlmslice.data.paragraphs import find_line, read_page, read_paragraph, read_place
from vlmslice.data.plots import read_plot
from vlmslice.data.receipts import read_receipt
from vlmslice.data.samples import READ_QUESTIONS, Task, TaskConfig, TaskSample, Turn, find_places
from vlmslice.data.scenes import (
    Scene,
    add_camera_effects,
    draw_line,
    ink_and_paper,
    line_size,
    paper_image,
    sample_rng,
)
from vlmslice.data.screens import read_screen
from vlmslice.data.tables import read_table
from vlmslice.data.text import random_words

__all__ = [
    "TASKS", "Curriculum", "Task", "TaskConfig", "TaskDataset", "TaskSample", "picture_size", "read_line",
]  # fmt: skip


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


TASKS: dict[str, Task] = {
    "read": read_line,
    "count": count_shapes,
    "paragraph": read_paragraph,
    "line": find_line,
    "place": read_place,
    "page": read_page,
    "receipt": read_receipt,
    "screenshot": read_screen,
    "table": read_table,
    "plot": read_plot,
    "crowd": count_crowd,
    "cells": count_blood_cells,
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
        sample = TASKS[task](rng, step.config, self.fonts, height, width)
        turns: list[TaskSample | Turn] = [sample, *sample.follow_ups]
        for turn in turns:
            turn.places = turn.places or locate_answer(turn.answer, sample.scene)
        return sample
