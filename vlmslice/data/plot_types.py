"""The data behind a chart."""

from __future__ import annotations

from dataclasses import dataclass

PALETTE = ("red", "green", "blue", "orange", "purple", "brown", "pink", "gray")
"""Colours of series where a library draws; names of `shapes.COLORS`."""
KINDS = ("bar", "horizontal", "grouped", "stacked", "line", "pie", "scatter")


@dataclass(frozen=True)
class Series:
    """Values of one colour; `across` holds the x values of a scatter plot."""

    name: str
    values: tuple[float, ...]
    across: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plot:
    """A chart of one of `KINDS`.

    Attributes:
        kind: of chart.
        title: over it.
        x_label: of the axis of the categories (or of `Series.across`); empty for a pie, which has none.
        y_label: of the axis of the values.
        categories: one for each value of a series; empty for a scatter plot.
        series: one or several.
        printed: print the value at each mark.
        topic: what it is about, in words that are printed nowhere; empty if nobody asks by them.
    """

    kind: str
    title: str
    x_label: str
    y_label: str
    categories: tuple[str, ...]
    series: tuple[Series, ...]
    printed: bool = False
    topic: str = ""

    @property
    def highest(self) -> float:
        """The largest value that the axis must reach."""
        if self.kind == "stacked":
            return max(map(sum, zip(*(s.values for s in self.series), strict=True)))
        return max(max(s.values) for s in self.series)


def nice_ticks(highest: float, most: int) -> list[float]:
    """Round numbers from 0 to `highest` or a little less, `most` at most besides 0.

    `nice_ticks(93, 5)` is [0, 20, 40, 60, 80].
    """
    step = 10.0**-2
    while True:
        for factor in (1, 2, 5):
            if highest / (factor * step) <= most:
                number = int(highest / (factor * step) + 1e-9)
                return [round(i * factor * step, 6) for i in range(number + 1)]
        step *= 10
