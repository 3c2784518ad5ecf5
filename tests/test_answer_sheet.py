import numpy as np
import pytest
from PIL import Image

from vlmslice.answer_sheet import _INKS, draw_answer_sheet
from vlmslice.marking import Cell, Mark, Marked


def has_ink(picture: Image.Image, mark: Mark) -> bool:
    return bool((np.asarray(picture) == _INKS[mark]).all(-1).any())


@pytest.mark.parametrize("height,width", [(10, 10), (900, 200), (100, 1200), (3000, 2000)])
def test_any_shape_stands_beside_its_answer(height: int, width: int) -> None:
    image = Image.new("RGB", (width, height), (0, 0, 255))
    marked = Marked([(Cell("name"), Cell("right", Mark.RIGHT)), (Cell("line " * 60, Mark.WRONG),)], "1 of 2")
    sheet = draw_answer_sheet(image, [("What?", marked)])
    assert sheet.width < 1200 and sheet.height < 1200
    assert (
        has_ink(sheet, Mark.RIGHT)
        and has_ink(sheet, Mark.WRONG)
        and not has_ink(
            draw_answer_sheet(image, [("What?", Marked([(Cell("right", Mark.RIGHT),)], ""))]), Mark.WRONG
        )
    )
    # Text and image do not lie on one another: all of the image's blue is there.
    is_blue = (np.asarray(sheet) == (0, 0, 255)).all(-1)
    rows, cols = np.flatnonzero(is_blue.any(1)), np.flatnonzero(is_blue.any(0))
    assert is_blue[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all()


def test_long_cells_are_wrapped_and_not_cut() -> None:
    image = Image.new("RGB", (50, 50))
    short = Marked([(Cell("a"), Cell("b")), (Cell("a"), Cell("b"))], "")
    long = Marked([(Cell("a"), Cell("b" * 200)), (Cell("a " * 80), Cell("b"))], "")
    heights = [draw_answer_sheet(image, [("What?", marked)]).height for marked in (short, long)]
    assert heights[1] > heights[0] + 4 * 25
