"""Rendered tasks: the same every time, inside the picture, and with answers that follow from the dense truth."""

import csv
import dataclasses
import hashlib
import html
import io
import itertools
import json
import random
import re
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmslice.data import crowds, flowcharts, paragraphs, plots, receipts, screens, tables
from vlmslice.data.counting import plural
from vlmslice.data.dense import HEADS, UNKNOWN, label_cells
from vlmslice.data.fonts import (
    CHARACTERS,
    FontLibrary,
    can_draw,
    load_font,
    matplotlib_font_dir,
    spell,
)
from vlmslice.data.photo_effects import homography, print_thermally, tilt, warp_boxes
from vlmslice.data.phrases import Phrases, unaccented
from vlmslice.data.plot_pillow import STYLES
from vlmslice.data.plot_types import KINDS, nice_ticks
from vlmslice.data.plot_vega import THEMES, draw_with_vega
from vlmslice.data.samples import TaskConfig, TaskSample, reshape
from vlmslice.data.scenes import Glyph, Region, Scene, luminance, sample_rng
from vlmslice.data.shapes import COLORS
from vlmslice.data.tasks import TASKS, Curriculum, TaskDataset
from vlmslice.data.text import words

NEW = [name for name in TASKS if name not in ("read", "count")]
FIXED_SIZE = ("paragraph", "line", "place", "page", "screenshot", "crowd")
PLAIN = TaskConfig(
    megapixels=(0.03, 0.15), max_aspect=2, font_px=(10, 30), max_count=20, photo=0, matplotlib=0, vega=0
)


@cache
def library(split: str = "eval") -> FontLibrary:
    return FontLibrary(split, [matplotlib_font_dir()])  # the only fonts that a test can count on


def samples(task: str, number: int, config: TaskConfig = PLAIN, name: str = "t") -> Iterator[TaskSample]:
    dataset = TaskDataset([Curriculum(number, config, {task: 1.0})], library(), group=1, name=name)
    return (dataset[i] for i in range(number))


def texts(sample: TaskSample, *kinds: str) -> list[str]:
    return [region.text for region in sample.scene.regions if region.kind in kinds]


def digest(sample: TaskSample) -> str:
    scene = sample.scene
    parts = (sample.question, sample.answer, scene.glyphs, scene.shapes, scene.regions)
    return hashlib.sha256(scene.image.tobytes() + repr(parts).encode()).hexdigest()


def outside(scene: Scene) -> float:
    """Px by which the farthest box reaches over the edge."""
    boxes = np.array([part.box for part in [*scene.glyphs, *scene.shapes, *scene.regions]]).reshape(-1, 4)
    assert (boxes[:, :2] <= boxes[:, 2:] + 1e-9).all()
    over = np.maximum(-boxes[:, :2], boxes[:, 2:] - (scene.image.height, scene.image.width))
    return float(over.max(initial=0.0))


