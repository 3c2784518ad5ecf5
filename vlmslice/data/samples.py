"""What every rendered task shares: its difficulty, its samples, and the shape of its pictures."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from vlmslice.data.fonts import FontLibrary
from vlmslice.data.scenes import Glyph, Scene

READ_QUESTIONS = (
    "Read the text.",
    "What does the text say?",
    "What is written in the image?",
    "Transcribe the text in this picture.",
    "Which words are shown?",
    "Read this.",
)
"""For any text: a word, a line, a page."""

Place = tuple[float, float]
"""A point (y, x) of a picture, in pixels."""


@dataclass(frozen=True)
class TaskConfig:
    """Difficulty, the same for all tasks; a curriculum changes it as it goes on.

    Attributes:
        megapixels: smallest and largest area of a picture; drawn evenly in the logarithm.
        max_aspect: longest to shortest side at most.
        num_words: fewest and most words of a line.
        max_characters: lines are cut to whole words within this length (at least one word).
        font_px: smallest and largest font size, px per em, before the line is made to fit.
        max_count: largest count of shapes.
        max_questions: questions about one picture; to look at a large picture costs more than to answer.
        split: "train" or "eval": which words and which chart styles are used.
        num_lines: fewest and most lines of a paragraph, items of a receipt, rows of a table, boxes of a flowchart.
        max_answer: characters of a read-out at most; pictures hold no more text than this.
        accents: share of words with an accented letter.
        photo: share of documents that look photographed: tilted, shaded, faded.
        printed_values: share of charts that print the value at each mark; in others it is read off the axis.
        matplotlib: share of charts drawn by matplotlib, at twenty times the cost of ours.
        vega: share of charts drawn by Vega-Lite, at forty times the cost.
        crowded: share of charts of many years or names in small print, with questions in words that they do not print.
    """

    megapixels: tuple[float, float] = (0.05, 4.0)
    max_aspect: float = 3.0
    num_words: tuple[int, int] = (1, 6)
    max_characters: int = 60
    font_px: tuple[float, float] = (14.0, 90.0)
    max_count: int = 10
    max_questions: int = 1
    split: str = "train"
    num_lines: tuple[int, int] = (2, 8)
    max_answer: int = 400
    accents: float = 0.08
    photo: float = 0.4
    printed_values: float = 0.7
    matplotlib: float = 0.1
    vega: float = 0.05
    crowded: float = 0.0


@dataclass(frozen=True)
class Mention:
    """Words of a question and what they name, whether it is counted or not.

    Attributes:
        start, end: characters of the question, the last one excluded.
        points: centres of the objects.
    """

    start: int
    end: int
    points: list[Place]


@dataclass
class Turn:
    """A question and its answer.

    Attributes:
        places: for each character of the answer, the points (y, x) of the picture that it rests on; empty where no
            place is known.
        points: centres of the objects that are counted; the answer points at each of them first.
        mentions: words of the question that name objects, in order.
    """

    question: str
    answer: str
    places: list[list[Place]] = field(default_factory=list)
    points: list[Place] = field(default_factory=list)
    mentions: list[Mention] = field(default_factory=list)


@dataclass
class TaskSample:
    """A question about a scene, see `Turn`, and those that follow it in the same conversation."""

    task: str
    scene: Scene
    question: str
    answer: str
    places: list[list[Place]] = field(default_factory=list)
    points: list[Place] = field(default_factory=list)
    mentions: list[Mention] = field(default_factory=list)
    follow_ups: list[Turn] = field(default_factory=list)

    @classmethod
    def of_turns(cls, task: str, scene: Scene, turns: Sequence[Turn]) -> TaskSample:
        first, *others = turns
        return cls(
            task,
            scene,
            first.question,
            first.answer,
            first.places,
            first.points,
            first.mentions,
            list(others),
        )

    @property
    def turns(self) -> list[Turn]:
        first = Turn(self.question, self.answer, self.places, self.points, self.mentions)
        return [first, *self.follow_ups]

    def messages(self, points: Sequence[Sequence[tuple[int, int]]] = ()) -> list[dict]:
        """The sample as a conversation with one image.

        `points`: for each turn, the rows and columns of what is counted, see `spatial_schema`.
        """
        messages: list[dict] = []
        for number, turn in enumerate(self.turns):
            question: list[dict] = [{"type": "text", "text": turn.question}]
            answer: list[dict] = [{"type": "text", "text": turn.answer}]
            if number < len(points) and points[number]:
                answer.insert(0, {"type": "points", "points": list(points[number])})
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        messages[0]["content"].insert(0, {"type": "image"})
        return messages


Task = Callable[[random.Random, TaskConfig, FontLibrary, int, int], TaskSample]
"""Draws a sample on a picture of a height and width."""


def ask_several(
    rng: random.Random, config: TaskConfig, task: str, scene: Scene, ask: Callable[[], tuple[str, str]]
) -> TaskSample:
    """A sample of one question or, with `config.max_questions`, of several that have different answers.

    Short answers come first, so that they are read off the picture and not out of a longer answer.

    Args:
        rng: drawn from.
        config: tells how many.
        task: name of the task.
        scene: what is asked about.
        ask: draws a question and its answer.
    """
    asked = [ask()]
    if config.max_questions > 1:
        for _ in range(rng.randrange(config.max_questions)):
            question, answer = ask()
            if all(answer != other for _, other in asked):
                asked.append((question, answer))
        asked.sort(key=lambda pair: len(pair[1]))
    (question, answer), *others = asked
    return TaskSample(task, scene, question, answer, follow_ups=[Turn(*pair) for pair in others])


def reshape(height: int, width: int, aspects: tuple[float, float], min_area: float = 0.0) -> tuple[int, int]:
    """Height and width of the same area, or of `min_area` px if that is more, with width / height within `aspects`.

    A receipt asked for at 100 x 400 px with aspects (0.25, 0.6) becomes 258 x 155 px.
    """
    area = max(height * width, min_area)
    aspect = min(max(width / height, aspects[0]), aspects[1])
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def font_size(rng: random.Random, config: TaskConfig, largest: float) -> int:
    """A font size within `config.font_px` and `largest`, even in the logarithm; 8 px at least."""
    low, high = (max(8.0, min(size, largest)) for size in config.font_px)
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def find_places(answer: str, glyphs: Iterable[Glyph]) -> list[list[Place]]:
    """`TaskSample.places` of an answer that reads out `glyphs` in their order: the centre of each visible character.

    Raises:
        ValueError: there are more or fewer glyphs than visible characters.
    """
    centers = [glyph.center for glyph in glyphs]
    visible = [not character.isspace() for character in answer]
    if len(centers) != sum(visible):
        raise ValueError(f"{len(centers)} glyphs for the {sum(visible)} visible characters of {answer!r}")
    remaining = iter(centers)
    return [[next(remaining)] if is_visible else [] for is_visible in visible]
