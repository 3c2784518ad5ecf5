"""A question about an image, from the press of the button to the answer: what the page shows at each moment."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlmslice.drawing import draw_plan
from vlmslice.image_loading import load_image
from vlmslice.inference import Answer, Assistant
from vlmslice.page.answer_table import AnswerTable, find_table
from vlmslice.page.line import Line, StoppedError, Turn
from vlmslice.page.sentences import error_sentence


@dataclass(frozen=True)
class Moment:
    """What to show now.

    Attributes:
        status: One sentence on where the question stands.
        kind: Of the status: "waiting", "running", "done", "stopped" or "error".
        text: The answer as far as it is known.
        overlay: The image with its slices, and at the end with the points of the answer; None for no change.
        json: The answer with its plans, at the end.
        table: The answer as a table, at the end, if it is one.
    """

    status: str
    kind: str
    text: str = ""
    overlay: Image.Image | None = None
    json: str | None = None
    table: AnswerTable | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it."""
        return self.kind in ("done", "stopped", "error")


def ask(
    assistant: Assistant,
    line: Line,
    upload: str | Path | None,
    question: str,
    *,
    policy: str,
    max_visual_tokens: int,
    max_new_tokens: int,
    on_turn: Callable[[Turn[Answer]], None] = lambda turn: None,
) -> Iterator[Moment]:
    """Asks in turn, and tells how it goes until the answer or an error is there; nothing is raised.

    Args:
        assistant: Who answers.
        line: Of those who wait for it.
        upload: The image file, if there is one.
        question: As typed.
        policy: Slicing policy.
        max_visual_tokens: Most visual tokens of the image.
        max_new_tokens: Most tokens of the answer.
        on_turn: Called with the turn as soon as it is taken, so that someone can stop it.
    """
    if upload is None:
        yield Moment(
            "Add an image first: drop it on the left, paste it, or take one of the examples.", "error"
        )
        return
    if not question.strip():
        yield Moment("Type a question about the image first.", "error")
        return
    text = ""
    try:
        image = load_image(upload)
        slicing = {"policy": policy, "max_visual_tokens": max_visual_tokens}
        plan = assistant.processor.image_processor.plan(image.height, image.width, **slicing)
        overlay: Image.Image | None = draw_plan(image, plan)

        turn = line.join(
            lambda turn: assistant.ask(
                [image],
                question,
                policy=policy,
                max_visual_tokens=max_visual_tokens,
                max_new_tokens=max_new_tokens,
                on_text=turn.say,
                should_stop=lambda: turn.stopped,
            )
        )
        on_turn(turn)
        looking = f"Looking at {_count(len(plan.views), 'view')}, {_count(plan.num_visual_tokens, 'visual token')} …"
        before = None
        for _ in turn.follow():
            text = turn.text
            num_before = turn.num_before
            now = (num_before, text)
            if now != before:
                if num_before:
                    yield Moment(
                        f"Waiting: {_count(num_before, 'question')} before yours.", "waiting", "", overlay
                    )
                else:
                    yield Moment("Answering …" if text else looking, "running", text, overlay)
                overlay = None
            before = now
        answer = turn.result()
    except StoppedError:
        yield Moment("Stopped while it waited.", "stopped")
    except Exception as error:  # Whatever happens, the page says a sentence.
        yield Moment(error_sentence(error, upload), "error", text)
    else:
        yield Moment(
            f"{'Stopped' if turn.stopped else 'Done'}: {_summary(answer)}.",
            "stopped" if turn.stopped else "done",
            answer.text,
            draw_plan(image, plan, answer.points) if answer.points or overlay else None,
            _to_json(answer, assistant),
            find_table(answer.text),
        )


def _to_json(answer: Answer, assistant: Assistant) -> str:
    """As `vlmslice ask --json` prints it, but for the seconds of loading."""
    seconds = {stage: round(value, 4) for stage, value in answer.seconds.items()}
    fields = answer.to_dict() | {"model": assistant.model.name_or_path, "seconds": seconds}
    return json.dumps(fields, indent=2, ensure_ascii=False)


def _summary(answer: Answer) -> str:
    seconds = sum(answer.seconds.values())
    why = {"length": ", cut at the longest answer allowed", "loop": ", cut as it went round in circles"}
    return (
        f"{_count(answer.num_visual_tokens, 'visual token')} in, {_count(answer.num_new_tokens, 'token')} out, "
        f"{seconds:.1f} s{why.get(answer.finish_reason, '')}"
    )


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