class TestEveryTask:
    @pytest.mark.parametrize("task", NEW)
    def test_the_same_every_time(self, task):
        config = TaskConfig(megapixels=(0.03, 0.1), max_count=20, photo=1.0)
        first = [digest(sample) for sample in samples(task, 4, config)]
        random.seed(5)
        np.random.seed(5)
        assert [digest(sample) for sample in samples(task, 4, config)] == first
        assert len(set(first)) == 4

    @pytest.mark.parametrize("task", NEW)
    @settings(max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        height=st.integers(32, 700),
        width=st.integers(32, 700),
        seed=st.integers(0, 10**6),
        photo=st.sampled_from([0.0, 1.0]),
    )
    def test_any_size(self, task, height, width, seed, photo):
        config = TaskConfig(max_count=50, photo=photo, matplotlib=0, vega=0, split="eval")
        sample = TASKS[task](sample_rng(seed, task, 0), config, library(), height, width)
        scene = sample.scene
        assert sample.task == task and sample.question
        assert scene.image.mode == "RGB"
        assert sample.answer == sample.answer.strip() != "" and "  " not in sample.answer.replace('""', "")
        if task in FIXED_SIZE:
            assert scene.image.size == (width, height)
        # A font has parts below its baseline and beside its advances; that much and no more.
        assert outside(scene) <= 2, (scene.image.size, sample.question)
        labels = label_cells(scene, (0, 0, scene.image.height, scene.image.width), (4, 4))
        assert all(label.min() >= 0 and label.max() < HEADS[name] for name, label in labels.items())

    @pytest.mark.parametrize("task", NEW)
    def test_large_pictures(self, task):
        config = TaskConfig(megapixels=(3.9, 4.1), max_aspect=1.5, matplotlib=0, vega=0)
        [sample] = samples(task, 1, config)
        assert 3.5e6 < sample.scene.image.width * sample.scene.image.height < 4.5e6
        assert outside(sample.scene) <= 4

    @pytest.mark.parametrize("task", ["paragraph", "receipt", "table", "plot", "screenshot", "page"])
    def test_boxes_lie_on_ink(self, task):
        """Nearly every glyph's box differs in brightness from pixel to pixel; an empty place does not."""
        found = total = 0
        for sample in samples(task, 6):
            pixels = np.asarray(sample.scene.image.convert("L"), dtype=float)
            for glyph in sample.scene.glyphs:
                top, left, bottom, right = (round(edge) for edge in glyph.box)
                if glyph.character.isalnum() and bottom - top > 5 and right - left > 2:
                    total += 1
                    found += np.ptp(pixels[max(0, top) : bottom, max(0, left) : right]) > 25
        assert total > 100 and found / total > 0.98

    @pytest.mark.parametrize("task", NEW)
    def test_answers_of_evaluation_use_held_out_words(self, task):
        trained = {word for word in words("train") if len(word) > 5}
        for sample in samples(
            task, 6, TaskConfig(megapixels=(0.03, 0.1), split="eval", matplotlib=0, vega=0)
        ):
            names = {
                w.lower()
                for w in re.findall(r"[A-Za-z]+", " ".join(texts(sample, "word", "category", "legend")))
            }
            assert not trained & names - {"street", "square", "avenue", "market", "trading", "invoice", "receipt",
                                          "amount", "please", "returnable", "mastercard"}  # fmt: skip

    def test_difficulty_is_followed(self):
        for sample in samples("crowd", 30, TaskConfig(megapixels=(0.05, 0.2), max_count=3)):
            assert int(sample.answer) <= 3
        config = TaskConfig(megapixels=(0.2, 0.3), num_lines=(5, 20), max_answer=80, font_px=(10, 14))
        for sample in samples("paragraph", 10, config):
            assert len(sample.answer) <= 80
        for sample in samples(
            "paragraph", 10, TaskConfig(megapixels=(0.2, 0.3), num_lines=(3, 3), font_px=(10, 14))
        ):
            assert len(sample.answer.split("\n")) == 3


