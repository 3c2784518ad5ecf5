"""Bar charts drawn with Pillow: every bar, label and value known to the pixel."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import ImageDraw

from vlmslice.data.fonts import FontLibrary
from vlmslice.data.scenes import Scene, approximate_length, draw_line, ink_and_paper, luminance, paper_image
from vlmslice.data.shapes import COLORS, vary, visible_colors
from vlmslice.data.text import words


@dataclass(frozen=True)
class BarChart:
    title: str
    labels: tuple[str, ...]
    values: tuple[int, ...]


def random_chart(rng: random.Random, split: str) -> BarChart:
    """2-6 bars with distinct one-word labels and distinct values below 100."""
    number = rng.randint(2, 6)
    short = [w for w in rng.sample(words(split), 200) if len(w) <= 7]
    labels = tuple(w.capitalize() for w in short[:number])
    return BarChart(rng.choice(words(split)).capitalize(), labels, tuple(rng.sample(range(1, 100), number)))


def chart_scene(
    rng: random.Random, fonts: FontLibrary, height: int, width: int, split: str = "train"
) -> tuple[Scene, BarChart]:
    """Draws a bar chart that fills the picture: title on top, a value over each bar, a label under it."""
    chart = random_chart(rng, split)
    ink, paper = ink_and_paper(rng, 110.0)
    image = paper_image(rng, height, width, paper)
    draw = ImageDraw.Draw(image)
    scene = Scene(image)
    number = len(chart.values)
    slot = 0.94 * width / number
    size = max(9, min(40, round(height / 14)))
    font = fonts.draw(rng, size)
    widest = max(approximate_length(font, label) for label in chart.labels)
    if widest > 0.95 * slot:
        font = font.font_variant(size=max(9, int(size * 0.95 * slot / widest)))
    ascent, descent = font.getmetrics()
    line = ascent + descent
    left = (width - approximate_length(font, chart.title)) / 2
    scene.glyphs += draw_line(draw, chart.title, font, 0.01 * height, left, ink)
    top, base = 0.01 * height + 2.4 * line, height - 1.5 * line
    tallest = max(chart.values)
    names = [c for c in visible_colors(paper) if abs(luminance(COLORS[c]) - luminance(ink)) > 10] or list(
        COLORS
    )
    one_color = rng.choice(names)
    several = rng.random() < 0.4
    for i, (label, value) in enumerate(zip(chart.labels, chart.values, strict=True)):
        middle = 0.03 * width + (i + 0.5) * slot
        bar = 0.32 * slot
        peak = base - (base - top) * value / tallest
        color = rng.choice(names) if several else one_color
        draw.rectangle((middle - bar, peak, middle + bar, base), fill=vary(rng, COLORS[color], 6))
        text = str(value)
        scene.glyphs += draw_line(
            draw, text, font, peak - 1.05 * line, middle - approximate_length(font, text) / 2, ink
        )
        scene.glyphs += draw_line(
            draw, label, font, base + 0.15 * line, middle - approximate_length(font, label) / 2, ink
        )
    draw.line((0.02 * width, base, 0.98 * width, base), fill=ink, width=max(1, size // 12))
    return scene, chart


def chart_question(rng: random.Random, chart: BarChart) -> tuple[str, str]:
    """A question about the chart and its answer."""
    i = rng.randrange(len(chart.values))
    highest = chart.labels[chart.values.index(max(chart.values))]
    lowest = chart.labels[chart.values.index(min(chart.values))]
    return rng.choice(
        [
            (f"What is the value of {chart.labels[i]}?", str(chart.values[i])),
            (f"How much is {chart.labels[i]}?", str(chart.values[i])),
            (f"Which bar has the value {chart.values[i]}?", chart.labels[i]),
            ("Which bar is the highest?", highest),
            ("Which bar is the lowest?", lowest),
            ("How many bars are there?", str(len(chart.values))),
            ("What is the title of the chart?", chart.title),
        ]
    )
