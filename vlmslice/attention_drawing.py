"""Draws an attention map over its image: heat for the whole answer, and one small picture for each of its words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vlmslice.attention_map import AttentionMap

_INK, _FAINT, _PAPER, _MARK = (40, 40, 40), (120, 120, 120), (255, 255, 255), (255, 214, 92)
_COLD, _HOT = np.array((255.0, 190.0, 40.0)), np.array((200.0, 0.0, 40.0))
_GAP, _MIN_SIDE, _MAX_SIDE, _FRAME_AREA = 16, 480, 900, 260 * 200
_FADED = 0.35  # share of white in the image under the heat


def draw_heat(image: Image.Image, attention: AttentionMap, weights: np.ndarray) -> Image.Image:
    """The image, faded, with heat where the weight is: from yellow for little to red for the most.

    Args:
        image: Of the map, at any resolution; the drawing has the same.
        attention: The map.
        weights: `float64[M]`, such as one of `attention.parts()`.
    """
    faded = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, _PAPER), _FADED)
    heat = attention.heat(weights, image.height, image.width)
    # Edges of tokens say nothing; half a token of blur takes them off.
    sides = attention.boxes[:, 2] - attention.boxes[:, 0]
    radius = 0.35 * float(np.median(sides)) * image.height / attention.plan.image_size[0]
    highest = heat.max()
    if highest <= 0:
        return faded
    # Weights span decades; the root shows a twentieth of the most as a quarter.
    grey = Image.fromarray(np.rint(255 * np.sqrt(heat / highest)).astype(np.uint8))
    strength = np.asarray(grey.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64)[..., None] / 255
    color = _COLD + (_HOT - _COLD) * strength
    alpha = 0.85 * np.minimum(1.3 * strength, 1.0)
    return Image.fromarray(np.rint(np.asarray(faded) * (1 - alpha) + color * alpha).astype(np.uint8))


def draw_attention(image: Image.Image, attention: AttentionMap, by: str = "word") -> Image.Image:
    """Question and answer, the heat of the whole answer, and below it a small picture for each of its parts.

    Args:
        image: As `load_image` returns it.
        attention: Of this image.
        by: `word` or `character`.

    Raises:
        AttentionError: `by` is neither.
    """
    parts = attention.parts(by)
    whole = draw_heat(_scaled(image), attention, attention.weights.mean(axis=0))
    small = _shrunk(image, _FRAME_AREA)
    labelled = max((ImageFont.load_default(14).getlength(label) for label, _ in parts), default=0)
    width, height = max(small.width, math.ceil(labelled)), small.height + 22
    cols = max(1, min((max(whole.width, 640) + _GAP) // (width + _GAP), len(parts)))
    rows = math.ceil(len(parts) / cols)
    inner = max(whole.width, cols * (width + _GAP) - _GAP)
    text = _wrap(f"{attention.question}", inner) + _wrap(f"{attention.answer}", inner)
    num_question = len(_wrap(attention.question, inner))
    head = 22 * len(text) + 10
    size = (inner + 2 * _GAP, _GAP + head + whole.height + (rows * (height + _GAP)) + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    canvas = ImageDraw.Draw(sheet)
    for number, line in enumerate(text):
        ink = _FAINT if number < num_question else _INK
        canvas.text((_GAP, _GAP + 22 * number), line, font=ImageFont.load_default(16), fill=ink)
    sheet.paste(whole, (_GAP, _GAP + head))
    for number, (label, weights) in enumerate(parts):
        row, col = divmod(number, cols)
        left = _GAP + col * (width + _GAP)
        top = 2 * _GAP + head + whole.height + row * (height + _GAP)
        canvas.text((left, top), label, font=ImageFont.load_default(14), fill=_INK)
        sheet.paste(draw_heat(small, attention, weights), (left, top + 22))
    return sheet


def draw_frames(image: Image.Image, attention: AttentionMap, by: str = "word") -> list[Image.Image]:
    """One picture for each part of the answer, its text marked in the whole, to be shown one after the other.

    Args:
        image: As `load_image` returns it.
        attention: Of this image.
        by: `word` or `character`.

    Raises:
        AttentionError: `by` is neither.
    """
    shown = _scaled(image)
    parts = attention.parts(by)
    lines = _lay_out([label for label, _ in parts], max(shown.width, _MIN_SIDE), 5 if by == "word" else 2)
    size = (max(shown.width, _MIN_SIDE) + 2 * _GAP, shown.height + 3 * _GAP + lines[-1].top + 24)
    frames = []
    font = ImageFont.load_default(16)
    for number, (_, weights) in enumerate(parts):
        frame = Image.new("RGB", size, _PAPER)
        canvas = ImageDraw.Draw(frame)
        for index, label in enumerate(lines):
            place = (_GAP + label.left, _GAP + label.top)
            if index == number:
                canvas.rectangle(
                    (place[0] - 2, place[1] - 1, place[0] + label.width + 2, place[1] + 20), fill=_MARK
                )
            canvas.text(place, label.text, font=font, fill=_INK)
        frame.paste(draw_heat(shown, attention, weights), (_GAP, size[1] - _GAP - shown.height))
        frames.append(frame)
    return frames


@dataclass(frozen=True)
class _Label:
    text: str
    left: float
    top: int
    width: float


def _lay_out(labels: list[str], width: int, space: int) -> list[_Label]:
    """Labels one after the other, in lines no wider than `width` px."""
    font = ImageFont.load_default(16)
    found, left, top = [], 0.0, 0
    for label in labels:
        length = font.getlength(label)
        if left and left + length > width:
            left, top = 0.0, top + 24
        found.append(_Label(label, left, top, length))
        left += length + space
    return found


def _scaled(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    scale = min(max(longest, _MIN_SIDE), _MAX_SIDE) / longest
    return image.resize([max(round(side * scale), 1) for side in image.size], Image.Resampling.LANCZOS)


def _shrunk(image: Image.Image, area: float) -> Image.Image:
    scale = min(math.sqrt(area / math.prod(image.size)), _MAX_SIDE / max(image.size))
    return image.resize([max(round(side * scale), 1) for side in image.size], Image.Resampling.LANCZOS)


def _wrap(text: str, width: float) -> list[str]:
    font = ImageFont.load_default(16)
    lines = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