class TestText:
    def test_paragraph_is_its_lines(self):
        for sample in samples("paragraph", 10):
            assert sample.answer.split("\n") == texts(sample, "line")
            spelled = "".join(glyph.character for glyph in sample.scene.glyphs)
            assert spelled == "".join(sample.answer.split())

    def test_line_asked_for(self):
        for sample in samples("line", 25):
            lines = texts(sample, "line")
            neighbour = re.search(r'(after|before|below|above) "(.*)"', sample.question)
            number = re.search(r"line (\d+)", sample.question)
            if neighbour:
                step = 1 if neighbour[1] in ("after", "below") else -1
                assert lines[lines.index(neighbour[2]) + step] == sample.answer
            elif number:
                assert lines[int(number[1]) - 1] == sample.answer
            elif "last" in sample.question:
                assert lines[-1] == sample.answer
            else:
                ordinal = re.search(r"the (\w+) line", sample.question)
                assert lines[paragraphs._ORDINALS.index(ordinal[1])] == sample.answer

    def test_place_asked_for(self):
        for sample in samples("place", 25):
            height, width = sample.scene.image.height, sample.scene.image.width
            named = {}
            for region in sample.scene.regions:
                if region.kind == "line":
                    y, x = (region.box[0] + region.box[2]) / 2, (region.box[1] + region.box[3]) / 2
                    named[paragraphs.PLACES[int(3 * y / height), int(3 * x / width)]] = region.text
            if sample.question.startswith("Where"):
                assert named[sample.answer] == re.search('"(.*)"', sample.question)[1]
            else:
                [place] = [p for p in named if re.search(rf"the {p}\b", sample.question)]
                assert named[place] == sample.answer

    def test_page_column_by_column(self):
        for sample in samples("page", 25):
            lines, heading = texts(sample, "line"), texts(sample, "heading")
            if sample.question in paragraphs.PAGE_QUESTIONS:
                assert sample.answer.split("\n") == heading + lines
            elif "heading" in sample.question:
                assert [sample.answer] == heading
            else:
                assert sample.answer in "\n".join(lines)

    def test_all_characters_are_in_the_font(self):
        """Accents are kept where the font has them, and left out where it has not."""
        font = load_font(str(matplotlib_font_dir() / "DejaVuSans.ttf"), 12)
        assert spell("é ž Åñ", font) == "é ž Åñ"
        cmr = load_font(str(matplotlib_font_dir() / "cmr10.ttf"), 12)
        assert spell("déjà vu ø", cmr) == "deja vu o"
        for sample in samples("paragraph", 10, TaskConfig(megapixels=(0.05, 0.1), accents=1.0)):
            for cuts in library().families.values():
                assert all(can_draw(cuts[0].path, glyph.character) for glyph in sample.scene.glyphs)
            assert not sample.answer.isascii()

    def test_accented_letters_are_labelled_as_their_base(self):
        scene = Scene(Image.new("RGB", (32, 16)), [Glyph("é", (0, 0, 16, 16)), Glyph("ø", (0, 16, 16, 32))])
        plane = label_cells(scene, (0, 0, 16, 32), (1, 2))["character"]
        assert plane.tolist() == [[CHARACTERS.index("e") + 1] * 4, [0] * 4]

    def test_phrases_are_drawable(self):
        phrases = Phrases(random.Random(0), accents=0.0)
        for _ in range(300):
            text = " ".join(
                [phrases.entry(), phrases.address(), phrases.price(), phrases.date(), *phrases.sentence()]
            )
            assert set(text) <= set(CHARACTERS + " ") and "  " not in text
        names = Phrases(random.Random(0), accents=1.0).distinct_words(30)
        assert len({unaccented(name) for name in names}) == 30


class TestReceipts:
    def test_fields(self):
        kinds = set()
        for sample in samples("receipt", 40):
            lines = texts(sample, "line")
            question = sample.question
            kind = next((k for k, known in receipts.QUESTIONS.items() if question in known), "price")
            kinds.add(kind)
            if kind == "all":
                assert sample.answer.split() == " ".join(lines).split()
            elif kind == "json":
                record = json.loads(sample.answer)
                assert list(record) == ["company", "date", "address", "total"]
                assert record["company"] == lines[0] and record["date"] in lines
                assert record["address"].split(", ") == [lines[1].removesuffix(","), lines[2]]
                assert any(re.fullmatch(rf"\D*{re.escape(record['total'])}", line) for line in lines)
                assert receipts.compact_json(record) == sample.answer
            elif kind == "items":
                for item in json.loads(sample.answer):
                    assert lines[lines.index(item["name"]) + 1] == item["price"]
            elif kind == "price":
                [name] = [
                    line
                    for line in lines
                    if f" {line}" in question and lines[lines.index(line) + 1] == sample.answer
                ]
                assert question.startswith(("What is the price of", "How much is", "What does")) and name
            elif kind == "total":
                assert any(line.endswith(sample.answer) for line in lines)
        assert len(kinds) >= 7

    def test_total_is_the_sum(self):
        for seed in range(30):
            receipt = receipts.random_receipt(random.Random(seed), Phrases(random.Random(seed)), 6)
            total = sum(round(100 * float(price)) for _, price in receipt.items)
            assert round(100 * float(receipt.total.replace(",", ""))) == total
            assert len({name for name, _ in receipt.items}) == 6


