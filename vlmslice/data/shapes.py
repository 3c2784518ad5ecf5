"""Coloured shapes on a ground, for counting."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

from vlmslice.data.scenes import Color, Shape, luminance

COLORS: dict[str, Color] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 85, 220),
    "yellow": (240, 205, 40),
    "orange": (245, 135, 30),
    "purple": (140, 60, 175),
    "pink": (245, 130, 180),
    "brown": (130, 80, 40),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
}

KINDS = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "hexagon")


def _polygon(num_corners: int, turn: float, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners (y, x) on the unit circle, every second one at radius `inner`."""
    radii = [1.0 if i % 2 == 0 else inner for i in range(num_corners)]
    angles = [turn + 2 * math.pi * i / num_corners for i in range(num_corners)]
    return [(-r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


_CROSS = [(-1, -0.35), (-1, 0.35), (-0.35, 0.35), (-0.35, 1), (0.35, 1), (0.35, 0.35), (1, 0.35), (1, -0.35),
          (0.35, -0.35), (0.35, -1), (-0.35, -1), (-0.35, -0.35)]  # fmt: skip

_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.9, -0.9), (-0.9, 0.9), (0.9, 0.9), (0.9, -0.9)],
    "triangle": _polygon(3, 0.0),
    "star": _polygon(10, 0.0, 0.42),
    "diamond": [(-1, 0), (0, 0.7), (1, 0), (0, -0.7)],
    "cross": [(float(y), float(x)) for y, x in _CROSS],
    "hexagon": _polygon(6, math.pi / 6),
}


def draw_shape(
    image: Image.Image, kind: str, color: str, center: tuple[float, float], radius: float, shade: Color
) -> Shape:
    """Draws one shape, its edges smoothed by drawing at four times the size.

    Args:
        image: drawn upon.
        kind: one of `KINDS`.
        color: the name under which it is counted.
        center: (y, x) in px.
        radius: of the circle round it, px.
        shade: the RGB value really used.

    Returns:
        The shape with its box (the square round the circle).
    """
    factor = 4 if radius < 64 else 2
    side = int(2 * radius * factor) + 2
    mask = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(mask)
    middle = side / 2
    r = radius * factor
    if kind in ("circle", "ring"):
        pen.ellipse((middle - r, middle - r, middle + r, middle + r), fill=255)
        if kind == "ring":
            hole = 0.55 * r
            pen.ellipse((middle - hole, middle - hole, middle + hole, middle + hole), fill=0)
    else:
        pen.polygon([(middle + r * x, middle + r * y) for y, x in _CORNERS[kind]], fill=255)
    small = max(1, side // factor)
    mask = mask.resize((small, small), Image.Resampling.BOX)
    y, x = center
    image.paste(Image.new("RGB", mask.size, shade), (round(x - small / 2), round(y - small / 2)), mask)
    return Shape(kind, color, (y - radius, x - radius, y + radius, x + radius))


def visible_colors(ground: Color, min_contrast: float = 45.0) -> list[str]:
    """Names of the colours that stand out from `ground`."""

    def distance(color: Color) -> float:
        hue = max(abs(a - b) for a, b in zip(color, ground, strict=True))
        return max(abs(luminance(color) - luminance(ground)), 0.6 * hue)

    return [name for name, color in COLORS.items() if distance(color) >= min_contrast]


def vary(rng: random.Random, color: Color, amount: int = 14) -> Color:
    """A nearby shade."""
    return tuple(min(255, max(0, c + rng.randint(-amount, amount))) for c in color)  # type: ignore[return-value]


def scatter_shapes(
    rng: random.Random,
    image: Image.Image,
    kinds_and_colors: list[tuple[str, str]],
    radii: tuple[float, float],
    gap: float = 2.0,
    max_tries: int = 200,
) -> list[Shape]:
    """Places shapes at random without touching one another or the border; those that find no room are left out.

    Args:
        radii: smallest and largest radius, px; each shape draws its own.
        gap: least distance between two circles round shapes, px.
    """
    height, width = image.height, image.width
    placed: list[Shape] = []
    circles: list[tuple[float, float, float]] = []
    for kind, color in kinds_and_colors:
        for _ in range(max_tries):
            radius = rng.uniform(*radii)
            if 2 * radius + 2 >= min(height, width):
                continue
            y, x = rng.uniform(radius + 1, height - radius - 1), rng.uniform(radius + 1, width - radius - 1)
            if all((y - v) ** 2 + (x - u) ** 2 >= (radius + r + gap) ** 2 for v, u, r in circles):
                circles.append((y, x, radius))
                placed.append(draw_shape(image, kind, color, (y, x), radius, vary(rng, COLORS[color])))
                break
    return placed
