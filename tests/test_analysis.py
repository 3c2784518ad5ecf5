"""Figures against numbers worked out by hand, and faults that were planted."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from vlmslice.counting_test import analysis
from vlmslice.counting_test.analysis import MIN_GROUPS, NO_NUMBER, analyse, find_faults
from vlmslice.counting_test.answerers import SCRIPTS, ScriptedAnswerer
from vlmslice.counting_test.answers import CountAnswer, record_answer
from vlmslice.counting_test.arms import Arm
from vlmslice.counting_test.pictures import (
    Picture,
    all_pictures,
    copy_pictures,
    count_pictures,
    nine_balls_pictures,
    seam_pictures,
    size_pictures,
)
from vlmslice.counting_test.run import ask, build_questions
from vlmslice.slicing import SlicingConfig


def answer_all(
    pictures: list[Picture], answer: Callable[[Picture], object], arm: str = "adaptive"
) -> list[CountAnswer]:
    return [record_answer(picture, arm, str(answer(picture))) for picture in pictures]


def ask_script(script: str) -> list[CountAnswer]:
    answerer = ScriptedAnswerer(script)
    questions = build_questions(all_pictures([answerer.slicing]), [Arm("adaptive")])
    return [answer for batch in ask(answerer, questions) for answer in batch]


def test_a_perfect_counter_has_no_fault() -> None:
    results = analyse(ask_script("perfect"))
    assert results["findings"] == []
    arm = results["arms"]["adaptive"]
    assert arm["overall"]["exact"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert arm["overall"]["mae"]["value"] == 0
    assert arm["seams"]["on_seams"] == {"value": 0.0, "low": 0.0, "high": 0.0, "num_groups": 12}
    assert arm["confusion"]["9"].keys() == {"9"}


@pytest.mark.parametrize(
    ("script", "name", "words"),
    [
        ("double-counter", "double-counting on seams", ("counted twice", "+1.00 an object on a seam")),
        ("seam-misser", "missing on seams", ("Objects on seams are missed", "-1.00 an object on a seam")),
        ("size-failer", "larger pictures are counted worse", ("100 % at 1024 px", "0 % at 2048 px")),
        ("constant", "an answer that does not depend on the count", ("grows by 0.00", "100 % of all answers are 7")),
    ],
)  # fmt: skip
def test_a_planted_fault_is_named(script: str, name: str, words: tuple[str, ...]) -> None:
    faults = {fault.name: fault for fault in find_faults("adaptive", ask_script(script))}
    assert name in faults
    for word in words:
        assert word in faults[name].sentence


def test_only_the_scripts_with_faults_at_seams_have_faults_at_seams() -> None:
    for script in SCRIPTS:
        names = {fault.name for fault in find_faults("adaptive", ask_script(script))}
        assert ("double-counting on seams" in names) == (script == "double-counter")
        assert ("missing on seams" in names) == (script == "seam-misser")


def test_error_of_objects_on_seams() -> None:
    pictures = seam_pictures(SlicingConfig(), num=8)
    # One too many everywhere, and half of what lies on seams once more.
    rows = answer_all(pictures, lambda picture: picture.layout.count + 1 + picture.num_on_seams)
    on, inside = analysis.seam_effect(rows), analysis.inside_effect(rows)
    assert on.figure is not None and inside.figure is not None
    assert (on.figure.value, on.num_groups) == (1.0, 8)
    truths = [row.truth for row in rows if row.variant == "inside"]
    assert inside.figure.value == pytest.approx(8 / sum(truths))


def test_pairs_without_a_number_are_left_out() -> None:
    pictures = seam_pictures(SlicingConfig(), num=8)
    rows = answer_all(pictures, lambda picture: "many" if picture.group == "03" else picture.layout.count)
    assert analysis.seam_effect(rows).num_groups == 7
    assert analysis.analyse_arm(rows)["num_without_number"] == 2
    assert NO_NUMBER in analysis.confusion(rows)[str(rows[6].truth)]


def test_faults_need_groups() -> None:
    def faults(num: int) -> list[str]:
        rows = answer_all(seam_pictures(SlicingConfig(), num=num), lambda p: p.layout.count + p.num_on_seams)
        return [fault.name for fault in find_faults("adaptive", rows)]

    assert faults(MIN_GROUPS - 1) == []
    assert faults(MIN_GROUPS) == ["double-counting on seams"]


def test_faults_need_an_interval_without_zero() -> None:
    # One pair of twelve errs: that may be chance.
    rows = answer_all(
        seam_pictures(SlicingConfig(), num=12), lambda p: p.layout.count + p.num_on_seams * (p.group == "05")
    )
    effect = analysis.seam_effect(rows)
    assert effect.figure is not None and effect.figure.value > 0
    assert find_faults("adaptive", rows) == []


def test_random_errors_rarely_make_a_finding() -> None:
    """Errors that depend on nothing: about one interval of twenty excludes zero, not most of them."""
    pictures = seam_pictures(SlicingConfig(), num=12) + size_pictures(num=8)
    found = 0
    for seed in range(40):
        rng = random.Random(seed)
        rows = answer_all(pictures, lambda picture: picture.layout.count + rng.choice((-1, 0, 0, 1)))  # noqa: B023
        found += analysis.seam_effect(rows).is_found + analysis.size_effect(rows).is_found
    assert found <= 12  # of 80


def test_growth_of_the_error_with_size_and_count() -> None:
    rows = answer_all(size_pictures(num=6), lambda p: p.layout.count + (p.size[0] >= 1024))
    effect = analysis.size_effect(rows)
    # Wrong 0, 0, 1, 1 at four doublings: the least-squares slope is 0.4.
    assert effect.figure is not None and effect.figure.value == pytest.approx(0.4)
    rows = answer_all(count_pictures(), lambda picture: 2 * picture.layout.count + 3)
    effect = analysis.count_effect(rows)
    assert effect.figure is not None and effect.figure.value == pytest.approx(1.0)


def test_invariance() -> None:
    def answer(picture: Picture) -> int:
        return picture.layout.count + picture.transposed + (picture.shift == (0, 5))

    changes = analysis.invariance(answer_all(copy_pictures(num=6), answer))
    assert changes["transposed"].figure is not None and changes["shifted"].figure is not None
    assert changes["transposed"].figure.value == 1
    assert changes["shifted"].figure.value == 0.25
    assert changes["resized"].figure is None


def test_wrong_twice_alike_is_no_change() -> None:
    changes = analysis.invariance(answer_all(copy_pictures(num=6) + size_pictures(num=6), lambda _: "many"))
    assert [effect.figure and effect.figure.value for effect in changes.values()] == [0, 0, 0]


def test_arms_are_compared_picture_by_picture() -> None:
    pictures = size_pictures(num=8)
    plain = answer_all(pictures, lambda picture: picture.layout.count)
    worse = answer_all(pictures, lambda picture: 0, "adaptive, no overview")
    other = answer_all(pictures, lambda picture: 0, "uhd")
    results = analyse([*plain, *other, *worse])
    assert results["comparisons"]["adaptive, no overview"]["baseline"] == "adaptive"
    assert results["comparisons"]["uhd"]["fewer_exact"]["value"] == 1
    names = [(finding["name"], finding["arm"]) for finding in results["findings"]]
    assert ("worse arm", "adaptive, no overview") in names and ("worse arm", "uhd") in names


def test_what_could_not_be_asked_is_counted_and_nothing_else() -> None:
    pictures = nine_balls_pictures((256, 512))
    rows = [
        record_answer(pictures[0], "adaptive", "9"),
        record_answer(pictures[1], "adaptive", None, "over the bound"),
    ]
    arm = analysis.analyse_arm(rows)
    assert arm["not_asked"] == {"over the bound": 1}
    assert arm["overall"]["num"] == 1 and arm["overall"]["exact"]["value"] == 1
    assert arm["nine_balls"] == {"256": 9}


def test_confusion_counts_answers() -> None:
    [row] = answer_all(nine_balls_pictures((256,)), lambda _: 12)
    assert analysis.confusion([row, row, replace(row, count=9)]) == {"9": {"12": 2, "9": 1}}
