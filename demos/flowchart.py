"""List the arrows of a flowchart.

The flowchart is rendered, in words and a font that training has not seen, or it is yours.
"""

from pathlib import Path

from vlmslice.data.flowcharts import QUESTIONS
from vlmslice.demonstration import (
    Exhibit,
    ImageArgument,
    ModelOption,
    PictureOption,
    SeedOption,
    render_exhibit,
    run_demo,
    show_exhibit,
)
from vlmslice.marking import mark_edges

QUESTION = QUESTIONS[0]


def render(seed: int = 2) -> Exhibit:
    """A flowchart of 640 x 560 px with six to eight boxes, and its arrows."""
    return render_exhibit("flowchart", QUESTIONS, 640, 560, seed=seed, num_lines=(6, 8))


def main(
    image: ImageArgument = None,
    seed: SeedOption = 2,
    picture: PictureOption = Path("demo-output/flowchart.png"),
    model: ModelOption = None,
) -> None:
    """List the arrows of a flowchart.

    - `python demos/flowchart.py`
    - `python demos/flowchart.py --seed 5`
    - `python demos/flowchart.py flow.png --picture edges.png`
    """
    show_exhibit(image, QUESTION, lambda: render(seed), mark_edges, picture, model)


if __name__ == "__main__":
    run_demo(main)
