"""Read a tall receipt as JSON: company, date, address and total.

The receipt is rendered, in words and a font that training has not seen, or it is yours.
"""

from pathlib import Path

from vlmslice.answer_schemas import RECEIPT_SCHEMA
from vlmslice.data.receipts import QUESTIONS
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
from vlmslice.marking import mark_fields

QUESTION = "Give the company, date, address and total of this receipt as JSON."


def render(seed: int = 2) -> Exhibit:
    """A receipt of 880 x 380 px, and the fields that it states."""
    return render_exhibit("receipt", QUESTIONS["json"], 880, 380, seed=seed)


def main(
    image: ImageArgument = None,
    seed: SeedOption = 2,
    picture: PictureOption = Path("demo-output/read_receipt.png"),
    model: ModelOption = None,
) -> None:
    """Read a tall receipt as JSON.

    - `python demos/read_receipt.py`
    - `python demos/read_receipt.py --seed 5`
    - `python demos/read_receipt.py receipt.jpg --picture read.png`
    """
    show_exhibit(image, QUESTION, lambda: render(seed), mark_fields, picture, model, RECEIPT_SCHEMA)


if __name__ == "__main__":
    run_demo(main)
