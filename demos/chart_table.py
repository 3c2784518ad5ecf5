"""Ask a chart for the table behind it, as CSV.

The chart is rendered, in words and a font that training has not seen, or it is yours.
"""

from pathlib import Path

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
from vlmslice.marking import mark_table

QUESTION = "Give the data as CSV."


def render(seed: int = 0) -> Exhibit:
    """A chart of 420 x 600 px, and its data."""
    return render_exhibit("plot", [QUESTION], 420, 600, seed=seed)


def main(
    image: ImageArgument = None,
    seed: SeedOption = 0,
    picture: PictureOption = Path("demo-output/chart_table.png"),
    model: ModelOption = None,
) -> None:
    """Ask a chart for its table.

    - `python demos/chart_table.py`
    - `python demos/chart_table.py --seed 5`
    - `python demos/chart_table.py chart.png --picture table.png`
    """
    show_exhibit(image, QUESTION, lambda: render(seed), mark_table, picture, model)


if __name__ == "__main__":
    run_demo(main)
