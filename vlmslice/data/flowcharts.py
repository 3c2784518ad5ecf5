"""Flowcharts: named boxes joined by arrows, asked for as lines "A -> B"."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import ImageDraw

from vlmslice.data.fonts import FontLibrary, spell
from vlmslice.data.photo_effects import photograph
from vlmslice.data.phrases import Phrases
from vlmslice.data.samples import TaskConfig, TaskSample, ask_several, reshape
from vlmslice.data.scenes import Box, Color, Scene, ink_and_paper, paper_image
from vlmslice.data.typesetting import Pen, line_height

QUESTIONS = (
    "List the arrows, one a line, as A -> B.",
    "Which boxes are connected? Answer with lines A -> B.",
    "Give the edges of the flowchart as lines A -> B.",
)

_SMALLEST = 9  # px per em


@dataclass(frozen=True)
class Flowchart:
    """Layers of box names, and edges from box to box."""

    layers: tuple[tuple[str, ...], ...]
    edges: tuple[tuple[str, str], ...]

    def lines(self) -> str:
        """The edges as "A -> B", one a line."""
        return "\n".join(f"{a} -> {b}" for a, b in self.edges)


def random_flowchart(phrases: Phrases, num_boxes: int) -> Flowchart:
    """Layers of one or two boxes; every box has an arrow from the layer before, or to the next."""
    rng = phrases.rng
    names = iter(phrases.distinct_words(num_boxes, 9))
    layers: list[tuple[str, ...]] = []
    left = num_boxes
    while left:
        size = 1 if not layers or left < 2 or rng.random() < 0.55 else 2
        layers.append(tuple(next(names) for _ in range(size)))
        left -= size
    edges = []
    for above, below in zip(layers, layers[1:], strict=False):
        if len(above) == len(below):
            edges += list(zip(above, below, strict=True))
        else:
            edges += [(a, b) for a in above for b in below]
    return Flowchart(tuple(layers), tuple(edges))


def read_flowchart(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> TaskSample:
    """Boxes in layers from top to bottom or from left to right; asks for the edges, a neighbour or a number."""
    height, width = reshape(height, width, (1 / config.max_aspect, config.max_aspect), 160 * 160)
    phrases = Phrases(rng, config.split, config.accents)
    sideways = width > height
    along, across = (width, height) if sideways else (height, width)
    font = fonts.draw(rng, 20)
    # A layer takes three lines of text along the flow, or the longest name when it flows to the right.
    per_layer = 8.5 * _SMALLEST if sideways else 4.0 * _SMALLEST
    most = max(2, int(0.96 * along / per_layer))
    chart = random_flowchart(phrases, max(2, min(rng.randint(*config.num_lines), most)))
    named = {name: spell(name, font) for layer in chart.layers for name in layer}
    chart = Flowchart(
        tuple(tuple(named[name] for name in layer) for layer in chart.layers),
        tuple((named[a], named[b]) for a, b in chart.edges),
    )
    pitch = 0.96 * along / len(chart.layers)
    rows, columns = (2, len(chart.layers)) if sideways else (len(chart.layers), 2)
    longest = max(font.getlength(name) for name in named.values()) / font.size
    slot = (0.96 * height / rows, 0.96 * width / columns)
    size = max(
        7, min(slot[1] * (0.6 if sideways else 0.8) / (longest + 1.2), slot[0] * (0.4 if sideways else 0.28))
    )
    font = font.font_variant(size=int(min(size, config.font_px[1])))
    ink, ground = ink_and_paper(rng, 100.0)
    scene = Scene(paper_image(rng, height, width, ground))
    pen = Pen(scene, ink)
    fill = tuple(round(g + 0.08 * (i - g)) for g, i in zip(ground, ink, strict=True))
    box = (1.8 * line_height(font), (longest + 1.2) * font.size)
    style = rng.choice(("rectangle", "rounded", "mixed"))
    places: dict[str, Box] = {}
    line = max(1, round(font.size / 12))
    for i, layer in enumerate(chart.layers):
        for j, name in enumerate(layer):
            middle_along = 0.02 * along + (i + 0.5) * pitch
            middle_across = across * (0.5 if len(layer) == 1 else 0.26 + 0.48 * j)
            y, x = (middle_across, middle_along) if sideways else (middle_along, middle_across)
            places[name] = (y - box[0] / 2, x - box[1] / 2, y + box[0] / 2, x + box[1] / 2)
    for a, b in chart.edges:
        _draw_arrow(pen.draw, places[a], places[b], sideways, ink, line, font.size)
        pen.mark("arrow", f"{a} -> {b}", _between(places[a], places[b]))
    for i, (name, (top, left, bottom, right)) in enumerate(places.items()):
        rounded = style == "rounded" or (style == "mixed" and i % 2 == 0)
        radius = box[0] / 2 if rounded else 0
        pen.draw.rounded_rectangle((left, top, right, bottom), radius, fill=fill, outline=ink, width=line)
        pen.write_middle(name, font, (top + bottom - line_height(font)) / 2, (left + right) / 2)
        pen.mark("node", name, (top, left, bottom, right))
    scene = photograph(rng, scene, config.photo)
    return ask_several(rng, config, "flowchart", scene, lambda: _ask(rng, chart))


def _between(a: Box, b: Box) -> Box:
    """The box from the middle of one to the middle of another."""
    (y, x), (v, u) = _middle(a), _middle(b)
    return min(y, v), min(x, u), max(y, v), max(x, u)


def _middle(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _draw_arrow(
    draw: ImageDraw.ImageDraw, start: Box, end: Box, sideways: bool, ink: Color, line: int, size: float
) -> None:
    """A straight arrow from the edge of one box to the edge of the next."""
    (y, x), (v, u) = _middle(start), _middle(end)
    y, x, v, u = (y, start[3], v, end[1]) if sideways else (start[2], x, end[0], u)
    draw.line((x, y, u, v), fill=ink, width=line)
    angle = math.atan2(v - y, u - x)
    barb = 0.45 * size
    corners = [
        (u - barb * math.cos(angle + turn), v - barb * math.sin(angle + turn)) for turn in (-0.45, 0.45)
    ]
    draw.polygon([(u, v), *corners], fill=ink)


def _ask(rng: random.Random, chart: Flowchart) -> tuple[str, str]:
    if rng.random() < 0.5:
        return rng.choice(QUESTIONS), chart.lines()
    a, b = rng.choice(chart.edges)
    asked = [
        ("How many boxes are there?", str(sum(map(len, chart.layers)))),
        ("Where does it begin?", chart.layers[0][0]),
    ]
    if sum(edge[0] == a for edge in chart.edges) == 1:
        asked += [(f"What comes after {a}?", b), (f"Where does the arrow from {a} lead?", b)] * 2
    if sum(edge[1] == b for edge in chart.edges) == 1:
        asked += [(f"What comes before {b}?", a), (f"From which box does an arrow lead to {b}?", a)] * 2
    return rng.choice(asked)
