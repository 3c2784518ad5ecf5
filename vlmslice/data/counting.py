"""Counting shapes that lie apart, and the questions that pictures of shapes are asked."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from vlmslice.data.fonts import FontLibrary
from vlmslice.data.samples import Mention, TaskConfig, TaskSample, Turn
from vlmslice.data.scenes import Scene, Shape, add_camera_effects, ink_and_paper, paper_image
from vlmslice.data.shapes import KINDS, scatter_shapes, visible_colors

COUNT_QUESTIONS = (
    "How many {things} are there?",
    "How many {things} do you see?",
    "Count the {things}.",
    "What is the number of {things} in the image?",
)

_OTHER_NAMES = {
    "circles": ("balls", "discs", "dots"),
    "rings": ("hoops",),
    "crosses": ("pluses",),
    "shapes": ("objects", "things", "items"),
}
"""What kinds are also called."""
_KIND_OF_NAME = {name: kind for kind, names in _OTHER_NAMES.items() for name in names}


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
    centers = [s.center for s in placed if matches(s.kind, s.color, form, asked_kind, asked_color, things)]
    scene = Scene(add_camera_effects(rng, image), shapes=placed)
    question = rng.choice(COUNT_QUESTIONS).format(things=things)
    first = Turn(
        question, str(len(centers)), points=centers, mentions=find_mentions(question, things, placed)
    )
    return with_follow_ups(rng, config, "count", scene, first, colors)


def with_follow_ups(
    rng: random.Random, config: TaskConfig, task: str, scene: Scene, first: Turn, colors: Sequence[str]
) -> TaskSample:
    """A sample of the turn `first` and, in any order, up to `config.max_questions - 1` others about the same shapes."""
    turns = [first]
    if config.max_questions > 1:
        turns += [_ask_count(rng, scene.shapes, colors) for _ in range(rng.randrange(config.max_questions))]
        rng.shuffle(turns)
    return TaskSample.of_turns(task, scene, turns)


def _ask_count(rng: random.Random, shapes: Sequence[Shape], colors: Sequence[str]) -> Turn:
    """A question about shapes as they lie; most often about some that are there."""
    kind, color = rng.choice(KINDS), rng.choice(colors)
    if shapes and rng.random() < 0.8:
        kind = rng.choice(shapes).kind
    if shapes and rng.random() < 0.8:
        color = rng.choice(shapes).color
    form = rng.choice(("all", "kind", "kind", "color", "color", "both", "both", "both"))
    things = name_things(form, kind, color)
    centers = [s.center for s in shapes if matches(s.kind, s.color, form, kind, color, things)]
    named = rename(rng, things)
    question = rng.choice(COUNT_QUESTIONS).format(things=named)
    mentions = find_mentions(question, named, shapes)
    return Turn(question, str(len(centers)), points=centers, mentions=mentions)


def name_things(form: str, kind: str, color: str) -> str:
    """What is asked for: "shapes", "rings", "red shapes" or "red rings"."""
    return {
        "all": "shapes",
        "kind": plural(kind),
        "color": f"{color} shapes",
        "both": f"{color} {plural(kind)}",
    }[form]


def rename(rng: random.Random, things: str) -> str:
    """`things` by another of their names, now and then: "red circles" becomes "red balls"."""
    *color, kind = things.split()
    if kind in _OTHER_NAMES and rng.random() < 0.4:
        kind = rng.choice(_OTHER_NAMES[kind])
    return " ".join([*color, kind])


def find_mentions(question: str, things: str, shapes: Sequence[Shape]) -> list[Mention]:
    """What each word of `things` names: all shapes of a colour, of a kind, or all."""
    mentions = []
    start = question.index(things)
    for word in things.split():
        known = _KIND_OF_NAME.get(word, word)
        named = [s.center for s in shapes if known in (s.color, plural(s.kind), "shapes")]
        mentions.append(Mention(start, start + len(word), named))
        start += len(word) + 1
    return mentions


def plural(kind: str) -> str:
    """circle -> circles, cross -> crosses."""
    return kind + ("es" if kind.endswith("s") else "s")


def _other(rng: random.Random, options, taken: str) -> str:
    return rng.choice([o for o in options if o != taken])


def matches(kind: str, color: str, form: str, asked_kind: str, asked_color: str, things: str) -> bool:
    """Whether a shape is among those asked for by `form`: "all", "kind", "color" or "both"."""
    if form == "all":
        return things == "shapes" or kind == asked_kind
    return (form == "color" or kind == asked_kind) and (form == "kind" or color == asked_color)
