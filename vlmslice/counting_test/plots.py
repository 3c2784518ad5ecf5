"""The plots of the counting test, each drawn into one axes of matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import FixedLocator, NullLocator

from vlmslice.counting_test.analysis import NO_NUMBER
from vlmslice.slicing import SlicePlan

Results = Mapping[str, Any]

STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e7e9ee",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",
    "figure.facecolor": "white",
}
_COLORS = (
    "#1f5fbf",
    "#d1495b",
    "#2a9d6f",
    "#e08e1b",
    "#7b4fb5",
    "#0f9bb0",
    "#8c6239",
    "#5b6470",
    "#b8336a",
    "#6b8e23",
)
_MARKERS = "osD^vPX<>*"
_TRUTH = "#20242c"
_MAX_TRUTH, _MAX_ANSWER = 12, 20  # of the table of confusions
_MAX_LINES = 6  # beyond which a legend needs a second column


def plot_nine_balls(axes: Axes, results: Results, plan: SlicePlan | None = None) -> None:
    """Answers over the side of the picture of nine balls, a line for each arm."""
    axes.set_title("Nine balls, counted at every size")
    sides: list[int] = []
    arms = [(name, arm["nine_balls"]) for name, arm in results["arms"].items() if arm["nine_balls"]]
    for number, (name, answers) in enumerate(arms):
        told = {int(side): count for side, count in answers.items() if count != NO_NUMBER}
        sides += [int(side) for side in answers]
        # Lines that lie on each other are drawn a little apart.
        offset = (number - (len(arms) - 1) / 2) * min(0.06, 0.5 / len(arms))
        axes.plot(
            list(told), [count + offset for count in told.values()], label=name, ms=4.5, lw=1.4,
            color=_COLORS[number % len(_COLORS)], marker=_MARKERS[number % len(_MARKERS)],
        )  # fmt: skip
    axes.axhline(9, color=_TRUTH, lw=1, ls=(0, (4, 3)), zorder=1)
    if sides:
        axes.set_xscale("log", base=2)
        ticks = [side for side in (256, 512, 1024, 2048, 4096) if min(sides) <= side <= 1.2 * max(sides)]
        _name_ticks(axes, ticks or sides[:1], lambda side: f"{side:g}")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 6), max(high, 12))
        axes.legend(ncols=1 + (len(arms) > _MAX_LINES))
    axes.set_xlabel("side of the picture, px")
    axes.set_ylabel("answer")


def plot_sizes(axes: Axes, results: Results, plan: SlicePlan | None = None) -> None:
    """Exact share over the size of the picture."""
    axes.set_title("The same pictures, larger and larger")
    _plot_exact(axes, results, "size", float, lambda side: f"{side:g}")
    axes.set_xlabel("side of the picture, px")


def plot_aspects(axes: Axes, results: Results, plan: SlicePlan | None = None) -> None:
    """Exact share over the aspect ratio."""
    axes.set_title("The same pictures, from tall to wide")

    def ratio(variant: str) -> float:
        width, height = map(float, variant.split(":"))
        return width / height

    _plot_exact(
        axes, results, "aspect", ratio, lambda value: f"{value:g}:1" if value >= 1 else f"1:{1 / value:g}"
    )
    axes.set_xlabel("width : height")


def plot_object_sizes(axes: Axes, results: Results, plan: SlicePlan | None = None) -> None:
    """Exact share over the size of the objects."""
    axes.set_title("The same pictures, objects of three sizes")
    _plot_exact(
        axes,
        results,
        "object-size",
        lambda variant: float(variant.removesuffix("px")),
        lambda side: f"{side:g}",
    )
    axes.set_xlabel("side of an object, px")


def plot_counts(axes: Axes, results: Results, plan: SlicePlan | None = None) -> None:
    """Mean answer over the true count."""
    axes.set_title("More and more objects")
    truths: set[int] = set()
    arms = [(name, arm["sets"]["count"]) for name, arm in results["arms"].items() if "count" in arm["sets"]]
    for number, (name, part) in enumerate(arms):
        points = sorted(
            (int(variant), int(variant) + figures["signed"]["value"])
            for variant, figures in part["variants"].items()
            if figures["signed"] is not None
        )
        axes.plot(
            *zip(*points, strict=True), label=name, ms=4.5, lw=1.4,
            color=_COLORS[number % len(_COLORS)], marker=_MARKERS[number % len(_MARKERS)],
        )  # fmt: skip
        truths |= {truth for truth, _ in points}
    if not truths:
        _say(axes, "not asked")
        return
    axes.plot([0, max(truths)], [0, max(truths)], color=_TRUTH, lw=1, ls=(0, (4, 3)), zorder=1)
    if len(arms) > 1:
        axes.legend()
    axes.set_xlabel("true count")
    axes.set_ylabel("mean answer")


def plot_seams(axes: Axes, results: Results, plan: SlicePlan | None = None) -> None:
    """Error for each object on seams, beside the error for each object inside slices."""
    axes.set_title("Objects on seams, and inside slices")
    arms = [(name, arm["seams"]) for name, arm in results["arms"].items() if arm["seams"]["on_seams"]]
    for number, (_, seams) in enumerate(arms):
        for shift, key, color in ((-0.19, "inside", "#9aa3b2"), (0.19, "on_seams", "#d1495b")):
            figure = seams[key]
            if figure is None:
                continue
            value = figure["value"]
            errors = [[max(value - figure["low"], 0)], [max(figure["high"] - value, 0)]]
            label = {"inside": "inside", "on_seams": "on a seam"}[key] if number == 0 else None
            axes.bar(number + shift, value, 0.34, color=color, label=label)
            axes.errorbar(number + shift, value, errors, color=_TRUTH, capsize=4, lw=1.2)
            axes.annotate(
                f"{value:+.2f}",
                (number + shift, value),
                xytext=(7, 3),
                textcoords="offset points",
                fontsize=8.5,
            )
    axes.axhline(0, color=_TRUTH, lw=1)
    if arms:
        axes.set_xticks(range(len(arms)), [name.replace(", ", "\n") for name, _ in arms])
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, -0.5), max(high, 0.5) * 1.25)
        axes.set_xlim(-0.7, len(arms) - 0.3)
        axes.legend(loc="upper left", ncols=2)
        axes.grid(visible=False, axis="x")
    else:
        _say(axes, "no picture has a seam")
    axes.set_ylabel("counted too often, an object")


def plot_confusion(axes: Axes, results: Results, plan: SlicePlan | None = None) -> None:
    """Share of each answer for each true count up to `_MAX_TRUTH`, of the first arm."""
    name, arm = _first(results)
    axes.set_title(f"True count and answer: {name}")
    table = {truth: row for truth, row in arm["confusion"].items() if int(truth) <= _MAX_TRUTH}
    truths = sorted(map(int, table))
    told = [int(answer) for row in table.values() for answer in row if answer != NO_NUMBER]
    most = min(max([*truths, *told], default=1), _MAX_ANSWER)
    columns = [str(count) for count in range(most + 1)]
    shares = []
    for truth in truths:
        row = dict.fromkeys([*columns, "more", NO_NUMBER], 0.0)
        total = sum(table[str(truth)].values())
        for answer, times in table[str(truth)].items():
            is_count = answer != NO_NUMBER and not 0 <= int(answer) <= most
            row["more" if is_count else answer] += times / total
        shares.append(list(row.values()))
    if not shares:
        _say(axes, "no answers")
        return
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for number, values in enumerate(shares):
        for col, share in enumerate(values):
            if share >= 0.15:
                axes.text(
                    col, number, f"{100 * share:.0f}", ha="center", va="center", fontsize=7,
                    color="white" if share > 0.55 else _TRUTH,
                )  # fmt: skip
        if truths[number] <= most:
            axes.add_patch(_frame(truths[number], number))
    step = 1 if most <= 12 else 2
    ticks = list(range(0, most + 1, step))
    axes.set_xticks([*ticks, most + 1, most + 2], [*map(str, ticks), "", ""], fontsize=8)
    axes.annotate(
        "more, no number", (most + 2.4, len(truths) - 0.4), rotation=90, fontsize=6.5, ha="right", va="bottom"
    )
    axes.set_yticks(range(len(truths)), list(map(str, truths)), fontsize=8)
    axes.grid(visible=False)
    axes.set_xlabel("answer (in % of the pictures of a row)")
    axes.set_ylabel("true count")


def plot_positions(axes: Axes, results: Results, plan: SlicePlan | None = None) -> None:
    """Signed error where four circles lie, of the first arm; seams of the plan over it."""
    name, arm = _first(results)
    axes.set_title(f"Four circles, moved about: {name}")
    errors = {tuple(map(float, place.split(","))): error for place, error in arm["positions"].items()}
    if not errors:
        _say(axes, "not asked")
        return
    rows, cols = (sorted({place[axis] for place in errors}) for axis in (0, 1))
    half = (rows[1] - rows[0]) / 2 if len(rows) > 1 else 0.5
    largest = max(2.0, *(abs(error) for error in errors.values()))
    grid = [[errors.get((y, x), float("nan")) for x in cols] for y in rows]
    axes.imshow(
        grid, cmap="RdBu_r", norm=TwoSlopeNorm(0, -largest, largest), interpolation="nearest",
        extent=(cols[0] - half, cols[-1] + half, rows[-1] + half, rows[0] - half),
    )  # fmt: skip
    for (y, x), error in errors.items():
        color = "white" if abs(error) > 0.6 * largest else _TRUTH
        axes.text(x, y, f"{error:+d}" if error else "0", ha="center", va="center", fontsize=9, color=color)
    if plan is not None and len(plan.slices) > 1:
        height, width = plan.image_size
        for view in plan.slices:
            top, left, bottom, right = view.box
            xs, ys = (left, right, right, left, left), (top, top, bottom, bottom, top)
            axes.plot(
                [x / width for x in xs],
                [y / height for y in ys],
                color=_TRUTH,
                lw=1,
                ls=(0, (3, 3)),
                alpha=0.7,
            )
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.set_xlabel("answer minus 4, where their middle lies; dashed: slices" if plan else "answer minus 4")


PLOTS: dict[str, Callable[[Axes, Results, SlicePlan | None], None]] = {
    "nine-balls": plot_nine_balls,
    "seams": plot_seams,
    "size": plot_sizes,
    "aspect": plot_aspects,
    "confusion": plot_confusion,
    "position": plot_positions,
    "object-size": plot_object_sizes,
    "count": plot_counts,
}
"""All of them, in the order of a report."""


def _plot_exact(
    axes: Axes,
    results: Results,
    name: str,
    place: Callable[[str], float],
    spell: Callable[[float], str],
) -> None:
    arms = [
        (arm, part["sets"][name]["variants"]) for arm, part in results["arms"].items() if name in part["sets"]
    ]
    ticks: set[float] = set()
    for number, (arm, variants) in enumerate(arms):
        points = sorted((place(variant), figures["exact"]) for variant, figures in variants.items())
        places = [at * 1.02 ** (number - (len(arms) - 1) / 2) for at, _ in points]
        values = [100 * figure["value"] for _, figure in points]
        below, above = (
            [100 * max(sign * (figure[end] - figure["value"]), 0) for _, figure in points]
            for sign, end in ((-1, "low"), (1, "high"))
        )
        axes.errorbar(
            places, values, [below, above], label=arm, capsize=3, ms=5, lw=1.4, elinewidth=1,
            color=_COLORS[number % len(_COLORS)], marker=_MARKERS[number % len(_MARKERS)],
        )  # fmt: skip
        ticks |= {at for at, _ in points}
    if not arms:
        _say(axes, "not asked")
        return
    axes.set_xscale("log", base=2)
    _name_ticks(axes, sorted(ticks), spell)
    axes.set_ylim(-4, 104)
    axes.set_ylabel("exact, %")
    if len(arms) > 1:
        axes.legend(loc="lower left")


def _name_ticks(axes: Axes, ticks: Sequence[float], spell: Callable[[float], str]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([spell(tick) for tick in ticks])


def _frame(x: float, y: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#d1495b", lw=1)


def _first(results: Results) -> tuple[str, Results]:
    return next(iter(results["arms"].items()))


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="#5b6470")
