"""Screenshots: a window with a title, a menu, fields, boxes to tick and buttons, light or dark."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from vlmslice.data.fonts import FontLibrary, spell
from vlmslice.data.phrases import Phrases
from vlmslice.data.samples import READ_QUESTIONS, TaskConfig, TaskSample, ask_several, font_size
from vlmslice.data.scenes import Color, Scene, add_camera_effects
from vlmslice.data.typesetting import Font, Pen, cut, line_height

QUESTIONS = (
    READ_QUESTIONS[0],
    "Read all the text on the screen.",
    "What is written on the screen?",
    "Transcribe the screenshot.",
    "Read the window from top to bottom.",
)


@dataclass(frozen=True)
class Theme:
    ground: Color
    panel: Color
    ink: Color
    faint: Color
    edge: Color
    accent: Color
    on_accent: Color


_ACCENTS: tuple[Color, ...] = ((30, 100, 210), (20, 130, 90), (150, 50, 160), (190, 60, 40), (60, 70, 90))


def random_theme(rng: random.Random) -> Theme:
    accent = rng.choice(_ACCENTS)
    white = (255, 255, 255)
    if rng.random() < 0.5:
        base = rng.randrange(18, 45)
        dark, panel, edge = (base,) * 3, (base + 14,) * 3, (base + 50,) * 3
        return Theme(dark, panel, (rng.randrange(215, 250),) * 3, (170,) * 3, edge, accent, white)
    base = rng.randrange(240, 256)
    light, panel, edge = (base,) * 3, (base - 12,) * 3, (base - 55,) * 3
    return Theme(light, panel, (rng.randrange(10, 50),) * 3, (95,) * 3, edge, accent, white)


@dataclass
class _Window:
    """What has been drawn, as questions need it."""

    title: str
    texts: list[str] = field(default_factory=list)
    menu: list[str] = field(default_factory=list)
    chosen: str = ""
    fields: dict[str, str] = field(default_factory=dict)
    ticked: dict[str, bool] = field(default_factory=dict)
    buttons: list[str] = field(default_factory=list)


def read_screen(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> TaskSample:
    """A window that fills the picture; asks for all of it or for one of its parts."""
    phrases = Phrases(rng, config.split, config.accents)
    font = fonts.draw(rng, font_size(rng, config, max(9, min(height / 6, width / 12))))
    theme = random_theme(rng)
    scene = Scene(Image.new("RGB", (width, height), theme.ground))
    pen = Pen(scene, theme.ink)
    unit = line_height(font)
    title = cut(spell(phrases.heading(rng.randint(1, 3)), font), font, 0.9 * width - 0.5 * unit)
    window = _Window(title, [title])
    bar = min(height, 1.6 * unit)
    pen.draw.rectangle((0, 0, width, bar), fill=theme.panel)
    pen.write(title, font, (bar - unit) / 2, 0.5 * unit, kind="title")
    free = width - font.getlength(title) - 1.2 * unit
    for i in range(min(3, int(free / (0.9 * unit)))):
        x, y, r = width - (i + 1) * 0.9 * unit, bar / 2, 0.22 * unit
        pen.draw.ellipse((x - r, y - r, x + r, y + r), fill=theme.edge)
    left = 0.5 * unit
    if width > 18 * font.size and rng.random() < 0.6:
        left = _draw_menu(rng, phrases, pen, font, theme, window, bar, height) + 0.7 * unit
    _draw_form(
        rng, config, phrases, pen, font, theme, window, (bar + 0.5 * unit, left, height, width - 0.5 * unit)
    )
    scene.image = add_camera_effects(rng, scene.image, 0.4)
    return ask_several(rng, config, "screenshot", scene, lambda: _ask(rng, window))


def _draw_menu(
    rng: random.Random,
    phrases: Phrases,
    pen: Pen,
    font: Font,
    theme: Theme,
    window: _Window,
    top: float,
    height: int,
) -> float:
    """Draws a menu along the left side; returns where it ends."""
    unit = line_height(font)
    number = min(rng.randint(2, 6), max(1, int((height - top) / (1.7 * unit))))
    window.menu = [spell(word, font) for word in phrases.distinct_words(number, 9)]
    right = max(font.getlength(word) for word in window.menu) + 1.4 * unit
    pen.draw.rectangle((0, top, right, height), fill=theme.panel)
    window.chosen = rng.choice(window.menu)
    for i, word in enumerate(window.menu):
        y = top + (0.3 + 1.7 * i) * unit
        if y + 1.3 * unit > height:
            window.menu = window.menu[:i]
            if window.chosen not in window.menu:
                window.chosen = ""
            break
        if word == window.chosen:
            pen.draw.rectangle((0, y - 0.15 * unit, right, y + 1.15 * unit), fill=theme.accent)
        pen.write(
            word, font, y, 0.6 * unit, theme.on_accent if word == window.chosen else theme.ink, kind="menu"
        )
    window.texts += window.menu
    return right


def _draw_form(
    rng: random.Random,
    config: TaskConfig,
    phrases: Phrases,
    pen: Pen,
    font: Font,
    theme: Theme,
    window: _Window,
    box: tuple[float, float, float, float],
) -> None:
    """Draws rows of fields, boxes, text and buttons until the room or the answer's length is used up."""
    top, left, bottom, right = box
    unit = line_height(font)
    names = iter(phrases.distinct_words(12, 9))
    kinds = rng.choices(("field", "tick", "text", "buttons"), (4, 2, 2, 1), k=rng.randint(1, 8))
    if rng.random() < 0.7:
        kinds.append("buttons")
    room = right - left
    for kind in kinds:
        if top + 1.6 * unit > bottom or sum(map(len, window.texts)) > config.max_answer - 60:
            return
        text_top = top + 0.25 * unit
        if kind == "field":
            name = cut(spell(next(names), font), font, 0.45 * room)
            value = cut(spell(phrases.entry(), font), font, 0.45 * room)
            pen.write(name, font, text_top, left, kind="label")
            start = left + 0.48 * room
            pen.draw.rectangle((start, top, right, top + 1.5 * unit), outline=theme.edge, fill=theme.panel)
            pen.write(value, font, text_top, start + 0.02 * room, kind="field")
            if name in window.fields:
                return
            window.fields[name] = value
            window.texts.append(f"{name} {value}")
        elif kind == "tick":
            name = cut(spell(next(names), font), font, max(1.0, room - 1.8 * unit))
            ticked = rng.random() < 0.5
            square = (left, text_top, left + unit, text_top + unit)
            pen.draw.rectangle(square, outline=theme.ink, width=max(1, round(unit / 12)))
            if ticked:
                corners = [(0.2, 0.55), (0.42, 0.8), (0.85, 0.2)]
                stroke = [(left + x * unit, text_top + y * unit) for x, y in corners]
                pen.draw.line(stroke, fill=theme.ink, width=max(1, round(unit / 8)))
            pen.write(name, font, text_top, left + 1.5 * unit, kind="tick")
            window.ticked[name] = ticked
            window.texts.append(name)
        elif kind == "text":
            words = [spell(word, font) for word in phrases.sentence()]
            line = cut(" ".join(words[: config.num_words[1] + 2]), font, room)
            pen.write(line, font, text_top, left, theme.faint, kind="text")
            window.texts.append(line)
        else:
            _draw_buttons(rng, names, pen, font, theme, window, (top, left, right))
        top += (1.5 + rng.uniform(0.3, 0.9)) * unit


