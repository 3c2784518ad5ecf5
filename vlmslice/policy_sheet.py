"""Draws what every slicing policy makes of an image, side by side."""

from __future__ import annotations

import math
from dataclasses import replace

from PIL import Image, ImageDraw, ImageFont

from vlmslice.slicing import SlicePlan, SlicingConfig, SlicingError, View, plan_slices
from vlmslice.slicing_policies import POLICIES

_LINE, _FILL = (214, 39, 40), (214, 39, 40, 32)
_INK, _FAINT, _PAPER, _BEYOND = (40, 40, 40), (120, 120, 120), (255, 255, 255), (205, 205, 205)
_GAP, _TEXT_WIDTH, _LEADING = 18, 236, 18
_TILE_AREA, _MIN_SIDE, _MAX_SIDE = 270 * 200, 24, 980  # of the picture in a tile
_WHOLE_SIDES = 72, 130  # of the thumbnail right of the figures, and below them
_MOST_BEYOND = 0.15  # of the longer side, and no more than the shorter: what is drawn of padding
_SHEET_ASPECT = 1.6
_SAMPLE_SIDE = 900

Rectangle = tuple[float, float, float, float]
"""top, left, bottom, right in px."""


def plan_all(height: int, width: int, config: SlicingConfig) -> dict[str, SlicePlan | SlicingError]:
    """The plan of every policy for an image of a size, or why it has none; the policy of `config` does not matter."""
    plans: dict[str, SlicePlan | SlicingError] = {}
    for policy in POLICIES:
        try:
            plans[policy] = plan_slices(height, width, replace(config, policy=policy))
        except SlicingError as error:
            plans[policy] = error
    return plans


def draw_policy_sheet(
    height: int, width: int, config: SlicingConfig, image: Image.Image | None = None
) -> Image.Image:
    """Every policy's slices over the image, its overview, tokens, pixels and distortion.

    Slices are translucent, so where they overlap it is darker; what they show beyond the image, as padding does, is
    grey, and only the beginning of it is drawn. All images are drawn to one scale. A policy that cannot make a plan
    says why instead.

    Args:
        height: Of the image in px.
        width: Likewise.
        config: Bounds and sizes for all policies; its `policy` does not matter.
        image: What to draw under the slices, of any resolution; by default `sample_picture`.

    Returns:
        An RGB picture, about 1000 to 1800 px wide.

    Raises:
        SlicingError: A side is below 1 px.
    """
    if height < 1 or width < 1:
        raise SlicingError(
            f"the image is {height} x {width} px (height x width); expected sides of at least 1 px"
        )
    plans = plan_all(height, width, config)
    shown = sample_picture(height, width) if image is None else image
    bounds = _bounds(height, width, plans)
    canvas_height, canvas_width = bounds[2] - bounds[0], bounds[3] - bounds[1]
    scale = min(
        math.sqrt(_TILE_AREA / (canvas_height * canvas_width)), _MAX_SIDE / max(canvas_height, canvas_width)
    )
    tiles = [_tile(name, plan, shown, (height, width), bounds, scale) for name, plan in plans.items()]
    title = (
        f"{width} x {height} px (width x height), {height * width / 1e6:.2g} megapixels; "
        f"slices of about {config.scale_resolution} px, at most {config.max_visual_tokens} visual tokens"
    )
    return _arrange(title, tiles)


def sample_picture(height: int, width: int) -> Image.Image:
    """A picture for a bare size, at reduced resolution: round discs on squares, on which distortion is seen."""
    scale = min(1.0, _SAMPLE_SIDE / max(height, width))
    rows, cols = max(round(height * scale), 1), max(round(width * scale), 1)
    picture = Image.new("RGB", (cols, rows), (247, 246, 240))
    canvas = ImageDraw.Draw(picture)
    down = max(round(math.sqrt(24 * rows / cols)), 1)
    across = max(round(math.sqrt(24 * cols / rows)), 1)
    high, wide = rows / down, cols / across
    radius = 0.3 * min(high, wide)
    for row in range(down):
        for col in range(across):
            top, left = row * high, col * wide
            if (row + col) % 2:
                canvas.rectangle((left, top, left + wide, top + high), fill=(228, 226, 216))
            y, x = top + high / 2, left + wide / 2
            color = f"hsl({360 * col / across:.0f}, 45%, {45 + 25 * row / down:.0f}%)"
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    return picture


