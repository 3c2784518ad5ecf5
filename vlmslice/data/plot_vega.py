"""Charts drawn by Vega-Lite, in its themes; costs about 200 ms each. Places of marks and text are its own.

Vega lays a chart out as a tree of marks before it draws it (its scenegraph); the places are read off there.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import vl_convert
from PIL import Image

from vlmslice.data.fonts import FontLibrary, load_font
from vlmslice.data.plot_pillow import has_room
from vlmslice.data.plot_types import PALETTE, Plot
from vlmslice.data.samples import TaskConfig
from vlmslice.data.scenes import Box, Region, Scene
from vlmslice.data.shapes import COLORS
from vlmslice.data.typesetting import Font, add_text

THEMES = {
    "train": ("default", "dark", "excel", "ggplot2", "googlecharts", "quartz", "vox", "carbonwhite"),
    "eval": ("fivethirtyeight", "latimes", "urbaninstitute", "powerbi"),
}
"""Themes of Vega by split."""

_MARKS = {"rect": "bar", "symbol": "point", "arc": "wedge"}
_BASELINES = {"top": 0.79, "middle": 0.30, "bottom": -0.21, "alphabetic": 0.0}
"""How far the baseline of a text lies below its place, in ems, as Vega has it."""

Node = dict[str, Any]


def draw_with_vega(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, plot: Plot, height: int, width: int
) -> tuple[Scene, tuple[str, ...]]:
    """Draws a plot; returns the scene and the colour names of the series, as `plot_pillow.draw_with_pillow` does."""
    theme = rng.choice(THEMES[config.split])
    size = max(9, min(30, round(min(height / 17, width / 24) * rng.uniform(0.85, 1.1))))
    font = _regular_font(rng, fonts, size)
    names = rng.sample(PALETTE, len(plot.categories) if plot.kind == "pie" else len(plot.series))
    spec = _Chart(rng, plot, font, names, theme == "dark", height, width).spec()
    # Compiled once, for the picture and for the places.
    options: Any = {} if theme == "default" else {"theme": theme}
    compiled = vl_convert.vegalite_to_vega(spec, **options)
    picture = Image.open(io.BytesIO(vl_convert.vega_to_png(compiled, scale=1, ppi=72)))
    ground = Image.new("RGB", picture.size, "white")
    ground.paste(picture, mask=picture if picture.mode == "RGBA" else None)
    scene = Scene(ground)
    tree = vl_convert.vega_to_scenegraph(compiled)
    marks: list[tuple[str, Box]] = []
    for node, item, x, y in _walk(tree["scenegraph"], *tree["origin"]):
        if node["marktype"] == "text" and str(item.get("text", "")).strip() and item.get("opacity", 1):
            _add_item(scene, item, x, y, str(font.path))
        elif node.get("role") == "mark" and node["marktype"] in _MARKS:
            marks.append((_MARKS[node["marktype"]], _mark_box(item, x, y, node["marktype"])))
    values = list(_values(plot))
    if len(marks) != len(values):
        raise ValueError(f"Vega drew {len(marks)} marks, expected {len(values)} of a {plot.kind} chart")
    for (kind, box), (name, value) in zip(marks, values, strict=True):
        scene.regions.append(Region(kind, name, box, value))
    return scene, tuple(names) if len(plot.series) > 1 else ()


def _regular_font(rng: random.Random, fonts: FontLibrary, size: int) -> Font:
    """A font that its family name alone stands for; others would be drawn in another cut than they are measured in."""
    for _ in range(50):
        font = fonts.draw(rng, size)
        if font.getname()[1] in ("Regular", "Book", "Roman", "Medium"):
            break
    _register(str(Path(str(font.path)).parent))
    return font


@cache
def _register(directory: str) -> None:
    vl_convert.register_font_directory(directory)


def _values(plot: Plot) -> Iterator[tuple[str, float]]:
    """Name and value of each mark, in the order in which `_Chart.rows` lists them."""
    for series in plot.series:
        for i, value in enumerate(series.values):
            if plot.kind == "scatter":
                yield series.name, value
            else:
                category = plot.categories[i]
                yield category if len(plot.series) == 1 else f"{category} {series.name}", value


class _Chart:
    """The Vega-Lite specification of a plot."""

    def __init__(
        self,
        rng: random.Random,
        plot: Plot,
        font: Font,
        names: list[str],
        is_dark: bool,
        height: int,
        width: int,
    ):
        self.rng, self.plot, self.font = rng, plot, font
        self.ink = "#e0e0e0" if is_dark else "#303030"
        self.colors = ["#{:02x}{:02x}{:02x}".format(*COLORS[name]) for name in names]
        self.height, self.width = height, width

    def spec(self) -> Node:
        plot, size, family = self.plot, self.font.size, self.font.getname()[0]
        # Themes name fonts, and not all of them are here.
        faces = {f"{part}{what}": value for part in ("label", "title")
                 for what, value in (("Font", family), ("FontWeight", "normal"), ("FontSize", size))}  # fmt: skip
        return {
            "width": self.width,
            "height": self.height,
            "autosize": {"type": "fit", "contains": "padding"},
            "title": {
                "text": plot.title,
                "fontWeight": "normal",
                "fontSize": self._fit(plot.title, self.width),
            },
            "data": {"values": self.rows()},
            **{"pie": self._pie, "scatter": self._points, "line": self._lines}.get(plot.kind, self._bars)(),
            "config": {
                "font": family,
                "axis": {**faces, "labelLimit": 0, "titleLimit": 0, "grid": self.rng.random() < 0.6},
                **{f"axis{which}": faces for which in ("X", "Y", "Band", "Quantitative")},
                "legend": {**faces, "labelLimit": 0, "symbolLimit": 0},
                "title": {"fontWeight": "normal", "font": family},
                "text": {"font": family, "fontWeight": "normal"},
                "bar": {"discreteBandSize": {"band": self.rng.uniform(0.55, 0.9)}},
            },
        }

    def rows(self) -> list[Node]:
        plot = self.plot
        if plot.kind == "scatter":
            return [
                {"s": series.name, "x": x, "v": value}
                for series in plot.series
                for x, value in zip(series.across, series.values, strict=True)
            ]
        return [
            {
                "s": series.name,
                "c": category,
                "v": value,
                "i": i,
                "t": f"{value:g}%" if plot.kind == "pie" else f"{value:g}",
            }
            for series in plot.series
            for i, (category, value) in enumerate(zip(plot.categories, series.values, strict=True))
        ]

    def _fit(self, text: str, room: float) -> float:
        """The font size at which `text` is at most as wide as `room`."""
        return max(
            7.0, min(self.font.size, 0.92 * self.font.size * room / max(1.0, self.font.getlength(text)))
        )

    def _slot(self, names: list[str]) -> float:
        """Width of a category, with a legend of `names` on the right if there are several, px."""
        legend = max(map(self.font.getlength, names)) + 3 * self.font.size if len(names) > 1 else 0
        return (0.98 * self.width - 4.5 * self.font.size - legend) / len(self.plot.categories)

    def _color(self, names: list[str], field: str = "s") -> Node:
        """One colour, or one for each name, with a legend."""
        if len(names) == 1:
            return {"value": self.colors[0]}
        return {
            "field": field,
            "type": "nominal",
            "sort": None,
            "title": None,
            "scale": {"domain": names, "range": self.colors},
        }

    def _categories(self, room: float) -> Node:
        longest = max(self.plot.categories, key=self.font.getlength)
        axis = {"labelAngle": 0, "labelFontSize": self._fit(longest, room), "labelOverlap": False}
        return {"field": "c", "type": "nominal", "sort": None, "title": self.plot.x_label, "axis": axis}

    def _amounts(self, stack: bool = False) -> Node:
        """The axis of the values, with room for what is printed over the highest."""
        reach = self.plot.highest * (1.18 if self.plot.printed else 1.06)
        return {
            "field": "v",
            "type": "quantitative",
            "title": self.plot.y_label,
            "stack": "zero" if stack else None,
            "scale": {"domain": [0, reach], "nice": False},
            "axis": {"tickCount": self.rng.randint(4, 7)},
        }

    def _bars(self) -> Node:
        plot = self.plot
        names = [series.name for series in plot.series]
        slot = self._slot(names)
        if plot.kind == "horizontal":
            encoding = {"y": self._categories(0.3 * self.width), "x": self._amounts()}
            text = {"align": "left", "dx": 0.25 * self.font.size}
        else:
            encoding = {"x": self._categories(slot), "y": self._amounts(plot.kind == "stacked")}
            text = {"baseline": "bottom", "dy": -1}
        if plot.kind == "grouped":
            encoding["xOffset"] = {"field": "s", "type": "nominal", "sort": None}
        encoding["color"] = self._color(names)
        layers: list[Node] = [{"mark": "bar"}]
        wide = slot / (len(names) if plot.kind == "grouped" else 1)
        if (
            plot.printed
            and plot.kind != "stacked"
            and (plot.kind == "horizontal" or has_room(plot, self.font, wide))
        ):
            longest = max((f"{v:g}" for series in plot.series for v in series.values), key=len)
            size = self.font.size if plot.kind == "horizontal" else self._fit(longest, wide)
            layers.append(self._printed(text, size))
        return {"encoding": encoding, "layer": layers}

    def _printed(self, place: Node, size: float) -> Node:
        """The layer of the values at their marks, in the colour that the theme has for text."""
        return {
            "mark": {"type": "text", "fontSize": size, **place},
            "encoding": {"text": {"field": "t"}, "color": {"value": self.ink}},
        }

    def _lines(self) -> Node:
        plot = self.plot
        names = [series.name for series in plot.series]
        slot = self._slot(names)
        layers: list[Node] = [
            {"mark": "line"},
            {"mark": {"type": "point", "filled": True, "size": 0.3 * self.font.size**2, "opacity": 1}},
        ]
        if plot.printed and len(names) == 1:
            longest = max((f"{v:g}" for v in plot.series[0].values), key=len)
            layers.append(
                self._printed({"baseline": "bottom", "dy": -0.4 * self.font.size}, self._fit(longest, slot))
            )
        encoding = {"x": self._categories(slot), "y": self._amounts(), "color": self._color(names)}
        return {"encoding": encoding, "layer": layers}

    def _points(self) -> Node:
        reach = {"domain": [0, 100]}
        axis = {"tickCount": self.rng.randint(4, 7)}
        common = {"type": "quantitative", "scale": reach, "axis": axis}
        return {
            "mark": {"type": "point", "filled": True, "size": 0.3 * self.font.size**2, "opacity": 1},
            "encoding": {
                "x": {"field": "x", "title": self.plot.x_label, **common},
                "y": {"field": "v", "title": self.plot.y_label, **common},
                "color": self._color([series.name for series in self.plot.series]),
            },
        }

    def _pie(self) -> Node:
        names = list(self.plot.categories)
        legend = max(map(self.font.getlength, names)) + 3 * self.font.size
        radius = 0.5 * min(self.height - 3 * self.font.size, self.width - legend) - 1.8 * self.font.size
        hole = radius * self.rng.uniform(0.4, 0.6) if self.rng.random() < 0.25 else 0
        return {
            "encoding": {
                "theta": {"field": "v", "type": "quantitative", "stack": True},
                "order": {"field": "i"},
                "color": self._color(names, "c"),
            },
            "layer": [
                {"mark": {"type": "arc", "innerRadius": hole, "outerRadius": radius, "stroke": "#ffffff"}},
                self._printed({"radius": radius + 0.9 * self.font.size}, self.font.size),
            ],
            "view": {"stroke": None},
        }


def _walk(mark: Node, x: float, y: float) -> Iterator[tuple[Node, Node, float, float]]:
    """Every item of the tree that is no group, with its mark and the origin of the group it lies in, px."""
    for item in mark.get("items", ()):
        if mark["marktype"] == "group":
            for inner in item.get("items", ()):
                yield from _walk(inner, x + item.get("x", 0), y + item.get("y", 0))
        else:
            yield mark, item, x, y


def _add_item(scene: Scene, item: Node, x: float, y: float, path: str) -> None:
    """Adds a text of the tree, which stands at an anchor, turned about it."""
    text = str(item["text"])
    size = item.get("fontSize", 11)
    font = load_font(path, max(1, round(size)))
    length = font.getlength(text) * size / font.size
    along = item.get("dx", 0) - {"center": length / 2, "right": length}.get(item.get("align", "left"), 0)
    below = item.get("dy", 0) + _BASELINES[item.get("baseline", "alphabetic")] * size
    x, y = x + item.get("x", 0), y + item.get("y", 0)
    if radius := item.get("radius"):
        angle = item.get("theta", 0) - math.pi / 2
        x, y = x + radius * math.cos(angle), y + radius * math.sin(angle)
    turned = item.get("angle", 0) % 360
    if turned == 270:
        add_text(scene, text, font, x + below, y - along, upwards=True)
    elif turned == 0:
        add_text(scene, text, font, x + along, y + below)


def _mark_box(item: Node, x: float, y: float, marktype: str) -> Box:
    """Box of a bar; a few px about a point; a square about the middle of a wedge, as `plot_pillow` has it."""
    x, y = x + item.get("x", 0), y + item.get("y", 0)
    if marktype == "rect":
        ys, xs = (sorted((at, at + item.get(size, 0))) for at, size in ((y, "height"), (x, "width")))
        return ys[0], xs[0], ys[1], xs[1]
    if marktype == "symbol":
        arm = math.sqrt(item.get("size", 16) / math.pi)
        return y - arm, x - arm, y + arm, x + arm
    start, end, radius = item["startAngle"], item["endAngle"], item["outerRadius"]
    middle = (start + end) / 2 - math.pi / 2
    arm = radius * min(0.2, abs(end - start) / (2 * math.pi))
    x, y = x + 0.7 * radius * math.cos(middle), y + 0.7 * radius * math.sin(middle)
    return y - arm, x - arm, y + arm, x + arm
