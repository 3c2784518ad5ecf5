"""Draws an image beside what a model said about it, with a mark at each part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from vlmslice.data.fonts import load_font, matplotlib_font_dir
from vlmslice.marking import Mark, Marked, Row

_PAPER, _FRAME, _FAINT = (255, 255, 255), (205, 205, 205), (120, 120, 120)
_RULE = (228, 228, 228)
_INKS = {
    Mark.NONE: (40, 40, 40),
    Mark.RIGHT: (20, 110, 55),
    Mark.WRONG: (190, 35, 40),
    Mark.MISSED: (120, 120, 120),
    Mark.NOTE: (120, 120, 120),
}
_MARGIN, _LEADING, _SIGN, _COLUMN_GAP = 20, 25, 20, 18
_PANEL_WIDTH, _IMAGE_SIDES = 460, (600, 560)  # px; height and width of the image at most
_SIZE = 16

_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def draw_answer_sheet(image: Image.Image, asked: Sequence[tuple[str, Marked]]) -> Image.Image:
    """The image, and beside it (below a wide one) each question with its answer: a tick at what is right, a cross at
    what is wrong, and in grey what is missed.

    Args:
        image: What was asked about.
        asked: Questions with their marked answers.
    """
    is_wide = image.width > 2 * image.height
    most = (_IMAGE_SIDES[0], 2 * _PANEL_WIDTH) if is_wide else _IMAGE_SIDES
    scale = min(most[0] / image.height, most[1] / image.width, 2.0)
    shown = image.resize(
        (max(round(image.width * scale), 1), max(round(image.height * scale), 1)), Image.Resampling.LANCZOS
    )
    panel_width = max(shown.width, _PANEL_WIDTH) if is_wide else _PANEL_WIDTH
    panel = _draw_panel(asked, panel_width)
    if is_wide:
        size = (panel.width + 2 * _MARGIN, shown.height + panel.height + 3 * _MARGIN)
        place = (_MARGIN, shown.height + 2 * _MARGIN)
    else:
        size = (shown.width + panel.width + 3 * _MARGIN, max(shown.height, panel.height) + 2 * _MARGIN)
        place = (shown.width + 2 * _MARGIN, _MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    sheet.paste(shown, (_MARGIN, _MARGIN))
    edge = (_MARGIN - 1, _MARGIN - 1, _MARGIN + shown.width, _MARGIN + shown.height)
    ImageDraw.Draw(sheet).rectangle(edge, outline=_FRAME)
    sheet.paste(panel, place)
    return sheet


def _draw_panel(asked: Sequence[tuple[str, Marked]], width: int) -> Image.Image:
    panel = Image.new("RGB", (width, 8000), _PAPER)  # cut to what was written
    canvas = ImageDraw.Draw(panel)
    font = _font(_SIZE)
    top = 0
    for question, marked in asked:
        for line in _wrap(question, font, width):
            canvas.text((0, top), line, font=font, fill=(0, 0, 0), stroke_width=0.3)
            top += _LEADING
        top += 4
        widths = _column_widths(marked.rows, font, width)
        for row in marked.rows:
            top += _draw_row(canvas, row, widths[len(row)], font, top, width)
            if len(row) > 1:
                canvas.line((0, top - 2, min(sum(widths[len(row)]), width), top - 2), fill=_RULE)
        top += 2
        for line in _wrap(marked.summary, font, width):
            canvas.text((0, top), line, font=font, fill=_FAINT)
            top += _LEADING
        top += _LEADING // 2
    return panel.crop((0, 0, width, min(max(top, 1), panel.height)))


def _column_widths(rows: Sequence[Row], font: _Font, width: int) -> dict[int, list[float]]:
    """Widths of the columns of rows with so many cells; they shrink evenly where they would not fit."""
    found: dict[int, list[float]] = {}
    for row in rows:
        lengths = [font.getlength(cell.text) + _SIGN + _COLUMN_GAP for cell in row]
        before = found.get(len(row), [0.0] * len(row))
        found[len(row)] = [max(pair) for pair in zip(before, lengths, strict=True)]
    for number, widths in found.items():
        if sum(widths) > width and number > 1:
            fair = width / number
            spare = width - sum(min(length, fair) for length in widths)
            greedy = sum(length > fair for length in widths)
            found[number] = [length if length <= fair else fair + spare / greedy for length in widths]
    return found


def _draw_row(
    canvas: ImageDraw.ImageDraw, row: Row, widths: Sequence[float], font: _Font, top: int, width: int
) -> int:
    """Writes a row and returns its height."""
    left, num_lines = 0.0, 1
    for cell, column in zip(row, widths, strict=True):
        room = (column if len(row) > 1 else width) - _SIGN
        lines = _wrap(cell.text, font, room)
        _draw_sign(canvas, cell.mark, left, top)
        for number, line in enumerate(lines):
            canvas.text((left + _SIGN, top + number * _LEADING), line, font=font, fill=_INKS[cell.mark])
        num_lines = max(num_lines, len(lines))
        left += column
    return num_lines * _LEADING


def _draw_sign(canvas: ImageDraw.ImageDraw, mark: Mark, left: float, top: float) -> None:
    """A tick, a cross or a dash: colour alone does not tell all readers."""
    y, ink = top + 10, _INKS[mark]
    if mark is Mark.RIGHT:
        canvas.line((left + 2, y, left + 5, y + 4, left + 12, y - 5), fill=ink, width=2)
    elif mark is Mark.WRONG:
        canvas.line((left + 2, y - 4, left + 10, y + 4), fill=ink, width=2)
        canvas.line((left + 2, y + 4, left + 10, y - 4), fill=ink, width=2)
    elif mark is Mark.MISSED:
        canvas.line((left + 2, y, left + 10, y), fill=ink, width=2)


def _wrap(text: str, font: _Font, width: float) -> list[str]:
    """Lines no wider than `width` px; a word that is wider is broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line] or [""]


@lru_cache
def _font(size: int) -> _Font:
    carried = matplotlib_font_dir()  # Pillow's own font lacks accented letters
    return load_font(str(carried / "DejaVuSans.ttf"), size - 1) if carried else ImageFont.load_default(size)