def _bounds(height: int, width: int, plans: dict[str, SlicePlan | SlicingError]) -> Rectangle:
    """What holds the image and every view of it, but no more than a margin beyond the image."""
    boxes: list[Rectangle] = [(0, 0, height, width)]
    boxes += [view.box for plan in plans.values() if isinstance(plan, SlicePlan) for view in plan.views]
    tops, lefts, bottoms, rights = zip(*boxes, strict=True)
    most = min(_MOST_BEYOND * max(height, width), min(height, width))
    return (
        max(min(tops), -most),
        max(min(lefts), -most),
        min(max(bottoms), height + most),
        min(max(rights), width + most),
    )


def _tile(
    name: str,
    plan: SlicePlan | SlicingError,
    shown: Image.Image,
    size: tuple[int, int],
    bounds: Rectangle,
    scale: float,
) -> Image.Image:
    """One policy: its name, the picture with its slices, and beside or below it the whole and what it costs."""
    picture = _draw_slices(plan, shown, size, bounds, scale)
    beside = picture.height > 1.5 * picture.width
    notes = _notes(plan, shown, size, stacked=beside, num_columns=3 if picture.width > 3 * _TEXT_WIDTH else 1)
    if beside:
        tile_size = (picture.width + 12 + notes.width, max(picture.height, notes.height))
        place = (picture.width + 12, 0)
    else:
        tile_size = (max(picture.width, notes.width), picture.height + 8 + notes.height)
        place = (0, picture.height + 8)
    head = 26
    tile = Image.new("RGB", (tile_size[0], head + tile_size[1]), _PAPER)
    ImageDraw.Draw(tile).text((0, 2), name, font=ImageFont.load_default(17), fill=_INK)
    tile.paste(picture, (0, head))
    tile.paste(notes, (place[0], head + place[1]))
    return tile


def _draw_slices(
    plan: SlicePlan | SlicingError,
    shown: Image.Image,
    size: tuple[int, int],
    bounds: Rectangle,
    scale: float,
) -> Image.Image:
    def pixels(box: Rectangle) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) on the canvas, as Pillow has it, the last row and column included."""
        top, left, bottom, right = (round((edge - bounds[axis % 2]) * scale) for axis, edge in enumerate(box))
        return left, top, max(right - 1, left), max(bottom - 1, top)

    _, _, last_x, last_y = pixels(bounds)
    canvas_size = (max(last_x + 1, _MIN_SIDE), max(last_y + 1, _MIN_SIDE))
    canvas = Image.new("RGBA", canvas_size, _PAPER)
    slices = plan.slices if isinstance(plan, SlicePlan) else ()
    for view in slices:
        canvas.paste(_BEYOND, _clip(pixels(view.box), canvas_size))
    left, top, right, bottom = pixels((0, 0, *size))
    # A strip thinner than the canvas is drawn as high as that, as nothing would be seen of it.
    if last_y + 1 < _MIN_SIDE:
        bottom = canvas.height - 1
    if last_x + 1 < _MIN_SIDE:
        right = canvas.width - 1
    image = shown.resize((right - left + 1, bottom - top + 1), Image.Resampling.LANCZOS)
    if isinstance(plan, SlicingError):
        image = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, _PAPER), 0.6)
    canvas.paste(image, (left, top))
    for view in slices:
        box = pixels(view.box)
        if last_y + 1 < _MIN_SIDE:
            box = (box[0], 0, box[2], canvas.height - 1)
        if last_x + 1 < _MIN_SIDE:
            box = (0, box[1], canvas.width - 1, box[3])
        layer = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
        ImageDraw.Draw(layer).rectangle(box, fill=_FILL, outline=(*_LINE, 255))
        canvas.alpha_composite(layer)
    return canvas.convert("RGB")


def _clip(box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) within a canvas, as `paste` has it, the last row and column left out."""
    left, top, right, bottom = box
    return max(left, 0), max(top, 0), min(right + 1, size[0]), min(bottom + 1, size[1])


