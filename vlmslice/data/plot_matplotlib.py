"""Charts drawn by matplotlib, in its style sheets; costs about 100 ms each. Places of marks and text are its own."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from matplotlib.font_manager import FontProperties
from PIL import Image

from vlmslice.data.fonts import FontLibrary, load_font
from vlmslice.data.plot_pillow import has_room
from vlmslice.data.plot_types import PALETTE, Plot, Series, nice_ticks
from vlmslice.data.samples import TaskConfig
from vlmslice.data.scenes import Region, Scene
from vlmslice.data.shapes import COLORS
from vlmslice.data.typesetting import Font, add_text

STYLE_SHEETS = {
    "train": (
        "default",
        "ggplot",
        "bmh",
        "seaborn-v0_8-whitegrid",
        "seaborn-v0_8-ticks",
        "dark_background",
        "classic",
    ),
    "eval": ("fivethirtyeight", "Solarize_Light2", "seaborn-v0_8-darkgrid", "grayscale"),
}
"""Style sheets of matplotlib by split."""

_DPI = 100


def draw_with_matplotlib(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, plot: Plot, height: int, width: int
) -> tuple[Scene, tuple[str, ...]]:
    """Draws a plot; returns the scene and the colour names of the series, as `plot_pillow.draw_with_pillow` does."""
    import matplotlib
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = rng.choice(STYLE_SHEETS[config.split])
    size = max(9, min(30, round(min(height / 17, width / 24) * rng.uniform(0.85, 1.1))))
    font = fonts.draw(rng, size)
    number = len(plot.categories) if plot.kind == "pie" else len(plot.series)
    names = rng.sample(PALETTE, number)
    with matplotlib.rc_context(), style.context(["default", sheet]):
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        drawing = _Drawing(rng, axes, plot, font, [tuple(c / 255 for c in COLORS[name]) for name in names])
        drawing.draw(height, width)
        written: list[tuple] = []
        _note_texts(canvas.get_renderer(), written)
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        scene = Scene(image)
        for string, x, baseline, face, angle in written:
            size = round(face.get_size_in_points() * _DPI / 72)
            add_text(scene, string, load_font(face.get_file(), size), x, baseline, upwards=angle == 90)
        for kind, name, value, extent in drawing.marks:
            left, low, right, high = extent()
            scene.regions.append(Region(kind, name, (height - high, left, height - low, right), value))
    return scene, tuple(names) if len(plot.series) > 1 else ()


class _Drawing:
    """Fills the axes of a figure; `marks` are (kind, name, value, function to their extent once drawn)."""

    def __init__(
        self, rng: random.Random, axes: Any, plot: Plot, font: Font, colors: list[tuple[float, ...]]
    ):
        self.rng, self.axes, self.plot, self.font, self.colors = rng, axes, plot, font, colors
        self.marks: list[tuple[str, str, float, Callable[[], Any]]] = []
        self.sideways = plot.kind == "horizontal"
        self.slot = 0.0
        """Width of a category, px."""

    def _face(self, text: str = "", room: float = math.inf) -> FontProperties:
        """The font, smaller if `text` is wider than `room` px."""
        scale = min(1.0, room / max(1.0, self.font.getlength(text)))
        pixels = max(7, int(self.font.size * scale))
        return FontProperties(fname=str(self.font.path), size=pixels * 72 / _DPI)

    def draw(self, height: int, width: int) -> None:
        """Draws marks, text and legend, and places the axes so that all of it fits a picture of this size."""
        plot, axes, size = self.plot, self.axes, self.font.size
        margin = 0.3 * size / height
        axes.figure.suptitle(
            plot.title, y=1 - margin, va="top", fontproperties=self._face(plot.title, 0.92 * width)
        )
        names = [series.name for series in plot.series] if len(plot.series) > 1 else []
        names = list(plot.categories) if plot.kind == "pie" else names
        legend = max(map(self.font.getlength, names)) + 4.5 * size if names else 0.0
        above = plot.kind != "pie" and legend > 0.28 * width
        columns = max(1, int(0.96 * width / legend)) if above else 1
        top = 2.4 * size + (2.1 * size * math.ceil(len(names) / columns) if above else 0)
        right = width - max(0.03 * width, 0 if above else legend)
        if plot.kind == "pie":
            self._draw_pie()
            beside = 2.6 * size  # the percentages
            axes.figure.subplots_adjust(
                beside / width, 0.08, (right - beside) / width, 1 - (top + size) / height
            )
        else:
            reach = (100.0 if plot.kind == "scatter" else plot.highest) * (1.18 if plot.printed else 1.08)
            ticks = nice_ticks(reach, self.rng.randint(4, 7))
            texts = [f"{tick:g}" for tick in ticks]
            long = max(map(self.font.getlength, plot.categories if self.sideways else texts))
            left = min(0.4 * width, long + 3.2 * size)
            axes.figure.subplots_adjust(left / width, 4.2 * size / height, right / width, 1 - top / height)
            self.slot = (right - left) / max(1, len(plot.categories))
            self._draw_axes(reach, ticks, texts, left)
            {"line": self._draw_lines, "scatter": self._draw_points}.get(plot.kind, self._draw_bars)()
        if above:
            axes.figure.legend(
                prop=self._face(), ncols=columns, loc="upper center", borderaxespad=0,
                bbox_to_anchor=(0.5, 1 - 2.0 * size / height), frameon=False,
            )  # fmt: skip
        elif names:
            # Eight names of a pie need the whole height.
            face = self._face()
            face.set_size(face.get_size_in_points() * min(1.0, (height - top) / (2.1 * size * len(names))))
            axes.figure.legend(
                prop=face,
                loc="upper left",
                borderaxespad=0.3,
                bbox_to_anchor=(right / width, 1 - top / height),
            )

    def _draw_axes(self, reach: float, ticks: list[float], texts: list[str], left: float) -> None:
        plot, axes = self.plot, self.axes
        x_label, y_label = (plot.y_label, plot.x_label) if self.sideways else (plot.x_label, plot.y_label)
        axes.set_xlabel(x_label, fontproperties=self._face())
        axes.set_ylabel(y_label, fontproperties=self._face())
        places = range(len(plot.categories))
        if self.sideways:
            longest = max(plot.categories, key=self.font.getlength)
            axes.set_yticks(
                places, plot.categories, fontproperties=self._face(longest, left - 3 * self.font.size)
            )
            axes.set_xticks(ticks, texts, fontproperties=self._face())
            axes.set(xlim=(0, reach), ylim=(len(plot.categories) - 0.5, -0.5))
            return
        axes.set_yticks(ticks, texts, fontproperties=self._face())
        if plot.kind == "scatter":
            axes.set_xticks(ticks, texts, fontproperties=self._face())
            axes.set(xlim=(0, reach), ylim=(0, reach))
            return
        longest = max(plot.categories, key=self.font.getlength)
        axes.set_xticks(places, plot.categories, fontproperties=self._face(longest, 0.92 * self.slot))
        axes.set(xlim=(-0.6, len(plot.categories) - 0.4), ylim=(0, reach))

    def _print(self, value: float, x: float, y: float, room: float, **place: str) -> None:
        text = f"{value:g}"
        self.axes.annotate(
            text, (x, y), (2, 0) if self.sideways else (0, 3), textcoords="offset points",
            fontproperties=self._face(text, room), **place,
        )  # fmt: skip

    def _name(self, i: int, series: Series) -> str:
        return (
            f"{self.plot.categories[i]} {series.name}"
            if len(self.plot.series) > 1
            else self.plot.categories[i]
        )

    def _draw_bars(self) -> None:
        plot, axes = self.plot, self.axes
        share = self.rng.uniform(0.5, 0.85)
        stacked = plot.kind == "stacked"
        wide = share / (1 if stacked else len(plot.series))
        room = math.inf if self.sideways else self.slot * (0.95 if len(plot.series) == 1 else wide)
        printed = plot.printed and (len(plot.series) == 1 or has_room(plot, self.font, room))
        bases = [0.0] * len(plot.categories)
        for j, (series, color) in enumerate(zip(plot.series, self.colors, strict=False)):
            shift = 0.0 if stacked else (j + 0.5) * wide - share / 2
            places = [i + shift for i in range(len(plot.categories))]
            if self.sideways:
                bars = axes.barh(places, series.values, wide, color=color, label=series.name)
            else:
                bars = axes.bar(places, series.values, wide, bases, color=color, label=series.name)
            for i, (bar, value) in enumerate(zip(bars, series.values, strict=True)):
                self.marks.append(("bar", self._name(i, series), value, partial(_extent_of, bar)))
                if printed and self.sideways:
                    self._print(value, value, places[i], room, ha="left", va="center")
                elif printed and stacked:
                    middle = bases[i] + value / 2
                    axes.text(
                        places[i],
                        middle,
                        f"{value:g}",
                        fontproperties=self._face(f"{value:g}", room),
                        ha="center",
                        va="center",
                    )
                elif printed:
                    self._print(value, places[i], value, room, ha="center", va="bottom")
            if stacked:
                bases = [base + value for base, value in zip(bases, series.values, strict=True)]

    def _draw_lines(self) -> None:
        for series, color in zip(self.plot.series, self.colors, strict=False):
            places = range(len(series.values))
            self.axes.plot(
                places, series.values, color=color, marker=self.rng.choice("os^D"), label=series.name
            )
            for i, value in enumerate(series.values):
                self._mark_point(self._name(i, series), i, value)
                if self.plot.printed and len(self.plot.series) == 1:
                    self._print(value, i, value, 0.95 * self.slot, ha="center", va="bottom")

    def _draw_points(self) -> None:
        for series, color in zip(self.plot.series, self.colors, strict=False):
            self.axes.scatter(series.across, series.values, s=20, color=color, label=series.name)
            for x, y in zip(series.across, series.values, strict=True):
                self._mark_point(series.name, x, y)

    def _mark_point(self, name: str, x: float, value: float) -> None:
        self.marks.append(("point", name, value, partial(_extent_at, self.axes, x, value)))

    def _draw_pie(self) -> None:
        names, values = self.plot.categories, self.plot.series[0].values
        wedges, texts = self.axes.pie(
            values, labels=[f"{value:g}%" for value in values], colors=self.colors, startangle=90, counterclock=False,
            labeldistance=1.04, textprops={"fontproperties": self._face()},
        )  # fmt: skip
        self.axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
        for wedge, name, value in zip(wedges, names, values, strict=True):
            wedge.set_label(name)
            self.marks.append(("wedge", name, value, partial(_extent_of_wedge, self.axes, wedge)))


def _note_texts(renderer: Any, written: list[tuple]) -> None:
    """Makes a renderer note every text that it draws: string, x, y of the baseline from the top, font, angle."""
    draw_text = renderer.draw_text

    def draw_and_note(gc, x, y, string, face, angle, *args, **kwargs):
        written.append((string, x, y, face, angle))
        draw_text(gc, x, y, string, face, angle, *args, **kwargs)

    renderer.draw_text = draw_and_note


def _extent_of(artist: Any) -> Any:
    return artist.get_window_extent().extents


def _extent_at(axes: Any, x: float, y: float) -> tuple[float, float, float, float]:
    across, up = axes.transData.transform((x, y))
    return across - 4, up - 4, across + 4, up + 4


def _extent_of_wedge(axes: Any, wedge: Any) -> tuple[float, float, float, float]:
    """A square about the middle of a wedge, as `plot_pillow` has it."""
    middle = math.radians((wedge.theta1 + wedge.theta2) / 2)
    arm = min(0.2, abs(wedge.theta2 - wedge.theta1) / 360)
    x, y = 0.7 * math.cos(middle), 0.7 * math.sin(middle)
    (left, low), (right, high) = axes.transData.transform([(x - arm, y - arm), (x + arm, y + arm)])
    return left, low, right, high
