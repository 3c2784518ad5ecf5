"""Draws an attention map over its image: heat for the whole answer, and one small picture for each of its words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vlmslice.attention_map import AttentionMap, Part

_INK, _FAINT, _PAPER, _MARK = (40, 40, 40), (120, 120, 120), (255, 255, 255), (255, 214, 92)
_COLD, _HOT = np.array((255.0, 190.0, 40.0)), np.array((200.0, 0.0, 40.0))
_GAP, _MIN_SIDE, _MAX_SIDE, _FRAME_AREA = 16, 480, 900, 210 * 160
_LITTLE = 0.05  # attention on the image, of 1, with which a part is said to look at nothing
_GREYED, _FADED = 0.6, 0.35  # of the image under the heat, shares of grey and then of white


def draw_heat(image: Image.Image, attention: AttentionMap, weights: np.ndarray) -> Image.Image:
    """The image, faded, with heat where the weight is: from yellow for little to red for the most.

    All of it is the fainter, the more of the weight lies on "nothing".

    Args:
        image: Of the map, at any resolution; the drawing has the same.
        attention: The map.
        weights: `float64[M]`, such as one of `attention.parts()`.
    """
    faded = Image.blend(image, image.convert("L").convert("RGB"), _GREYED)
    faded = Image.blend(faded, Image.new("RGB", image.size, _PAPER), _FADED)
    heat = attention.heat(weights, image.height, image.width)
    # Edges of tokens say nothing; half a token of blur takes them off.
    sides = attention.boxes[:, 2] - attention.boxes[:, 0]
    radius = 0.35 * float(np.median(sides)) * image.height / attention.plan.image_size[0]
    highest = heat.max()
    if highest <= 0:
        return faded
    # Weights span decades; the root shows a twentieth of the most as a quarter.
    grey = Image.fromarray(np.rint(255 * np.sqrt(heat / highest * min(weights.sum(), 1.0))).astype(np.uint8))
    strength = np.asarray(grey.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64)[..., None] / 255
    color = _COLD + (_HOT - _COLD) * strength
    alpha = 0.85 * np.minimum(1.3 * strength, 1.0)
    return Image.fromarray(np.rint(np.asarray(faded) * (1 - alpha) + color * alpha).astype(np.uint8))


def draw_attention(
    image: Image.Image, attention: AttentionMap, by: str = "word", max_parts: int = 60
) -> Image.Image:
    """Question and answer, the heat of the whole answer, and below it a small picture for each of its parts.

    Args:
        image: As `load_image` returns it.
        attention: Of this image.
        by: `word` or `character`.
        max_parts: Most small pictures.

    Raises:
        AttentionError: `by` is neither.
    """
    parts = attention.parts(by)[:max_parts]
    whole = draw_heat(_scaled(image), attention, attention.weights.mean(axis=0))
    inner = max(whole.width, _MIN_SIDE)
    # As many small pictures in a row as fill it.
    wide = math.sqrt(_FRAME_AREA * image.width / image.height)
    cols = min(max(round((inner + _GAP) / (wide + _GAP)), 1), max(len(parts), 3))
    width = min((inner - (cols - 1) * _GAP) // cols, round(1.4 * wide))
    small = image.resize((width, max(round(image.height * width / image.width), 1)), Image.Resampling.LANCZOS)
    lines = [(line, _FAINT) for line in _wrap(attention.question, inner)]
    lines += [(line, _INK) for line in _wrap(attention.answer, inner)]
    head = _GAP + 22 * len(lines) + 10
    first, step = head + whole.height + _GAP, small.height + 22 + _GAP
    rows = math.ceil(len(parts) / cols)
    sheet = Image.new("RGB", (inner + 2 * _GAP, first + rows * step), _PAPER)
    canvas = ImageDraw.Draw(sheet)
    for number, (line, ink) in enumerate(lines):
        canvas.text((_GAP, _GAP + 22 * number), line, font=ImageFont.load_default(16), fill=ink)
    sheet.paste(whole, (_GAP, head))
    for number, part in enumerate(parts):
        left, top = _GAP + number % cols * (width + _GAP), first + number // cols * step
        label = part.label if part.weights.sum() > _LITTLE else f"{part.label} (looked at nothing)"
        canvas.text((left, top), label, font=ImageFont.load_default(14), fill=_INK)
        sheet.paste(draw_heat(small, attention, part.weights), (left, top + 22))
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
    shown, parts = _scaled(image), attention.parts(by)
    width = max(shown.width, _MIN_SIDE)
    labels = _lay_out(parts, width)
    size = (width + 2 * _GAP, shown.height + 3 * _GAP + (labels[-1].top if labels else 0) + 20)
    font, frames = ImageFont.load_default(16), []
    for part in parts:
        frame = Image.new("RGB", size, _PAPER)
        canvas = ImageDraw.Draw(frame)
        for label in labels:
            left, top = _GAP + label.left, _GAP + label.top
            if label.part is part:
                canvas.rectangle((left - 2, top - 1, left + label.width + 2, top + 20), fill=_MARK)
            canvas.text((left, top), label.part.label, font=font, fill=_INK)
        frame.paste(draw_heat(shown, attention, part.weights), (_GAP, size[1] - _GAP - shown.height))
        frames.append(frame)
    return frames


@dataclass(frozen=True)
class _Label:
    part: Part
    left: float
    top: int
    width: float


def _lay_out(parts: list[Part], width: int) -> list[_Label]:
    """Labels one after the other, in lines no wider than `width` px, with space where tokens stand between them."""
    font = ImageFont.load_default(16)
    found: list[_Label] = []
    left, top = 0.0, 0
    for part in parts:
        length = font.getlength(part.label)
        if found:
            before = found[-1].part
            is_next = part.tokens[0] == before.tokens[-1] + 1 and not part.label.startswith("point")
            left += 1 if is_next and len(part.label) == 1 else 7
        if left and left + length > width:
            left, top = 0.0, top + 24
        found.append(_Label(part, left, top, length))
        left += length
    return found


def _scaled(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    scale = min(max(longest, _MIN_SIDE), _MAX_SIDE) / longest
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
