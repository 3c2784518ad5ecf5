"""Draws a slice plan over its image: what the model looked at, for people."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from vlmslice.slicing import SlicePlan, View

_LINE = (214, 39, 40)
_POINT = (31, 119, 180)
_INK = (40, 40, 40)
_PAPER = (255, 255, 255)
_FRAME = (200, 200, 200)
_MARGIN = 16
_MIN_SIDE, _MAX_SIDE = 480, 1600  # of the drawn image's longer side


def draw_plan(image: Image.Image, plan: SlicePlan, points: Sequence[tuple[float, float]] = ()) -> Image.Image:
    """The image with the grid of its slices, numbered in the order in which the model reads them, and the overview.

    The overview stands below a wide image and beside a tall one, in the pixels that the vision encoder gets. The image
    itself is scaled to between 480 and 1600 px, so that a line of text remains legible and a photo fits a screen.

    Args:
        image: As `load_image` returns it.
        plan: Of this image.
        points: (y, x) in px of the image, shown as dots; see `Answer.points`.

    Raises:
        ValueError: The plan is for an image of another size.
    """
    if plan.image_size != (image.height, image.width):
        raise ValueError(
            f"the plan is for an image of {plan.image_size[0]} x {plan.image_size[1]} px (height x width), got one of "
            f"{image.height} x {image.width}; plan the image that is drawn"
        )
    overlay = _draw_grid(image, plan)
    _draw_points(overlay, points, overlay.height / image.height, overlay.width / image.width)
    panels = [(_describe_slices(plan), overlay)]
    if plan.overview is not None:
        height, width = plan.overview.size
        small = image.resize((width, height), Image.Resampling.BICUBIC)
        ImageDraw.Draw(small).rectangle((0, 0, width - 1, height - 1), outline=_FRAME)
        panels.append((f"overview\n{_describe_view(plan.overview)}", small))
    return _arrange(panels, side_by_side=image.height > image.width)


def _draw_grid(image: Image.Image, plan: SlicePlan) -> Image.Image:
    longest = max(image.size)
    scale = min(max(longest, _MIN_SIDE), _MAX_SIDE) / longest
    width, height = (max(round(side * scale), 1) for side in image.size)
    drawn = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas = ImageDraw.Draw(drawn)
    cell = min(height / plan.grid[0], width / plan.grid[1])
    font = ImageFont.load_default(12)
    for number, view in enumerate(plan.slices, start=1):
        top, left, bottom, right = (round(edge * scale) for edge in view.box)
        box = (left, top, max(right - 1, left), max(bottom - 1, top))
        canvas.rectangle(box, outline=_LINE, width=2)
        if cell >= 24 and len(plan.slices) > 1:
            text_left, text_top, text_right, text_bottom = canvas.textbbox(
                (left + 5, top + 3), str(number), font=font
            )
            canvas.rectangle((text_left - 4, text_top - 3, text_right + 3, text_bottom + 2), fill=_LINE)
            canvas.text((left + 5, top + 3), str(number), font=font, fill=_PAPER)
    return drawn


def _draw_points(
    overlay: Image.Image, points: Sequence[tuple[float, float]], scale_y: float, scale_x: float
) -> None:
    canvas = ImageDraw.Draw(overlay)
    for y, x in points:
        center, radius = (x * scale_x, y * scale_y), 6
        box = [center[0] - radius, center[1] - radius, center[0] + radius, center[1] + radius]
        canvas.ellipse(box, fill=_POINT, outline=_PAPER, width=2)


def _describe_slices(plan: SlicePlan) -> str:
    if plan.overview is None:
        return f"one view\n{_describe_view(plan.slices[0])}"
    rows, cols = plan.grid
    return f"{rows} x {cols} slices (rows x columns)\neach {_describe_view(plan.slices[0])}"


def _describe_view(view: View) -> str:
    return f"{view.size[0]} x {view.size[1]} px (height x width), {view.num_visual_tokens} visual tokens"


def _arrange(panels: list[tuple[str, Image.Image]], side_by_side: bool) -> Image.Image:
    """Panels with their captions above them, on white."""
    font = ImageFont.load_default(15)
    caption_height = 44  # two lines
    sizes = [
        (
            caption_height + panel.height,
            max(panel.width, *(int(font.getlength(line)) + 1 for line in caption.split("\n"))),
        )
        for caption, panel in panels
    ]
    heights, widths = zip(*sizes, strict=True)
    gaps = _MARGIN * (len(panels) + 1)
    if side_by_side:
        size = (sum(widths) + gaps, max(heights) + 2 * _MARGIN)
    else:
        size = (max(widths) + 2 * _MARGIN, sum(heights) + gaps)
    picture = Image.new("RGB", size, _PAPER)
    canvas = ImageDraw.Draw(picture)
    left = top = _MARGIN
    for (caption, panel), (height, width) in zip(panels, sizes, strict=True):
        canvas.text((left, top), caption, font=font, fill=_INK)
        picture.paste(panel, (left, top + caption_height))
        if side_by_side:
            left += width + _MARGIN
        else:
            top += height + _MARGIN
    return picture
