"""The picture of nine balls: the first test of what slicing does to counting (LLaVA-UHD, https://arxiv.org/abs/2403.11703)."""

from __future__ import annotations

from PIL import Image

from vlmslice.data.scenes import Color
from vlmslice.data.shapes import draw_shape

CENTERS = (
    (0.17, 0.16), (0.14, 0.49), (0.19, 0.82),
    (0.48, 0.20), (0.52, 0.53), (0.46, 0.85),
    (0.83, 0.15), (0.80, 0.47), (0.85, 0.80),
)  # fmt: skip
"""Row and column, in shares of the side; no two of a row are level."""
RADIUS = 0.085
"""In shares of the side."""
COLOR: Color = (45, 85, 220)

NINE_BALLS_QUESTION = "How many balls are there?"
NINE_BALLS_SIZES = tuple(round(224 * (4096 / 224) ** (i / 23)) for i in range(24))
"""Sides of the pictures, px."""


def draw_nine_balls(side: int) -> Image.Image:
    """Nine blue balls in three rows on white, `side` x `side` px, the same picture at every size."""
    image = Image.new("RGB", (side, side), (255, 255, 255))
    for y, x in CENTERS:
        draw_shape(image, "circle", "blue", (y * side, x * side), RADIUS * side, COLOR)
    return image