class TestTables:
    def test_answers_are_the_cells(self):
        kinds = set()
        for sample in samples("table", 40):
            rows: dict[float, list[str]] = {}
            for region in sample.scene.regions:
                if region.kind == "cell":
                    rows.setdefault(region.box[0], []).append(region.text)
            cells = list(rows.values())
            assert len({len(row) for row in cells}) == 1
            answer, question = sample.answer, sample.question
            if question in tables.HTML_QUESTIONS:
                kinds.add("html")
                parsed = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", answer)]
                assert [[html.unescape(cell) for cell in row] for row in parsed] == cells
            elif question in tables.CSV_QUESTIONS:
                kinds.add("csv")
                assert list(csv.reader(io.StringIO(answer))) == cells
            elif question.startswith("How many"):
                assert answer == str(len(cells) - 1 if "rows" in question else len(cells[0]))
            elif question.endswith("as CSV."):
                assert next(csv.reader([answer])) in cells
            else:
                kinds.add("cell")
                [row] = [row for row in cells[1:] if re.search(rf"\b{row[0]}\b", question)]
                columns = [j for j, name in enumerate(cells[0]) if j and re.search(rf"\b{name}\b", question)]
                assert answer in [row[j] for j in columns]
        assert kinds == {"html", "csv", "cell"}

    def test_csv_quotes_what_needs_it(self):
        assert tables.table_to_csv([["a", "1,000"], ['say "x"', ""]]) == 'a,"1,000"\n"say ""x""",'
        assert tables.table_to_html([["a<b", "c"]]) == "<table><tr><td>a&lt;b</td><td>c</td></tr></table>"


def check_plot(sample: TaskSample) -> str:
    """Checks the answer against the marks; returns what was asked, or "" for what no mark tells."""
    question, answer = sample.question, sample.answer
    marks = [region for region in sample.scene.regions if region.kind in ("bar", "point", "wedge")]
    values = {mark.text: mark.value for mark in marks}
    if "CSV" in question:
        _, *rows = csv.reader(io.StringIO(answer))
        if len(rows[0]) == 2:
            assert {name: float(value) for name, value in rows} == values
        else:
            assert sorted(float(v) for _, *cells in rows for v in cells) == sorted(values.values())
        return "csv"
    if question == "What is the largest value?":
        assert float(answer) == max(values.values())
        return "largest"
    if question.startswith(("What is the difference", "How far apart")):
        one, two = re.search(r"(?:between|apart are) (\w+) and (\w+)\?", question).groups()
        assert float(answer) == pytest.approx(abs(values[one] - values[two]))
        return "difference"
    pair = re.search(r"(sum|average) of (\w+) and (\w+)\?", question)
    if pair:
        one, two = values[pair[2]], values[pair[3]]
        assert float(answer) == pytest.approx((one + two) / (2 if pair[1] == "average" else 1))
        return pair[1]
    larger = re.fullmatch(r"Is (?:the value of )?(\w+) (?:larger than|more than that of) (\w+)\?", question)
    if larger:
        assert answer == ("Yes" if values[larger[1]] > values[larger[2]] else "No")
        return "larger"
    either = re.fullmatch(r"Which is larger, (\w+) or (\w+)\?", question)
    if either:
        assert answer == max(either.groups(), key=values.__getitem__)
        return "either"
    above = re.search(r"above ([\d.]+)\?", question)
    if above:
        assert int(answer) == sum(value > float(above[1]) for value in values.values())
        return "above"
    named = re.fullmatch(
        r"(?:What was the \w+ of|How many \w+ did|In) (\w+)(?: have|, how much .*)?\?", question
    )
    if named:
        assert float(answer) == values[named[1]]
        return "named"
    most = re.fullmatch(r"Which \w+ (?:has the (highest|lowest)|had the most) \w+\?", question)
    if most and len(values) == len({mark.text for mark in marks}) and answer in values:
        assert values[answer] == (min if most[1] == "lowest" else max)(values.values())
        return "most"
    if question.startswith("How many") and "series" not in question:
        name = re.search("points of (\\w+)", question)
        assert int(answer) == len([mark for mark in marks if not name or mark.text == name[1]])
        return "number"
    single = re.fullmatch(r"(?:What is the value of|How much is) (\w+)\?", question)
    if single:
        assert float(answer) == values[single[1]]
        return "value"
    double = re.fullmatch(r"What is the value of (\w+) for (\w+)\?", question)
    if double:
        assert float(answer) == values[f"{double[2]} {double[1]}"]
        return "value of series"
    if question.startswith(("Which is the largest", "Which bar is the largest")):
        assert values[answer] == max(values.values())
        return "which"
    return ""


