"""The slicing policies: how the grid and the sizes of views follow from the size of an image.

`adaptive` is ours; the others are published rules, kept exact for comparison, and `uniform`, which does not cut. A
policy is a function of `(height, width, config)` that returns a `Layout`; `vlmslice.slicing` defines the words and
turns a layout into a plan. Sides of views are counted in whole *blocks*, which are `merge_size` patches a side.

`adaptive` cuts the image and resizes each slice by itself, so that no pixel beyond a slice touches it. The published
rules resize the whole image to a `Canvas` and cut that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vlmslice.slicing import SlicingConfig

# Weights of the score of a grid, beside the squared logarithm of its aspect ratio; see `_best_grid`. With
# lost detail at nine times the weight of unused area, a square image is first cut, 2 x 2, at about sqrt(2)
# times the area that one view holds.
_UNUSED_AREA_WEIGHT = 1 / 3
_LOST_DETAIL_WEIGHT = 3.0
_MISFIT_WEIGHT = 10.0

# Weights of the misfit of a view, beside its squared distortion; see `_fit_blocks`. Detail counts for less
# where the budget has taken some of it already.
_AREA_LOST_WEIGHT = 0.5
_AREA_LOST_WEIGHT_IN_BUDGET = 0.2
_AREA_GAINED_WEIGHT = 0.05
_SEARCH_RADIUS = 3  # blocks tried on each side of the undistorted height


class Canvas(NamedTuple):
    """The resized image that slices are cut from.

    Attributes:
        tops: Where rows of slices begin, in patches of the canvas.
        lefts: Where columns begin.
        image_box: `(top, left, bottom, right)` of the resized image on the canvas, in px; around it is padding.
    """

    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    image_box: tuple[int, int, int, int]


class Layout(NamedTuple):
    """What a policy decides.

    Attributes:
        grid: `(rows, cols)`.
        slice_patches: Patch grid `(height, width)` of a slice.
        overview_patches: That of the overview, `None` for a single slice.
        reason: Why, in one line for people.
        canvas: `None` where slices are cut from the image, evenly, and each is resized by itself.
        padded_box: The part of the plane, `(top, left, bottom, right)` in px of the image, that is cut instead of the
            image alone; only without a canvas.
        fill: Colour of what is padded: "black", or "mean", which normalises to zero.
        token_boxes: For each slice `(top, left, bottom, right)` of the visual tokens, in blocks, that the language
            model receives; `None` for all.
    """

    grid: tuple[int, int]
    slice_patches: tuple[int, int]
    overview_patches: tuple[int, int] | None
    reason: str
    canvas: Canvas | None = None
    padded_box: tuple[int, int, int, int] | None = None
    fill: str = "black"
    token_boxes: tuple[tuple[int, int, int, int], ...] | None = None


# --- adaptive ------------------------------------------------------------------------------------------------


def _plan_adaptive(height: int, width: int, config: SlicingConfig) -> Layout:
    """Our policy: one score over every grid.

    Portrait images are planned as their transpose, which is why transposing an image transposes its plan
    exactly; a square one gets a square grid, whose slices are square and fit square patch grids best.
    """
    if height > width:
        (rows, cols), (high, wide), overview, reason, *_ = _plan_adaptive(width, height, config)
        return Layout((cols, rows), (wide, high), overview and (overview[1], overview[0]), reason)

    whole = _allowed_grids(config)[0]
    whole_fits = height * width <= whole.max_blocks * config.block_size**2 and width <= 2 * height
    if whole_fits:  # cutting would gain nothing, and cost an overview
        grid, blocks = whole, _fit_blocks(height, width, whole, config.block_size).blocks
        notes = ["one view holds the whole image"]
    else:
        grid, blocks = _best_grid(height, width, config)
        aspect = width * grid.rows / (height * grid.cols)
        notes = [f"best score of slice aspect ratio ({_ratio(aspect)}), area and fit to whole blocks"]
        if not 0.5 <= aspect <= 2:
            notes.append("no allowed grid has slices within 1:2, this is the nearest")

    num_slices, num_blocks = grid.rows * grid.cols, blocks[0] * blocks[1]
    overview = None
    if num_slices > 1:
        room = _Grid(1, 1, _overview_budget(num_slices * num_blocks, config))
        overview = _to_patches(_fit_blocks(height, width, room, config.block_size).blocks, config)

    distortion = (width * grid.rows * blocks[0]) / (height * grid.cols * blocks[1])
    if max(distortion, 1 / distortion) > 1.25:
        notes.append(f"whole blocks distort by {_ratio(distortion)}")
    kept = num_slices * num_blocks * config.block_size**2 / (height * width)
    if kept < 0.75:
        notes.append(f"{kept:.0%} of the pixels kept")
    return Layout((grid.rows, grid.cols), _to_patches(blocks, config), overview, "; ".join(notes))


class _Grid(NamedTuple):
    rows: int
    cols: int
    max_blocks: int  # of each slice


@lru_cache(maxsize=256)
def _allowed_grids(config: SlicingConfig) -> tuple[_Grid, ...]:
    """Every grid that `max_slice_nums` and `max_visual_tokens` allow, fewest slices first."""
    return tuple(
        _Grid(rows, num_slices // rows, max_blocks)
        for num_slices in range(1, config.max_slice_nums + 1)
        if (max_blocks := _slice_budget(num_slices, config)) > 0
        for rows in range(1, num_slices + 1)
        if num_slices % rows == 0
    )


def _slice_budget(num_slices: int, config: SlicingConfig) -> int:
    """Most blocks of each of so many slices under `max_visual_tokens`; 0 if that cannot pay for them."""
    tokens = config.max_visual_tokens
    if config.tokens_per_view is not None:
        num_views = num_slices + (num_slices > 1)
        return config.max_blocks_per_slice if num_views * config.tokens_per_view <= tokens else 0
    if num_slices == 1:
        return min(config.max_blocks_per_slice, tokens)
    if num_slices + 1 > tokens:
        return 0
    # Slices leave room for a full overview, or for one of a quarter of their size, or are a block each.
    left = max((tokens - config.max_blocks_per_overview) // num_slices, 4 * tokens // (5 * num_slices), 1)
    return min(config.max_blocks_per_slice, left)


def _overview_budget(num_slice_blocks: int, config: SlicingConfig) -> int:
    """Most blocks of the overview of slices that have so many in all.

    At most a quarter of the slices: a larger one would repeat what they show. This also removes the cost
    cliff of the first cut: one view of 49 blocks gives way to, say, two slices of 25 and an overview of 12.
    """
    budget = min(config.max_blocks_per_overview, max(num_slice_blocks // 4, 1))
    if config.tokens_per_view is None:
        budget = min(budget, config.max_visual_tokens - num_slice_blocks)
    return budget


def _best_grid(height: int, width: int, config: SlicingConfig) -> tuple[_Grid, tuple[int, int]]:
    """The grid of least score, and the blocks of its slices.

    Only grids with slices within 1:2 compete, or those nearest to that if there are none.

    The score is a squared distance, in logarithms, from a full view of aspect ratio 1 that loses nothing:
    `log(aspect)^2 + 1/3 log(unused)^2 + 3 log(lost)^2`, and ten times the misfit of `_fit_blocks`. For 448 x
    672 px at `scale_resolution` 448, the grid (1, 1) has the aspect ratio 1.5 and 1.5 times the pixels that
    it can hold, 0.16 + 3 * 0.16 = 0.66; (1, 2) has 0.75 and uses three quarters, 0.08 + 0.08 / 3 = 0.11, and
    wins; neither has a misfit worth mentioning.

    Quotients are of whole numbers, the larger above, so that equal scores are equal bit for bit; a tie goes to
    fewer rows.
    """
    grids = []
    for grid in _allowed_grids(config):
        if grid.rows <= height and grid.cols <= width and (height != width or grid.rows == grid.cols):
            across, down = width * grid.rows, height * grid.cols
            grids.append((across / down if across >= down else down / across, grid))
    most_elongated = max(2.0, min(elongation for elongation, _ in grids))
    grids = [(elongation, grid) for elongation, grid in grids if elongation <= most_elongated]

    block_pixels = config.block_size**2
    # Detail that none of them could keep must not drown the aspect ratio.
    keepable = max(grid.rows * grid.cols * grid.max_blocks for _, grid in grids) * block_pixels
    pixels = min(height * width, keepable)
    ranked = []
    for elongation, grid in grids:
        num_slices = grid.rows * grid.cols
        room = num_slices * grid.max_blocks * block_pixels
        lost = math.log(pixels / room) if pixels > room else 0.0
        unused = math.log(num_slices * config.max_blocks_per_slice * block_pixels / min(pixels, room))
        score = math.log(elongation) ** 2 + _UNUSED_AREA_WEIGHT * unused**2 + _LOST_DETAIL_WEIGHT * lost**2
        ranked.append((score, grid))
    ranked.sort()

    best_score = math.inf
    for score, grid in ranked:
        if score >= best_score:
            break  # no later one can win either, as a misfit only adds
        fit = _fit_blocks(height, width, grid, config.block_size)
        if score + _MISFIT_WEIGHT * fit.misfit < best_score:
            best_score = score + _MISFIT_WEIGHT * fit.misfit
            best = grid, fit.blocks
    return best


class _Fit(NamedTuple):
    misfit: float
    blocks: tuple[int, int]


def _fit_blocks(height: int, width: int, grid: _Grid, block_size: int) -> _Fit:
    """The blocks `(height, width)` of a slice of this grid, and how badly they fit it.

    Neither side exceeds what holds the source at full detail, rounded up to whole blocks. Within that and the
    budget, `log(distortion)^2` is weighed against the area lost or gained over an undistorted view. A slice
    of 213 x 240 px, for one, is 6.7 x 7.5 blocks of 32 px: with 49 allowed, 6 x 7 distort it by 4 %, 7 x 7 by
    12 %.
    """
    exact_high = height / (grid.rows * block_size)
    exact_wide = width / (grid.cols * block_size)
    most_high = min(-(-height // (grid.rows * block_size)), grid.max_blocks)
    most_wide = min(-(-width // (grid.cols * block_size)), grid.max_blocks)

    shrink = min(1.0, math.sqrt(grid.max_blocks / (exact_high * exact_wide)))
    lost_weight = _AREA_LOST_WEIGHT if shrink == 1.0 else _AREA_LOST_WEIGHT_IN_BUDGET
    log_high, log_wide = math.log(exact_high * shrink), math.log(exact_wide * shrink)

    def misfit(high: int, wide: int) -> float:
        gain_high, gain_wide = math.log(high) - log_high, math.log(wide) - log_wide
        area = gain_high + gain_wide
        return (gain_wide - gain_high) ** 2 + (lost_weight if area < 0 else _AREA_GAINED_WEIGHT) * area**2

    best = _Fit(math.inf, (1, 1))
    middle = min(int(exact_high * shrink), most_high)
    for high in range(max(middle - _SEARCH_RADIUS, 1), min(middle + _SEARCH_RADIUS + 1, most_high) + 1):
        widest = min(most_wide, grid.max_blocks // high)
        wide = min(max(int(high * exact_wide / exact_high), 1), widest)
        best = min(best, _Fit(misfit(high, wide), (high, wide)))
        if wide < widest:
            best = min(best, _Fit(misfit(high, wide + 1), (high, wide + 1)))
    return best


def _to_patches(blocks: tuple[int, int], config: SlicingConfig) -> tuple[int, int]:
    return blocks[0] * config.merge_size, blocks[1] * config.merge_size


def _ratio(ratio: float) -> str:
    """`1:1.5` for 1.5 and for 1 / 1.5 alike, so that an image and its transpose are given the same reason."""
    return f"1:{max(ratio, 1 / ratio):.3g}"


# --- published -----------------------------------------------------------------------------------------------


def _plan_uhd(height: int, width: int, config: SlicingConfig) -> Layout:
    """LLaVA-UHD (https://arxiv.org/abs/2403.11703).

    From the paper: N = ceil(H W / S^2); of the grids of N-1, N and N+1 slices the one with the largest
    -|log(slice aspect ratio)|; slices resized in proportion. From the released code, where the paper is
    silent: N capped by `max_slice_nums`; N = 1 means no slicing, otherwise one slice is no candidate; ties go
    to fewer slices, then to fewer columns; a view is brought to an area of S^2, enlarged if need be, and its
    sides are *floored*, here to whole blocks. The released code puts the overview last; here it comes first,
    as everywhere.
    """
    chosen = min(_window_grids(height, width, config), key=lambda c: (c.error, c.rows * c.cols, c.cols))
    rows, cols = chosen.rows, chosen.cols

    def fit(exact_height: float, exact_width: float, side: int) -> tuple[int, int]:
        scaled_height, scaled_width = _scale_to_area(exact_height, exact_width, side)
        high, wide = scaled_height // config.block_size, scaled_width // config.block_size
        return _to_patches((max(high, 1), max(wide, 1)), config)

    overview = fit(height, width, config.overview_side) if rows * cols > 1 else None
    slices = fit(height / rows, width / cols, config.scale_resolution)
    reason = _window_reason(height, width, rows, cols, config)
    return Layout((rows, cols), slices, overview, reason, _tiled_canvas((rows, cols), slices, config))


def _plan_minicpm(height: int, width: int, config: SlicingConfig) -> Layout:
    """MiniCPM-V 4.6.

    Equal to transformers' `minicpmv4_6` at `scale_resolution` 448, `patch_size` 14 and `merge_size` 4. The
    rule of LLaVA-UHD, with sides *rounded* (half to even) to whole blocks, so that a view may exceed S^2:
    1,200 patches where 1,024 are nominal. The image is first rounded to a multiple of the grid. Slices, and
    an image that stays whole, are enlarged to an area of S^2; an overview is only ever reduced. Ties go to
    more rows.
    """
    chosen = min(_window_grids(height, width, config), key=lambda c: (c.error, -c.rows))
    rows, cols = chosen.rows, chosen.cols

    def round_to(length: float, divisor: int) -> int:
        return max(round(length / divisor) * divisor, divisor)

    def fit(exact_height: float, exact_width: float, side: int, enlarge: bool) -> tuple[int, int]:
        if enlarge or exact_height * exact_width > side * side:
            exact_height, exact_width = _scale_to_area(exact_height, exact_width, side)
        high, wide = round_to(exact_height, config.block_size), round_to(exact_width, config.block_size)
        return high // config.patch_size, wide // config.patch_size

    if rows * cols == 1:
        overview = None
        slices = fit(height, width, config.scale_resolution, enlarge=True)
    else:
        overview = fit(height, width, config.overview_side, enlarge=False)
        slice_height, slice_width = round_to(height, rows) / rows, round_to(width, cols) / cols
        slices = fit(slice_height, slice_width, config.scale_resolution, enlarge=True)
    reason = _window_reason(height, width, rows, cols, config)
    return Layout((rows, cols), slices, overview, reason, _tiled_canvas((rows, cols), slices, config))


def _plan_internvl(height: int, width: int, config: SlicingConfig) -> Layout:
    """InternVL (https://arxiv.org/abs/2404.16821).

    Square tiles, all of S x S px, in the grid whose aspect ratio is nearest to the image's, by the plain difference; of
    grids alike in that the largest that has less than twice the image's area. The image is squashed or enlarged to the
    grid, and its overview to a square. The grid is what transformers' `got_ocr2`, which InternVL uses, computes for
    `max_patches=max_slice_nums`. There the overview comes last; here it comes first, as everywhere.
    """
    side, pixels = config.scale_resolution, height * width
    aspect = width / height
    least, rows, cols = math.inf, 1, 1
    for candidate_rows, candidate_cols in _grids_up_to(config.max_slice_nums):
        difference = abs(aspect - candidate_cols / candidate_rows)
        room = side * side * candidate_rows * candidate_cols
        if difference < least or (difference == least and pixels > 0.5 * room):
            least, rows, cols = difference, candidate_rows, candidate_cols
    reason = f"nearest aspect ratio ({_ratio(cols / rows)} to {_ratio(aspect)}) of up to {config.max_slice_nums} tiles"
    return _square_tiles(rows, cols, reason, config)


@lru_cache(maxsize=64)
def _grids_up_to(num_slices: int) -> tuple[tuple[int, int], ...]:
    """`(rows, cols)` of every grid of so many slices at most: fewest first, of those alike the narrowest."""
    grids = [(rows, cols) for cols in range(1, num_slices + 1) for rows in range(1, num_slices // cols + 1)]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def _plan_idefics3(height: int, width: int, config: SlicingConfig) -> Layout:
    """Idefics3 and SmolVLM (https://arxiv.org/abs/2408.12637).

    The long side, of small images too, is brought to as many tiles of S px as the root of `max_slice_nums` (but to
    4,096 px at most), the short one to what then holds it. The image is squashed or enlarged to the grid, and its
    overview to a square. The grid is what transformers' `idefics3` computes for a `max_image_size` of S. There the
    overview comes last.
    """
    side = config.scale_resolution
    aspect = width / height
    longest = math.isqrt(config.max_slice_nums) * side
    shortest = int(longest / aspect if width >= height else longest * aspect)
    shortest = max(shortest + shortest % 2, 1)
    if longest > 4096:  # a second step, from the rounded size of the first
        aspect = longest / shortest if width >= height else shortest / longest
        longest = 4096
        shortest = max(int(longest / aspect if width >= height else longest * aspect), 1)
    across, along = math.ceil(shortest / side), math.ceil(longest / side)
    rows, cols = (across, along) if width >= height else (along, across)
    return _square_tiles(rows, cols, f"long side brought to {longest} px, tiles of {side} px", config)


def _plan_uniform(height: int, width: int, config: SlicingConfig) -> Layout:
    """One square view: the image is squashed or enlarged to S x S px."""
    return _square_tiles(1, 1, f"squashed to one square, from {_ratio(width / height)}", config)


def _square_tiles(rows: int, cols: int, reason: str, config: SlicingConfig) -> Layout:
    """Slices and overview whose sides hold as many whole blocks as theirs in the config."""
    square = _square(config.scale_resolution, config)
    overview = _square(config.overview_side, config) if rows * cols > 1 else None
    return Layout((rows, cols), square, overview, reason, _tiled_canvas((rows, cols), square, config))


def _tiled_canvas(grid: tuple[int, int], slice_patches: tuple[int, int], config: SlicingConfig) -> Canvas:
    """A canvas that the image fills and the slices tile."""
    (rows, cols), (high, wide) = grid, slice_patches
    return Canvas(
        tops=tuple(row * high for row in range(rows)),
        lefts=tuple(col * wide for col in range(cols)),
        image_box=(0, 0, rows * high * config.patch_size, cols * wide * config.patch_size),
    )


def _plan_pad(height: int, width: int, config: SlicingConfig) -> Layout:
    """LLaVA-1.5 (https://arxiv.org/abs/2310.03744): padded to a square in the mean colour, then one view of S x S px.

    Equal to transformers' `llava` with `do_pad=True`.
    """
    side = max(height, width)
    above, before = (side - height) // 2, (side - width) // 2
    box = (-above, -before, side - above, side - before)
    square, share = _square(config.scale_resolution, config), 1 - height * width / side**2
    reason = f"padded to one square, {share:.0%} of it empty" if share else "one square"
    return Layout((1, 1), square, None, reason, padded_box=box, fill="mean")


def _plan_anyres(height: int, width: int, config: SlicingConfig) -> Layout:
    """LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next/).

    Of a list of grids of S x S px tiles the one that keeps most pixels, then the one that wastes least. The image is
    brought to it in proportion and padded around with black; visual tokens of the padding are dropped. The overview is
    the image squashed to a square. The grids are the five of LLaVA-NeXT, of two to four slices; from a `max_slice_nums`
    of 9 on those of LLaVA-OneVision (https://arxiv.org/abs/2408.03326), which are all up to as many rows, and columns,
    as its root. Equal to transformers' `llava_next` and `llava_onevision`, which give a grid (1, 1) an overview, too,
    and end each row of tokens with one more, which here is the spatial schema's part.
    """
    side = config.scale_resolution // config.block_size * config.block_size
    rows, cols = _most_effective_grid(height, width, side, _pinpoints(config.max_slice_nums))
    canvas_height, canvas_width = rows * side, cols * side
    across, down = canvas_width / width, canvas_height / height
    if across < down:
        new_height, new_width = min(math.ceil(height * across), canvas_height), canvas_width
    else:
        new_height, new_width = canvas_height, min(math.ceil(width * down), canvas_width)
    top, left = (canvas_height - new_height) // 2, (canvas_width - new_width) // 2
    square = _square(config.scale_resolution, config)
    canvas = _tiled_canvas((rows, cols), square, config)._replace(
        image_box=(top, left, top + new_height, left + new_width)
    )
    empty = 1 - new_height * new_width / (canvas_height * canvas_width)
    return Layout(
        (rows, cols),
        square,
        _square(config.overview_side, config) if rows * cols > 1 else None,
        f"keeps most pixels of up to {config.max_slice_nums} tiles, {empty:.0%} of them padded",
        canvas,
        token_boxes=None
        if config.tokens_per_view
        else _unpadded_tokens(height, width, rows, cols, side // config.block_size),
    )


def _square(side: int, config: SlicingConfig) -> tuple[int, int]:
    """The patch grid of a square view: as many whole blocks as its side holds."""
    high = side // config.block_size * config.merge_size
    return high, high


@lru_cache(maxsize=64)
def _pinpoints(max_slice_nums: int) -> tuple[tuple[int, int], ...]:
    """`(rows, cols)` in the order of the published lists, which decides ties."""
    if max_slice_nums >= 9:
        side = math.isqrt(max_slice_nums)
        return tuple((rows, cols) for rows in range(1, side + 1) for cols in range(1, side + 1))
    listed = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    return tuple(grid for grid in listed if math.prod(grid) <= max_slice_nums) or ((1, 1),)


def _most_effective_grid(
    height: int, width: int, side: int, grids: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    best, most, least_waste = grids[0], 0, math.inf
    for rows, cols in grids:
        scale = min(cols * side / width, rows * side / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = rows * cols * side * side - effective
        if effective > most or (effective == most and waste < least_waste):
            best, most, least_waste = (rows, cols), effective, waste
    return best


def _unpadded_tokens(
    height: int, width: int, rows: int, cols: int, blocks: int
) -> tuple[tuple[int, int, int, int], ...]:
    """The tokens that show the image, of slices of `blocks` x `blocks` tokens; rounded as LLaVA-NeXT does."""
    high, wide = rows * blocks, cols * blocks
    above = before = 0
    if width / height > wide / high:
        above = (high - int(round(height * (wide / width), 7))) // 2
    else:
        before = (wide - int(round(width * (high / height), 7))) // 2
    kept = (above, before, high - above, wide - before)
    return tuple(
        _intersect(kept, (row * blocks, col * blocks, (row + 1) * blocks, (col + 1) * blocks))
        for row in range(rows)
        for col in range(cols)
    )


def _intersect(
    kept: tuple[int, int, int, int], of_slice: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    """The part of a slice's tokens that is kept, counted from its first row and column; maybe empty."""
    top, left, bottom, right = of_slice
    first_row, first_col = max(kept[0], top), max(kept[1], left)
    last_row, last_col = max(min(kept[2], bottom), first_row), max(min(kept[3], right), first_col)
    return first_row - top, first_col - left, last_row - top, last_col - left


def _plan_overlap(height: int, width: int, config: SlicingConfig) -> Layout:
    """Fixed tiles that overlap, as GPT-4V is suspected to see (LLaVA-UHD, section 2).

    The image is reduced to fit 4 S x 4 S and then to a short side of 1.5 S, as OpenAI documents for S = 512
    (https://platform.openai.com/docs/guides/images-vision), and is shown by as many tiles of S px as it takes to cover
    each side. That they are spread evenly, so that they overlap wherever a side is no multiple of S, is what the paper
    infers from miscounts. An image of 768 x 768 px has 2 x 2 tiles of 512 px, which share 256 px: its middle is seen
    four times. A side shorter than S has tiles of its own length. With few `max_slice_nums` the long side is reduced
    further.
    """
    return _overlapping_tiles(height, width, config)


def _plan_overlap_dedup(height: int, width: int, config: SlicingConfig) -> Layout:
    """`overlap`, but of the visual tokens that show one place, the language model receives one.

    Every place goes to the slice whose middle is nearest, so a token's neighbourhood is seen as far as may be.
    """
    if config.tokens_per_view is not None:
        from vlmslice.slicing import SlicingError

        raise SlicingError(
            f"policy 'overlap_dedup' with tokens_per_view {config.tokens_per_view}: expected a token for each block, "
            "as learned queries stand for no place that could be left out; use policy 'overlap' or tokens_per_view=None"
        )
    layout = _overlapping_tiles(height, width, config)
    assert layout.canvas is not None
    down = _shares([top // config.merge_size for top in layout.canvas.tops], layout.slice_patches[0], config)
    along = _shares(
        [left // config.merge_size for left in layout.canvas.lefts], layout.slice_patches[1], config
    )
    boxes = tuple((top, left, bottom, right) for top, bottom in down for left, right in along)
    return layout._replace(token_boxes=boxes)


def _overlapping_tiles(height: int, width: int, config: SlicingConfig) -> Layout:
    side, block = config.scale_resolution, config.block_size
    blocks = side // block
    for longest in (4, 3, 2, 1):
        scale = min(1.0, longest * side / max(height, width), 1.5 * side / min(height, width))
        high, wide = (
            min(max(round(length * scale / block), 1), longest * blocks) for length in (height, width)
        )
        rows, cols = -(-high // blocks), -(-wide // blocks)
        if rows * cols <= config.max_slice_nums:
            break
    slice_high, slice_wide = min(high, blocks), min(wide, blocks)
    canvas = Canvas(
        tops=_spread(high - slice_high, rows, config),
        lefts=_spread(wide - slice_wide, cols, config),
        image_box=(0, 0, high * block, wide * block),
    )
    overview = None
    if rows * cols > 1:
        scale = min(1.0, config.overview_side / max(height, width))
        overview = _to_patches(
            (max(round(height * scale / block), 1), max(round(width * scale / block), 1)), config
        )
    shared = rows * cols * slice_high * slice_wide / (high * wide) - 1
    return Layout(
        (rows, cols),
        _to_patches((slice_high, slice_wide), config),
        overview,
        f"{rows * cols} tiles of up to {side} px, which show {shared:.0%} of it again",
        canvas,
    )


def _spread(room: int, number: int, config: SlicingConfig) -> tuple[int, ...]:
    """Where so many slices begin, in patches: evenly over `room` blocks, the middle one in the middle."""
    if number == 1:
        return (0,)
    return tuple(
        (2 * index * room + number - 1) // (2 * (number - 1)) * config.merge_size for index in range(number)
    )


def _shares(starts: list[int], patches: int, config: SlicingConfig) -> list[tuple[int, int]]:
    """Along one side, the first block of each slice that is its own and the first that is not: neighbours go halves."""
    blocks = patches // config.merge_size
    cuts = [starts[0]]
    cuts += [(start + before + blocks) // 2 for before, start in zip(starts, starts[1:], strict=False)]
    cuts.append(starts[-1] + blocks)
    return [(cuts[i] - start, cuts[i + 1] - start) for i, start in enumerate(starts)]


class _WindowGrid(NamedTuple):
    rows: int
    cols: int
    error: float  # |log(slice aspect ratio)|


def _window_grids(height: int, width: int, config: SlicingConfig) -> list[_WindowGrid]:
    """The candidates of the published rules: every grid of N-1, N or N+1 slices."""
    num_slices = min(math.ceil(height * width / config.scale_resolution**2), config.max_slice_nums)
    if num_slices <= 1:
        return [_WindowGrid(1, 1, abs(math.log(width / height)))]
    return [
        _WindowGrid(rows, product // rows, abs(math.log(width / height) - math.log(product // rows / rows)))
        for product in (num_slices - 1, num_slices, num_slices + 1)
        if 1 < product <= config.max_slice_nums
        for rows in range(1, product + 1)
        if product % rows == 0
    ]


def _scale_to_area(height: float, width: float, side: int) -> tuple[int, int]:
    """The size, cut to whole px, that has the same aspect ratio and about the area of a square."""
    ratio = width / height
    scaled_height = int(side / math.sqrt(ratio))
    return scaled_height, int(scaled_height * ratio)


def _window_reason(height: int, width: int, rows: int, cols: int, config: SlicingConfig) -> str:
    size = f"the image has {height * width / config.scale_resolution**2:.3g} times the training area"
    if rows * cols == 1:
        return f"{size}: one view"
    aspect = _ratio(width * rows / (height * cols))
    return f"{size}; nearest slice aspect ratio ({aspect}) around that many slices"


POLICIES: dict[str, Callable[[int, int, SlicingConfig], Layout]] = {
    "adaptive": _plan_adaptive,
    "uhd": _plan_uhd,
    "minicpm": _plan_minicpm,
    "internvl": _plan_internvl,
    "anyres": _plan_anyres,
    "idefics3": _plan_idefics3,
    "overlap": _plan_overlap,
    "overlap_dedup": _plan_overlap_dedup,
    "pad": _plan_pad,
    "uniform": _plan_uniform,
}
