"""Where a thing on a picture is seen: by which visual token, and in which patch of the canvas."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vlmslice.data.samples import Place
from vlmslice.slicing import SlicePlan, View

Cell = tuple[int, int]
"""Row and column of a patch on the canvas."""


class Sight(NamedTuple):
    """Attributes:
    token: index, among the visual tokens of the image, of the one that sees the middle of the thing.
    cell: the patch that holds the middle.
    """

    token: int
    cell: Cell


def find_sight(plan: SlicePlan, place: Place, token_grid: Callable[[View], tuple[int, int]]) -> Sight:
    """Where a point of the image is seen: by the first token whose block holds it; where that was dropped, beside it.

    Args:
        plan: of the image.
        place: the point (y, x), px; those outside follow the border.
        token_grid: rows and columns of the visual tokens of a view.
    """
    height, width = plan.image_size
    y, x = min(max(place[0], 0), height - 1), min(max(place[1], 0), width - 1)
    first = plan.overview.num_visual_tokens if plan.overview is not None else 0
    boxes = plan.canvas_boxes[-len(plan.slices) :]
    found = None
    for view, (canvas_top, canvas_left, _, _) in zip(plan.slices, boxes, strict=True):
        top, left, bottom, right = view.box
        down, along = (y - top) / (bottom - top), (x - left) / (right - left)
        if 0 <= down < 1 and 0 <= along < 1 and view.num_visual_tokens:
            rows, cols = token_grid(view)
            kept = view.token_box or (0, 0, rows, cols)
            row, col = int(down * rows), int(along * cols)
            kept_row, kept_col = min(max(row, kept[0]), kept[2] - 1), min(max(col, kept[1]), kept[3] - 1)
            patch_rows, patch_cols = view.patch_grid
            found = Sight(
                first + (kept_row - kept[0]) * (kept[3] - kept[1]) + kept_col - kept[1],
                (canvas_top + int(down * patch_rows), canvas_left + int(along * patch_cols)),
            )
            if (row, col) == (kept_row, kept_col):
                return found
        first += view.num_visual_tokens
    assert found is not None, f"no slice shows {place}"
    return found
