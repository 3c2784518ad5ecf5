"""What a chart shows, apart from how it is drawn, and the questions that it answers.

Three renderers draw the same `Plot`: `plot_pillow` in our own styles, `plot_matplotlib` in those of matplotlib,
`plot_vega` in those of Vega-Lite.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from vlmslice.data.answer_places import locate_answer
from vlmslice.data.fonts import FontLibrary
from vlmslice.data.phrases import Phrases
from vlmslice.data.plot_pillow import draw_with_pillow
from vlmslice.data.plot_types import KINDS, Plot, Series
from vlmslice.data.samples import Place, TaskConfig, TaskSample, Turn, ask_several, reshape
from vlmslice.data.scenes import Scene, add_camera_effects
from vlmslice.data.tables import table_to_csv

_Renderer = Callable[[random.Random, TaskConfig, FontLibrary, Plot, int, int], tuple[Scene, tuple[str, ...]]]
_MIN_AREA = 240 * 180
_CROWDED_AREA = 400 * 300
_CROWDED_PX = (9, 13)
_MARKS = {"bar": "bar", "horizontal": "bar", "line": "point", "pie": "slice"}
_KINDS_OF_NAMES = (
    "country",
    "company",
    "city",
    "region",
    "brand",
    "player",
    "category",
    "group",
    "state",
    "product",
)
_PLURALS = {"bar": "bars", "horizontal": "bars", "pie": "slices"}


def random_plot(rng: random.Random, config: TaskConfig, most_categories: int) -> Plot:
    """A chart of any kind with distinct names, and values that differ where a question compares them."""
    phrases = Phrases(rng, config.split)
    kind = rng.choice(KINDS)
    few = most_categories if kind not in ("grouped", "stacked") else most_categories // 2
    num_categories = rng.randint(2, max(2, min(8, few)))
    num_series = rng.randint(2, 3) if kind in ("grouped", "stacked") else 1
    if kind in ("line", "scatter"):
        num_series = rng.choice((1, 1, 2, 3))
    names = phrases.distinct_words(num_categories + num_series + 2, longest=8)
    series_names, x_label, y_label = names[:num_series], *names[num_series : num_series + 2]
    categories = tuple(names[num_series + 2 :])
    if rng.random() < 0.25 and kind not in ("pie", "scatter"):
        first = rng.randint(1950, 2030 - num_categories)
        categories = tuple(str(first + i) for i in range(num_categories))
    title = _title(rng, phrases)
    if kind == "scatter":
        return Plot(kind, title, x_label, y_label, (), tuple(_cloud(rng, name) for name in series_names))
    if kind == "pie":
        return Plot(kind, title, "", "", categories, (Series(series_names[0], _shares(rng, num_categories)),))
    decimals = 1 if rng.random() < 0.2 else 0
    top = rng.choice((20, 100, 100, 100, 500, 2000)) if not decimals else 100
    low = max(1, round(0.04 * top * 10**decimals))
    series = tuple(
        Series(
            name,
            tuple(
                v / 10**decimals if decimals else v
                for v in rng.sample(range(low, top * 10**decimals), num_categories)
            ),
        )
        for name in series_names
    )
    return Plot(kind, title, x_label, y_label, categories, series, rng.random() < config.printed_values)


def crowded_plot(rng: random.Random, config: TaskConfig, font_px: int, height: int, width: int) -> Plot:
    """A chart of as many years or names as are legible at `font_px`, as statistics are published.

    It has a topic beside its labels, as people ask for what they know, not for what is printed.
    """
    phrases = Phrases(rng, config.split)
    kind = rng.choice(("bar", "bar", "horizontal", "line", "grouped", "stacked"))
    is_time = rng.random() < (0.2 if kind == "horizontal" else 0.7)
    num_series = rng.randint(2, 3) if kind in ("grouped", "stacked") else rng.choice((1, 1, 1, 2))
    if kind in ("bar", "horizontal"):
        num_series = 1
    longest = 4 if is_time else 9
    if kind == "horizontal":
        most = int(0.65 * height / (1.5 * font_px))
    else:
        # Beside years, values of up to six characters at each mark of a group.
        characters = max(longest, 5 * num_series if kind == "grouped" else 5)
        most = int(0.8 * width / (0.65 * characters * font_px))
    number = rng.randint(max(2, min(24, most) // 2), max(2, min(24, most)))
    names = phrases.distinct_words(num_series + 2 + (0 if is_time else number), longest)
    series_names, x_label, y_label = names[:num_series], *names[num_series : num_series + 2]
    categories = tuple(names[num_series + 2 :])
    if is_time:
        first = rng.randint(1960, 2025 - number)
        categories = tuple(str(first + i) for i in range(number))
    decimals = rng.choice((0, 0, 1, 2))
    top = rng.choice((10, 30, 100, 100, 500) if decimals else (50, 100, 500, 2000, 2000))
    low = max(1, round(0.05 * top * 10**decimals))
    series = tuple(
        Series(name, tuple(v / 10**decimals if decimals else v for v in values))
        for name in series_names
        if (values := rng.sample(range(low, max(low + number, top * 10**decimals)), number))
    )
    topic = " ".join(phrases.word(10) for _ in range(rng.randint(1, 4)))
    if rng.random() < 0.3:
        topic += f" in {phrases.capitalized(10)}"
    title = _title(rng, phrases)
    return Plot(kind, title, x_label, y_label, categories, series, rng.random() < 0.9, topic)


def _title(rng: random.Random, phrases: Phrases) -> str:
    return " ".join([phrases.capitalized(9)] + [phrases.word(8)] * rng.randint(0, 2))


def _shares(rng: random.Random, number: int) -> tuple[float, ...]:
    """Distinct whole percentages of 4 or more with the sum 100."""
    while True:
        cuts = sorted(rng.sample(range(4, 97), number - 1))
        shares = [b - a for a, b in zip([0, *cuts], [*cuts, 100], strict=True)]
        if min(shares) >= 4 and len(set(shares)) == number:
            return tuple(shares)


def _cloud(rng: random.Random, name: str) -> Series:
    """5-20 points on or round a line."""
    slope, noise = rng.uniform(-1, 1), rng.uniform(2, 25)
    across = [rng.uniform(2, 98) for _ in range(rng.randint(5, 20))]
    values = tuple(round(min(98.0, max(2.0, 50 + slope * (x - 50) + rng.gauss(0, noise))), 1) for x in across)
    return Series(name, values, tuple(round(x, 1) for x in across))


def read_plot(
    rng: random.Random, config: TaskConfig, fonts: FontLibrary, height: int, width: int
) -> TaskSample:
    """A chart of any kind; see `ask` for the questions. The picture is at most 1.9 times as long as the other side."""
    # Nothing is drawn from `rng` for a share of 0: the charts of an evaluation stay what they were.
    if config.crowded and rng.random() < config.crowded:
        height, width = reshape(height, width, (1 / 1.4, 1.9), _CROWDED_AREA)
        font_px = rng.randint(*_CROWDED_PX)
        plot = crowded_plot(rng, config, font_px, height, width)
        scene, colors = draw_with_pillow(rng, config, fonts, plot, height, width, font_px)
        return _ask_about(rng, config, plot, scene, colors)
    height, width = reshape(height, width, (1 / 1.6, 1.9), _MIN_AREA)
    plot = random_plot(rng, config, int(width / 55))
    draw: _Renderer = draw_with_pillow
    chosen = rng.random()
    if chosen < config.matplotlib:
        from vlmslice.data.plot_matplotlib import draw_with_matplotlib  # half a second to load

        draw = draw_with_matplotlib
    elif chosen < config.matplotlib + config.vega:
        from vlmslice.data.plot_vega import draw_with_vega

        draw = draw_with_vega
    scene, colors = draw(rng, config, fonts, plot, height, width)
    return _ask_about(rng, config, plot, scene, colors)


def _ask_about(
    rng: random.Random, config: TaskConfig, plot: Plot, scene: Scene, colors: tuple[str, ...]
) -> TaskSample:
    scene.image = add_camera_effects(rng, scene.image, 0.5)
    sample = ask_several(rng, config, "plot", scene, lambda: ask(rng, plot, colors, config.max_answer))
    turns: list[TaskSample | Turn] = [sample, *sample.follow_ups]
    for turn in turns:
        turn.places = locate_answer(turn.answer, scene) or locate_value(turn.answer, plot, scene)
    return sample


def locate_value(answer: str, plot: Plot, scene: Scene) -> list[list[Place]]:
    """`TaskSample.places` of a value that is printed nowhere: the end of the one mark that stands for it.

    The end of a bar is where the axis says how much it is, the middle of a point or a wedge stands for the whole.
    """
    marks = [region for region in scene.regions if region.value is not None and f"{region.value:g}" == answer]
    if len(marks) != 1:
        return []
    [mark] = marks
    top, left, bottom, right = mark.box
    place = (top + bottom) / 2, (left + right) / 2
    if mark.kind == "bar":
        place = (place[0], right) if plot.kind == "horizontal" else (top, place[1])
    return [[place] for _ in answer]


def spell_value(value: float) -> str:
    """7 for 7.0, else the shortest decimal."""
    return f"{value:g}"


def plot_table(plot: Plot) -> list[list[str]]:
    """Header and rows of the data; the names of several series head the columns, else the label of the axis."""
    heads = [series.name for series in plot.series] if len(plot.series) > 1 else [plot.y_label or "Value"]
    rows = [
        [category, *(spell_value(series.values[i]) for series in plot.series)]
        for i, category in enumerate(plot.categories)
    ]
    return [[plot.x_label or "Name", *heads], *rows]


def ask(rng: random.Random, plot: Plot, colors: tuple[str, ...], max_answer: int = 400) -> tuple[str, str]:
    """A question about the plot and its answer.

    Args:
        rng: drawn from.
        plot: what is shown.
        colors: name of the colour of each series; of the only series, if all its marks share one; else empty.
        max_answer: tables of more characters are not asked for.
    """
    asked: list[list[tuple[str, str]]] = [
        [("What is the title of the chart?", plot.title), ("Read the title.", plot.title)]
    ]
    if plot.x_label:
        asked.append(
            [
                ("What is the label of the x axis?", plot.x_label),
                ("What does the horizontal axis show?", plot.x_label),
            ]
        )
        asked.append(
            [
                ("What is the label of the y axis?", plot.y_label),
                ("What does the vertical axis show?", plot.y_label),
            ]
        )
        if plot.kind == "horizontal":  # its axes are swapped
            asked[-2:] = [
                [("What is the label of the x axis?", plot.y_label)],
                [("What is the label of the y axis?", plot.x_label)],
            ]
    if len(plot.series) > 1:
        i = rng.randrange(len(plot.series))
        name = plot.series[i].name
        asked.append([("How many series are there?", str(len(plot.series)))])
        if len(colors) == len(plot.series):
            asked.append([(f"What colour is {name}?", colors[i]), (f"Which series is {colors[i]}?", name)])
    if plot.kind == "scatter":
        asked += [_about_points(rng, plot)] * 2
    elif len(plot.series) == 1:
        asked += [_about_one_series(rng, plot)] * (20 if plot.topic else 5)
    else:
        asked += [_about_several_series(rng, plot)] * (16 if plot.topic else 4)
    if plot.kind != "scatter":
        table = table_to_csv(plot_table(plot))
        if len(table) <= max_answer:
            asked.append([("Give the data as CSV.", table), ("Read the chart as a CSV table.", table)])
    return rng.choice(rng.choice(asked))


def _about_points(rng: random.Random, plot: Plot) -> list[tuple[str, str]]:
    if len(plot.series) == 1:
        return [("How many points are there?", str(len(plot.series[0].values)))]
    series = rng.choice(plot.series)
    return [(f"How many points of {series.name} are there?", str(len(series.values)))]


def _about_one_series(rng: random.Random, plot: Plot) -> list[tuple[str, str]]:
    values, names = plot.series[0].values, plot.categories
    i, j = rng.sample(range(len(names)), 2)
    mark = _MARKS[plot.kind]
    high, low = names[values.index(max(values))], names[values.index(min(values))]
    one, two = spell_value(values[i]), spell_value(values[j])
    difference = spell_value(round(abs(values[i] - values[j]), 1))
    total, mean = round(values[i] + values[j], 1), round((values[i] + values[j]) / 2, 2)
    is_larger = "Yes" if values[i] > values[j] else "No"
    options = [
        [
            (f"What is the value of {names[i]}?", one),
            (f"How much is {names[i]}?", one),
            (f"Which value does {names[i]} have?", one),
            (f"What is the value of {names[j]}?", two),
        ],
        [
            ("Which is the largest?", high),
            (f"Which {mark} is the largest?" if mark != "point" else "Where is the highest point?", high),
            ("What is the largest value?", spell_value(max(values))),
        ],
        [
            ("Which is the smallest?", low),
            ("What is the smallest value?", spell_value(min(values))),
        ],
        [
            (f"What is the difference between {names[i]} and {names[j]}?", difference),
            (f"How far apart are {names[i]} and {names[j]}?", difference),
            (f"What is the sum of {names[i]} and {names[j]}?", spell_value(total)),
            (f"What is the average of {names[i]} and {names[j]}?", spell_value(mean)),
        ],
        [
            (f"Is {names[i]} larger than {names[j]}?", is_larger),
            (f"Is the value of {names[i]} more than that of {names[j]}?", is_larger),
            (f"Which is larger, {names[i]} or {names[j]}?", names[i] if is_larger == "Yes" else names[j]),
            (
                f"How many {_PLURALS.get(plot.kind, 'points')} are above {two}?",
                str(sum(v > values[j] for v in values)),
            ),
        ],
    ]
    if plot.y_label:
        what, over = plot.y_label, plot.x_label
        options += [
            [
                (f"What was the {what} of {names[i]}?", one),
                (f"What is the {what} in {names[i]}?", one),
                (f"How many {what} did {names[i]} have?", one),
                (f"In {names[i]}, how much {what} was there?", one),
            ],
            [
                (f"Which {over} has the highest {what}?", high),
                (f"Which {over} had the most {what}?", high),
                (f"What was the highest {what}?", spell_value(max(values))),
                (f"Which {over} has the lowest {what}?", low),
                (f"What was the lowest {what}?", spell_value(min(values))),
            ],
        ]
    if plot.topic:
        options += [
            _by_topic(plot.topic, names[i], one),
            _by_topic(plot.topic, names[j], two),
            _by_rank(rng, plot.topic, names, values),
            _by_rank(rng, plot.topic, names, values),
        ] * 3
    if plot.kind in _PLURALS:
        options.append([(f"How many {_PLURALS[plot.kind]} are there?", str(len(values)))])
    return rng.choice(options)


def _by_topic(topic: str, name: str, value: str) -> list[tuple[str, str]]:
    """Questions for the value of `name` as people ask who know what the chart is about."""
    return [
        (f"What was the {topic} in {name}?", value),
        (f"What is the {topic} of {name}?", value),
        (f"How many {topic} were there in {name}?", value),
        (f"How much {topic} did {name} have?", value),
        (f"What percentage of {topic} was in {name}?", value),
        (f"In {name}, what was the {topic}?", value),
    ]


def _by_rank(
    rng: random.Random, topic: str, names: tuple[str, ...], values: tuple[float, ...]
) -> list[tuple[str, str]]:
    """Questions for the name or the value that comes first, second or last; years are asked for as such."""
    order = sorted(range(len(names)), key=values.__getitem__, reverse=True)
    which, words = rng.choice(
        (
            (order[0], ("highest", "largest", "most")),
            (order[0], ("highest", "largest", "most")),
            (order[1], ("second highest", "second largest", "second most")),
            (order[-1], ("lowest", "smallest", "least")),
        )
    )
    rank, name, value = rng.choice(words), names[which], spell_value(values[which])
    if names[0].isdecimal():
        questions = [
            (f"In what year was the {topic} the {rank}?", name),
            (f"In which year was the {rank} {topic}?", name),
            (f"What year had the {rank} {topic}?", name),
            (f"When was the {topic} the {rank}?", name),
            (f"In what year was the {topic} {value}?", name),
        ]
    else:
        kind = rng.choice(_KINDS_OF_NAMES)
        questions = [
            (f"Which {kind} had the {rank} {topic}?", name),
            (f"What {kind} had the {rank} number of {topic}?", name),
            (f"What was the {rank} {topic}?", name),
            (f"Who had the {rank} {topic}?", name),
            (f"Which {kind} had a {topic} of {value}?", name),
        ]
    return [*questions, (f"What was the value of the {rank} {topic}?", value)]


def _about_several_series(rng: random.Random, plot: Plot) -> list[tuple[str, str]]:
    series = rng.choice(plot.series)
    i = rng.randrange(len(plot.categories))
    name, value = plot.categories[i], spell_value(series.values[i])
    high = plot.categories[series.values.index(max(series.values))]
    low = plot.categories[series.values.index(min(series.values))]
    options = [
        [
            (f"What is the value of {series.name} for {name}?", value),
            (f"How much is {series.name} in {name}?", value),
            (f"What was {series.name} in {name}?", value),
            (f"What is the {plot.y_label} of {series.name} in {name}?", value),
        ],
        [
            (f"Where is {series.name} the largest?", high),
            (f"Which {plot.x_label} has the highest {series.name}?", high),
            (f"What is the largest value of {series.name}?", spell_value(max(series.values))),
        ],
        [
            (f"Where is {series.name} the smallest?", low),
            (f"Which {plot.x_label} has the lowest {series.name}?", low),
        ],
    ]
    if plot.topic:
        options += [
            _by_topic(f"{plot.topic} of {series.name}", name, value),
            _by_topic(f"{series.name} {plot.topic}", name, value),
        ] * 3
    if plot.kind == "stacked":
        total = spell_value(round(math.fsum(s.values[i] for s in plot.series), 1))
        options.append([(f"What is the total of {name}?", total)])
    at = [s.values[i] for s in plot.series]
    if at.count(max(at)) == 1:
        options.append([(f"Which series is the largest for {name}?", plot.series[at.index(max(at))].name)])
    return rng.choice(options)