def _notes(
    plan: SlicePlan | SlicingError,
    shown: Image.Image,
    size: tuple[int, int],
    stacked: bool,
    num_columns: int,
) -> Image.Image:
    """The figures of the plan, and right of them (or below, if stacked) the whole as the vision encoder gets it."""
    font = ImageFont.load_default(13)
    text_width = num_columns * _TEXT_WIDTH
    if isinstance(plan, SlicingError):
        columns = [_wrap(f"no plan: {plan}", font, text_width + (not stacked) * _WHOLE_SIDES[0])]
        small, ink = None, _FAINT
    else:
        lines = describe(plan)
        per_column = len(lines) // num_columns
        columns = [lines[i : i + per_column] for i in range(0, len(lines), per_column)]
        small, ink = _whole(plan.views[0], shown, size, _WHOLE_SIDES[stacked]), _INK
    text_height = max(map(len, columns)) * _LEADING
    height = text_height + 8 + _WHOLE_SIDES[1] if stacked else max(text_height, _WHOLE_SIDES[0] + 4)
    notes = Image.new("RGB", (text_width + (not stacked) * (_WHOLE_SIDES[0] + 8), height), _PAPER)
    canvas = ImageDraw.Draw(notes)
    for number, column in enumerate(columns):
        for row, line in enumerate(column):
            canvas.text((number * _TEXT_WIDTH, row * _LEADING), line, font=font, fill=ink)
    if small is not None:
        notes.paste(small, (0, text_height + 8) if stacked else (text_width + 8, 2))
    return notes


def describe(plan: SlicePlan) -> list[str]:
    """The figures of a plan, a line each: slices, overview, visual tokens, pixels that show the image, distortion."""
    rows, cols = plan.grid
    piece, overview = plan.slices[0], plan.overview
    megapixels = plan.detail * math.prod(plan.image_size) / 1e6
    return [
        f"{rows} x {cols} slices (rows x columns)" if len(plan.slices) > 1 else "one view",
        f"each resized to {piece.size[1]} x {piece.size[0]} px",
        f"overview {overview.size[1]} x {overview.size[0]} px" if overview else "no overview",
        f"{plan.num_visual_tokens:,} visual tokens",
        f"{megapixels:.2g} megapixels, {_percent(plan.detail)} of the image's",
        f"distortion {plan.distortion:.2f}, padded {_percent(plan.padded)}",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 or share == 0 else f"{100 * share:.1g} %"


def _whole(view: View, shown: Image.Image, size: tuple[int, int], longest: int) -> Image.Image:
    """A view of the whole image in the shape in which the vision encoder gets it, its padding grey."""
    top, left, bottom, right = view.box
    scale = min(longest / max(view.size), 1.0)
    high, wide = (max(round(side * scale), 4) for side in view.size)
    small = Image.new("RGB", (wide, high), _BEYOND)
    down, across = high / (bottom - top), wide / (right - left)
    image = shown.resize((max(round(size[1] * across), 1), max(round(size[0] * down), 1)))
    small.paste(image, (round(-left * across), round(-top * down)))
    ImageDraw.Draw(small).rectangle((0, 0, wide - 1, high - 1), outline=_FAINT)
    return small


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _arrange(title: str, tiles: list[Image.Image]) -> Image.Image:
    """Tiles in rows, as many in each as make the sheet about 16:10."""
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)

    def misfit(cols: int) -> float:
        rows = math.ceil(len(tiles) / cols)
        aspect = (cols * (width + _GAP)) / (rows * (height + _GAP))
        return abs(math.log(aspect / _SHEET_ASPECT)) + 0.2 * (cols * rows - len(tiles))

    cols = min(range(1, len(tiles) + 1), key=misfit)
    rows = math.ceil(len(tiles) / cols)
    head, font = 34, ImageFont.load_default(15)
    sheet_width = max(cols * (width + _GAP) + _GAP, round(font.getlength(title)) + 2 * _GAP)
    sheet = Image.new("RGB", (sheet_width, head + rows * (height + _GAP) + _GAP), _PAPER)
    ImageDraw.Draw(sheet).text((_GAP, 12), title, font=font, fill=_INK)
    for number, tile in enumerate(tiles):
        row, col = divmod(number, cols)
        sheet.paste(tile, (_GAP + col * (width + _GAP), head + _GAP + row * (height + _GAP)))
    return sheet
