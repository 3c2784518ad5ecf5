"""The planner: from the size of an image to the views that the vision encoder will see.

Nothing here touches a pixel. `plan_slices` is a pure function of two whole numbers and a config, so that a
server can price a request from the image header, and a port to another language can check itself against
`tests/golden/slice_plans.json`. The words, on an image 480 px high and 720 px wide under the default config:

      the image               its plan: grid (2, 3)              one slice, resized
                                                                 to 224 x 224 px
    0           720          +-------+-------+-------+
    +-------------+ 0        |       |       |       |           +-+-+-+-+-+- ... -+
    |             |          | (0,0) | (0,1) | (0,2) |           |1|1|2|2|3|       |
    |             |          |       |       |       |           +-+-+-+-+-+-      |
    |             |   cut    +-------+-------+-------+   fit     |1|1|2|2|3|       |  14 x 14 patches
    |             |  ----->  |       |       |       |  ----->   +-+-+-+-+-+-      |  of 16 px,
    |             |          | (1,0) | (1,1) | (1,2) |           |8|8|9|9|         |  7 x 7 blocks
    +-------------+ 480      |       |       |       |           +-+-+-+-+-        |
                             +-------+-------+-------+           :                 :
                             6 slices of 240 x 240 px            +-----------------+

    and an overview: the whole image, resized to 160 x 256 px.

- A *patch* is one cell of the vision encoder, `patch_size` px a side, and nothing else.
- A *block* is `merge_size` x `merge_size` patches (the cells that bear one number). Views grow by whole
  blocks, and a block becomes one visual token unless `tokens_per_view` fixes their number: the slice above
  costs 49.
- A *view* is a slice or the overview. The overview comes first, then the slices row by row, all with one
  patch grid.
- A plan with the grid (1, 1) has no overview, as its one slice is the whole image already.

The policies, named in `SlicingConfig.policy`, live in `vlmslice.slicing_policies`: `adaptive` is ours, a
search over every grid; `uhd` is the rule of LLaVA-UHD (https://arxiv.org/abs/2403.11703) from which it
descends; `minicpm` is that rule as MiniCPM-V 4.6 computes it; `internvl`, `anyres` (LLaVA-NeXT) and `idefics3` cut
square tiles as these models do; `overlap` shows fixed tiles that share some of the image, `overlap_dedup` too, but
hands each place on once; `pad` (LLaVA-1.5) and `uniform` make one square of the image, by padding and by squashing.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmslice.errors import VlmSliceError, suggestion
from vlmslice.slicing_policies import POLICIES, Canvas


class SlicingError(VlmSliceError, ValueError):
    """A slicing config cannot work, or a plan cannot be made within it."""


@dataclass(frozen=True)
class SlicingConfig:
    """How images are cut.

    Attributes:
        policy: One of `POLICIES`.
        scale_resolution: Side, in px, of the square that the vision encoder was trained on. Under `adaptive`,
            a slice has at most the patches of that square.
        overview_resolution: Side of the square whose area bounds the overview; `None` means
            `scale_resolution`.
        patch_size: Side of a patch in px.
        merge_size: Both sides of every patch grid are multiples of this.
        max_slice_nums: Most slices of a plan, the overview not counted.
        tokens_per_view: Visual tokens of every view, as a resampler with learned queries gives. `None` means
            one for each block of `merge_size` x `merge_size` patches.
        max_visual_tokens: Most visual tokens of a plan. `adaptive` plans within it; the published policies,
            which know no such bound, raise when they would exceed it.
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
        if self.policy not in POLICIES:
            raise SlicingError(_unknown_name("slicing policy", self.policy, POLICIES))
        for name, value in self.to_dict().items():
            optional = name in ("overview_resolution", "tokens_per_view")
            if (
                name != "policy"
                and not (value is None and optional)
                and (type(value) is not int or value < 1)
            ):
                raise SlicingError(f"{name} is {value!r}; expected a whole number of at least 1")
        for name, side in (
            ("scale_resolution", self.scale_resolution),
            ("overview_resolution", self.overview_side),
        ):
            if side < self.block_size:
                raise SlicingError(
                    f"{name} is {side} px, smaller than one block of patch_size * merge_size = {self.block_size} "
                    f"px; raise {name} or lower merge_size"
                )
        least = self.tokens_per_view or 1
        if self.max_visual_tokens < least:
            raise SlicingError(
                f"max_visual_tokens is {self.max_visual_tokens}, but a single view takes {least}; raise "
                f"max_visual_tokens to at least {least} or lower tokens_per_view"
            )

    @property
    def overview_side(self) -> int:
        """`overview_resolution` with its default filled in."""
        return self.scale_resolution if self.overview_resolution is None else self.overview_resolution

    @property
    def block_size(self) -> int:
        """Side, in px, of the block by which views grow."""
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
        names = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in names:
                raise SlicingError(_unknown_name("slicing config field", name, names))
        return cls(**fields)


