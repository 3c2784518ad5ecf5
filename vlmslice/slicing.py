"""The planner: from the size of an image to the views that a vision encoder will see.

Nothing here touches a pixel. `plan_slices` is a pure function of two integers and a config, so a server can price a
request from the image header, and a port in another language can check itself against golden vectors.

The words, on an image 640 px high and 960 px wide under the default config (slices of about 224 x 224 px):

    image, in pixels                   plan: grid (3, 4), 12 slices          one slice, in patches and blocks

    0         960                      +-----+-----+-----+-----+             +---+---+---+---+---+-- 14 patches
    +-----------+ 0                    | 0,0 | 0,1 | 0,2 | 0,3 |             | 1 | 1 | 2 | 2 | 3 |   of 16 px
    |           |                      +-----+-----+-----+-----+             +---+---+---+---+---+--
    |           |   each slice is      | 1,0 | 1,1 | 1,2 | 1,3 |   resized   | 1 | 1 | 2 | 2 | 3 |
    |           |   213 x 240 px       +-----+-----+-----+-----+   to        +---+---+---+---+---+--
    +-----------+ 640                  | 2,0 | 2,1 | 2,2 | 2,3 |   192x224   | 8 | 8 | 9 | 9 |...
                                       +-----+-----+-----+-----+             12 patches

    plus the overview: the whole image, resized to 128 x 192 px. It comes first, then the slices, row by row.

A *patch* is a cell of the vision encoder (`patch_size` px a side). A *block* is `merge_size` x `merge_size` patches
(above: 2 x 2, drawn with the same number), the least that a view grows by; unless `tokens_per_view` says otherwise,
one block becomes one visual token, so the slice above costs 6 * 7 = 42. All slices of a plan share one patch grid.
A plan with the grid (1, 1) has no overview: its one slice is the whole image already.

Policies:

- `adaptive` (default), ours: every grid within the budget competes by one score of aspect ratio and area. Descends
  from LLaVA-UHD (https://arxiv.org/abs/2403.11703), without the window of N-1, N, N+1 slices.
- `uhd` and `minicpm`: the published rules, kept exact for comparison; see `_plan_uhd` and `_plan_minicpm`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from vlmslice.errors import VlmSliceError

# Weights of the score of a grid, whose aspect-ratio term has the weight 1. Lost detail costs nine times what an equal
# (logarithmic) amount of unused area does; a square image is therefore first cut, 2 x 2, at sqrt(2) times the area
# that one view holds.
_UNUSED_AREA_WEIGHT = 1 / 3
_LOST_DETAIL_WEIGHT = 3.0

# Weights of the score of a patch grid, whose distortion term has the weight 1. Rounding 4.2 blocks to 4 costs as much
# as rounding them to 5.
_VIEW_LOST_WEIGHT = 0.2
_VIEW_GAINED_WEIGHT = 0.02
_SEARCH_RADIUS = 3  # blocks searched on each side of the undistorted height of a view


class SlicingError(VlmSliceError, ValueError):
    """A slicing config cannot work, or a plan cannot be made within it."""


@dataclass(frozen=True)
class SlicingConfig:
    """How images are cut.

    Attributes:
        policy: `"adaptive"`, `"uhd"` or `"minicpm"`.
        scale_resolution: Side, in px, of the square that the vision encoder was trained on. A slice has at most the
            patches of that square.
        overview_resolution: Side of the square whose area bounds the overview; `None` means `scale_resolution`.
        patch_size: Side of a patch in px.
        merge_size: Both sides of every patch grid are multiples of this.
        max_slice_nums: Most slices of a plan, the overview not counted.
        tokens_per_view: Visual tokens of every view, as a resampler with learned queries gives. `None` means one for
            each block of `merge_size` x `merge_size` patches.
        max_visual_tokens: Most visual tokens of a plan. `adaptive` plans within it; the published policies, which
            know no such bound, raise when they would exceed it.
    """

    policy: str = "adaptive"
    scale_resolution: int = 224
    overview_resolution: int | None = None
    patch_size: int = 16
    merge_size: int = 2
    max_slice_nums: int = 36
    tokens_per_view: int | None = None
    max_visual_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.policy not in _POLICIES:
            raise SlicingError(_unknown("slicing policy", self.policy, _POLICIES))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "policy" or (value is None and field.default is None):
                continue
            if type(value) is not int or value < 1:
                raise SlicingError(f"{field.name} is {value!r}; expected a whole number of at least 1")
        for name, side in (
            ("scale_resolution", self.scale_resolution),
            ("overview_resolution", self.overview_side),
        ):
            if side < self.block_size:
                raise SlicingError(
                    f"{name} is {side} px, smaller than one block of patch_size * merge_size = {self.block_size} px; "
                    f"raise {name} or lower merge_size"
                )
        least = self.tokens_per_view or 1
        if self.max_visual_tokens < least:
            raise SlicingError(
                f"max_visual_tokens is {self.max_visual_tokens}, but a single view takes {least}; "
                f"raise max_visual_tokens to at least {least} or lower tokens_per_view"
            )

    @property
    def overview_side(self) -> int:
        """`overview_resolution` with its default filled in."""
        return self.scale_resolution if self.overview_resolution is None else self.overview_resolution

    @property
    def block_size(self) -> int:
        """Side in px of the least that a view grows by."""
        return self.patch_size * self.merge_size

    @property
    def max_blocks_per_slice(self) -> int:
        """Whole blocks in the patch budget of a slice: 49 by default, which are 196 patches."""
        return (self.scale_resolution // self.patch_size) ** 2 // self.merge_size**2

    @property
    def max_blocks_per_overview(self) -> int:
        """Whole blocks in the patch budget of the overview."""
        return (self.overview_side // self.patch_size) ** 2 // self.merge_size**2

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SlicingConfig:
        """Builds a config from some of its fields; an unknown name raises with the nearest match."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise SlicingError(_unknown("slicing config field", name, known))
        return cls(**fields)


