import threading
import time

import pytest

from vlmslice.page.line import Line, LineFullError, StoppedError, Turn


@pytest.fixture
def line():
    line = Line(max_length=3)
    yield line
    line.close()


class Gate:
    """Work that runs until it is opened or its turn is stopped."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, turn: Turn[str]) -> str:
        self.entered.set()
        while not (self.opened.wait(0.01) or turn.stopped):
            pass
        return "stopped" if turn.stopped else "through"


def test_turns_run_one_at_a_time_in_their_order(line: Line) -> None:
    log: list[str] = []

    def work(name: str):
        def run(turn: Turn[str]) -> str:
            log.append(f"{name} begins")
            time.sleep(0.02)
            log.append(f"{name} ends")
            return name

        return run

    turns = [line.join(work(name)) for name in "abc"]
    assert [turn.result() for turn in turns] == ["a", "b", "c"]
    assert log == [f"{name} {what}" for name in "abc" for what in ("begins", "ends")]


def test_a_turn_knows_how_many_are_before_it(line: Line) -> None:
    gate = Gate()
    first = line.join(gate)
    second, third = line.join(lambda turn: "2"), line.join(lambda turn: "3")
    gate.entered.wait(5)
    assert [turn.num_before for turn in (first, second, third)] == [0, 1, 2]
    gate.opened.set()
    assert third.result() == "3"
    assert [turn.num_before for turn in (first, second, third)] == [0, 0, 0]


def test_a_full_line_says_so_and_takes_others_later(line: Line) -> None:
    gate = Gate()
    turns = [line.join(gate), line.join(lambda turn: "2"), line.join(lambda turn: "3")]
    with pytest.raises(LineFullError, match="3 questions are waiting .* try again"):
        line.join(lambda turn: "4")
    gate.opened.set()
    for turn in turns:
        turn.result()
    assert line.join(lambda turn: "4").result() == "4"


def test_stopping_a_waiting_turn_drops_it_and_no_other(line: Line) -> None:
    gate, ran = Gate(), []
    first, second = line.join(gate), line.join(lambda turn: ran.append(2))
    third = line.join(lambda turn: "3")
    second.stop()
    with pytest.raises(StoppedError):
        second.result()
    assert third.num_before == 1
    gate.opened.set()
    assert (first.result(), third.result(), ran) == ("through", "3", [])


def test_stopping_a_running_turn_reaches_its_work(line: Line) -> None:
    gate = Gate()
    turn = line.join(gate)
    gate.entered.wait(5)
    turn.stop()
    assert turn.result() == "stopped"


def test_following_tells_what_was_said_and_ends_with_the_work(line: Line) -> None:
    gate = Gate()

    def work(turn: Turn[str]) -> str:
        turn.say("one ")
        gate.opened.wait(5)
        turn.say("two")
        return turn.text

    turn = line.join(work)
    seen = []
    for _ in turn.follow(0.01):
        seen.append(turn.text)
        gate.opened.set()
    assert seen and set(seen) <= {"", "one ", "one two"}
    assert turn.result() == "one two"


def test_who_leaves_stops_the_turn(line: Line) -> None:
    gate = Gate()
    turn = line.join(gate)
    follower = turn.follow(0.01)
    next(follower)
    follower.close()
    assert turn.result() == "stopped"


def test_errors_of_the_work_are_those_of_the_result(line: Line) -> None:
    def fail(turn: Turn[str]) -> str:
        raise ValueError("broken")

    turn = line.join(fail)
    assert list(turn.follow(0.01)) in ([], [None])
    with pytest.raises(ValueError, match="broken"):
        turn.result()


def test_closing_ends_all() -> None:
    line, gate = Line(), Gate()
    running, waiting = line.join(gate), line.join(lambda turn: "2")
    gate.entered.wait(5)
    line.close()
    assert running.result() == "stopped"
    with pytest.raises(StoppedError):
        waiting.result()