@dataclass(frozen=True)
class View:
    """A slice or the overview.

    Attributes:
        box: `(top, left, bottom, right)` in pixels of the image; fractions where the image is resized before it is cut,
            and beyond the image where it is padded.
        size: `(height, width)` in px after resizing: `patch_grid` times the patch size.
        patch_grid: Patches `(height, width)`.
        num_visual_tokens: Visual tokens that the language model receives for this view.
        token_box: `(top, left, bottom, right)` of these among the view's blocks, if some are dropped; `None` for all.
        block_size: Side of a block, in px of the view.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    patch_grid: tuple[int, int]
    num_visual_tokens: int
    token_box: tuple[int, int, int, int] | None = None
    block_size: int = 1

    @property
    def received_box(self) -> tuple[float, float, float, float]:
        """The part of `box` whose visual tokens the language model receives."""
        if self.token_box is None:
            return self.box
        top, left, bottom, right = (edge * self.block_size for edge in self.token_box)
        return self.box_to_image((top, left, bottom, right))

    def to_image(self, y: float, x: float) -> tuple[float, float]:
        """Where a point (y, x) of this view, in px of the view, lies in px of the image.

        Of a view of 224 x 224 px that shows the box (240, 0, 480, 240), the middle (112, 112) lies at (360, 120).
        """
        top, left, bottom, right = self.box
        return top + y * (bottom - top) / self.size[0], left + x * (right - left) / self.size[1]

    def to_view(self, y: float, x: float) -> tuple[float, float]:
        """The inverse of `to_image`; points beyond the view have places below zero or above its size."""
        top, left, bottom, right = self.box
        return (y - top) * self.size[0] / (bottom - top), (x - left) * self.size[1] / (right - left)

    def box_to_image(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """Of a box `(top, left, bottom, right)` in px of this view the box in px of the image."""
        return (*self.to_image(*box[:2]), *self.to_image(*box[2:]))

    def box_to_view(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """The inverse of `box_to_image`."""
        return (*self.to_view(*box[:2]), *self.to_view(*box[2:]))

    def to_dict(self) -> dict[str, Any]:
        """The fields, with lists for tuples."""
        return {
            "box": list(self.box),
            "size": list(self.size),
            "patch_grid": list(self.patch_grid),
            "num_visual_tokens": self.num_visual_tokens,
            "token_box": self.token_box and list(self.token_box),
        }


@dataclass(frozen=True)
class SlicePlan:
    """What becomes of one image; see the picture at the top of this file.

    Attributes:
        policy: The policy that made it.
        image_size: `(height, width)` of the image in px.
        grid: `(rows, cols)` of the slices.
        overview: The whole image, reduced; `None` if the grid is (1, 1).
        slices: Row by row.
        num_visual_tokens: Sum over all views.
        reason: Why this grid, in one line for people. Not meant to be parsed.
        canvas: The resized image that slices are cut from; `None` where each slice is cut from the image and resized by
            itself.
        fill: Colour of what is padded: "black", or "mean", which normalises to zero.
    """

    policy: str
    image_size: tuple[int, int]
    grid: tuple[int, int]
    overview: View | None
    slices: tuple[View, ...]
    num_visual_tokens: int
    reason: str
    canvas: Canvas | None = None
    fill: str = "black"

    @property
    def views(self) -> tuple[View, ...]:
        """All views in the order of encoding: the overview, if any, then the slices."""
        return self.slices if self.overview is None else (self.overview, *self.slices)

    @property
    def num_patches(self) -> int:
        """Patches that the vision encoder sees, of all views."""
        return sum(math.prod(view.patch_grid) for view in self.views)

    @property
    def detail(self) -> float:
        """Pixels that show the image, for each of its pixels: below 1 what was lost, above 1 what was blown up.

        Of the slices; what several of them show counts once, and padding does not count.
        """
        height, width = self.image_size
        if self.canvas is not None:
            top, left, bottom, right = self.canvas.image_box
            return (bottom - top) * (right - left) / (height * width)
        shown = sum(math.prod(view.size) for view in self.slices) * (1 - self.padded)
        return shown / (height * width)

    @property
    def padded(self) -> float:
        """Share of the slices' pixels that lie beyond the image."""
        height, width = self.image_size
        total = inside = 0.0
        for top, left, bottom, right in (view.box for view in self.slices):
            total += (bottom - top) * (right - left)
            inside += max(min(bottom, height) - max(top, 0), 0) * max(min(right, width) - max(left, 0), 0)
        return max(1 - inside / total, 0.0)

    @property
    def distortion(self) -> float:
        """By how much the aspect ratio of the slices was changed: 1 for not at all, 2 for 1:1 to 1:2 or 2:1."""
        view_height, view_width = self.slices[0].size
        if self.canvas is not None:
            top, left, bottom, right = self.slices[0].box
            height, width = bottom - top, right - left
        else:
            (tops, lefts), (rows, cols) = self._cuts(), self.grid
            height, width = (tops[-1] - tops[0]) / rows, (lefts[-1] - lefts[0]) / cols
        ratio = (width * view_height) / (height * view_width)
        return max(ratio, 1 / ratio)

    @property
    def canvas_boxes(self) -> tuple[tuple[int, int, int, int], ...]:
        """For each view, `(top, left, bottom, right)` in patches of the canvas that the slices cover.

        With slices of 14 x 14 patches in a grid of (2, 3), the overview covers (0, 0, 28, 42), the first
        slice (0, 0, 14, 14) and the last one (14, 28, 28, 42). Those of `overlap` share patches of the canvas.
        """
        rows, cols = self.grid
        height, width = self.slices[0].patch_grid
        tops, lefts = (
            (self.canvas.tops, self.canvas.lefts)
            if self.canvas is not None
            else ([row * height for row in range(rows)], [col * width for col in range(cols)])
        )
        boxes = [(top, left, top + height, left + width) for top in tops for left in lefts]
        return tuple(boxes) if self.overview is None else ((0, 0, *boxes[-1][2:]), *boxes)

    def to_canvas(self, y: float, x: float) -> tuple[float, float]:
        """Row and column, in patches of the canvas, of a point of the image in px.

        Where the image is cut 2 x 3 into slices of 240 x 240 px of 14 x 14 patches, the point (240, 120) lies at
        (14.0, 7.0). Points outside of the image follow its outermost slices.
        """
        rows, cols = self.slices[0].patch_grid
        if self.canvas is not None:
            top, left, bottom, right = self.canvas.image_box
            high, wide = self._patch_size()
            return (
                (top + y * (bottom - top) / self.image_size[0]) / high,
                (left + x * (right - left) / self.image_size[1]) / wide,
            )
        heights, widths = self._cuts()
        return _piecewise(y, heights, rows), _piecewise(x, widths, cols)

    def to_image(self, row: float, col: float) -> tuple[float, float]:
        """The inverse of `to_canvas`: the point (y, x) in px."""
        rows, cols = self.slices[0].patch_grid
        if self.canvas is not None:
            top, left, bottom, right = self.canvas.image_box
            high, wide = self._patch_size()
            return (
                (row * high - top) * self.image_size[0] / (bottom - top),
                (col * wide - left) * self.image_size[1] / (right - left),
            )
        heights, widths = self._cuts()
        return _piecewise_inverse(row, heights, rows), _piecewise_inverse(col, widths, cols)

    def _cuts(self) -> tuple[list[float], list[float]]:
        """Where the slices begin and end, in px: rows + 1 heights and cols + 1 widths."""
        rows, cols = self.grid
        tops = [self.slices[row * cols].box[0] for row in range(rows)]
        lefts = [view.box[1] for view in self.slices[:cols]]
        return [*tops, self.slices[-1].box[2]], [*lefts, self.slices[-1].box[3]]

    def _patch_size(self) -> tuple[int, int]:
        view = self.slices[0]
        return view.size[0] // view.patch_grid[0], view.size[1] // view.patch_grid[1]

    def to_dict(self) -> dict[str, Any]:
        """The plan in dicts, lists, numbers and strings: equal to itself after a round trip through JSON."""
        return {
            "policy": self.policy,
            "image_size": list(self.image_size),
            "grid": list(self.grid),
            "overview": self.overview and self.overview.to_dict(),
            "slices": [view.to_dict() for view in self.slices],
            "canvas_boxes": [list(box) for box in self.canvas_boxes],
            "image_box": self.canvas and list(self.canvas.image_box),
            "fill": self.fill,
            "num_visual_tokens": self.num_visual_tokens,
            "reason": self.reason,
        }


