"""Counting many things: 0 to 50 shapes or characters, scattered or in clusters, lightly overlapping, on any ground."""

from __future__ import annotations

import math
import random
import string

import numpy as np
from PIL import Image, ImageDraw

from vlmslice.data.counting import find_mentions, matches, name_things, rename, with_follow_ups
from vlmslice.data.fonts import FontLibrary
from vlmslice.data.photo_effects import shade
from vlmslice.data.samples import Mention, Place, TaskConfig, TaskSample, Turn
from vlmslice.data.scenes import Color, Glyph, Scene, add_camera_effects, ink_and_paper, paper_image
from vlmslice.data.shapes import COLORS, KINDS, draw_shape, vary, visible_colors

QUESTIONS = (
    "How many {} are there?",
    "How many {} do you see?",
    "Count the {}.",
    "What is the number of {} in the image?",
    "How many {} are in the picture?",
)

_LETTERS = string.ascii_uppercase + string.digits + "&@#%$"

Disc = tuple[float, float, float]
"""Centre (y, x) and radius, px."""


def textured_ground(rng: random.Random, height: int, width: int, color: Color) -> Image.Image:
    """A ground round `color`: grain, blotches, stripes or checks, all faint enough to tell things from it."""
    kind = rng.choice(("grain", "blotches", "stripes", "checks"))
    generator = np.random.default_rng(rng.getrandbits(32))
    depth = rng.uniform(4, 16)
    if kind == "grain":
        tile = generator.normal(0, depth / 2, (128, 128, 1))
        light = np.tile(tile, (-(-height // 128), -(-width // 128), 1))[:height, :width]
        return Image.fromarray(np.clip(np.array(color) + light, 0, 255).astype(np.uint8))
    if kind == "blotches":
        cells = rng.randint(3, 12)
        small = np.clip(np.array(color) + generator.normal(0, depth, (cells, cells, 3)), 0, 255)
        return Image.fromarray(small.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pitch = rng.randint(4, max(5, min(height, width) // 6))
    other = tuple(int(min(255, max(0, c + rng.choice((-depth, depth))))) for c in color)
    rows, columns = np.arange(height)[:, None] // pitch, np.arange(width)[None] // pitch
    turned = rng.random() < 0.5
    pattern = (
        (rows + columns) % 2
        if kind == "checks"
        else (rows + 0 * columns if turned else 0 * rows + columns) % 2
    )
    return Image.fromarray(np.array([color, other], dtype=np.uint8)[pattern])


def place_discs(
    rng: random.Random,
    height: int,
    width: int,
    number: int,
    radii: tuple[float, float],
    overlap: float,
    clustered: bool,
) -> list[Disc]:
    """Places for discs that stay inside the picture; those that find no room in 60 tries are left out.

    Args:
        rng: drawn from.
        height: of the picture, px.
        width: of the picture, px.
        number: wanted.
        radii: smallest and largest, px.
        overlap: share by which two discs may reach into each other, of the sum of their radii; 0 keeps them apart.
        clustered: gather them round one to four centres.
    """
    centres = [
        (rng.uniform(0.2, 0.8) * height, rng.uniform(0.2, 0.8) * width) for _ in range(rng.randint(1, 4))
    ]
    spread = 1.5 * math.sqrt(number) * radii[1] / math.sqrt(len(centres))
    placed: list[Disc] = []
    for _ in range(number):
        radius = rng.uniform(*radii)
        for attempt in range(60):
            if clustered:
                middle = rng.choice(centres)
                reach = spread * (1 + attempt / 20)
                y, x = rng.gauss(middle[0], reach), rng.gauss(middle[1], reach)
            else:
                y, x = rng.uniform(0, height), rng.uniform(0, width)
            if not (radius + 1 <= y <= height - radius - 1 and radius + 1 <= x <= width - radius - 1):
                continue
            if all(
                (y - v) ** 2 + (x - u) ** 2 >= ((1 - overlap) * (radius + r) + 1) ** 2 for v, u, r in placed
            ):
                placed.append((y, x, radius))
                break
    return placed


def count_crowd(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> TaskSample:
    """None to `config.max_count` things of the asked sort among others; shapes, or characters of one font."""
    _, ground = ink_and_paper(rng)
    textured = rng.random() < 0.5
    image = (textured_ground if textured else paper_image)(rng, height, width, ground)
    scene = Scene(image)
    count = 0 if rng.random() < 0.04 else rng.randint(1, max(1, config.max_count))
    others = 0 if rng.random() < 0.4 and count else rng.randint(1, max(2, count // 2))
    # All of them cover a fifth of the picture at most, so that nearly all find room.
    fitting = math.sqrt(height * width / (5 * math.pi * (count + others)))
    largest = min(fitting, min(height, width) / 4, 200.0)
    # Two middles in one patch of 16 px could not be pointed at one after the other.
    smallest = min(max(9.0, 0.012 * min(height, width)), largest)
    base = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
    places = place_discs(
        rng,
        height,
        width,
        count + others,
        (0.8 * base, min(largest, 1.2 * base)),
        rng.choice((0.0, 0.0, 0.15, 0.25)),
        rng.random() < 0.4,
    )
    rng.shuffle(places)
    draw_things = _draw_characters if rng.random() < 0.2 else _draw_shapes
    things, centers = draw_things(rng, fonts, scene, places, count, ground)
    if rng.random() < 0.5 * config.photo:
        scene.image = shade(rng, scene.image)
    scene.image = add_camera_effects(rng, scene.image)
    question = rng.choice(QUESTIONS).format(things)
    if scene.shapes:
        mentions = find_mentions(question, things, scene.shapes)
        turn = Turn(question, str(len(centers)), points=centers, mentions=mentions)
        return with_follow_ups(rng, config, "crowd", scene, turn, visible_colors(ground, 60.0))
    start = question.index(things)
    mention = Mention(start, start + len(things), centers)
    return TaskSample("crowd", scene, question, str(len(centers)), points=centers, mentions=[mention])


def _draw_shapes(
    rng: random.Random, fonts: FontLibrary, scene: Scene, places: list[Disc], count: int, ground: Color
) -> tuple[str, list[Place]]:
    """Draws shapes, the first `count` of the asked sort; returns what is asked for and the centre of each."""
    colors = visible_colors(ground, 60.0)
    kind, color = rng.choice(KINDS), rng.choice(colors)
    form = (
        rng.choice(("kind", "color", "both"))
        if len(places) > count or not count
        else rng.choice(("all", "kind"))
    )
    one_color = rng.choice(colors) if rng.random() < 0.4 else None
    for i, (y, x, radius) in enumerate(places):
        asked = i < count
        shape_kind, shape_color = rng.choice(KINDS), one_color or rng.choice(colors)
        if form in ("kind", "both"):
            shape_kind = kind if asked else rng.choice([k for k in KINDS if k != kind])
        if form in ("color", "both"):
            shape_color = color if asked else rng.choice([c for c in colors if c != color])
        if form == "both" and not asked and rng.random() < 0.4:
            shape_kind = kind
        shade = vary(rng, COLORS[shape_color])
        scene.shapes.append(draw_shape(scene.image, shape_kind, shape_color, (y, x), radius, shade))
    things = name_things(form, kind, color)
    asked_shapes = [s for s in scene.shapes if matches(s.kind, s.color, form, kind, color, things)]
    return rename(rng, things), [shape.center for shape in asked_shapes]


def _draw_characters(
    rng: random.Random, fonts: FontLibrary, scene: Scene, places: list[Disc], count: int, ground: Color
) -> tuple[str, list[Place]]:
    """As `_draw_shapes`, with characters of one font in one or several colours."""
    font = fonts.draw(rng, 16)
    asked = rng.choice(_LETTERS)
    others = [c for c in _LETTERS if c != asked and {c, asked} not in ({"0", "O"}, {"1", "I"})]
    colors = visible_colors(ground, 70.0)
    one_color = rng.choice(colors) if rng.random() < 0.6 else None
    draw = ImageDraw.Draw(scene.image)
    for i, (y, x, radius) in enumerate(places):
        character = asked if i < count else rng.choice(others)
        sized = font.font_variant(size=max(8, round(1.5 * radius)))
        left, top, right, bottom = sized.getbbox(character)
        fill = vary(rng, COLORS[one_color or rng.choice(colors)])
        start = (x - (left + right) / 2, y - (top + bottom) / 2)
        draw.text(start, character, font=sized, fill=fill)
        box = (start[1] + top, start[0] + left, start[1] + bottom, start[0] + right)
        scene.glyphs.append(Glyph(character, box))
    found = [glyph.center for glyph in scene.glyphs if glyph.character == asked]
    named = (
        f"digits {asked}" if asked.isdigit() else f"letters {asked}" if asked.isalpha() else f"{asked} signs"
    )
    return named, found
