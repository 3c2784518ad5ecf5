"""A run of the counting test, into a folder, whatever interrupts it.

The folder holds `answers.jsonl` (one row for each picture and arm), `results.json` (figures and findings; without
timings, so that two runs are equal byte for byte), `manifest.json` (who was asked, how, about what), and the report,
`report.html` and `report.png`. Started again with the same settings, a run goes on behind the last complete batch.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from vlmslice.counting_test.analysis import analyse
from vlmslice.counting_test.answerers import Answerer
from vlmslice.counting_test.answers import CountAnswer, record_answer
from vlmslice.counting_test.arms import Arm
from vlmslice.counting_test.pictures import Picture, pictures_digest
from vlmslice.run_folder import RunFolder, RunFolderError, describe_versions, to_line, write_json
from vlmslice.slicing import SlicingError

_ANSWERS = "answers.jsonl"
_OUTPUTS = ("results.json", "report.html", "report.png")
_PACKAGES = ("numpy", "pillow", "torch", "transformers", "vlmslice")
_MAX_BATCH_PIXELS = 2**22


class CountingTestError(RunFolderError):
    """A counting test cannot begin, or cannot go on with what its folder holds."""


class CountingTest(NamedTuple):
    """Who is asked what.

    Attributes:
        answerer: Who is asked.
        questions: See `build_questions`.
        seed: That the pictures were made with.
    """

    answerer: Answerer
    questions: Sequence[Question]
    seed: int


class Question(NamedTuple):
    """A picture, and the arm in which it is asked about."""

    picture: Picture
    arm: Arm


def build_questions(
    pictures: Sequence[Picture], arms: Sequence[Arm], nine_balls_arms: Sequence[Arm] = ()
) -> list[Question]:
    """Every picture in every arm; those with seams in the arms of their policy alone.

    Args:
        pictures: See `pictures.all_pictures`.
        arms: Asked about all of them.
        nine_balls_arms: Asked about the nine balls only.
    """
    questions = [
        Question(picture, arm)
        for arm in arms
        for picture in pictures
        if picture.policy is None or arm.policy in (None, picture.policy)
    ]
    balls = [picture for picture in pictures if picture.set == "nine-balls"]
    return questions + [Question(picture, arm) for arm in nine_balls_arms for picture in balls]


def ask(answerer: Answerer, questions: Sequence[Question], num_done: int = 0) -> Iterator[list[CountAnswer]]:
    """Asks batch by batch; batches are the same wherever a run begins.

    Args:
        answerer: Who is asked.
        questions: All of them.
        num_done: How many of them are answered already.
    """
    start = 0
    while start < len(questions):
        end, arm, num_pixels = start, questions[start].arm, 0
        while end < len(questions) and questions[end].arm == arm and end - start < answerer.batch_size:
            height, width = questions[end].picture.size
            if end > start and num_pixels + height * width > _MAX_BATCH_PIXELS:
                break
            num_pixels += height * width
            end += 1
        if end > num_done:
            yield _ask_batch(answerer, [q.picture for q in questions[max(start, num_done) : end]], arm)
        start = end


def _ask_batch(answerer: Answerer, pictures: Sequence[Picture], arm: Arm) -> list[CountAnswer]:
    reasons: dict[str, str] = {}
    for picture in pictures:
        try:
            answerer.plan(*picture.image_size, arm)
        except SlicingError as error:
            reasons[picture.id] = str(error)
    asked = [picture for picture in pictures if picture.id not in reasons]
    texts = iter(answerer.answer(asked, arm) if asked else ())
    return [
        record_answer(picture, arm.name, None, reasons[picture.id])
        if picture.id in reasons
        else record_answer(picture, arm.name, next(texts))
        for picture in pictures
    ]


def describe_test(answerer: Answerer, questions: Sequence[Question], seed: int) -> dict[str, Any]:
    """The manifest of a run."""
    return {
        "answerer": answerer.describe(),
        "arms": list(dict.fromkeys(question.arm.name for question in questions)),
        "seed": seed,
        "num_questions": len(questions),
        "pictures_sha256": pictures_digest(question.picture for question in questions),
        "versions": describe_versions(_PACKAGES),
        "machine": {"platform": platform.platform()},
    }


def run_with_progress(test: CountingTest, folder: Path, restart: bool = False) -> dict[str, Any]:
    """`run_counting_test` with a progress bar, which is silent where nobody watches, as in a log."""
    with tqdm(total=len(test.questions), unit="picture", disable=None) as progress:
        return run_counting_test(test, folder, restart=restart, on_progress=progress.update)


def run_counting_test(
    test: CountingTest,
    folder: Path,
    *,
    restart: bool = False,
    on_progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Asks all questions, and reports; returns what `results.json` holds.

    Args:
        test: Who is asked what.
        folder: Where everything is written; made if need be.
        restart: Delete what an earlier run left in `folder`, instead of going on with it.
        on_progress: Called with the number of questions answered, first with those of an earlier run.

    Raises:
        CountingTestError: `folder` holds another run.
        ArmError: An arm means nothing to who is asked.
    """
    from vlmslice.counting_test.report import check_report, write_report

    start = time.perf_counter()
    answerer, questions, seed = test
    check_report()
    run = RunFolder(folder, _ANSWERS, _OUTPUTS, CountingTestError)
    settings = describe_test(answerer, questions, seed)
    for arm in dict.fromkeys(question.arm for question in questions):
        answerer.check(arm)
    answers = [CountAnswer.from_dict(row) for row in run.open(settings, len(questions), restart)]
    if on_progress is not None:
        on_progress(len(answers))
    with run.rows.open("a", encoding="utf-8") as file:
        for batch in ask(answerer, questions, len(answers)):
            file.writelines(to_line(answer.to_dict()) for answer in batch)
            file.flush()
            answers += batch
            if on_progress is not None:
                on_progress(len(batch))
    asked = time.perf_counter()
    results = {"answerer": settings["answerer"], "seed": seed, **analyse(answers)}
    write_json(folder / "results.json", results)
    write_report(
        folder, results, answers, {question.picture.id: question.picture for question in questions}, answerer
    )
    seconds = {"ask": asked - start, "report": time.perf_counter() - asked}
    write_json(
        run.manifest, settings | {"seconds": {name: round(value, 3) for name, value in seconds.items()}}
    )
    return results