class TestPlots:
    def test_answers_follow_from_the_marks(self):
        asked = {check_plot(sample) for sample in samples("plot", 300, PLAIN)}
        assert asked >= {"csv", "largest", "difference", "number", "value", "value of series", "which"}
        assert asked >= {"sum", "average", "larger", "either", "above", "named", "most"}

    def test_bars_are_as_long_as_their_values(self):
        checked = 0
        for seed in range(40):
            sample = plots.read_plot(random.Random(seed), PLAIN, library(), 300, 400)
            bars = [region for region in sample.scene.regions if region.kind == "bar"]
            for long in ((lambda b: b[2] - b[0]), (lambda b: b[3] - b[1])):
                sizes = [long(bar.box) / bar.value for bar in bars]
                if bars and np.ptp(sizes) < 1e-3 * max(sizes):
                    checked += 1
        assert checked >= 12

    def test_crowded_charts_are_asked_about_by_what_is_not_printed(self):
        config = dataclasses.replace(PLAIN, crowded=1.0, megapixels=(0.15, 0.3))
        most = asked = unprinted = 0
        for sample in samples("plot", 120, config):
            assert outside(sample.scene) <= 2
            marks = [region for region in sample.scene.regions if region.value is not None]
            most = max(most, len(marks))
            values = {mark.text: mark.value for mark in marks}
            by_topic = re.search(
                r"(?:\b(?:in|did|of)|^In) (\w+)(?: have\?|\?|, what was the)", sample.question
            )
            if not by_topic or by_topic[1] not in values:
                continue
            asked += 1
            assert float(sample.answer) == values[by_topic[1]]
            written = " ".join(texts(sample, "word"))
            unprinted += any(
                not re.search(rf"\b{word}\b", written) for word in sample.question.rstrip("?").split()[4:]
            )
        assert most >= 15 and asked >= 15 and unprinted >= 10

    @pytest.mark.parametrize("renderer", ["matplotlib", "vega"])
    def test_other_renderers(self, renderer):
        shares = {"matplotlib": 0.0, "vega": 0.0, renderer: 1.0}
        config = TaskConfig(megapixels=(0.05, 0.1), max_aspect=1.5, split="eval", **shares)
        for sample in samples("plot", 12, config):
            check_plot(sample)
            assert outside(sample.scene) <= 2
            found = [glyph for glyph in sample.scene.glyphs if glyph.character.isalnum()]
            pixels = np.asarray(sample.scene.image.convert("L"), dtype=float)
            inked = [
                np.ptp(pixels[round(g.box[0]) : round(g.box[2]) + 1, round(g.box[1]) : round(g.box[3]) + 1])
                > 25
                for g in found
            ]
            assert np.mean(inked) > 0.95

    @pytest.mark.parametrize("kind", KINDS)
    def test_marks_of_vega_have_the_colours_and_lengths_of_their_values(self, kind):
        rng = random.Random(kind)
        config = dataclasses.replace(PLAIN, printed_values=0.0)
        while (plot := plots.random_plot(rng, config, 5)).kind != kind:
            pass
        scene, colors = draw_with_vega(rng, config, library(), plot, 300, 420)
        assert scene.image.size == (420, 300)
        marks = [region for region in scene.regions if region.value is not None]
        assert [mark.value for mark in marks] == [v for series in plot.series for v in series.values]
        pixels = np.asarray(scene.image, dtype=int)

        def color_of(mark: Region) -> np.ndarray:
            top, left, bottom, right = mark.box
            return pixels[round((top + bottom) / 2), round((left + right) / 2)]

        for mark in marks:
            seen = color_of(mark)
            of_series = [
                c for c, series in zip(colors, plot.series, strict=False) if series.name in mark.text
            ]
            if of_series and kind in ("grouped", "stacked"):
                assert np.abs(seen - COLORS[of_series[0]]).max() <= 4
            elif kind == "bar":
                assert np.abs(seen - color_of(marks[0])).max() <= 4
        if kind in ("bar", "horizontal", "grouped", "stacked"):
            axis = 1 if kind == "horizontal" else 0
            scales = [(mark.box[axis + 2] - mark.box[axis]) / mark.value for mark in marks]
            assert np.ptp(scales) < 0.02 * max(scales)

    def test_styles_are_apart(self):
        assert not set(THEMES["train"]) & set(THEMES["eval"])
        assert not set(STYLES["train"]) & set(STYLES["eval"])
        for styles in STYLES.values():
            for style in styles:
                assert abs(luminance(style.ink) - luminance(style.ground)) > 100

    @pytest.mark.parametrize(
        "highest, most, expected",
        [(93, 5, [0, 20, 40, 60, 80]), (10, 5, [0, 2, 4, 6, 8, 10]), (0.5, 5, [0, 0.1, 0.2, 0.3, 0.4, 0.5])],
    )
    def test_ticks(self, highest, most, expected):
        assert nice_ticks(highest, most) == expected


