"""Which visual token sees a thing, and where an answer points at it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmslice.data.sight import LARGEST_IN_SLICE, find_sight
from vlmslice.slicing import SlicingConfig, plan_slices

CONFIG = SlicingConfig(overview_resolution=160, merge_size=1, max_visual_tokens=4096)


def patches(view) -> tuple[int, int]:
    return view.patch_grid


def places_of_tokens(plan) -> list[tuple[float, float]]:
    """Row and column of the middle of each visual token on the canvas."""
    places = []
    for view, (top, left, bottom, right) in zip(plan.views, plan.canvas_boxes, strict=True):
        rows, cols = view.patch_grid
        places += [
            (top + (row + 0.5) * (bottom - top) / rows, left + (col + 0.5) * (right - left) / cols)
            for row in range(rows)
            for col in range(cols)
        ]
    return places


@given(
    height=st.integers(8, 3000),
    width=st.integers(8, 3000),
    y=st.floats(0, 0.999),
    x=st.floats(0, 0.999),
    size=st.floats(0, 900),
)
def test_cell_is_the_patch_of_the_token(height, width, y, x, size):
    """So what was pointed at is what `VisualMemory.without_passed` takes for passed, and nothing behind it."""
    plan = plan_slices(height, width, CONFIG)
    token, cell = find_sight(plan, (y * height, x * width), patches, size)
    assert cell == tuple(math.floor(part) for part in places_of_tokens(plan)[token])
    row, col = plan.to_canvas(min(y * height, height - 1), min(x * width, width - 1))
    if plan.overview is None or token >= plan.overview.num_visual_tokens:
        assert cell == pytest.approx((row - 0.5, col - 0.5), abs=0.51)
    else:  # inside the thing, which is larger than the patch of the overview
        scale = plan.overview.patch_grid[0] / plan.canvas_boxes[0][2]
        assert abs(cell[0] + 0.5 - row) <= 0.5 / scale + 1


@pytest.mark.parametrize(("size", "in_overview"), [(0, False), (74, False), (84, True), (300, True)])
def test_what_is_large_is_seen_in_the_overview(size, in_overview):
    plan = plan_slices(640, 640, CONFIG)
    assert (plan.grid, plan.slices[0].patch_grid, plan.overview.patch_grid) == ((3, 3), (14, 14), (10, 10))
    assert 74 * 42 / 640 < LARGEST_IN_SLICE < 84 * 42 / 640
    token, cell = find_sight(plan, (200, 330), patches, size)
    assert (token < 100) == in_overview
    assert cell == ((14, 23) if in_overview else (13, 21))


def test_what_the_overview_shows_too_small_stays_in_its_slice():
    plan = plan_slices(1600, 300, CONFIG)
    token, _ = find_sight(plan, (800, 100), patches, 100)
    shown = 100 * plan.overview.patch_grid[0] / 1600
    assert (shown >= 1) == (token < plan.overview.num_visual_tokens)


def test_image_of_one_view_has_no_overview():
    plan = plan_slices(150, 150, CONFIG)
    assert find_sight(plan, (149.9, 200), patches, 140).token == plan.num_visual_tokens - 1