def plan_slices(height: int, width: int, config: SlicingConfig | None = None) -> SlicePlan:
    """Plans the views of an image from its size alone.

    Under `adaptive`, for every size:

    - each pixel lies in exactly one slice;
    - no view exceeds its patch budget, and no plan `max_visual_tokens`;
    - the aspect ratio of the mean slice, `image_size / grid`, lies within [1/2, 2] if an allowed grid permits
      it, and is the nearest possible otherwise;
    - no side of a view exceeds its source by more than the rounding up to whole blocks;
    - the plan of the transposed image is the transposed plan.

    One more pixel on a side multiplies the visual tokens by at most 2.6, from sides of two blocks on (and by at
    most 2 from four blocks on, under the default config); 449 x 448 px cost the 64 of 448 x 448 where the
    published rules triple them. `tokens_per_view` gives that up, as the first cut then adds two views at least.

    Args:
        height: Of the upright image, in px.
        width: Likewise.
        config: `None` means `SlicingConfig()`.

    Returns:
        The plan. For 480 x 720 px under the default config it has the grid (2, 3) and 6 * 49 + 40 visual
        tokens.

    Raises:
        SlicingError: If a side is below 1 px, or a published policy would exceed `max_visual_tokens`.
    """
    config = _DEFAULT_CONFIG if config is None else config
    if height < 1 or width < 1:
        raise SlicingError(
            f"the image is {height} x {width} px (height x width); expected sides of at least 1 px"
        )
    layout = POLICIES[config.policy](height, width, config)
    boxes = (
        _even_boxes(layout.padded_box or (0, 0, height, width), layout.grid)
        if layout.canvas is None
        else _canvas_boxes(layout.canvas, layout.slice_patches, (height, width), config)
    )
    token_boxes = layout.token_boxes or (None,) * len(boxes)
    slices = tuple(
        _view(box, layout.slice_patches, config, token_box)
        for box, token_box in zip(boxes, token_boxes, strict=True)
    )
    overview = layout.overview_patches and _view((0, 0, height, width), layout.overview_patches, config)
    num_visual_tokens = sum(view.num_visual_tokens for view in slices)
    if overview:
        num_visual_tokens += overview.num_visual_tokens
    if num_visual_tokens > config.max_visual_tokens:
        raise SlicingError(
            f"policy {config.policy!r} needs {num_visual_tokens} visual tokens for an image of {height} x {width} "
            f"px (height x width), but max_visual_tokens is {config.max_visual_tokens}; use policy 'adaptive', "
            "which plans within the bound, or raise max_visual_tokens"
        )
    return SlicePlan(
        config.policy,
        (height, width),
        layout.grid,
        overview,
        slices,
        num_visual_tokens,
        layout.reason,
        layout.canvas,
        layout.fill,
    )