def in_common_names(question: str) -> str:
    """The question with kinds of shapes as they are called most often."""
    for others, name in (
        ("balls|discs|dots", "circles"),
        ("hoops", "rings"),
        ("pluses", "crosses"),
        ("objects|things|items", "shapes"),
    ):
        question = re.sub(others, name, question)
    return question


class TestCrowds:
    def test_answer_is_the_number_of_marks(self):
        seen = set()
        for sample in samples("crowd", 60, TaskConfig(megapixels=(0.05, 0.3), max_count=50)):
            asked = sample.question
            scene = sample.scene
            if scene.glyphs:
                sign = re.search(r"(?:digits|letters) (\w)|([&@#%$]) signs", asked)
                counted = sum(glyph.character in sign.groups() for glyph in scene.glyphs)
            else:
                colors = {shape.color for shape in scene.shapes if re.search(rf"\b{shape.color}\b", asked)}
                spelt = in_common_names(asked)
                kinds = {shape.kind for shape in scene.shapes if re.search(rf"\b{shape.kind}", spelt)}
                named = [
                    shape for shape in scene.shapes
                    if (not colors or shape.color in colors) and (not kinds or shape.kind in kinds)
                ]  # fmt: skip
                counted = len(named) if sample.answer != "0" else 0
            assert int(sample.answer) == counted
            seen.add(int(sample.answer))
        assert max(seen) > 25 and min(seen) <= 3

    def test_each_thing_that_is_counted_is_pointed_at(self):
        questions = ""
        for sample in samples("crowd", 60, TaskConfig(megapixels=(0.05, 0.3), max_count=30, max_questions=3)):
            centers = {part.center for part in [*sample.scene.glyphs, *sample.scene.shapes]}
            for turn in sample.turns:
                assert int(turn.answer) == len(turn.points) and set(turn.points) <= centers
                assert turn.mentions
                assert set(turn.points) <= set(turn.mentions[-1].points)
                questions += turn.question
        assert "balls" in questions and "objects" in questions

    def test_discs_keep_apart(self):
        for clustered in (False, True):
            places = crowds.place_discs(random.Random(1), 300, 400, 40, (8, 12), 0.2, clustered)
            assert len(places) > 20
            for i, (y, x, r) in enumerate(places):
                assert r < y < 300 - r and r < x < 400 - r
                for v, u, s in places[:i]:
                    assert np.hypot(y - v, x - u) >= 0.8 * (r + s)

    @pytest.mark.parametrize("seed", range(8))
    def test_grounds_stay_near_their_colour(self, seed):
        pixels = np.asarray(crowds.textured_ground(random.Random(seed), 50, 70, (120, 130, 140)), dtype=float)
        assert pixels.shape == (50, 70, 3)
        assert np.abs(pixels - (120, 130, 140)).mean() < 25


class TestBloodCells:
    def test_each_cell_is_pointed_at_and_seen(self):
        seen: dict[str, set[int]] = {}
        for sample in samples("cells", 60, TaskConfig(megapixels=(0.05, 0.3), max_count=25, max_questions=3)):
            scene = sample.scene
            shown = {shape.center: shape.color for shape in scene.shapes}
            pointed = []
            for turn in sample.turns:
                assert int(turn.answer) == len(turn.points) == len(set(turn.points))
                things = re.search("red blood cells|white blood cells|platelets", turn.question).group()
                assert {shown[center] for center in turn.points} <= {"red" if "red" in things else "purple"}
                assert turn.question[turn.mentions[0].start : turn.mentions[0].end] == things
                seen.setdefault(things, set()).add(int(turn.answer))
                pointed += turn.points
            assert len(pointed) == len(set(pointed)) <= len(shown)
            assert all(
                max(abs(y - v), abs(x - u)) > 8 for (y, x), (v, u) in itertools.combinations(sample.points, 2)
            )
        assert max(seen["red blood cells"]) > 15 and {0, 1} <= seen["white blood cells"] & seen["platelets"]

    def test_what_is_red_is_redder_than_the_ground(self):
        differences = []
        for sample in samples("cells", 12, TaskConfig(megapixels=(0.1, 0.3))):
            pixels = np.asarray(sample.scene.image, dtype=float)
            ground = np.median(pixels.reshape(-1, 3), axis=0)
            for shape in sample.scene.shapes:
                top, left, bottom, right = map(round, shape.box)
                if shape.color == "red":
                    differences.append((ground - pixels[top:bottom, left:right].mean(axis=(0, 1)))[1])
        assert len(differences) > 30 and np.mean(np.array(differences) > 3) > 0.8


