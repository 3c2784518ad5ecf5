"""Pictures with their truth: what a renderer knows about every glyph and shape it drew.

A `Scene` is an RGB picture and the boxes of what is on it, in pixels of that picture, heights first. The language
task asks about a scene; the dense task labels every cell of a view's patch grid from the same boxes.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Box = tuple[float, float, float, float]
"""top, left, bottom, right in pixels."""

Color = tuple[int, int, int]


class _Boxed:
    """What lies in a box."""

    box: Box

    @property
    def center(self) -> tuple[float, float]:
        """(y, x) in pixels."""
        top, left, bottom, right = self.box
        return (top + bottom) / 2, (left + right) / 2


@dataclass(frozen=True)
class Glyph(_Boxed):
    character: str
    box: Box


@dataclass(frozen=True)
class Shape(_Boxed):
    kind: str
    color: str
    box: Box


@dataclass(frozen=True)
class Region:
    """A part of a picture that is neither a glyph nor a shape to count.

    Attributes:
        kind: "word" or "line" of text; "cell" of a table; "bar", "point" or "wedge" of a chart; "node" or "arrow" of a
            flowchart; "field", "button", ... of a window.
        text: what it says or is named, as an answer spells it.
        box: its place.
        value: the number that a chart's mark stands for.
    """

    kind: str
    text: str
    box: Box
    value: float | None = None


@dataclass
class Scene:
    """A picture and what is on it.

    Of a photograph `is_listed` is False: nobody listed all that is on it, and the boxes of glyphs are estimates.
    """

    image: Image.Image
    glyphs: list[Glyph] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    is_listed: bool = True

    def moved(self, image: Image.Image, move: Callable[[np.ndarray], np.ndarray]) -> Scene:
        """The same things on another picture.

        Args:
            image: the new picture.
            move: old boxes `float64[N, 4]` to new ones.
        """
        parts: list[Glyph | Shape | Region] = [*self.glyphs, *self.shapes, *self.regions]
        boxes = np.array([part.box for part in parts], dtype=np.float64).reshape(-1, 4)
        places: Iterator[Box] = iter(map(tuple, move(boxes).tolist()))
        return Scene(
            image,
            [replace(glyph, box=next(places)) for glyph in self.glyphs],
            [replace(shape, box=next(places)) for shape in self.shapes],
            [replace(region, box=next(places)) for region in self.regions],
            self.is_listed,
        )


def sample_rng(seed: int, task: str, index: int) -> random.Random:
    """The random source of sample `index`: the same for the same three values, on every machine."""
    return random.Random(f"{seed}/{task}/{index}")


def luminance(color: Color) -> float:
    """Perceived brightness, 0-255 (ITU-R BT.601 weights, as Pillow's "L" mode)."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def random_color(rng: random.Random) -> Color:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def ink_and_paper(rng: random.Random, min_contrast: float = 70.0) -> tuple[Color, Color]:
    """A text colour and a background colour at least `min_contrast` apart in luminance; mostly dark on light."""
    if rng.random() < 0.5:
        gray = rng.randrange(225, 256)
        tinted = rng.randrange(225, 256), rng.randrange(225, 256), rng.randrange(200, 256)
        paper = (gray, gray, gray) if rng.random() < 0.7 else tinted
        dark = rng.randrange(0, 90)
        return (dark, dark, dark), paper
    while True:
        ink, paper = random_color(rng), random_color(rng)
        if abs(luminance(ink) - luminance(paper)) >= min_contrast:
            return ink, paper


def paper_image(rng: random.Random, height: int, width: int, color: Color) -> Image.Image:
    """A background of `color`: plain (3 in 4) or a soft gradient."""
    if rng.random() < 0.75:
        return Image.new("RGB", (width, height), color)
    other = tuple(min(255, max(0, c + rng.randint(-25, 25))) for c in color)
    corners = np.array([[color, other], [other, color]], dtype=np.uint8)
    if rng.random() < 0.5:
        corners = np.array([[color, color], [other, other]], dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def draw_line(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, top: float, left: float, fill: Color
) -> list[Glyph]:
    """Draws one line of text and returns a box for every visible character.

    A box is as wide as the character's advance and spans the line from capital height to a little below the
    baseline, the same for all characters of the line, so that a cell beside an "x" still says "x".
    """
    draw.text((left, top), text, font=font, fill=fill)
    ascent, _ = font.getmetrics()
    capital = font.getbbox("H")
    line_top, baseline = top + capital[1], top + ascent
    drop = 0.18 * (baseline - line_top)
    glyphs = []
    # Advances summed one by one, stretched by the little that kerning takes: twenty times cheaper than measuring
    # every prefix of the line.
    table = _advances(font)
    advances = [table[character] for character in text]
    stretch = font.getlength(text) / max(sum(advances), 1e-6)
    start = left
    for character, advance in zip(text, advances, strict=True):
        end = start + advance * stretch
        if not character.isspace():
            glyphs.append(Glyph(character, (line_top - drop, start, baseline + drop, end)))
        start = end
    return glyphs


class _Advances(dict):
    """Character -> width in px, measured when first asked for."""

    def __init__(self, font: ImageFont.FreeTypeFont):
        self._font = font

    def __missing__(self, character: str) -> float:
        self[character] = self._font.getlength(character)
        return self[character]


@lru_cache(maxsize=256)
def _advances(font: ImageFont.FreeTypeFont) -> _Advances:
    return _Advances(font)


def approximate_length(font: ImageFont.FreeTypeFont, text: str) -> float:
    """Width of `text` in px without kerning, from cached advances."""
    return sum(map(_advances(font).__getitem__, text))


def line_size(font: ImageFont.FreeTypeFont, text: str) -> tuple[int, int]:
    """Height and width in px that `text` takes in `font`."""
    ascent, descent = font.getmetrics()
    return ascent + descent, int(font.getlength(text)) + 1


def add_camera_effects(rng: random.Random, image: Image.Image, strength: float = 1.0) -> Image.Image:
    """Noise, blur and JPEG, each in some of the pictures; the geometry stays as it is."""
    if rng.random() < 0.2 * strength:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.9)))
    if rng.random() < 0.25 * strength:
        generator = np.random.default_rng(rng.getrandbits(32))
        tile = generator.normal(0, rng.uniform(2, 12), (128, 128, 3))
        pixels = np.asarray(image, dtype=np.int16)
        repeats = (-(-pixels.shape[0] // 128), -(-pixels.shape[1] // 128), 1)
        noise = np.tile(tile.astype(np.int16), repeats)[: pixels.shape[0], : pixels.shape[1]]
        image = Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
    if rng.random() < 0.2 * strength:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randrange(35, 95))
        image = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    return image