@dataclass(frozen=True)
class View:
    """A slice or the overview.

    Attributes:
        box: `(top, left, bottom, right)` in pixels of the image.
        size: `(height, width)` in px after resizing: `patch_grid` times the patch size.
        patch_grid: Patches `(height, width)`.
        num_visual_tokens: Visual tokens that the language model receives for this view.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    patch_grid: tuple[int, int]
    num_visual_tokens: int


@dataclass(frozen=True)
class SlicePlan:
    """What becomes of one image; see the picture at the top of this file.

    Attributes:
        policy: The policy that made it.
        image_size: `(height, width)` of the image in px.
        grid: `(rows, cols)` of the slices.
        overview: The whole image, downscaled; `None` if the grid is (1, 1).
        slices: Row by row.
        num_visual_tokens: Sum over all views.
        reason: One line for people: why this grid. Not meant to be parsed.
    """

    policy: str
    image_size: tuple[int, int]
    grid: tuple[int, int]
    overview: View | None
    slices: tuple[View, ...]
    num_visual_tokens: int
    reason: str

    @property
    def views(self) -> tuple[View, ...]:
        """All views in the order of encoding: the overview, if any, then the slices."""
        return self.slices if self.overview is None else (self.overview, *self.slices)

    @property
    def canvas_boxes(self) -> tuple[tuple[int, int, int, int], ...]:
        """For each view `(top, left, bottom, right)` in patches of the canvas that the slices tile.

        With slices of 14 x 14 patches in a grid of (2, 2), the last slice covers (14, 14, 28, 28) and the overview
        (0, 0, 28, 28).
        """
        rows, cols = self.grid
        height, width = self.slices[0].patch_grid
        boxes = [
            (row * height, col * width, (row + 1) * height, (col + 1) * width)
            for row in range(rows)
            for col in range(cols)
        ]
        return tuple(boxes if self.overview is None else [(0, 0, rows * height, cols * width), *boxes])

    def to_dict(self) -> dict[str, Any]:
        """The plan as dicts, lists, numbers and strings: equal to itself after a round trip through JSON."""
        views = [
            {
                "box": list(view.box),
                "size": list(view.size),
                "patch_grid": list(view.patch_grid),
                "num_visual_tokens": view.num_visual_tokens,
            }
            for view in self.views
        ]
        return {
            "policy": self.policy,
            "image_size": list(self.image_size),
            "grid": list(self.grid),
            "overview": None if self.overview is None else views[0],
            "slices": views[-len(self.slices) :],
            "canvas_boxes": [list(box) for box in self.canvas_boxes],
            "num_visual_tokens": self.num_visual_tokens,
            "reason": self.reason,
        }


def plan_slices(height: int, width: int, config: SlicingConfig | None = None) -> SlicePlan:
    """Plans the views of an image from its size alone.

    Under `adaptive`, for every size: each pixel lies in exactly one slice; no view exceeds the patch budget and no
    plan `max_visual_tokens`; the aspect ratio of the mean slice lies within [1/2, 2] if any allowed grid permits (else
    it is the nearest possible); an image is never enlarged by more than the rounding to whole blocks; and the plan of
    the transposed image is the transposed plan.

    Args:
        height: Of the upright image, in px.
        width: Likewise.
        config: Defaults to `SlicingConfig()`.

    Returns:
        The plan. `plan_slices(448, 448)`, for one, has the grid (2, 2) and 5 views: 128 x 128 px is not its overview's
        size by chance, as the overview is never larger than a slice.

    Raises:
        SlicingError: If a side is below 1, or a published policy would exceed `max_visual_tokens`.
    """
    config = _DEFAULT_CONFIG if config is None else config
    if height < 1 or width < 1:
        raise SlicingError(
            f"image is {height} x {width} px (height x width); expected sides of at least 1 px"
        )
    layout = _POLICIES[config.policy](height, width, config)
    plan = _build_plan(height, width, layout, config)
    if plan.num_visual_tokens > config.max_visual_tokens:
        raise SlicingError(
            f"policy {config.policy!r} needs {plan.num_visual_tokens} visual tokens for an image of {height} x {width} "
            f"px (height x width), but max_visual_tokens is {config.max_visual_tokens}; use policy 'adaptive', which "
            "plans within the bound, or raise max_visual_tokens"
        )
    return plan


class _Layout(NamedTuple):
    """What a policy decides; `_build_plan` derives the rest. Both grids are in patches."""

    grid: tuple[int, int]
    slice_patches: tuple[int, int]
    overview_patches: tuple[int, int] | None
    reason: str

    def transposed(self) -> _Layout:
        overview = self.overview_patches and self.overview_patches[::-1]
        return _Layout(self.grid[::-1], self.slice_patches[::-1], overview, self.reason)


def _build_plan(height: int, width: int, layout: _Layout, config: SlicingConfig) -> SlicePlan:
    def view(box: tuple[int, int, int, int], patch_grid: tuple[int, int]) -> View:
        size = (patch_grid[0] * config.patch_size, patch_grid[1] * config.patch_size)
        num_blocks = (patch_grid[0] // config.merge_size) * (patch_grid[1] // config.merge_size)
        return View(box, size, patch_grid, config.tokens_per_view or num_blocks)

    rows, cols = layout.grid
    tops = [row * height // rows for row in range(rows + 1)]
    lefts = [col * width // cols for col in range(cols + 1)]
    slices = tuple(
        view((tops[row], lefts[col], tops[row + 1], lefts[col + 1]), layout.slice_patches)
        for row in range(rows)
        for col in range(cols)
    )
    overview = layout.overview_patches and view((0, 0, height, width), layout.overview_patches)
    num_visual_tokens = len(slices) * slices[0].num_visual_tokens + (
        overview.num_visual_tokens if overview else 0
    )
    return SlicePlan(
        config.policy, (height, width), layout.grid, overview, slices, num_visual_tokens, layout.reason
    )


# --- adaptive --------------------------------------------------------------------------------------------------------


def _plan_adaptive(height: int, width: int, config: SlicingConfig) -> _Layout:
    """Our policy: a joint score over every grid.

    Portrait images are planned as their transpose, which is why transposing an image transposes its plan exactly; a
    square one gets a square grid of square patch grids, the only plans that are their own transpose.
    """
    if height > width:
        return _plan_adaptive(width, height, config).transposed()
    block_pixels = config.block_size**2
    whole = _allowed_grids(config)[0]
    whole_fits = height * width <= whole.max_blocks * block_pixels and width <= 2 * height
    chosen = whole if whole_fits else _best_grid(height, width, config)
    rows, cols, max_blocks = chosen

    blocks = _fit_blocks(height, width, rows, cols, config.block_size, max_blocks)
    num_blocks = blocks[0] * blocks[1]
    overview = None
    if rows * cols > 1:
        # Not larger than a slice: an image just too large for one view then costs a little more, not three times more.
        room = min(config.max_blocks_per_overview, num_blocks)
        overview = _fit_blocks(height, width, 1, 1, config.block_size, room)

    aspect = (width * rows) / (height * cols)
    distortion = (blocks[1] / blocks[0]) / aspect
    kept = rows * cols * num_blocks * block_pixels / (height * width)
    notes = [
        "one view holds the whole image"
        if whole_fits
        else f"best score of slice aspect ratio ({_ratio(aspect)}) and area"
    ]
    if not 0.5 <= aspect <= 2:
        notes.append("no allowed grid has slices within 1:2, this is the nearest")
    if max(distortion, 1 / distortion) > 1.25:
        notes.append(f"fitting whole blocks distorts by {_ratio(distortion)}")
    if kept < 0.8:
        notes.append(f"the budget keeps {kept:.2g} of the pixels")
    patches = (blocks[0] * config.merge_size, blocks[1] * config.merge_size)
    overview_patches = overview and (overview[0] * config.merge_size, overview[1] * config.merge_size)
    return _Layout((rows, cols), patches, overview_patches, "; ".join(notes))


class _Grid(NamedTuple):
    rows: int
    cols: int
    max_blocks: int  # budget of each slice


@lru_cache(maxsize=256)
def _allowed_grids(config: SlicingConfig) -> tuple[_Grid, ...]:
    """Every grid that `max_slice_nums` and `max_visual_tokens` allow, fewest slices first."""
    grids = []
    for num_slices in range(1, config.max_slice_nums + 1):
        max_blocks = _slice_budget(num_slices, config)
        if max_blocks:
            rows = (rows for rows in range(1, num_slices + 1) if num_slices % rows == 0)
            grids += [_Grid(r, num_slices // r, max_blocks) for r in rows]
    return tuple(grids)


def _slice_budget(num_slices: int, config: SlicingConfig) -> int:
    """Blocks that each of so many slices may have under `max_visual_tokens`; 0 if the plan cannot be paid at all."""
    tokens = config.max_visual_tokens
    if config.tokens_per_view is not None:
        num_views = num_slices + (num_slices > 1)
        return config.max_blocks_per_slice if num_views * config.tokens_per_view <= tokens else 0
    if num_slices == 1:
        return min(config.max_blocks_per_slice, tokens)
    # The overview is never larger than its own budget, nor than a slice: the better of the two bounds holds.
    affordable = max((tokens - config.max_blocks_per_overview) // num_slices, tokens // (num_slices + 1))
    return min(config.max_blocks_per_slice, affordable)


def _best_grid(height: int, width: int, config: SlicingConfig) -> _Grid:
    """The grid of least score, among those whose slices lie within 1:2 if there are any.

    The score is a squared distance in logarithms from a full view of aspect ratio 1 that loses nothing:
    `log(aspect)^2 + 1/3 log(unused)^2 + 3 log(lost)^2`. For 448 x 672 px at `scale_resolution` 448, the grid (1, 1)
    has the aspect ratio 1.5 and 1.5 times the pixels it can hold, 0.16 + 3 * 0.16 = 0.66; (1, 2) has 0.75 and uses
    three quarters, 0.08 + 0.08 / 3 = 0.11, and wins.

    Every quotient is of whole numbers and at least 1, so that equal scores are equal bit for bit; a tie goes to
    fewer slices, then to fewer rows.
    """
    grids = [g for g in _allowed_grids(config) if g.rows <= height and g.cols <= width]
    if height == width:
        grids = [g for g in grids if g.rows == g.cols]

    def elongation(grid: _Grid) -> float:
        across, down = width * grid.rows, height * grid.cols
        return across / down if across >= down else down / across

    competing = [g for g in grids if elongation(g) <= 2]
    if not competing:
        nearest = min(map(elongation, grids))
        competing = [g for g in grids if elongation(g) == nearest]

    block_pixels = config.block_size**2
    # Detail that no competing grid could keep must not drown the aspect ratio.
    keepable = max(g.rows * g.cols * g.max_blocks for g in competing) * block_pixels
    pixels = min(height * width, keepable)

    def score(grid: _Grid) -> float:
        num_slices = grid.rows * grid.cols
        room = num_slices * grid.max_blocks * block_pixels
        lost = math.log(pixels / room) if pixels > room else 0.0
        unused = math.log(num_slices * config.max_blocks_per_slice * block_pixels / min(pixels, room))
        return (
            math.log(elongation(grid)) ** 2 + _UNUSED_AREA_WEIGHT * unused**2 + _LOST_DETAIL_WEIGHT * lost**2
        )

    return min(competing, key=lambda g: (score(g), g.rows * g.cols, g.rows))


def _fit_blocks(
    height: int, width: int, rows: int, cols: int, block_size: int, max_blocks: int
) -> tuple[int, int]:
    """Blocks `(height, width)` of a view that shows `height / rows` x `width / cols` px, at most `max_blocks`.

    Neither side exceeds what holds the source at full detail, rounded up to whole blocks. Within that, distortion
    of the aspect ratio is weighed against detail lost and area gained. 213 x 240 px, for one, are 6.7 x 7.5 blocks
    of 32 px; of 49 blocks, 6 x 7 distort by 4 %.
    """
    exact_height, exact_width = height / (rows * block_size), width / (cols * block_size)
    most_high = min(-(-height // (rows * block_size)), max_blocks)
    most_wide = min(-(-width // (cols * block_size)), max_blocks)

    if height * cols == width * rows:
        side = min(most_high, math.isqrt(max_blocks))
        candidates = [(s, s) for s in (side, max(side - 1, 1))]
    else:
        shrink = min(1.0, math.sqrt(max_blocks / (exact_height * exact_width)))
        middle = min(int(exact_height * shrink), most_high)
        candidates = []
        for high in range(max(middle - _SEARCH_RADIUS, 1), min(middle + _SEARCH_RADIUS + 1, most_high) + 1):
            widest = min(most_wide, max_blocks // high)
            undistorted = int(high * exact_width / exact_height)
            candidates += [(high, max(1, min(wide, widest))) for wide in (undistorted, undistorted + 1)]

    def score(blocks: tuple[int, int]) -> float:
        log_high, log_wide = math.log(blocks[0] / exact_height), math.log(blocks[1] / exact_width)
        area = log_high + log_wide
        return (log_wide - log_high) ** 2 + (_VIEW_LOST_WEIGHT if area < 0 else _VIEW_GAINED_WEIGHT) * area**2

    return min(candidates, key=score)


# --- published policies ----------------------------------------------------------------------------------------------


def _plan_uhd(height: int, width: int, config: SlicingConfig) -> _Layout:
    """LLaVA-UHD (https://arxiv.org/abs/2403.11703).

    From the paper: N = ceil(H W / S^2); of the grids of N-1, N and N+1 slices the one with the largest
    -|log(slice aspect ratio)|; slices resized in proportion. From the released code, where the paper is silent: N
    capped by `max_slice_nums`; N = 1 means no slicing, else one slice is no candidate; ties go to fewer slices, then
    to fewer columns; and sides *floored*, here to whole blocks. A view is brought to an area of S^2, enlarged if need
    be. The overview comes first, as everywhere in this package; the released code puts it last.
    """
    grid = min(_window_grids(height, width, config), key=lambda c: (c.error, c.rows * c.cols, c.cols))[:2]

    def fit(high: float, wide: float, side: int) -> tuple[int, int]:
        ratio = wide / high
        new_height = int(side / math.sqrt(ratio))
        new_width = int(new_height * ratio)
        return (
            max(new_height // config.block_size, 1) * config.merge_size,
            max(new_width // config.block_size, 1) * config.merge_size,
        )

    rows, cols = grid
    overview = None if grid == (1, 1) else fit(height, width, config.overview_side)
    slices = fit(height / rows, width / cols, config.scale_resolution)
    return _Layout(grid, slices, overview, _window_reason(height, width, grid, config))


def _plan_minicpm(height: int, width: int, config: SlicingConfig) -> _Layout:
    """MiniCPM-V 4.6, equal to transformers' `minicpmv4_6` at `scale_resolution` 448, `patch_size` 14, `merge_size` 4.

    LLaVA-UHD's grid, with sides *rounded* to whole blocks, so that a view may exceed S^2 (1,200 patches where 1,024
    are nominal). The source is first rounded to a multiple of the grid. Slices, and an image that stays whole, are
    enlarged to an area of S^2; an overview is only ever reduced. Ties go to more rows.
    """
    grid = min(_window_grids(height, width, config), key=lambda c: (c.error, -c.rows))[:2]

    def to_multiple(length: float, divisor: int) -> int:
        return max(round(length / divisor) * divisor, divisor)

    def fit(high: float, wide: float, side: int, enlarge: bool) -> tuple[int, int]:
        if enlarge or high * wide > side * side:
            ratio = wide / high
            high = int(side / math.sqrt(ratio))
            wide = int(high * ratio)
        return (
            to_multiple(high, config.block_size) // config.patch_size,
            to_multiple(wide, config.block_size) // config.patch_size,
        )

    rows, cols = grid
    overview = None
    high, wide = float(height), float(width)
    if grid != (1, 1):
        overview = fit(height, width, config.overview_side, enlarge=False)
        high, wide = to_multiple(height, rows) / rows, to_multiple(width, cols) / cols
    slices = fit(high, wide, config.scale_resolution, enlarge=True)
    return _Layout(grid, slices, overview, _window_reason(height, width, grid, config))


class _WindowGrid(NamedTuple):
    rows: int
    cols: int
    error: float  # |log(slice aspect ratio)|


def _window_grids(height: int, width: int, config: SlicingConfig) -> list[_WindowGrid]:
    """The candidates of the published rules: every grid of N-1, N and N+1 slices, computed in their order of floats."""
    num_slices = min(math.ceil(width * height / config.scale_resolution**2), config.max_slice_nums)
    if num_slices <= 1:
        return [_WindowGrid(1, 1, 0.0)]
    return [
        _WindowGrid(rows, product // rows, abs(math.log(width / height) - math.log(product // rows / rows)))
        for product in (num_slices - 1, num_slices, num_slices + 1)
        if 1 < product <= config.max_slice_nums
        for rows in range(1, product + 1)
        if product % rows == 0
    ]


def _window_reason(height: int, width: int, grid: tuple[int, int], config: SlicingConfig) -> str:
    areas = height * width / config.scale_resolution**2
    if grid == (1, 1):
        return f"the image has {areas:.3g} times the training area: one view"
    aspect = _ratio((width * grid[0]) / (height * grid[1]))
    return f"the image has {areas:.3g} times the training area; nearest slice aspect ratio ({aspect}) around that number"


def _ratio(ratio: float) -> str:
    """`1:1.5` for 1.5 and for 1 / 1.5 alike, so that an image and its transpose are given the same reason."""
    return f"1:{max(ratio, 1 / ratio):.3g}"


def _unknown(kind: str, name: object, known: Mapping[str, Any] | list[str]) -> str:
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {kind} {name!r}; expected one of {', '.join(sorted(known))}{hint}"


_POLICIES: dict[str, Callable[[int, int, SlicingConfig], _Layout]] = {
    "adaptive": _plan_adaptive,
    "uhd": _plan_uhd,
    "minicpm": _plan_minicpm,
}
_DEFAULT_CONFIG = SlicingConfig()