class TestPlacesOfValues:
    @pytest.mark.parametrize("kind, edge", [("bar", "top"), ("horizontal", "right")])
    def test_a_value_that_is_not_printed_is_read_at_the_end_of_its_bar(self, kind, edge):
        found = 0
        config = dataclasses.replace(PLAIN, printed_values=0.0, max_questions=6)
        for index in range(150):
            rng = random.Random(index)
            plot = plots.random_plot(rng, config, 5)
            if plot.kind != kind:
                continue
            scene, _ = plots.draw_with_pillow(rng, config, library(), plot, 300, 400)
            for value, bar in zip(
                plot.series[0].values, [r for r in scene.regions if r.kind == "bar"], strict=True
            ):
                top, left, bottom, right = bar.box
                expected = (top, (left + right) / 2) if edge == "top" else ((top + bottom) / 2, right)
                answer = f"{value:g}"
                assert plots.locate_value(answer, plot, scene) == [[expected]] * len(answer)
                found += 1
        assert found > 20

    def test_what_stands_for_no_mark_has_no_place(self):
        [sample] = samples("plot", 1)
        plot = plots.random_plot(random.Random(0), PLAIN, 5)
        assert plots.locate_value("123456", plot, sample.scene) == []
        assert plots.locate_value("largest", plot, sample.scene) == []


class TestFlowcharts:
    def test_edges(self):
        for sample in samples("flowchart", 30):
            arrows, nodes = texts(sample, "arrow"), texts(sample, "node")
            edges = [tuple(arrow.split(" -> ")) for arrow in arrows]
            assert {name for edge in edges for name in edge} == set(nodes)
            if sample.question in flowcharts.QUESTIONS:
                assert sample.answer == "\n".join(arrows)
            elif "How many" in sample.question:
                assert sample.answer == str(len(nodes))
            elif "after" in sample.question or "from" in sample.question and "lead?" in sample.question:
                [start] = [name for name in nodes if re.search(rf"\b{name}\b", sample.question)]
                assert (start, sample.answer) in edges


class TestScreens:
    def test_parts(self):
        for sample in samples("screenshot", 30):
            if sample.question in screens.QUESTIONS:
                spelled = "".join(sample.answer.split())
                assert sorted(spelled) == sorted(glyph.character for glyph in sample.scene.glyphs)
            elif "title" in sample.question:
                assert [sample.answer] == texts(sample, "title")
            elif "field" in sample.question:
                assert sample.answer in texts(sample, "field")
            elif "buttons" in sample.question:
                assert sample.answer == str(len(texts(sample, "button")))


class TestPhotoEffects:
    def test_boxes_follow_a_tilt(self):
        """Dark squares stay under their boxes, whatever the tilt."""
        for seed in range(12):
            image = Image.new("RGB", (300, 200), "white")
            boxes = [(20.0, 30.0, 50.0, 60.0), (120.0, 220.0, 160.0, 260.0)]
            for top, left, bottom, right in boxes:
                image.paste((0, 0, 0), (int(left), int(top), int(right), int(bottom)))
            scene = Scene(image, regions=[Region("cell", "", box) for box in boxes])
            tilted = tilt(random.Random(seed), scene)
            assert tilted.image.size == (300, 200)
            pixels = np.asarray(tilted.image.convert("L"))
            for region in tilted.regions:
                top, left, bottom, right = region.box
                y, x = (top + bottom) / 2, (left + right) / 2
                assert pixels[round(y) - 8 : round(y) + 8, round(x) - 8 : round(x) + 8].max() < 60
                assert 0 <= top < bottom <= 200 and 0 <= left < right <= 300

    def test_homography_takes_corners_to_corners(self):
        start = np.array([(0, 0), (10, 0), (10, 8), (0, 8)], dtype=float)
        end = np.array([(1, 1), (9, 0.5), (9.5, 7), (0.5, 7.5)])
        matrix = homography(start, end)
        points = matrix @ np.c_[start, np.ones(4)].T
        np.testing.assert_allclose((points[:2] / points[2]).T, end)
        shift = np.array([[1, 0, 5], [0, 1, 3], [0, 0, 1.0]])
        np.testing.assert_allclose(warp_boxes(np.array([[0, 1, 2, 4.0]]), shift), [[3, 6, 5, 9]])

    def test_dots_leave_paper_alone(self):
        image = Image.new("RGB", (40, 40), (250, 250, 250))
        image.paste((0, 0, 0), (10, 10, 30, 30))
        printed = np.asarray(print_thermally(random.Random(1), image, 3))
        assert printed[:9].min() == 250 and printed[10:30, 10:30].max() >= 60


