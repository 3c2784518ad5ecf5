"""Which visual token sees a thing, and where an answer points at it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmslice.data.sight import find_sight
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


@given(height=st.integers(8, 3000), width=st.integers(8, 3000), y=st.floats(0, 0.999), x=st.floats(0, 0.999))
def test_cell_is_the_patch_of_the_token(height, width, y, x):
    """So what was pointed at is what `VisualMemory.without_passed` takes for passed, and nothing behind it."""
    plan = plan_slices(height, width, CONFIG)
    token, cell = find_sight(plan, (y * height, x * width), patches)
    assert plan.overview is None or token >= plan.overview.num_visual_tokens
    assert cell == tuple(math.floor(part) for part in places_of_tokens(plan)[token])
    row, col = plan.to_canvas(min(y * height, height - 1), min(x * width, width - 1))
    assert cell == pytest.approx((row - 0.5, col - 0.5), abs=0.51)


def test_a_point_outside_follows_the_border():
    plan = plan_slices(150, 150, CONFIG)
    assert find_sight(plan, (149.9, 200), patches).token == plan.num_visual_tokens - 1
