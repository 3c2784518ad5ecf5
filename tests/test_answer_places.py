"""Answers are found again where their words were written."""

import random
import re

import pytest
from PIL import Image, ImageFont

from vlmslice.data.answer_places import locate_answer
from vlmslice.data.fonts import FontLibrary, matplotlib_font_dir
from vlmslice.data.scenes import Scene
from vlmslice.data.tasks import Curriculum, TaskConfig, TaskDataset
from vlmslice.data.typesetting import Pen


@pytest.fixture
def pen() -> Pen:
    return Pen(Scene(Image.new("RGB", (400, 300))), (255, 255, 255))


def write(pen: Pen, *lines: str) -> Scene:
    for i, line in enumerate(lines):
        pen.write(line, ImageFont.load_default(12), 20 * i, 0)
    return pen.scene


def read_back(answer: str, scene: Scene) -> str:
    """What stands at the places of an answer; `~` where no place is known."""
    characters = {glyph.center: glyph.character for glyph in scene.glyphs}
    places = locate_answer(answer, scene)
    assert not places or len(places) == len(answer)
    return "".join(characters[place[0]] if place else "~" for place in places)


@pytest.mark.parametrize(
    ("written", "answer", "found"),
    [
        (["one two", "three"], "one two\nthree", "one~two~three"),
        (["one two", "three"], "two", "two"),
        (["cat 7", "dog 12"], '{"cat":"7","dog":"12"}', "~~cat~~~7~~~dog~~~12~~"),
        (["cat 7", "dog 12"], "<td>dog</td><td>12</td>", "~~~~dog~~~~~~~~~12~~~~~"),
        (["a b", "c d"], "c d -> a b", "c~d~~~~a~b"),
        # "1" is a part of a word that was written, not a word.
        (["11"], "1", ""),
        (["cat"], "dog", ""),
        # Which of two is meant cannot be told, but for what follows what was found before.
        (["5", "cat 5"], "5", ""),
        (["5", "cat 5"], "cat,5", "cat~5"),
        (["5", "5", "cat"], "5\n5\ncat", "5~5~cat"),
    ],
)
def test_what_is_found(pen: Pen, written: list[str], answer: str, found: str) -> None:
    assert read_back(answer, write(pen, *written)) == found


def test_turned_text_is_passed_over(pen: Pen) -> None:
    """It has glyphs and no words."""
    scene = write(pen, "one", "two", "three")
    scene.regions = [region for region in scene.regions if region.text != "two"]
    assert read_back("one\ntwo\nthree", scene) == "one~~~~~three"


@pytest.mark.parametrize(
    "task", ["paragraph", "line", "page", "receipt", "table", "screenshot", "plot", "flowchart"]
)
def test_places_of_rendered_tasks_hold_their_characters(task: str) -> None:
    fonts = FontLibrary("train", [matplotlib_font_dir()])
    dataset = TaskDataset(
        [Curriculum(40, TaskConfig(megapixels=(0.05, 0.2), matplotlib=0, vega=0), {task: 1.0})], fonts
    )
    num_found = 0
    for index in random.Random(0).sample(range(40), 20):
        sample = dataset[index]
        by_center: dict = {}
        for glyph in sample.scene.glyphs:
            by_center.setdefault(glyph.center, set()).add(glyph.character)
        marks = [region.box for region in sample.scene.regions if region.value is not None]
        for character, places in zip(sample.answer, sample.places, strict=False):
            for y, x in places:
                if (y, x) in by_center:
                    assert character in by_center[y, x]
                else:  # a value that is read off the axis
                    assert any(top <= y <= low and left <= x <= right for top, left, low, right in marks)
            num_found += len(places)
        assert not sample.places or len(sample.places) == len(sample.answer)
    asked = sum(len(re.sub(r"\s", "", dataset[i].answer)) for i in range(20))
    assert num_found > asked / 5