def _draw_buttons(
    rng: random.Random,
    names: Iterator[str],
    pen: Pen,
    font: Font,
    theme: Theme,
    window: _Window,
    place: tuple[float, float, float],
) -> None:
    """Draws one or two buttons side by side from `place`: top, left and the right end of the room."""
    top, left, right = place
    unit = line_height(font)
    row = []
    for i in range(rng.randint(1, 2)):
        name = cut(spell(next(names), font), font, max(1.0, right - left - unit))
        wide = font.getlength(name) + 1.2 * unit
        if left + wide > right and i:
            break
        filled = i == 0
        box = (left, top, min(right, left + wide), top + 1.5 * unit)
        radius = 0.3 * unit * rng.choice((0, 1))
        pen.draw.rounded_rectangle(
            box, radius, outline=theme.edge, fill=theme.accent if filled else theme.panel
        )
        pen.write_middle(
            name,
            font,
            top + 0.25 * unit,
            (box[0] + box[2]) / 2,
            theme.on_accent if filled else theme.ink,
            kind="button",
        )
        row.append(name)
        left += wide + 0.6 * unit
    window.buttons += row
    window.texts.append(" ".join(row))


def _ask(rng: random.Random, window: _Window) -> tuple[str, str]:
    whole = "\n".join(window.texts)
    asked = [[(question, whole) for question in QUESTIONS]]
    asked.append([(q, window.title) for q in ("What is the title of the window?", "Read the title bar.")])
    if window.chosen:
        menu = ("Which menu entry is selected?", "Which entry of the menu is highlighted?")
        asked.append([(q, window.chosen) for q in menu])
        asked.append([("Read the menu.", "\n".join(window.menu))])
    if window.fields:
        name, value = rng.choice(list(window.fields.items()))
        asked.append([(f"What is in the field {name}?", value), (f"What is the value of {name}?", value)])
    if len(window.buttons) == 1:
        asked.append([("What does the button say?", window.buttons[0])])
    elif window.buttons:
        asked.append([("How many buttons are there?", str(len(window.buttons)))])
    if window.ticked:
        name, ticked = rng.choice(list(window.ticked.items()))
        asked.append([(f"Is {name} ticked?", "yes" if ticked else "no")])
    return rng.choice(rng.choice(asked + asked[:1]))
