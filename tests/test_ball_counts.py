import threading
from types import SimpleNamespace

import pytest
from tiny_models import tiny_model, tiny_processor, tiny_slicing

from vlmslice import Assistant
from vlmslice.page.ball_counts import BallCount, count_balls, counts_plot, counts_table
from vlmslice.page.line import Line, Turn
from vlmslice.slicing import SlicingError, plan_slices


@pytest.fixture
def line():
    line = Line()
    yield line
    line.close()


class Counter:
    """Answers as a model that sees balls of overlapping slices twice: 9, and 12 from 448 px on."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str, str]] = []

    def ask(self, images, question, *, policy, max_new_tokens, should_stop):
        [image] = images
        self.asked.append((image.width, policy, question))
        if policy == "strict":
            raise SlicingError("over the budget")
        if policy == "mute":
            return SimpleNamespace(text="many", plans=[plan_slices(*image.size)], num_visual_tokens=4)
        text = "There are 12." if image.width >= 448 else "9"
        return SimpleNamespace(text=text, plans=[plan_slices(*image.size)], num_visual_tokens=4)


def test_every_size_under_every_policy(line: Line) -> None:
    counter = Counter()
    moments = list(count_balls(counter, line, [448, 224], ["a", "strict", "mute"], "How many?"))  # type: ignore[arg-type]
    assert counter.asked == [
        (side, policy, "How many?") for side in (224, 448) for policy in ("a", "strict", "mute")
    ]
    last = moments[-1]
    assert (last.kind, last.status) == ("done", "Done: 1 of 6 pictures counted as nine.")
    assert counts_table(last.counts) == (
        ["policy", "224 px", "448 px"],
        [["a", "9", "12"], ["strict", "–", "–"], ["mute", "?", "?"]],
    )
    assert [moment.kind for moment in moments[:-1]].count("running") == 6
    assert "Picture 1 of 6: 224 px, a" in moments[0].status


def test_on_a_model(line: Line) -> None:
    assistant = Assistant(tiny_model(), tiny_processor())
    *_, last = count_balls(assistant, line, [64], ["adaptive", "uhd"])
    assert last.kind == "done"
    plan = plan_slices(64, 64, tiny_slicing())
    assert [(count.policy, count.grid) for count in last.counts] == [("adaptive", plan.grid), ("uhd", (1, 1))]


@pytest.mark.parametrize(
    ("sides", "policies", "question"), [([], ["a"], "?"), ([224], [], "?"), ([224], ["a"], " ")]
)
def test_nothing_to_do(line: Line, sides: list[int], policies: list[str], question: str) -> None:
    [only] = count_balls(Counter(), line, sides, policies, question)  # type: ignore[arg-type]
    assert only.kind == "error" and "at least one" in only.status


def test_stopping_keeps_what_was_counted(line: Line) -> None:
    counter = Counter()
    turns: list[Turn] = []
    moments = []
    for moment in count_balls(counter, line, [224, 448, 672], ["a"], on_turn=turns.append):  # type: ignore[arg-type]
        moments.append(moment)
        if len(turns) == 2:
            turns[-1].stop()
    last = moments[-1]
    assert last.kind == "stopped" and last.status == "Stopped after 1 of 3 pictures."
    assert [count.side for count in last.counts] == [224]
    assert [side for side, _, _ in counter.asked] in ([224], [224, 448])


def test_others_come_in_between(line: Line) -> None:
    """A question that waits is answered before the next picture."""
    log: list[str] = []
    counter = Counter()
    gate = threading.Event()
    line.join(lambda turn: gate.wait(10))
    moments = count_balls(counter, line, [224, 448], ["a"])  # type: ignore[arg-type]
    next(moments)
    line.join(lambda turn: log.append(f"question after {len(counter.asked)} pictures"))
    gate.set()
    assert list(moments)[-1].kind == "done"
    assert log == ["question after 1 pictures"]


def test_plot_names_policies_and_sizes() -> None:
    counts = [BallCount(p, side, "9", 9, (1, 1), 4) for p in ("one", "two") for side in (224, 448)]
    markup = counts_plot([*counts, BallCount("three", 224, "?"), BallCount("one", 896, "16", 16, (4, 4), 9)])
    assert markup.startswith("<figure") and "<svg" in markup and "<?xml" not in markup
    for word in ("nine", "one", "two", "224", "448", "896", "18"):
        assert f">{word}</text>" in markup
