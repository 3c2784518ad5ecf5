"""Lines of text on a picture: breaking, cutting to a width, and writing with boxes for glyphs, words and lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from PIL import ImageDraw, ImageFont

from vlmslice.data.fonts import spell
from vlmslice.data.scenes import Box, Color, Glyph, Region, Scene, approximate_length, draw_line

Font = ImageFont.FreeTypeFont


def line_height(font: Font) -> int:
    ascent, descent = font.getmetrics()
    return ascent + descent


def cut(text: str, font: Font, width: float) -> str:
    """`text` without the last words, then letters, that do not fit `width` px; one letter is left in any case."""
    while len(text) > 1 and approximate_length(font, text) > width:
        text = text.rpartition(" ")[0] if " " in text else text[:-1]
    return text


def fill_lines(
    sentence: Callable[[], list[str]],
    font: Font,
    width: float,
    num_lines: int,
    max_characters: int,
    longest: int = 1000,
) -> list[str]:
    """Lines of running text, no wider than `width` px.

    Args:
        sentence: gives the tokens of the next sentence.
        font: in which widths are measured and characters must exist.
        width: of a line, px.
        num_lines: so many at most.
        max_characters: of all lines together with their breaks at most; the first line is there in any case.
        longest: characters of a line at most, but for a single word.
    """
    lines: list[str] = []
    tokens: list[str] = []
    total = -1
    for _ in range(num_lines):
        line = ""
        while True:
            tokens = tokens or [spell(token, font) for token in sentence()]
            longer = f"{line} {tokens[0]}" if line else tokens[0]
            if line and (len(longer) > longest or approximate_length(font, longer) > width):
                break
            line = cut(longer, font, width)
            tokens.pop(0)
        total += 1 + len(line)
        if lines and total > max_characters:
            break
        lines.append(line)
    return lines


def add_text(
    scene: Scene, text: str, font: Font, left: float, baseline: float, upwards: bool = False
) -> None:
    """Adds the boxes of a line that another program wrote, as `Pen.write` gives them.

    Args:
        scene: added to.
        text: the line.
        font: it is written in.
        left: where its first character starts, px.
        baseline: y at that point, px from the top; with `upwards` the line runs up from there, its feet to the right.
    """
    ascent, _ = font.getmetrics()
    cap = ascent - font.getbbox("H")[1]
    drop = 0.18 * cap
    stretch = font.getlength(text) / max(approximate_length(font, text), 1e-6)

    def box(start: float, end: float) -> Box:
        if upwards:
            return baseline - end, left - cap - drop, baseline - start, left + drop
        return baseline - cap - drop, left + start, baseline + drop, left + end

    start, boxes = 0.0, []
    for character in text:
        end = start + approximate_length(font, character) * stretch
        if not character.isspace():
            boxes.append(box(start, end))
            scene.glyphs.append(Glyph(character, boxes[-1]))
        start = end
    if not upwards:
        scene.regions += _words(text, boxes)
    scene.regions.append(Region("line", text, box(0.0, start)))


def add_evenly(scene: Scene, text: str, box: Box) -> None:
    """Adds the boxes of a line of print of which only the box of the whole is known: characters of one width."""
    top, left, bottom, right = box
    step = (right - left) / max(1, len(text))
    glyphs = [
        Glyph(character, (top, left + i * step, bottom, left + (i + 1) * step))
        for i, character in enumerate(text)
        if not character.isspace()
    ]
    scene.glyphs += glyphs
    scene.regions += [*_words(text, [glyph.box for glyph in glyphs]), Region("line", text, box)]


class Pen:
    """Writes on a scene, with a box for each glyph, word and line."""

    def __init__(self, scene: Scene, ink: Color):
        self.scene, self.ink = scene, ink
        self.draw = ImageDraw.Draw(scene.image)

    def write(
        self, text: str, font: Font, top: float, left: float, ink: Color | None = None, kind: str = "line"
    ) -> Box:
        """Writes one line of text and returns its box; `kind` names its region."""
        glyphs = draw_line(self.draw, text, font, top, left, ink or self.ink)
        self.scene.glyphs += glyphs
        words = _words(text, [glyph.box for glyph in glyphs])
        box = _around(words[0].box, words[-1].box)
        self.scene.regions += [*words, Region(kind, text, box)]
        return box

    def write_right(
        self, text: str, font: Font, top: float, right: float, ink: Color | None = None, kind: str = "line"
    ) -> Box:
        """As `write`, ending at `right`."""
        return self.write(text, font, top, right - font.getlength(text), ink, kind)

    def write_middle(
        self, text: str, font: Font, top: float, middle: float, ink: Color | None = None, kind: str = "line"
    ) -> Box:
        """As `write`, with `middle` as the centre of the line."""
        return self.write(text, font, top, middle - font.getlength(text) / 2, ink, kind)

    def mark(self, kind: str, text: str, box: Box, value: float | None = None) -> None:
        """Adds a region that is not a line of text."""
        self.scene.regions.append(Region(kind, text, box, value))


def _words(text: str, boxes: Iterable[Box]) -> list[Region]:
    """The words of a line whose visible characters have these boxes."""
    places = iter(boxes)
    words = []
    for word in text.split():
        of_word = [next(places) for _ in word]
        words.append(Region("word", word, _around(of_word[0], of_word[-1])))
    return words


def _around(first: Box, last: Box) -> Box:
    return min(first[0], last[0]), first[1], max(first[2], last[2]), last[3]
