"""The picture of nine balls at growing sizes: what the loaded model counts under each slicing policy."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from vlmslice.data.nine_balls import draw_nine_balls
from vlmslice.inference import Answer, Assistant
from vlmslice.metrics import parse_count
from vlmslice.page.line import Line, StoppedError, Turn
from vlmslice.page.sentences import error_sentence

SIDES = (224, 336, 448, 672, 896, 1344, 1792)
"""Sides of the square pictures on offer, px."""

QUESTION = "How many shapes are there?"
"""Asked unless another is typed. The bundled model knows shapes; a larger model may be asked for balls."""

TRUTH = 9
_GREY = "#7c7670"
# Told apart by the colour-blind (Okabe and Ito, https://jfly.uni-koeln.de/color/), black left out for the dark page.
_LINE_COLORS = ("#009e73", "#e69f00", "#56b4e9", "#d55e00", "#cc79a7", "#0072b2", "#f0e442")
_MAX_NEW_TOKENS = 64  # enough to point at nine balls and to say so


@dataclass(frozen=True)
class BallCount:
    """One answer.

    Attributes:
        policy: Slicing policy.
        side: Of the picture, px.
        answer: What the model said, or why it could not be asked.
        count: The first number in it, if there is one.
        grid: Rows and columns of the slices, if the picture could be planned.
        num_visual_tokens: Of the picture.
    """

    policy: str
    side: int
    answer: str
    count: int | None = None
    grid: tuple[int, int] | None = None
    num_visual_tokens: int | None = None


@dataclass(frozen=True)
class CountingMoment:
    """What to show now; `kind` as in `asking.Moment`."""

    status: str
    kind: str
    counts: tuple[BallCount, ...] = ()


def count_balls(
    assistant: Assistant,
    line: Line,
    sides: Sequence[int],
    policies: Sequence[str],
    question: str = QUESTION,
    *,
    on_turn: Callable[[Turn[Answer]], None] = lambda turn: None,
) -> Iterator[CountingMoment]:
    """Asks for the nine balls at each size under each policy, each in a turn of its own; nothing is raised.

    Between two pictures others may come in: a long test does not hold up a short question.
    """
    if not sides or not policies or not question.strip():
        yield CountingMoment("Choose at least one size and one policy, and type a question.", "error")
        return
    counts: list[BallCount] = []
    pictures = list(itertools.product(sorted(sides), policies))
    for number, (side, policy) in enumerate(pictures, start=1):
        status = f"Picture {number} of {len(pictures)}: {side} px, {policy}"
        try:
            turn = line.join(partial(_ask, assistant, side, policy, question))
            on_turn(turn)
            yield CountingMoment(f"{status} …", "running", tuple(counts))
            for _ in turn.follow():
                if turn.num_before:
                    yield CountingMoment(f"{status}, waiting for others …", "waiting", tuple(counts))
            answer = turn.result()
        except StoppedError:
            pass
        except (
            Exception
        ) as error:  # A policy over its budget is a result, too; anything else is logged as such.
            counts.append(BallCount(policy, side, error_sentence(error)))
            continue
        else:
            if not turn.stopped:
                [plan] = answer.plans
                counts.append(
                    BallCount(
                        policy,
                        side,
                        answer.text,
                        parse_count(answer.text),
                        plan.grid,
                        answer.num_visual_tokens,
                    )
                )
                continue
        yield CountingMoment(
            f"Stopped after {len(counts)} of {len(pictures)} pictures.", "stopped", tuple(counts)
        )
        return
    num_right = sum(count.count == TRUTH for count in counts)
    yield CountingMoment(
        f"Done: {num_right} of {len(counts)} pictures counted as nine.", "done", tuple(counts)
    )


def _ask(assistant: Assistant, side: int, policy: str, question: str, turn: Turn[Answer]) -> Answer:
    return assistant.ask(
        [draw_nine_balls(side)],
        question,
        policy=policy,
        max_new_tokens=_MAX_NEW_TOKENS,
        should_stop=lambda: turn.stopped,
    )


def counts_table(counts: Sequence[BallCount]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row for each policy, a column for each side; `9`, `12`, `?` for no number, `–` for no plan."""
    sides = sorted({count.side for count in counts})
    by_place = {(count.policy, count.side): count for count in counts}
    rows = []
    for policy in dict.fromkeys(count.policy for count in counts):
        of_policy = [by_place.get((policy, side)) for side in sides]
        rows.append([policy, *map(_cell, of_policy)])
    return ["policy", *(f"{side} px" for side in sides)], rows


def counts_plot(counts: Sequence[BallCount]) -> str:
    """Count against size, a line for each policy, as SVG markup in a grey that light and dark pages can bear."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(TRUTH, color=_GREY, linewidth=1, linestyle=(0, (4, 4)), label="nine")
    policies = list(dict.fromkeys(count.policy for count in counts))
    for number, policy in enumerate(policies):
        known = sorted(
            (count.side, count.count)
            for count in counts
            if count.policy == policy and count.count is not None
        )
        # Lines that coincide are drawn a little apart, all within one ball.
        shift = (number - (len(policies) - 1) / 2) * min(0.2, 0.9 / len(policies))
        axes.plot(
            [side for side, _ in known],
            [number + shift for _, number in known],
            color=_LINE_COLORS[number % len(_LINE_COLORS)],
            marker="o",
            markersize=4.5,
            linewidth=1.5,
            linestyle="-" if number < len(_LINE_COLORS) else "--",
            label=policy,
        )
    sides = sorted({count.side for count in counts})
    axes.set_xscale("log")
    axes.set_xticks(sides, [str(side) for side in sides])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, max(12, *(count.count + 2 for count in counts if count.count is not None)))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("side of the picture, px")
    axes.set_ylabel("count")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    for part in figure.findobj(Text):
        part.set(color=_GREY, fontfamily="sans-serif")
    axes.tick_params(color=_GREY)
    for spine in axes.spines.values():
        spine.set_color(_GREY)
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):  # text in the fonts of the page
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    markup = out.getvalue()
    return f'<figure aria-label="Count against size">{markup[markup.index("<svg") :]}</figure>'


def _cell(count: BallCount | None) -> str:
    if count is None:
        return ""
    if count.grid is None:
        return "–"
    return "?" if count.count is None else str(count.count)