@pytest.mark.parametrize(
    "height, width, aspects, min_area, expected",
    [
        (100, 400, (0.25, 0.6), 0, (258, 155)),
        (100, 100, (0.5, 2), 0, (100, 100)),
        (10, 10, (0.5, 2), 400, (20, 20)),
    ],
)
def test_reshape(height, width, aspects, min_area, expected):
    assert reshape(height, width, aspects, min_area) == expected


class TestFollowUps:
    def test_each_counts_the_shapes_that_its_words_name(self):
        """Also none at all, and any of them may come first."""
        firsts, numbers = set(), set()
        for sample in samples("count", 60, TaskConfig(megapixels=(0.02, 0.05), max_questions=4)):
            for turn in sample.turns:
                [things] = re.findall(
                    r"(\w+ )?(\w+)s(?: |[.])(?:are there|do you|in the image|$)",
                    in_common_names(turn.question),
                )
                color, kind = (word.strip() for word in things)
                named = [
                    shape.center
                    for shape in sample.scene.shapes
                    if (shape.color == color or color not in COLORS)
                    and (kind == "shape" or plural(shape.kind) == f"{kind}s")
                ]
                assert sorted(turn.points) == sorted(named) and turn.answer == str(len(named)), turn
                numbers.add(turn.answer)
            firsts.add(sample.answer)
            assert len(sample.turns) <= 4
        assert {"0", "1", "2"} <= numbers and "0" in firsts

    @pytest.mark.parametrize(
        "task", ["line", "place", "page", "receipt", "table", "screenshot", "plot", "flowchart"]
    )
    def test_several_questions_have_different_answers(self, task):
        """The short ones first; and the picture is that of a single question."""
        config = TaskConfig(megapixels=(0.05, 0.1), matplotlib=0, vega=0)
        alone = list(samples(task, 20, config))
        several = list(samples(task, 20, dataclasses.replace(config, max_questions=4)))
        assert max(len(sample.turns) for sample in several) > 1
        for sample, single in zip(several, alone, strict=True):
            assert not single.follow_ups
            assert sample.scene.image.tobytes() == single.scene.image.tobytes()
            answers = [turn.answer for turn in sample.turns]
            assert len(set(answers)) == len(answers) <= 4 and single.answer in answers
            assert [len(answer) for answer in answers] == sorted(map(len, answers))
            assert all(len(turn.places) in (0, len(turn.answer)) for turn in sample.turns)

    def test_one_question_by_default(self):
        assert all(not sample.follow_ups for sample in samples("count", 10))

    def test_a_conversation_has_its_image_once(self):
        sample = next(s for s in samples("count", 20, TaskConfig(max_questions=4)) if len(s.turns) == 3)
        messages = sample.messages([[(1, 2)], [], [(3, 4), (5, 6)]])
        assert [message["role"] for message in messages] == ["user", "assistant"] * 3
        blocks = [[block["type"] for block in message["content"]] for message in messages]
        assert blocks == [
            ["image", "text"],
            ["points", "text"],
            ["text"],
            ["text"],
            ["text"],
            ["points", "text"],
        ]
        assert messages[5]["content"][0]["points"] == [(3, 4), (5, 6)]


class TestUnlistedScenes:
    def test_labels_say_that_nobody_knows(self):
        [sample] = samples("count", 1)
        height, width = sample.scene.image.size[::-1]
        scene = Scene(sample.scene.image, is_listed=False)
        moved = scene.moved(scene.image, lambda boxes: boxes)
        for name, labels in label_cells(moved, (0, 0, height, width), (2, 3)).items():
            assert name in HEADS and labels.shape == (6, 4) and (labels == UNKNOWN).all()
