"""Charts in styles of our own, drawn with Pillow within milliseconds, every mark and glyph known to the pixel."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from vlmslice.data.fonts import FontLibrary
from vlmslice.data.plot_types import Plot, nice_ticks
from vlmslice.data.samples import TaskConfig
from vlmslice.data.scenes import Box, Color, Region, Scene, draw_line, luminance
from vlmslice.data.shapes import COLORS
from vlmslice.data.typesetting import Font, Pen, line_height


@dataclass(frozen=True)
class Style:
    """Colours and lines of a chart.

    Attributes:
        ground: of the picture.
        panel: of the plotted area.
        ink: of the text.
        grid: colour of the grid lines, or None for none.
        frame: sides of the plotted area that are drawn, of "l", "b", "t" and "r".
        legend: "top" or "right".
        outlined: whether marks have an outline.
    """

    ground: Color
    panel: Color
    ink: Color
    grid: Color | None
    frame: str
    legend: str
    outlined: bool = False


_WHITE, _BLACK = (255, 255, 255), (20, 20, 20)
STYLES: dict[str, tuple[Style, ...]] = {
    "train": (
        Style(_WHITE, _WHITE, _BLACK, (220, 220, 220), "lb", "top"),
        Style(_WHITE, _WHITE, (60, 60, 60), None, "lb", "right"),
        Style(_WHITE, (235, 235, 240), (50, 50, 50), _WHITE, "", "right"),
        Style((250, 245, 232), (250, 245, 232), (70, 50, 30), (222, 210, 190), "b", "top", True),
        Style((28, 30, 36), (28, 30, 36), (225, 225, 225), (62, 66, 74), "lb", "top"),
        Style((240, 246, 252), _WHITE, (25, 45, 80), (214, 224, 236), "lbtr", "right", True),
    ),
    "eval": (
        Style((244, 244, 244), _WHITE, (35, 35, 35), (205, 205, 205), "lbtr", "top"),
        Style((18, 24, 48), (30, 38, 66), (235, 235, 245), (60, 70, 104), "", "right", True),
        Style((233, 242, 233), (233, 242, 233), (20, 50, 30), None, "b", "right"),
    ),
}
"""Styles by split; an evaluation chart never looks like a training chart."""

_SMALLEST = 9


def series_colors(rng: random.Random, number: int, ground: Color) -> list[str]:
    """Names of colours that stand out from `ground`, no two near one another."""

    def apart(a: Color, b: Color) -> bool:
        return max(abs(x - y) for x, y in zip(a, b, strict=True)) > 70

    names = [
        name
        for name, color in COLORS.items()
        if apart(color, ground) and abs(luminance(color) - luminance(ground)) > 25
    ]
    chosen: list[str] = []
    for name in rng.sample(names, len(names)):
        if all(apart(COLORS[name], COLORS[other]) for other in chosen):
            chosen.append(name)
    while len(chosen) < number:
        chosen.append(rng.choice([name for name in names if name not in chosen] or list(COLORS)))
    return chosen[:number]


def draw_with_pillow(
    rng: random.Random,
    config: TaskConfig,
    fonts: FontLibrary,
    plot: Plot,
    height: int,
    width: int,
    font_px: int | None = None,
) -> tuple[Scene, tuple[str, ...]]:
    """Draws a plot that fills the picture, by default in print that suits its size.

    Returns:
        The scene, with a region for each mark, and the colour names of the series as `plots.ask` takes them.
    """
    style = rng.choice(STYLES[config.split])
    scene = Scene(Image.new("RGB", (width, height), style.ground))
    pen = Pen(scene, style.ink)
    if font_px is None:
        font_px = max(_SMALLEST, min(36, round(min(height / 17, width / 24) * rng.uniform(0.85, 1.15))))
    font = fonts.draw(rng, font_px)
    canvas = _Canvas(rng, style, pen, font, plot, height, width)
    if plot.kind == "pie":
        canvas.draw_pie()
        return scene, ()
    names = canvas.names
    canvas.draw_axes()
    others = {
        "horizontal": canvas.draw_horizontal,
        "line": canvas.draw_lines,
        "scatter": canvas.draw_points,
    }
    others.get(plot.kind, canvas.draw_bars)()
    return scene, tuple(names) if len(plot.series) > 1 else ()


def has_room(plot: Plot, font: Font, room: float) -> bool:
    """Whether every value can be printed at 8 px or more within `room` px."""
    longest = max(font.getlength(f"{value:g}") for series in plot.series for value in series.values)
    return longest * 8 / font.size <= room


class _Canvas:
    """One chart being drawn; coordinates of the plotted area are `top`, `left`, `bottom`, `right`, px."""

    def __init__(
        self, rng: random.Random, style: Style, pen: Pen, font: Font, plot: Plot, height: int, width: int
    ):
        self.rng, self.style, self.pen, self.font, self.plot = rng, style, pen, font, plot
        self.height, self.width = height, width
        self.unit = line_height(font)
        self.thin = max(1, round(font.size / 14))
        number = len(plot.categories) if plot.kind == "pie" else len(plot.series)
        self.names = series_colors(rng, number, style.panel)
        self.colors = [COLORS[name] for name in self.names]
        self.top = self._draw_title()
        self.left, self.bottom, self.right = 0.04 * width, 0.97 * height, 0.97 * width
        if len(plot.series) > 1:
            self._draw_legend([series.name for series in plot.series])

    def _fit(self, text: str, room: float) -> Font:
        """The font, smaller if `text` is wider than `room`."""
        wide = self.font.getlength(text)
        if wide <= room:
            return self.font
        return self.font.font_variant(size=max(7, int(self.font.size * room / wide)))

    def _draw_title(self) -> float:
        large = self.font.font_variant(size=round(self.font.size * self.rng.uniform(1.0, 1.4)))
        room = 0.96 * self.width / max(1.0, large.getlength(self.plot.title))
        if room < 1:
            large = large.font_variant(size=max(7, int(large.size * room)))
        top = 0.015 * self.height
        if self.rng.random() < 0.7:
            self.pen.write_middle(self.plot.title, large, top, self.width / 2, kind="title")
        else:
            self.pen.write(self.plot.title, large, top, 0.02 * self.width, kind="title")
        return top + line_height(large) + 0.5 * self.unit

    def _draw_legend(self, names: list[str]) -> None:
        """Names beside squares of their colours, on top or on the right; takes its room from the plotted area."""
        square = 0.6 * self.font.size
        widths = [self.font.getlength(name) + 2.2 * self.font.size for name in names]
        if self.style.legend == "top" and sum(widths) < 0.94 * self.width:
            x, y = (self.width - sum(widths)) / 2, self.top
            places = [(y, x + sum(widths[:i])) for i in range(len(names))]
            self.top += 1.3 * self.unit
        else:
            self.right -= max(widths)
            places = [
                (self.top + (0.5 + 1.3 * i) * self.unit, self.right + 0.6 * self.font.size)
                for i in range(len(names))
            ]
        for (y, x), name, color in zip(places, names, self.colors, strict=True):
            middle = y + self.unit / 2
            box = (x, middle - square / 2, x + square, middle + square / 2)
            self.pen.draw.rectangle(box, fill=color)
            self.pen.write(name, self.font, y, x + 1.6 * square, kind="legend")

    def draw_axes(self) -> None:
        """Draws panel, grid, ticks and axis labels, and settles the plotted area."""
        plot, unit = self.plot, self.unit
        sideways = plot.kind == "horizontal"
        highest = 100.0 if plot.kind == "scatter" else plot.highest
        # Room for a printed value over the highest mark.
        self.reach = highest * (1.18 if plot.printed else self.rng.uniform(1.03, 1.15))
        ticks = nice_ticks(self.reach, self.rng.randint(4, 7))
        texts = [f"{tick:g}" for tick in ticks]
        widest = max(map(self.font.getlength, texts))
        x_label, y_label = (plot.y_label, plot.x_label) if sideways else (plot.x_label, plot.y_label)
        aside = self.rng.random() < 0.6
        if aside:
            middle = (self.top + self.bottom) / 2
            self._write_upwards(y_label, middle, 0.015 * self.width)
            self.left = 0.015 * self.width + 1.2 * unit
        else:
            self.pen.write(y_label, self.font, self.top - 0.3 * unit, 0.015 * self.width, kind="axis")
            self.top += 0.9 * unit
            self.left = 0.015 * self.width
        names_wide = max((self.font.getlength(c) for c in plot.categories), default=0.0)
        self.left += (min(names_wide, 0.3 * self.width) if sideways else widest) + 0.6 * unit
        self.pen.write_middle(
            x_label, self.font, self.bottom - unit, (self.left + self.right) / 2, kind="axis"
        )
        self.bottom -= 2.4 * unit
        self.pen.draw.rectangle((self.left, self.top, self.right, self.bottom), fill=self.style.panel)
        for tick, text in zip(ticks, texts, strict=True):
            if sideways:
                x = self.x(tick)
                if self.style.grid:
                    self.pen.draw.line((x, self.top, x, self.bottom), fill=self.style.grid, width=self.thin)
                self._write_tick(text, x)
            else:
                y = self.y(tick)
                if self.style.grid:
                    self.pen.draw.line((self.left, y, self.right, y), fill=self.style.grid, width=self.thin)
                self.pen.write_right(text, self.font, y - 0.55 * unit, self.left - 0.35 * unit, kind="tick")
        if plot.kind == "scatter":
            for tick in nice_ticks(self.reach, 5):
                self._write_tick(f"{tick:g}", self.x(tick))
        sides = {
            "l": (self.left, self.top, self.left, self.bottom), "b": (self.left, self.bottom, self.right, self.bottom),
            "t": (self.left, self.top, self.right, self.top), "r": (self.right, self.top, self.right, self.bottom),
        }  # fmt: skip
        for side in self.style.frame:
            self.pen.draw.line(sides[side], fill=self.style.ink, width=self.thin)

    def _write_upwards(self, text: str, middle: float, left: float) -> None:
        """Writes a line that runs from bottom to top, drawn lying and turned."""
        font = self._fit(text, 0.9 * (self.bottom - self.top))
        long, tall = int(font.getlength(text)) + 2, line_height(font)
        lying = Image.new("RGB", (long, tall), self.style.ground)
        glyphs = draw_line(ImageDraw.Draw(lying), text, font, 0, 0, self.style.ink)
        top = middle - long / 2
        self.pen.scene.image.paste(lying.transpose(Image.Transpose.ROTATE_90), (round(left), round(top)))
        left, top = round(left), round(top)
        for glyph in glyphs:
            a, b, c, d = glyph.box
            box = (top + long - d, left + a, top + long - b, left + c)
            self.pen.scene.glyphs.append(type(glyph)(glyph.character, box))
        self.pen.scene.regions.append(Region("axis", text, (top, left, top + long, left + tall)))

    def _write_tick(self, text: str, x: float) -> None:
        """Below the x axis at `x`, or as near to it as the picture has room."""
        middle = min(x, self.width - 1 - self.font.getlength(text) / 2)
        self.pen.write_middle(text, self.font, self.bottom + 0.2 * self.unit, middle, kind="tick")

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * value / self.reach

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * value / self.reach

    def _print(self, value: float, middle: float, y: float, room: float, ink: Color | None = None) -> None:
        """Writes a value centred at `middle`, its line ending at `y`."""
        text = f"{value:g}"
        font = self._fit(text, room)
        self.pen.write_middle(text, font, y - 1.02 * line_height(font), middle, ink, kind="value")

    def _bar(self, box: Box, color: Color, text: str, value: float) -> None:
        top, left, bottom, right = box
        outline = self.style.ink if self.style.outlined else None
        self.pen.draw.rectangle((left, top, right, bottom), fill=color, outline=outline, width=self.thin)
        self.pen.mark("bar", text, box, value)

    def draw_bars(self) -> None:
        """Single, grouped or stacked bars over the names of the categories."""
        plot = self.plot
        slot = (self.right - self.left) / len(plot.categories)
        share = self.rng.uniform(0.5, 0.85)
        stacked = plot.kind == "stacked"
        wide = share * slot / (1 if stacked else len(plot.series))
        printed = plot.printed and (len(plot.series) == 1 or has_room(plot, self.font, wide))
        names_font = self._fit(max(plot.categories, key=self.font.getlength), 0.94 * slot)
        for i, category in enumerate(plot.categories):
            middle = self.left + (i + 0.5) * slot
            self.pen.write_middle(
                category, names_font, self.bottom + 0.2 * self.unit, middle, kind="category"
            )
            base = 0.0
            for j, series in enumerate(plot.series):
                value = series.values[i]
                left = middle - share * slot / 2 + (0 if stacked else j * wide)
                box = (self.y(base + value), left, self.y(base), left + 0.96 * wide)
                name = category if len(plot.series) == 1 else f"{category} {series.name}"
                self._bar(box, self.colors[j], name, value)
                if printed and stacked:
                    if box[2] - box[0] > 1.1 * self.unit:
                        ink = _BLACK if luminance(self.colors[j]) > 120 else _WHITE
                        self._print(
                            value, left + wide / 2, (box[0] + box[2] + self.unit) / 2, 0.9 * wide, ink
                        )
                elif printed:
                    self._print(
                        value, left + wide / 2, box[0], 1.1 * wide if len(plot.series) > 1 else 0.94 * slot
                    )
                base += value if stacked else 0

    def draw_horizontal(self) -> None:
        """Bars that run to the right, their names on the left; the first on top."""
        slot = (self.bottom - self.top) / len(self.plot.categories)
        tall = self.rng.uniform(0.5, 0.85) * slot
        room = self.left - 1.2 * self.unit
        longest = max(self.plot.categories, key=self.font.getlength)
        names_font = self._fit(longest, room)
        for i, (category, value) in enumerate(
            zip(self.plot.categories, self.plot.series[0].values, strict=True)
        ):
            middle = self.top + (i + 0.5) * slot
            box = (middle - tall / 2, self.left, middle + tall / 2, self.x(value))
            self._bar(box, self.colors[0], category, value)
            half = line_height(names_font) / 2
            self.pen.write_right(
                category, names_font, middle - half, self.left - 0.3 * self.unit, kind="category"
            )
            if self.plot.printed:
                text = f"{value:g}"
                font = self._fit(text, self.right - box[3] + 0.02 * self.width)
                self.pen.write(
                    text, font, middle - line_height(font) / 2, box[3] + 0.2 * self.font.size, kind="value"
                )

    def draw_lines(self) -> None:
        """A line with dots for each series; values are printed if there is one series."""
        plot = self.plot
        slot = (self.right - self.left) / len(plot.categories)
        names_font = self._fit(max(plot.categories, key=self.font.getlength), 0.94 * slot)
        middles = [self.left + (i + 0.5) * slot for i in range(len(plot.categories))]
        for middle, category in zip(middles, plot.categories, strict=True):
            self.pen.write_middle(
                category, names_font, self.bottom + 0.2 * self.unit, middle, kind="category"
            )
        dot = self.font.size * self.rng.uniform(0.2, 0.35)
        for series, color in zip(plot.series, self.colors, strict=True):
            points = [(x, self.y(value)) for x, value in zip(middles, series.values, strict=True)]
            self.pen.draw.line(points, fill=color, width=max(2, round(self.font.size / 6)), joint="curve")
            for (x, y), value, category in zip(points, series.values, plot.categories, strict=True):
                self._dot(
                    y, x, dot, color, f"{category} {series.name}" if len(plot.series) > 1 else category, value
                )
                if plot.printed and len(plot.series) == 1:
                    self._print(value, x, y - dot, 0.94 * slot)

    def draw_points(self) -> None:
        """The points of a scatter plot."""
        dot = self.font.size * self.rng.uniform(0.2, 0.4)
        for series, color in zip(self.plot.series, self.colors, strict=True):
            for across, value in zip(series.across, series.values, strict=True):
                self._dot(self.y(value), self.x(across), dot, color, series.name, value)

    def _dot(self, y: float, x: float, radius: float, color: Color, text: str, value: float) -> None:
        outline = self.style.ink if self.style.outlined else None
        self.pen.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color, outline=outline)
        self.pen.mark("point", text, (y - radius, x - radius, y + radius, x + radius), value)

    def draw_pie(self) -> None:
        """Wedges clockwise from the top, named in a legend or beside them; percentages stand in them."""
        names, values = self.plot.categories, self.plot.series[0].values
        self.right -= max(map(self.font.getlength, names)) + 2.2 * self.font.size
        square = 0.6 * self.font.size
        radius = 0.47 * min(self.bottom - self.top, self.right - self.left)
        middle_y, middle_x = (self.top + self.bottom) / 2, (self.left + self.right) / 2
        circle = (middle_x - radius, middle_y - radius, middle_x + radius, middle_y + radius)
        step = min(1.5 * self.unit, (self.bottom - self.top) / len(names))
        first = middle_y - step * len(names) / 2
        hole = self.rng.uniform(0.4, 0.6) if self.rng.random() < 0.25 else 0.0
        start = -90.0
        inside = []
        for i, (name, value, color) in enumerate(zip(names, values, self.colors, strict=True)):
            end = start + 3.6 * value
            self.pen.draw.pieslice(circle, start, end, fill=color, outline=self.style.ground, width=self.thin)
            angle = math.radians((start + end) / 2)
            at = radius * ((1 + hole) / 2 if hole else 0.7)
            y, x = middle_y + at * math.sin(angle), middle_x + at * math.cos(angle)
            arm = radius * min(0.2, value / 100)
            self.pen.mark("wedge", name, (y - arm, x - arm, y + arm, x + arm), value)
            inside.append((value, y, x, color))
            top = first + i * step
            left = self.right + 0.3 * self.font.size
            middle = top + self.unit / 2
            self.pen.draw.rectangle(
                (left, middle - square / 2, left + square, middle + square / 2), fill=color
            )
            self.pen.write(name, self.font, top, left + 1.6 * square, kind="legend")
            start = end
        if hole:
            r = hole * radius
            box = (middle_x - r, middle_y - r, middle_x + r, middle_y + r)
            self.pen.draw.ellipse(box, fill=self.style.ground)
        for value, y, x, color in inside:
            # A slim wedge has no room; its share stands outside, where it is legible on the ground.
            ink = _BLACK if luminance(color) > 120 else _WHITE
            if value < 8:
                scale = 1.04 + 0.5 * self.unit / radius
                at = (1 + hole) / 2 if hole else 0.7
                y, x = (middle_y + (y - middle_y) * scale / at, middle_x + (x - middle_x) * scale / at)
                ink = self.style.ink
            text = f"{value:g}%"
            font = self._fit(text, 0.45 * radius)
            half = font.getlength(text) / 2
            x = min(max(x, half + 1), self.width - half - 1)
            y = min(max(y, 0.5 * self.unit), self.height - 0.5 * self.unit)
            self.pen.write_middle(text, font, y - line_height(font) / 2, x, ink, kind="value")
