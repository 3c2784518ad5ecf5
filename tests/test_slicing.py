"""The planner: tables of known cases, one property at a time, the published rules, golden vectors.

The properties are functions named `check_...`. Hypothesis tries each on its own, and `test_sweep` tries all of them
on `VLMSLICE_SWEEP_SIZES` random sizes (20,000 unless set) and on every listed edge case.
"""

import ast
import dataclasses
import itertools
import json
import math
import os
import random
import runpy
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from policy_oracles import EDGE_SIZES

import vlmslice.slicing
from vlmslice.errors import VlmSliceError
from vlmslice.slicing import SlicePlan, SlicingConfig, SlicingError, plan_slices
from vlmslice.slicing_policies import POLICIES

GOLDEN = Path(__file__).parent / "golden"
LONGEST_SIDE = 400_000
NANO = SlicingConfig(overview_resolution=160)
MINICPM_SHAPE = SlicingConfig(scale_resolution=448, patch_size=14, merge_size=4, max_slice_nums=9)
MINICPM = dataclasses.replace(MINICPM_SHAPE, policy="minicpm", max_visual_tokens=10**9)
MINICPM_2_6 = dataclasses.replace(MINICPM, merge_size=1, tokens_per_view=64)
UHD = SlicingConfig("uhd", 336, patch_size=14, merge_size=1, max_slice_nums=7, max_visual_tokens=10**9)

ADAPTIVE_CONFIGS = {
    "default": SlicingConfig(),
    "nano": NANO,
    "minicpm-shape": MINICPM_SHAPE,
    "minicpm-shape, 36 slices": dataclasses.replace(MINICPM_SHAPE, max_slice_nums=36),
    "8 slices": dataclasses.replace(MINICPM_SHAPE, max_slice_nums=8),
    "7 slices": dataclasses.replace(MINICPM_SHAPE, max_slice_nums=7),
    "1 slice": dataclasses.replace(MINICPM_SHAPE, max_slice_nums=1),
    "no merging": dataclasses.replace(MINICPM_SHAPE, merge_size=1, max_visual_tokens=12_000),
    "uneven budget": SlicingConfig(scale_resolution=336, patch_size=14, merge_size=3),
    "large overview": SlicingConfig(scale_resolution=224, overview_resolution=448),
    "64 per view": SlicingConfig(tokens_per_view=64, max_slice_nums=9),
    "64 per view, 5 views": SlicingConfig(tokens_per_view=64, max_visual_tokens=350),
    "256 tokens": SlicingConfig(max_visual_tokens=256),
    "40 tokens": SlicingConfig(max_visual_tokens=40),
    "5 tokens": SlicingConfig(max_visual_tokens=5),
    "1 token": SlicingConfig(max_visual_tokens=1),
}


# --- properties of `adaptive` -------------------------------------------------------------------------------------


def check_every_pixel_lies_in_exactly_one_slice(plan: SlicePlan, config: SlicingConfig) -> None:
    height, width = plan.image_size
    rows, cols = plan.grid
    edges_down = sorted({view.box[0] for view in plan.slices} | {height})
    edges_across = sorted({view.box[1] for view in plan.slices} | {width})
    assert (len(edges_down), len(edges_across)) == (rows + 1, cols + 1)
    assert (edges_down[0], edges_across[0]) == (0, 0)
    assert [view.box for view in plan.slices] == [
        (top, left, bottom, right)
        for top, bottom in itertools.pairwise(edges_down)
        for left, right in itertools.pairwise(edges_across)
    ]


def check_slices_are_equal_but_for_one_pixel(plan: SlicePlan, config: SlicingConfig) -> None:
    boxes = [view.box for view in plan.slices]
    heights, widths = {box[2] - box[0] for box in boxes}, {box[3] - box[1] for box in boxes}
    assert max(heights) - min(heights) <= 1 and max(widths) - min(widths) <= 1
    assert min(heights) >= 1 and min(widths) >= 1


