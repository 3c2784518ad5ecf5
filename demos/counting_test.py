"""The nine balls, counted at every size under several slicing policies: the first test of what slicing does."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from vlmslice.counting_test.analysis import analyse
from vlmslice.counting_test.answerers import Answerer, AssistantAnswerer, ScriptedAnswerer
from vlmslice.counting_test.arms import build_arms
from vlmslice.counting_test.pictures import nine_balls_pictures
from vlmslice.counting_test.plots import plot_nine_balls
from vlmslice.counting_test.run import ask, build_questions
from vlmslice.demonstration import ModelOption, check_picture, hand_over, run_demo
from vlmslice.model_files import read_slicing_config

SIDES = (224, 288, 368, 480, 640, 832, 1088)
POLICIES = ("adaptive", "overlap", "overlap_dedup", "pad", "internvl")


def show(
    answerer: Answerer, policies: Sequence[str] = POLICIES, sides: Sequence[int] = SIDES
) -> tuple[dict[str, Any], Image.Image]:
    """The answers by policy and side, and their plot."""
    from matplotlib.figure import Figure

    questions = build_questions(nine_balls_pictures(sides), build_arms(policies))
    answers = [answer for batch in ask(answerer, questions) for answer in batch]
    results = analyse(answers)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    plot_nine_balls(figure.subplots(), results)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130)
    return results, Image.open(drawn).convert("RGB")


def main(
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Slicing policy; repeatable.  [default: {', '.join(POLICIES)}]"),
    ] = None,
    scripted: Annotated[
        str | None, typer.Option(metavar="NAME", help="Ask a script, such as `double-counter`, not a model.")
    ] = None,
    picture: Annotated[Path, typer.Option(metavar="OUT.png", help="Where the plot goes.")] = Path(
        "demo-output/counting_test.png"
    ),
    model: ModelOption = None,
) -> None:
    """Count nine balls at every size under several slicing policies.

    - `python demos/counting_test.py`
    - `python demos/counting_test.py --policy adaptive --policy overlap`
    - `python demos/counting_test.py --scripted double-counter`

    `vlmslice count-test` is the whole test: seams, shapes, shifts, and what it all means.
    """
    check_picture(picture)
    answerer: Answerer = AssistantAnswerer(model)
    if scripted is not None:
        answerer = ScriptedAnswerer(scripted, read_slicing_config(model))
    results, drawn = show(answerer, policy or POLICIES)
    for name, arm in results["arms"].items():
        counts = ", ".join(f"{count} at {int(side)} px" for side, count in arm["nine_balls"].items())
        print(f"{name}: {counts or 'no plan within the bound on visual tokens'}")
    hand_over(drawn, picture)


if __name__ == "__main__":
    run_demo(main)
