"""Where a thing on a picture is seen: by which visual token, and in which patch of the canvas."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vlmslice.data.samples import Place
from vlmslice.slicing import SlicePlan, View

Cell = tuple[int, int]
"""Row and column of a patch on the canvas."""

LARGEST_IN_SLICE = 5
"""Patches. The middle of a larger thing sees little of its edge, and seams cut it; the overview shows it whole."""


class Sight(NamedTuple):
    """Attributes:
    token: index, among the visual tokens of the image, of the one that sees the middle of the thing.
    cell: the patch that holds the middle; the patch in the middle of the token, if that is one of the overview.
    """

    token: int
    cell: Cell


def find_sight(
    plan: SlicePlan, place: Place, token_grid: Callable[[View], tuple[int, int]], size: float = 0.0
) -> Sight:
    """Where the thing round a point of the image is seen: in a slice, or in the overview if it is large.

    Args:
        plan: of the image.
        place: the middle of the thing (y, x), px; points outside follow the border.
        token_grid: rows and columns of the visual tokens of a view.
        size: height of the thing, px. It is large if it is higher than `LARGEST_IN_SLICE` patches of the slices and
            still one patch of the overview.
    """
    height, width = plan.image_size
    y, x = min(max(place[0], 0), height - 1), min(max(place[1], 0), width - 1)
    first = 0
    if plan.overview is not None:
        top, _, bottom, _ = plan.slices[0].box
        in_slices = size * plan.slices[0].patch_grid[0] / (bottom - top)
        in_overview = size * plan.overview.patch_grid[0] / height
        if in_slices > LARGEST_IN_SLICE and in_overview >= 1:
            rows, cols = token_grid(plan.overview)
            row, col = int(y / height * rows), int(x / width * cols)
            canvas_rows, canvas_cols = plan.canvas_boxes[0][2:]
            cell = int((row + 0.5) / rows * canvas_rows), int((col + 0.5) / cols * canvas_cols)
            return Sight(row * cols + col, cell)
        first = plan.overview.num_visual_tokens
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
