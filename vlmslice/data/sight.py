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
    """Where a point of the image is seen, in the slices.

    Args:
        plan: of the image.
        place: the point (y, x), px; those outside follow the border.
        token_grid: rows and columns of the visual tokens of a view.
    """
    height, width = plan.image_size
    y, x = min(max(place[0], 0), height - 1), min(max(place[1], 0), width - 1)
    first = plan.overview.num_visual_tokens if plan.overview is not None else 0
    boxes = plan.canvas_boxes[-len(plan.slices) :]
    for view, (canvas_top, canvas_left, _, _) in zip(plan.slices, boxes, strict=True):
        top, left, bottom, right = view.box
        if y < bottom and x < right:
            down, along = (y - top) / (bottom - top), (x - left) / (right - left)
            rows, cols = token_grid(view)
            patch_rows, patch_cols = view.patch_grid
            return Sight(
                first + int(down * rows) * cols + int(along * cols),
                (canvas_top + int(down * patch_rows), canvas_left + int(along * patch_cols)),
            )
        first += view.num_visual_tokens
    raise AssertionError(f"no slice covers {place}")