def check_patch_budget_holds(plan: SlicePlan, config: SlicingConfig) -> None:
    assert len(plan.slices) <= config.max_slice_nums
    for view in plan.slices:
        assert math.prod(view.patch_grid) <= (config.scale_resolution // config.patch_size) ** 2
    if plan.overview:
        side = config.overview_resolution or config.scale_resolution
        assert math.prod(plan.overview.patch_grid) <= (side // config.patch_size) ** 2


def check_visual_tokens_are_counted_and_bounded(plan: SlicePlan, config: SlicingConfig) -> None:
    for view in plan.views:
        merged = math.prod(view.patch_grid) // config.merge_size**2
        assert view.num_visual_tokens == (config.tokens_per_view or merged) >= 1
    assert plan.num_visual_tokens == sum(view.num_visual_tokens for view in plan.views)
    assert plan.num_visual_tokens <= config.max_visual_tokens


def check_slice_aspect_ratio_is_bounded_or_nearest(plan: SlicePlan, config: SlicingConfig) -> None:
    height, width = plan.image_size

    def elongation(rows: int, cols: int) -> tuple[int, int]:
        """Of the mean slice, as the fraction long / short."""
        across, down = width * rows, height * cols
        return max(across, down), min(across, down)

    long, short = elongation(*plan.grid)
    if long > 2 * short:
        assert "no allowed grid" in plan.reason
        for rows in range(1, min(config.max_slice_nums, height) + 1):
            for cols in range(1, min(config.max_slice_nums // rows, width) + 1):
                num_views = rows * cols + (rows * cols > 1)
                if num_views * (config.tokens_per_view or 1) <= config.max_visual_tokens:
                    other_long, other_short = elongation(rows, cols)
                    assert long * other_short <= other_long * short, f"{rows} x {cols} is nearer"
    else:
        assert "no allowed grid" not in plan.reason


def check_transposing_the_image_transposes_the_plan(plan: SlicePlan, config: SlicingConfig) -> None:
    other = plan_slices(*plan.image_size[::-1], config)
    assert other.grid == plan.grid[::-1]
    assert (other.num_visual_tokens, other.reason) == (plan.num_visual_tokens, plan.reason)
    rows, cols = plan.grid
    pairs = [
        (plan.slices[row * cols + col], other.slices[col * rows + row])
        for row in range(rows)
        for col in range(cols)
    ]
    if plan.overview or other.overview:
        pairs.append((plan.overview, other.overview))
    for view, mirrored in pairs:
        top, left, bottom, right = view.box
        assert mirrored.box == (left, top, right, bottom)
        assert (mirrored.patch_grid, mirrored.size) == (view.patch_grid[::-1], view.size[::-1])


def check_images_are_not_blown_up(plan: SlicePlan, config: SlicingConfig) -> None:
    """No side of a view exceeds its source, rounded up to whole blocks."""
    height, width = plan.image_size
    block = config.patch_size * config.merge_size
    rows, cols = plan.grid
    for view, shown_rows, shown_cols in [(plan.slices[0], rows, cols), (plan.overview, 1, 1)]:
        if view:
            assert view.size[0] <= -(-height // (shown_rows * block)) * block
            assert view.size[1] <= -(-width // (shown_cols * block)) * block


def check_views_are_whole_blocks_of_one_patch_grid(plan: SlicePlan, config: SlicingConfig) -> None:
    assert len({view.patch_grid for view in plan.slices}) == 1
    for view in plan.views:
        assert all(side >= 1 and side % config.merge_size == 0 for side in view.patch_grid)
        assert view.size == (view.patch_grid[0] * config.patch_size, view.patch_grid[1] * config.patch_size)


def check_overview_shows_all_or_is_absent(plan: SlicePlan, config: SlicingConfig) -> None:
    height, width = plan.image_size
    if plan.grid == (1, 1):
        assert plan.overview is None and plan.views == plan.slices
    else:
        assert plan.overview.box == (0, 0, height, width) and plan.views == (plan.overview, *plan.slices)


def check_points_map_to_the_canvas_and_back(plan: SlicePlan, config: SlicingConfig) -> None:
    """Corners of every slice fall on the corners of its canvas box, and every point comes back."""
    skipped = plan.overview is not None
    for view, canvas in zip(plan.slices, plan.canvas_boxes[skipped:], strict=True):
        top, left, bottom, right = view.box
        middle = ((top + bottom) / 2, (left + right) / 2)
        assert plan.to_canvas(top, left) == (canvas[0], canvas[1])
        assert plan.to_canvas(*middle) == pytest.approx(
            ((canvas[0] + canvas[2]) / 2, (canvas[1] + canvas[3]) / 2)
        )
        assert plan.to_image(*plan.to_canvas(*middle)) == pytest.approx(middle)
    height, width = plan.image_size
    assert plan.to_canvas(height, width) == pytest.approx(plan.canvas_boxes[-1][2:])


def check_canvas_boxes_tile_the_canvas(plan: SlicePlan, config: SlicingConfig) -> None:
    (high, wide), (rows, cols) = plan.slices[0].patch_grid, plan.grid
    assert len(plan.canvas_boxes) == len(plan.views)
    slices = plan.canvas_boxes[len(plan.views) - len(plan.slices) :]
    assert slices == tuple(
        (r * high, c * wide, r * high + high, c * wide + wide) for r in range(rows) for c in range(cols)
    )
    if plan.overview:
        assert plan.canvas_boxes[0] == (0, 0, rows * high, cols * wide)


CHECKS = [check for name, check in globals().items() if name.startswith("check_")]

sides = st.one_of(st.integers(1, LONGEST_SIDE), st.integers(1, 3000), st.integers(1, 100))
configs = st.sampled_from(list(ADAPTIVE_CONFIGS.values()))
random_configs = st.builds(
    SlicingConfig,
    scale_resolution=st.integers(64, 600),
    overview_resolution=st.none() | st.integers(64, 600),
    patch_size=st.integers(1, 16),
    merge_size=st.integers(1, 4),
    max_slice_nums=st.integers(1, 40),
    tokens_per_view=st.none() | st.integers(1, 64),
    max_visual_tokens=st.integers(64, 4000),
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@given(height=sides, width=sides, config=configs | random_configs)
@settings(max_examples=150)
@example(height=398_847, width=2, config=MINICPM_SHAPE)
@example(height=13_000, width=13_000, config=ADAPTIVE_CONFIGS["8 slices"])
@example(height=20, width=20_000, config=ADAPTIVE_CONFIGS["40 tokens"])
@example(height=20, width=60, config=NANO)
def test_property(check, height, width, config):
    check(plan_slices(height, width, config), config)


def test_sweep():
    num_sizes = int(os.environ.get("VLMSLICE_SWEEP_SIZES", "20000"))
    rng = random.Random(20_000)

    def side() -> int:
        return rng.choice(
            (rng.randint(1, LONGEST_SIDE), round(math.exp(rng.uniform(0, math.log(LONGEST_SIDE)))))
        )

    every_config = list(ADAPTIVE_CONFIGS.values())
    edges = [(size, config) for size in EDGE_SIZES for config in every_config]
    sweep = (((side(), side()), every_config[i % len(every_config)]) for i in range(num_sizes))
    for (height, width), config in itertools.chain(edges, sweep):
        plan = plan_slices(height, width, config)
        for check in CHECKS:
            check(plan, config)


# --- cost ---------------------------------------------------------------------------------------------------------


def tokens(height: int, width: int, config: SlicingConfig) -> int:
    return plan_slices(height, width, config).num_visual_tokens


def test_one_pixel_above_the_training_size_costs_nothing():
    assert tokens(448, 448, MINICPM_SHAPE) == tokens(449, 448, MINICPM_SHAPE) == 64
    assert (tokens(448, 448, MINICPM_2_6), tokens(449, 448, MINICPM_2_6)) == (64, 192)


@pytest.mark.parametrize(
    "name", [name for name, config in ADAPTIVE_CONFIGS.items() if not config.tokens_per_view]
)
def test_no_cost_cliff(name):
    """One more pixel on a side multiplies the visual tokens by at most 2.6, from sides of two blocks on.

    The steepest steps found lie at the first cut (8 -> 20 tokens) and where a strip that must stay one view grows
    from one block to two (25 -> 64). Below two blocks a step may go from 2 tokens to 10. Under the default config
    no step from sides of four blocks on exceeds 2.
    """
    config = ADAPTIVE_CONFIGS[name]
    rng = random.Random(name)
    least = 2 * config.block_size

    def thresholds():
        for side in range(least, 40 * config.block_size, 7):
            yield from ((side, side), (side, side - 1), (side, 2 * side), (side, 2 * side - 1))

    def anywhere(num: int):
        for _ in range(num):
            yield tuple(round(math.exp(rng.uniform(math.log(least), math.log(6000)))) for _ in range(2))

    for height, width in itertools.chain(thresholds(), anywhere(800)):
        if min(height, width) >= least:
            before, after = tokens(height, width, config), tokens(height, width + 1, config)
            steepest = 2 if name == "default" and min(height, width) >= 2 * least else 2.6
            assert after <= steepest * before, f"{height} x {width}: {before} -> {after}"


def test_planning_is_fast():
    """Well under a millisecond of processor time, whatever the size; the first plan of a config lists its grids."""
    rng = random.Random(0)
    sizes = [(rng.randint(1, 5000), rng.randint(1, 5000)) for _ in range(300)] + EDGE_SIZES
    plan_slices(1, 1, NANO)
    start = time.thread_time()
    for height, width in sizes:
        plan_slices(height, width, NANO)
    assert (time.thread_time() - start) / len(sizes) < 0.001


# --- known cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "config", "grid", "slice_size", "overview_size", "num_visual_tokens"),
    [
        # The example of the module's picture.
        (480, 720, SlicingConfig(), (2, 3), (224, 224), (160, 256), 6 * 49 + 40),
        # An image of the training size, or a little larger, stays whole.
        (448, 448, MINICPM_SHAPE, (1, 1), (448, 448), None, 64),
        (449, 448, MINICPM_SHAPE, (1, 1), (448, 448), None, 64),
        # An ordinary photograph: 3 views, where fixed tiles take 13.
        (480, 640, MINICPM_SHAPE, (1, 2), (504, 336), (224, 336), 2 * 54 + 24),
        # Small images are rounded up to whole blocks, and no further.
        (1, 1, MINICPM_SHAPE, (1, 1), (56, 56), None, 1),
        (300, 300, MINICPM_SHAPE, (1, 1), (336, 336), None, 36),
        # Extreme shapes: the longest side is bounded by the patch budget.
        (4000, 100, MINICPM_SHAPE, (9, 1), (448, 112), (2016, 56), 9 * 16 + 36),
        (20000, 20, MINICPM_SHAPE, (9, 1), (2240, 56), (3584, 56), 9 * 40 + 64),
        (398_847, 2, MINICPM_SHAPE, (9, 1), (3584, 56), (3584, 56), 640),
    ],
)
def test_known_plans(height, width, config, grid, slice_size, overview_size, num_visual_tokens):
    plan = plan_slices(height, width, config)
    assert plan.grid == grid
    assert plan.slices[0].size == slice_size
    assert (plan.overview and plan.overview.size) == overview_size
    assert plan.num_visual_tokens == num_visual_tokens


@pytest.mark.parametrize(
    ("max_slice_nums", "side", "uhd_grid", "adaptive_grid"),
    [
        # The published rules cut large squares into strips, whether by the number N ...
        (10_000, 1570, (7, 3), (5, 5)),  # N = 22: aspect ratio 2.33
        (10_000, 2070, (13, 3), (6, 6)),  # N = 38: 4.33
        (10_000, 2555, (19, 3), (8, 8)),  # N = 58: 6.33
        # ... or by the cap.
        (7, 4000, (3, 2), (2, 2)),
        (8, 4000, (4, 2), (2, 2)),
        (11, 4000, (5, 2), (3, 3)),
        (14, 4000, (7, 2), (3, 3)),
    ],
)
def test_squares_get_square_grids(max_slice_nums, side, uhd_grid, adaptive_grid):
    uhd = dataclasses.replace(UHD, max_slice_nums=max_slice_nums)
    adaptive = dataclasses.replace(uhd, policy="adaptive", max_slice_nums=min(max_slice_nums, 81))
    assert sorted(plan_slices(side, side, uhd).grid) == sorted(uhd_grid)
    assert plan_slices(side, side, adaptive).grid == adaptive_grid


@pytest.mark.parametrize("config", [NANO, MINICPM_SHAPE, SlicingConfig(max_visual_tokens=64)])
@pytest.mark.parametrize("size", [(398_847, 2), (20_000, 1), (1, 1), (2, 300_000)])
def test_hostile_sizes_stay_in_budget(size, config):
    for policy in sorted(set(POLICIES) - {"adaptive"}):
        published = dataclasses.replace(config, policy=policy)
        try:
            assert plan_slices(*size, published).num_visual_tokens <= config.max_visual_tokens
        except SlicingError as error:
            assert "use policy 'adaptive'" in str(error)
    assert plan_slices(*size, config).num_visual_tokens <= config.max_visual_tokens


def distortions(config: SlicingConfig, num_sizes: int = 3000) -> list[float]:
    """Sorted distortions, in per cent, of slices of images of at least two training areas and at most 1:10."""
    rng = random.Random(1)
    found = []
    while len(found) < num_sizes:
        height, width = (round(math.exp(rng.uniform(math.log(64), math.log(4000)))) for _ in range(2))
        if max(height, width) <= 10 * min(height, width) and height * width > 2 * config.scale_resolution**2:
            plan = plan_slices(height, width, config)
            source = (width / plan.grid[1]) / (height / plan.grid[0])
            ratio = source * plan.slices[0].size[0] / plan.slices[0].size[1]
            found.append(100 * (max(ratio, 1 / ratio) - 1))
    return sorted(found)


@pytest.mark.parametrize(
    "published",
    [MINICPM, MINICPM_2_6, UHD],
    ids=["minicpm 4.6", "minicpm 2.6", "uhd"],
)
def test_slices_are_distorted_less_than_by_the_published_rules(published):
    theirs, ours = distortions(published), distortions(dataclasses.replace(published, policy="adaptive"))
    assert sum(ours) < sum(theirs)
    assert ours[int(0.95 * len(ours))] < theirs[int(0.95 * len(theirs))]
    assert ours[-1] < theirs[-1]


# --- published policies -------------------------------------------------------------------------------------------


def tiles_of(policy: str, side: int, max_slice_nums: int) -> SlicingConfig:
    return SlicingConfig(
        policy,
        side,
        patch_size=14,
        merge_size=2,
        max_slice_nums=max_slice_nums,
        max_visual_tokens=10**9,
    )


@pytest.mark.parametrize(
    ("policy", "size", "grid", "detail", "distortion"),
    [
        # A picture of 0.3 megapixels becomes twelve tiles.
        ("internvl", (480, 640), (3, 4), 12 * 448**2 / (480 * 640), 1.0),
        ("internvl", (100, 4000), (1, 12), 12 * 448**2 / (100 * 4000), 40 / 12),
        ("idefics3", (30, 40), (3, 3), 9 * 448**2 / (30 * 40), 4 / 3),
        ("uniform", (200, 800), (1, 1), 448**2 / (200 * 800), 4.0),
    ],
)
def test_square_tiles_known_plans(policy, size, grid, detail, distortion):
    plan = plan_slices(*size, tiles_of(policy, 448, 12))
    assert plan.grid == grid
    assert plan.detail == pytest.approx(detail)
    assert plan.distortion == pytest.approx(distortion)


@pytest.mark.parametrize(
    ("height", "width", "config", "grid", "slice_size", "overview_size", "num_visual_tokens"),
    [
        # One pixel more than the training size triples the price.
        (448, 448, MINICPM_2_6, (1, 1), (448, 448), None, 64),
        (449, 448, MINICPM_2_6, (2, 1), (322, 630), (448, 448), 192),
        (449, 448, MINICPM, (2, 1), (336, 616), (448, 448), 2 * 66 + 64),
        (480, 640, MINICPM_2_6, (1, 2), (546, 364), (392, 518), 192),
        # The patches of a strip know no bound: 571 in a row, and 10,681 tokens for a PNG of 176 bytes.
        (100, 4000, MINICPM_2_6, (1, 3), (126, 1624), (70, 2800), 256),
        (20, 20_000, MINICPM_2_6, (1, 3), (28, 7994), (14, 14_000), 256),
        (2, 398_847, MINICPM, (1, 5), (56, 79_744), (56, 199_416), 10_681),
        # An overview with more room than the image fills is not enlarged.
        (
            600,
            600,
            dataclasses.replace(MINICPM, overview_resolution=1000),
            (2, 1),
            (336, 616),
            (616, 616),
            253,
        ),
    ],
)
def test_minicpm_known_plans(height, width, config, grid, slice_size, overview_size, num_visual_tokens):
    plan = plan_slices(height, width, config)
    assert plan.grid == grid
    assert plan.slices[0].size == slice_size
    assert (plan.overview and plan.overview.size) == overview_size
    assert plan.num_visual_tokens == num_visual_tokens


@pytest.mark.parametrize(
    ("height", "width", "grid", "slice_size", "overview_size"),
    [
        # 672 x 1008 px, the paper's example: N = 6, and (2, 3) has slices of aspect ratio 1.
        (672, 1008, (2, 3), (336, 336), (266, 406)),
        (336, 336, (1, 1), (336, 336), None),
        (100, 50, (1, 1), (462, 224), None),
        # Flooring costs the overview of this one 47 of its 576 patches.
        (448, 449, (1, 2), (462, 224), (322, 322)),
        (4000, 100, (5, 1), (938, 112), (2114, 42)),
    ],
)
def test_uhd_known_plans(height, width, grid, slice_size, overview_size):
    plan = plan_slices(height, width, UHD)
    assert plan.grid == grid
    assert plan.slices[0].size == slice_size
    assert (plan.overview and plan.overview.size) == overview_size


def test_uhd_never_exceeds_its_patch_budget():
    rng = random.Random(5)
    for _ in range(2000):
        plan = plan_slices(rng.randint(1, 3000), rng.randint(1, 3000), UHD)
        if min(plan.slices[0].patch_grid) > 1:
            assert all(math.prod(view.patch_grid) <= 576 for view in plan.views)


@pytest.mark.parametrize("policy", ["uhd", "minicpm"])
def test_published_policies_refuse_what_exceeds_the_budget(policy):
    config = dataclasses.replace(MINICPM_SHAPE, policy=policy, max_visual_tokens=200)
    expected = (
        rf"policy '{policy}' needs \d+ visual tokens for an image of 2000 x 1000 px \(height x width\), but "
        r"max_visual_tokens is 200; use policy 'adaptive', which plans within the bound"
    )
    with pytest.raises(SlicingError, match=expected):
        plan_slices(2000, 1000, config)
    assert plan_slices(2000, 1000, dataclasses.replace(config, policy="adaptive")).num_visual_tokens <= 200


# --- configs, errors, files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "adaptiv"}, "unknown slicing policy 'adaptiv'; .* did you mean 'adaptive'?"),
        ({"max_slices": 4}, "unknown slicing config field 'max_slices'; .* did you mean 'max_slice_nums'?"),
        ({"patch_size": 0}, "patch_size is 0; expected a whole number of at least 1"),
        ({"merge_size": 2.0}, "merge_size is 2.0; expected a whole number"),
        ({"max_slice_nums": True}, "max_slice_nums is True; expected a whole number"),
        ({"patch_size": None}, "patch_size is None; expected a whole number"),
        ({"scale_resolution": 31}, "scale_resolution is 31 px, smaller than one block .* = 32 px; raise"),
        ({"overview_resolution": 16}, "overview_resolution is 16 px, smaller than one block"),
        (
            {"tokens_per_view": 64, "max_visual_tokens": 63},
            "max_visual_tokens is 63, but a single view takes 64; raise max_visual_tokens to at least 64",
        ),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(SlicingError, match=message):
        SlicingConfig.from_dict(fields)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_sizes_below_one_pixel_are_refused(size):
    with pytest.raises(SlicingError, match=r"expected sides of at least 1 px"):
        plan_slices(*size)


def test_errors_are_value_errors():
    assert issubclass(SlicingError, ValueError) and issubclass(SlicingError, VlmSliceError)


@pytest.mark.parametrize("config", ADAPTIVE_CONFIGS.values(), ids=ADAPTIVE_CONFIGS)
def test_config_survives_json(config):
    assert SlicingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_plan_survives_json():
    plan = plan_slices(480, 720)
    fields = plan.to_dict()
    assert json.loads(json.dumps(fields)) == fields
    assert fields["overview"] == {
        "box": [0, 0, 480, 720],
        "size": [160, 256],
        "patch_grid": [10, 16],
        "num_visual_tokens": 40,
        "token_box": None,
    }
    assert (len(fields["slices"]), fields["grid"]) == (6, [2, 3])
    assert fields["canvas_boxes"][-1] == [14, 28, 28, 42]


def test_reasons_say_what_had_to_give():
    assert plan_slices(100, 100).reason == "one view holds the whole image"
    strip = plan_slices(2, 398_847, MINICPM_SHAPE).reason
    assert "no allowed grid has slices within 1:2" in strip and "whole blocks distort by 1:346" in strip
    assert "45% of the pixels kept" in plan_slices(2000, 2000, MINICPM_SHAPE).reason


@pytest.mark.parametrize("name", ["slicing", "slicing_policies"])
def test_planner_needs_only_the_standard_library(name):
    tree = ast.parse((Path(vlmslice.slicing.__file__).with_name(f"{name}.py")).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert imported - sys.stdlib_module_names - {"collections.abc"} <= {
        "vlmslice.errors",
        "vlmslice.slicing",
        "vlmslice.slicing_policies",
    }


# --- golden vectors -----------------------------------------------------------------------------------------------


def golden_cases():
    golden = json.loads((GOLDEN / "slice_plans.json").read_text())
    return [
        pytest.param(entry["config"], plan, id=f"{name}-{'x'.join(map(str, plan['image_size']))}")
        for name, entry in golden["configs"].items()
        for plan in entry["plans"]
    ]


@pytest.mark.parametrize(("config", "expected"), golden_cases())
def test_golden_plans(config, expected):
    assert plan_slices(*expected["image_size"], SlicingConfig.from_dict(config)).to_dict() == expected


def test_golden_file_is_what_its_script_writes(tmp_path, monkeypatch):
    written = tmp_path / "slice_plans.json"
    monkeypatch.setattr(sys, "argv", ["make_slice_plans.py", str(written)])
    runpy.run_path(str(GOLDEN / "make_slice_plans.py"), run_name="__main__")
    assert written.read_text() == (GOLDEN / "slice_plans.json").read_text()
