"""From answers to figures and findings, each with a 95 % interval.

Figures are ratios of sums with a bootstrap interval over groups of matched pictures (see `metrics.summarize`): pictures
of one layout share its difficulty. A finding is a sentence about one effect, measured within groups, and is made only
if the interval of the effect excludes zero and `MIN_GROUPS` groups tell of it. There are about ten effects for each
arm, so of a model that errs at random some arm may show one: an interval of 95 % misses in one case of twenty.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from vlmslice.counting_test.answers import CountAnswer
from vlmslice.metrics import Figure, Ratio, summarize

MIN_GROUPS = 6
"""Fewest groups that a finding rests on; fewer make no interval."""
NO_FAULT = (
    f"No fault found. (A finding rests on {MIN_GROUPS} groups of pictures at least; --limit may leave fewer.)"
)
_ROUNDING = 1e-9  # of sums; an effect below is none
NO_NUMBER = "no number"

Results = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """An effect whose interval excludes zero.

    Attributes:
        name: Of the effect, such as "double-counting on seams".
        arm: In which it was found.
        sentence: What was found, with its evidence.
        effect: Its size and interval.
        num_groups: On which it rests.
    """

    name: str
    arm: str
    sentence: str
    effect: Figure
    num_groups: int

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Effect:
    """What `Finding` is made of, whatever its interval; `figure` is None if no group tells of it."""

    figure: Figure | None
    num_groups: int

    @property
    def is_found(self) -> bool:
        """Whether the interval excludes zero, and enough groups make it."""
        figure = self.figure
        if figure is None or self.num_groups < MIN_GROUPS:
            return False
        return figure.low > _ROUNDING or figure.high < -_ROUNDING


def analyse(answers: Sequence[CountAnswer]) -> Results:
    """All figures of a test, ready for JSON.

    Args:
        answers: Of any arms and sets, in any order.

    Returns:
        `arms`: by name, what `analyse_arm` gives. `comparisons`: each further arm of the whole test, that of an
        arm from which something is taken away with the plain one, of another policy with the first;
        `findings`: what `find_faults` and the comparisons found.
    """
    by_arm = _group(answers, lambda answer: answer.arm)
    findings = [finding for name in by_arm for finding in find_faults(name, by_arm[name])]
    # Some policies are asked about the nine balls alone.
    whole = [name for name, some in by_arm.items() if any(answer.set != "nine-balls" for answer in some)]
    comparisons = {}
    for name in whole[1:]:
        plain = name.split(", ")[0]  # with nothing taken away
        baseline = plain if plain != name and plain in whole else whole[0]
        effect = compare_arms(by_arm[baseline], by_arm[name])
        comparisons[name] = {"baseline": baseline, "fewer_exact": _effect_dict(effect)}
        if effect.is_found:
            assert effect.figure is not None
            verdict = "worse" if effect.figure.value > 0 else "better"
            wrong = _share(effect.figure, " of the same pictures wrong")
            sentence = f'"{name}" counts {verdict} than "{baseline}": {wrong}'
            findings.append(Finding(f"{verdict} arm", name, sentence, effect.figure, effect.num_groups))
    return {
        "arms": {name: analyse_arm(some) for name, some in by_arm.items()},
        "comparisons": comparisons,
        "findings": [finding.to_dict() | {"effect": _figure_dict(finding.effect)} for finding in findings],
    }


def analyse_arm(answers: Sequence[CountAnswer]) -> Results:
    """The figures of one arm.

    Returns:
        `num_pictures`, `num_without_number`, `not_asked` (reasons and how often), `overall` and `sets` (exact share,
        mean absolute error, mean signed error; by set and variant), `seams`, `invariance`, `confusion` (truth to
        answer to number of pictures), `nine_balls` (side to answer), `positions` (place to mean signed error).
    """
    asked = [answer for answer in answers if answer.reason is None]
    sets = {}
    for name, some in _group(asked, lambda answer: answer.set).items():
        variants = _group(some, lambda answer: answer.variant)
        sets[name] = {
            "all": summarize_answers(some),
            # Positions differ by one place each; those have a map of their own.
            "variants": {}
            if name in ("position", "nine-balls")
            else {variant: summarize_answers(few) for variant, few in variants.items()},
        }
    return {
        "num_pictures": len(asked),
        "num_without_number": sum(answer.count is None for answer in asked),
        "not_asked": dict(Counter(answer.reason for answer in answers if answer.reason is not None)),
        "overall": summarize_answers(asked),
        "sets": sets,
        "seams": {
            "on_seams": _effect_dict(seam_effect(asked)),
            "inside": _effect_dict(inside_effect(asked)),
        },
        "invariance": {name: _effect_dict(change) for name, change in invariance(asked).items()},
        "confusion": confusion(asked),
        "nine_balls": {
            str(answer.height): NO_NUMBER if answer.count is None else answer.count
            for answer in sorted(asked, key=lambda answer: answer.height)
            if answer.set == "nine-balls"
        },
        "positions": {
            answer.variant: answer.error
            for answer in asked
            if answer.set == "position" and answer.error is not None
        },
    }


def summarize_answers(answers: Sequence[CountAnswer]) -> dict[str, Any]:
    """Exact share (no number is wrong), mean absolute and mean signed error (of answers with a number)."""
    told = [answer for answer in answers if answer.error is not None]
    return {
        "num": len(answers),
        "exact": _figure_dict(_mean(answers, lambda answer: float(answer.is_exact))),
        "mae": _figure_dict(_mean(told, lambda answer: float(abs(answer.error or 0)))),
        "signed": _figure_dict(_mean(told, lambda answer: float(answer.error or 0))),
    }


# Effects


def seam_effect(answers: Iterable[CountAnswer]) -> Effect:
    """By how much the answer grows with each object that is moved from inside a slice onto a seam.

    Of matched pairs: sum of (answer on - answer inside) / sum of objects on seams. 1 if each counts twice, -1 if none
    is seen. Pairs in which an answer has no number are left out.
    """
    ratios, groups = [], []
    for pair in _pairs(answers):
        on, inside = pair["on"], pair["inside"]
        if on.count is not None and inside.count is not None:
            ratios.append(Ratio(on.count - inside.count, on.num_on_seams))
            groups.append(_unit(on))
    return _effect(ratios, groups)


def inside_effect(answers: Iterable[CountAnswer]) -> Effect:
    """Signed error for each object, of the same pictures with all objects inside slices."""
    inside = [pair["inside"] for pair in _pairs(answers) if pair["inside"].error is not None]
    return _effect(
        [Ratio(answer.error or 0, answer.truth) for answer in inside], [_unit(answer) for answer in inside]
    )


def invariance(answers: Iterable[CountAnswer]) -> dict[str, Effect]:
    """The share of copies that get another answer than the picture they were made of.

    `shifted` and `transposed` are of the set `copies`; `resized` compares each size of a layout with the smallest.
    """
    by_set = _group(answers, lambda answer: answer.set)
    changed: dict[str, list[tuple[bool, str]]] = {"resized": [], "shifted": [], "transposed": []}
    for some in _group(by_set.get("copies", ()), _unit).values():
        plain = next((answer for answer in some if answer.variant == "plain"), None)
        for answer in some:
            if plain is not None and answer is not plain:
                kind = "transposed" if answer.variant == "transposed" else "shifted"
                changed[kind].append((answer.count != plain.count, _unit(answer)))
    for some in _group(by_set.get("size", ()), _unit).values():
        smallest, *others = sorted(some, key=lambda answer: answer.height)
        changed["resized"] += [(answer.count != smallest.count, _unit(answer)) for answer in others]
    return {
        kind: _effect([Ratio(is_changed, 1) for is_changed, _ in pairs], [group for _, group in pairs])
        for kind, pairs in changed.items()
    }


def size_effect(answers: Iterable[CountAnswer]) -> Effect:
    """By how much the share of wrong answers grows with each doubling of the side, within layouts."""
    return _slopes(answers, "size", lambda answer: math.log2(answer.height))


def object_size_effect(answers: Iterable[CountAnswer]) -> Effect:
    """By how much the share of wrong answers grows with each halving of the objects, within layouts."""
    return _slopes(
        answers, "object-size", lambda answer: -math.log2(float(answer.variant.removesuffix("px")))
    )


def aspect_effect(answers: Iterable[CountAnswer]) -> Effect:
    """Share of wrong answers at 1:4 and beyond minus that within 1:2, within layouts."""
    values = []
    for some in _group((a for a in answers if a.set == "aspect"), _unit).values():
        wrong: dict[bool, list[float]] = {True: [], False: []}
        for answer in some:
            wrong[max(answer.height, answer.width) >= 4 * min(answer.height, answer.width)].append(
                float(not answer.is_exact)
            )
        if wrong[True] and wrong[False]:
            values.append(fmean(wrong[True]) - fmean(wrong[False]))
    return _effect([Ratio(value, 1) for value in values], range(len(values)))


def count_effect(answers: Iterable[CountAnswer]) -> Effect:
    """By how much the signed error grows with each object more (set `count`): -1 for an answer that is always the same.

    The least-squares slope, with the means held fixed when groups are drawn again.
    """
    told = [answer for answer in answers if answer.set == "count" and answer.error is not None]
    if not told:
        return Effect(None, 0)
    mean_truth = fmean(answer.truth for answer in told)
    mean_error = fmean(answer.error or 0 for answer in told)
    ratios = [
        Ratio(
            (answer.truth - mean_truth) * ((answer.error or 0) - mean_error), (answer.truth - mean_truth) ** 2
        )
        for answer in told
    ]
    return _effect(ratios, [_unit(answer) for answer in told])


def nine_balls_effect(answers: Iterable[CountAnswer]) -> Effect:
    """Mean signed error over the sizes of the picture of nine balls."""
    told = [answer for answer in answers if answer.set == "nine-balls" and answer.error is not None]
    return _effect([Ratio(answer.error or 0, 1) for answer in told], [_unit(answer) for answer in told])


def silence_effect(answers: Iterable[CountAnswer]) -> Effect:
    """Share of answers without a number."""
    asked = [answer for answer in answers if answer.reason is None]
    return _effect([Ratio(answer.count is None, 1) for answer in asked], [_unit(answer) for answer in asked])


def compare_arms(baseline: Iterable[CountAnswer], other: Iterable[CountAnswer]) -> Effect:
    """Share of wrong answers of another arm minus that of the baseline, over pictures that both were asked about."""
    before = {answer.id: answer for answer in baseline if answer.reason is None}
    pairs = [(before[answer.id], answer) for answer in other if answer.reason is None and answer.id in before]
    return _effect(
        [Ratio(float(one.is_exact) - float(two.is_exact), 1) for one, two in pairs],
        [_unit(two) for _, two in pairs],
    )


def confusion(answers: Iterable[CountAnswer]) -> dict[str, dict[str, int]]:
    """How often each true count got each answer: `{"4": {"4": 66, "5": 17}}`, most frequent answers first."""
    table: dict[int, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        table[answer.truth][NO_NUMBER if answer.count is None else str(answer.count)] += 1
    return {str(truth): dict(table[truth].most_common()) for truth in sorted(table)}


# Findings


def find_faults(arm: str, answers: Sequence[CountAnswer]) -> list[Finding]:
    """What is wrong with the answers of one arm, what slicing does first."""
    answers = [answer for answer in answers if answer.reason is None]
    effects: list[tuple[Effect, Callable[[Figure], tuple[str, str]]]] = [
        (seam_effect(answers), lambda figure: _name_seams(figure, inside_effect(answers))),
        (nine_balls_effect(answers), lambda figure: _name_nine_balls(figure, answers)),
        (size_effect(answers), lambda figure: _name_sizes(figure, answers)),
        (aspect_effect(answers), _name_aspects),
        (object_size_effect(answers), lambda figure: _name_object_sizes(figure, answers)),
        (count_effect(answers), lambda figure: _name_counts(figure, answers)),
        *(
            (effect, lambda figure, kind=kind: _name_change(figure, kind))
            for kind, effect in invariance(answers).items()
        ),
        (silence_effect(answers), _name_silence),
    ]
    findings = []
    for effect, describe in effects:
        if effect.is_found:
            assert effect.figure is not None
            name, sentence = describe(effect.figure)
            findings.append(Finding(name, arm, sentence, effect.figure, effect.num_groups))
    return findings


def _name_seams(on: Figure, inside: Effect) -> tuple[str, str]:
    value = on.value
    if value > 0:
        name = "double-counting on seams"
        verb = "are counted twice" if value >= 0.5 else "are sometimes counted twice"
    else:
        name = "missing on seams"
        verb = "are missed" if value <= -0.5 else "are sometimes missed"
    within = (
        "" if inside.figure is None else f"; inside slices, the error is {inside.figure.value:+.2f} an object"
    )
    return name, f"Objects on seams {verb}: {_number(on, ' an object on a seam')}{within}"


def _name_nine_balls(error: Figure, answers: Sequence[CountAnswer]) -> tuple[str, str]:
    balls = sorted((a for a in answers if a.set == "nine-balls"), key=lambda a: a.height)
    told = [f"{_spell(answer)} at {answer.height} px" for answer in balls]
    # First, last and the worst say what a list of a dozen would.
    worst = max(range(len(balls)), key=lambda i: abs(balls[i].error or 0))
    shown = ", ".join(told[i] for i in sorted({0, worst, len(told) - 1}))
    name = "too many of nine balls" if error.value > 0 else "too few of nine balls"
    return name, f"Nine balls are counted as {shown}: {_number(error, f' on the mean of {len(told)} sizes')}"


def _name_sizes(slope: Figure, answers: Sequence[CountAnswer]) -> tuple[str, str]:
    word = "Larger" if slope.value > 0 else "Smaller"
    shares = _exact_by(answers, "size", lambda answer: answer.height)
    return (
        f"{word.lower()} pictures are counted worse",
        f"{word} pictures are counted worse: {_share(slope, ' wrong for each doubling of the side')}; "
        "exact are " + ", ".join(f"{_percent(share)} at {side} px" for side, share in shares.items()),
    )


def _name_aspects(difference: Figure) -> tuple[str, str]:
    word = "Long" if difference.value > 0 else "Compact"
    return (
        f"{word.lower()} pictures are counted worse",
        f"{word} pictures are counted worse: "
        + _share(difference, " wrong at 1:4 and 1:8 against 1:1 and 1:2"),
    )


def _name_object_sizes(slope: Figure, answers: Sequence[CountAnswer]) -> tuple[str, str]:
    word = "Small" if slope.value > 0 else "Large"
    shares = _exact_by(answers, "object-size", lambda answer: float(answer.variant.removesuffix("px")))
    return (
        f"{word.lower()} objects are counted worse",
        f"{word} objects are counted worse: {_share(slope, ' wrong for each halving of their size')}; "
        "exact are " + ", ".join(f"{_percent(share)} at {side:g} px" for side, share in shares.items()),
    )


def _name_counts(slope: Figure, answers: Sequence[CountAnswer]) -> tuple[str, str]:
    if slope.high < -0.9:
        common = Counter(_spell(answer) for answer in answers)
        text, number = common.most_common(1)[0]
        return (
            "an answer that does not depend on the count",
            "The answer does not depend on how many objects there are: with each object more it grows by "
            f"{1 + slope.value:.2f} (95 % interval {1 + slope.low:.2f} to {1 + slope.high:.2f}); "
            f"{_percent(number / len(answers))} of all answers are {text}",
        )
    if slope.value < 0:
        return "large counts are too small", (
            f"Large counts come out too small: {_number(slope, ' for each object more')}"
        )
    return "large counts are too large", (
        f"Large counts come out too large: {_number(slope, ' for each object more')}"
    )


def _name_change(share: Figure, kind: str) -> tuple[str, str]:
    how = {
        "resized": "drawn at another size",
        "shifted": "shifted by a few px",
        "transposed": "transposed",
    }[kind]
    return (
        f"another answer when {kind}",
        f"The same picture {how} gets another answer: {_share(share, ' of copies', signed=False)}",
    )


def _name_silence(share: Figure) -> tuple[str, str]:
    return "answers without a number", f"Answers hold no number: {_share(share, ' of them', signed=False)}"


def _spell(answer: CountAnswer) -> str:
    return NO_NUMBER if answer.count is None else str(answer.count)


def _number(figure: Figure, unit: str) -> str:
    return f"{figure.value:+.2f}{unit} (95 % interval {figure.low:+.2f} to {figure.high:+.2f})"


def _share(figure: Figure, unit: str, signed: bool = True) -> str:
    value, low, high = (_percent(part, signed) for part in (figure.value, figure.low, figure.high))
    return f"{value}{unit} (95 % interval {low} to {high})"


def _percent(share: float, signed: bool = False) -> str:
    return f"{share:{'+' if signed else ''}.0%}".replace("%", " %")


# Sums


def _group(answers: Iterable[CountAnswer], key: Callable[[CountAnswer], str]) -> dict[str, list[CountAnswer]]:
    groups: dict[str, list[CountAnswer]] = {}
    for answer in answers:
        groups.setdefault(key(answer), []).append(answer)
    return groups


def _unit(answer: CountAnswer) -> str:
    return f"{answer.set}/{answer.group}"


def _pairs(answers: Iterable[CountAnswer]) -> list[Mapping[str, CountAnswer]]:
    on_seams = _group((answer for answer in answers if answer.set.startswith("seams-")), _unit)
    pairs = [{answer.variant: answer for answer in some} for some in on_seams.values()]
    return [pair for pair in pairs if len(pair) == 2]


def _slopes(answers: Iterable[CountAnswer], name: str, measure: Callable[[CountAnswer], float]) -> Effect:
    """The mean over layouts of the least-squares slope of being wrong over what `measure` gives."""
    slopes = []
    for some in _group((answer for answer in answers if answer.set == name), _unit).values():
        places = [measure(answer) for answer in some]
        middle = fmean(places)
        spread = sum((place - middle) ** 2 for place in places)
        if spread:
            wrong = [float(not answer.is_exact) for answer in some]
            slopes.append(sum((p - middle) * w for p, w in zip(places, wrong, strict=True)) / spread)
    return _effect([Ratio(slope, 1) for slope in slopes], range(len(slopes)))


def _exact_by(
    answers: Iterable[CountAnswer], name: str, measure: Callable[[CountAnswer], float]
) -> dict[float, float]:
    exact: dict[float, list[bool]] = defaultdict(list)
    for answer in answers:
        if answer.set == name:
            exact[measure(answer)].append(answer.is_exact)
    return {place: fmean(exact[place]) for place in sorted(exact)}


def _mean(answers: Sequence[CountAnswer], measure: Callable[[CountAnswer], float]) -> Figure | None:
    return summarize([Ratio(measure(answer), 1) for answer in answers], [_unit(answer) for answer in answers])


def _effect(ratios: Sequence[Ratio], groups: Sequence[Any]) -> Effect:
    return Effect(summarize(ratios, groups), len(set(groups)))


def _effect_dict(effect: Effect) -> dict[str, Any] | None:
    figure = _figure_dict(effect.figure)
    return None if figure is None else figure | {"num_groups": effect.num_groups}


def _figure_dict(figure: Figure | None) -> dict[str, float] | None:
    return None if figure is None else {name: round(value, 4) for name, value in asdict(figure).items()}