def _even_boxes(
    source: tuple[int, int, int, int], grid: tuple[int, int]
) -> list[tuple[float, float, float, float]]:
    """Slices of equal sides, but for a pixel, row by row."""
    (top, left, bottom, right), (rows, cols) = source, grid
    tops = [top + row * (bottom - top) // rows for row in range(rows + 1)]
    lefts = [left + col * (right - left) // cols for col in range(cols + 1)]
    return [
        (tops[row], lefts[col], tops[row + 1], lefts[col + 1]) for row in range(rows) for col in range(cols)
    ]


def _canvas_boxes(
    canvas: Canvas, slice_patches: tuple[int, int], image_size: tuple[int, int], config: SlicingConfig
) -> list[tuple[float, float, float, float]]:
    """What slices of a canvas show, in px of the image."""

    def edges(start: int, patches: int, first: int, last: int, length: int) -> tuple[float, float]:
        begin, end = start * config.patch_size, (start + patches) * config.patch_size
        return (begin - first) * length / (last - first), (end - first) * length / (last - first)

    (height, width), (top, left, bottom, right) = image_size, canvas.image_box
    down = [edges(start, slice_patches[0], top, bottom, height) for start in canvas.tops]
    along = [edges(start, slice_patches[1], left, right, width) for start in canvas.lefts]
    return [(y[0], x[0], y[1], x[1]) for y in down for x in along]


def _view(
    box: tuple[float, float, float, float],
    patch_grid: tuple[int, int],
    config: SlicingConfig,
    token_box: tuple[int, int, int, int] | None = None,
) -> View:
    high, wide = patch_grid
    blocks_high, blocks_wide = high // config.merge_size, wide // config.merge_size
    if token_box == (0, 0, blocks_high, blocks_wide):
        token_box = None
    if token_box is not None:
        blocks_high, blocks_wide = token_box[2] - token_box[0], token_box[3] - token_box[1]
    size = (high * config.patch_size, wide * config.patch_size)
    num_visual_tokens = config.tokens_per_view or blocks_high * blocks_wide
    return View(box, size, patch_grid, num_visual_tokens, token_box, config.block_size)


def _piecewise(value: float, cuts: list[float], step: int) -> float:
    """`cuts[i]` becomes `i * step`, with straight lines between."""
    piece = min(max(bisect_right(cuts, value) - 1, 0), len(cuts) - 2)
    return (piece + (value - cuts[piece]) / (cuts[piece + 1] - cuts[piece])) * step


def _piecewise_inverse(value: float, cuts: list[float], step: int) -> float:
    piece = min(max(math.floor(value / step), 0), len(cuts) - 2)
    return cuts[piece] + (value / step - piece) * (cuts[piece + 1] - cuts[piece])


def _unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    return f"unknown {kind} {name!r}; expected one of {', '.join(known)}{suggestion(name, known)}"


_DEFAULT_CONFIG = SlicingConfig()
