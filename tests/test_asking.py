import json
import threading
from pathlib import Path

import pytest
from tiny_models import noise_image, tiny_model, tiny_processor

from vlmslice import Assistant
from vlmslice.page.asking import Moment, ask
from vlmslice.page.line import Line, Turn


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return Assistant(tiny_model(), tiny_processor())


@pytest.fixture
def line():
    line = Line()
    yield line
    line.close()


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    noise_image(100, 200).save(path)
    return path


SETTINGS = {"policy": "adaptive", "max_visual_tokens": 64, "max_new_tokens": 12}


def test_the_answer_is_the_assistants(assistant: Assistant, line: Line, upload: Path) -> None:
    moments = list(ask(assistant, line, upload, "read the line", **SETTINGS))
    expected = assistant.ask([upload], "read the line", max_new_tokens=12)
    last = moments[-1]
    assert (last.kind, last.text) == ("done", expected.text)
    assert [moment.is_last for moment in moments] == [False] * (len(moments) - 1) + [True]
    fields = json.loads(last.json or "")
    assert fields["answer"] == expected.text
    assert fields["plans"] == [plan.to_dict() for plan in expected.plans]
    assert f"{expected.num_visual_tokens} visual tokens in, 12 tokens out" in last.status
    assert sum(moment.overlay is not None for moment in moments) >= 1


def test_settings_reach_the_model(assistant: Assistant, line: Line, upload: Path) -> None:
    settings = {"policy": "uhd", "max_visual_tokens": 20, "max_new_tokens": 3}
    *_, last = ask(assistant, line, upload, "read", **settings)
    fields = json.loads(last.json or "")
    assert fields["plans"][0]["policy"] == "uhd" and fields["num_new_tokens"] == 3
    assert fields["num_visual_tokens"] <= 20


def test_what_is_missing_is_said_without_the_model(line: Line, upload: Path) -> None:
    [no_image] = ask(None, line, None, "what?", **SETTINGS)  # type: ignore[arg-type]
    [no_question] = ask(None, line, upload, "  ", **SETTINGS)  # type: ignore[arg-type]
    assert no_image.kind == no_question.kind == "error"
    assert "image" in no_image.status and "question" in no_question.status


def test_a_bad_file_is_a_sentence(assistant: Assistant, line: Line, upload: Path) -> None:
    upload.write_bytes(upload.read_bytes()[:-300])
    *_, last = ask(assistant, line, upload, "what?", **SETTINGS)
    assert last.kind == "error" and "'picture.png' cannot be decoded" in last.status
    assert str(upload.parent) not in last.status
    again = upload.with_name("good.png")
    noise_image(40, 40).save(again)
    assert list(ask(assistant, line, again, "what?", **SETTINGS))[-1].kind == "done"


def test_a_plan_over_the_budget_is_a_sentence(assistant: Assistant, line: Line, upload: Path) -> None:
    [only] = ask(assistant, line, upload, "what?", policy="idefics3", max_visual_tokens=4, max_new_tokens=3)
    assert only.kind == "error" and "max_visual_tokens is 4" in only.status


def test_a_defect_is_logged_and_not_shown(
    assistant: Assistant,
    line: Line,
    upload: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("inner workings")

    monkeypatch.setattr(assistant, "ask", fail)
    *_, last = ask(assistant, line, upload, "what?", **SETTINGS)
    assert last.kind == "error" and "inner workings" not in last.status
    assert "inner workings" in caplog.text


def test_stopping_ends_the_generation(assistant: Assistant, line: Line, upload: Path) -> None:
    turns: list[Turn] = []
    settings = SETTINGS | {"max_new_tokens": 5000}
    *_, last = (
        (moment, turns[0].stop())[0]  # from the first moment on, 0.1 s after the turn began
        for moment in ask(assistant, line, upload, "what?", **settings, on_turn=turns.append)
    )
    assert last.kind == "stopped" and last.status.startswith("Stopped: ")
    assert 0 < json.loads(last.json or "")["num_new_tokens"] < 5000
    assert turns[0].result().text == last.text


def test_waiting_is_said_and_can_be_stopped(assistant: Assistant, line: Line, upload: Path) -> None:
    entered, opened, turns = threading.Event(), threading.Event(), []
    before = line.join(lambda turn: (entered.set(), opened.wait(10)))
    entered.wait(5)
    moments = ask(assistant, line, upload, "what?", **SETTINGS, on_turn=turns.append)
    first = next(moments)
    assert (first.kind, first.status) == ("waiting", "Waiting: 1 question before yours.")
    turns[0].stop()
    assert [moment.kind for moment in moments] == ["stopped"]
    opened.set()
    before.result()


def test_who_leaves_ends_the_generation(assistant: Assistant, line: Line, upload: Path) -> None:
    turns: list[Turn] = []
    moments = ask(
        assistant, line, upload, "what?", **SETTINGS | {"max_new_tokens": 5000}, on_turn=turns.append
    )
    next(moments)
    moments.close()  # type: ignore[attr-defined]
    assert turns[0].result().num_new_tokens < 5000


def test_two_at_once_get_their_own_answers(assistant: Assistant, line: Line, tmp_path: Path) -> None:
    answers: dict[int, Moment] = {}
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        noise_image(100 + 40 * number, 200, seed=number).save(paths[-1])

    def run(number: int) -> None:
        *_, answers[number] = ask(assistant, line, paths[number], f"question {number}", **SETTINGS)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [
        assistant.ask([path], f"question {n}", max_new_tokens=12).text for n, path in enumerate(paths)
    ]
    assert len(set(expected)) == 3
    assert [answers[number].text for number in range(3)] == expected
