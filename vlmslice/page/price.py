"""What an image will cost, before anyone asks: its plan as markup, from its size alone."""

from __future__ import annotations

import dataclasses
import html
from pathlib import Path

from vlmslice.errors import VlmSliceError
from vlmslice.image_loading import read_image_size
from vlmslice.page.sentences import error_sentence
from vlmslice.slicing import SlicePlan, SlicingConfig, SlicingError, plan_slices
from vlmslice.slicing_policies import POLICIES

NO_IMAGE = '<p class="vs-quiet">With an image, its slices and their price appear here.</p>'


def price_markup(
    upload: str | Path | None, policy: str, max_visual_tokens: int, config: SlicingConfig
) -> str:
    """The plan of an uploaded image, drawn and in numbers, beside those of the other policies.

    Only the header of the file is read. What cannot be planned becomes a sentence.

    Args:
        upload: The image file, if there is one.
        policy: Slicing policy that is chosen.
        max_visual_tokens: Token budget that is chosen.
        config: How the model slices otherwise.
    """
    if upload is None:
        return NO_IMAGE
    config = dataclasses.replace(config, max_visual_tokens=max_visual_tokens)
    try:
        height, width = read_image_size(upload)
    except VlmSliceError as error:
        return notice(error_sentence(error, upload))
    try:
        plan = plan_slices(height, width, dataclasses.replace(config, policy=policy))
    except SlicingError as error:
        chosen = notice(error_sentence(error))
    else:
        chosen = _describe(plan)
    return chosen + _compare(height, width, config, policy)


def notice(sentence: str) -> str:
    """An error as the page shows it."""
    return f'<p class="vs-notice" role="alert">{html.escape(sentence)}</p>'


def _describe(plan: SlicePlan) -> str:
    (height, width), (rows, cols) = plan.image_size, plan.grid
    numbers = [
        (f"{plan.num_visual_tokens:,}", "visual tokens"),
        (f"{rows} × {cols}", "slices" if plan.overview is None else "slices + overview"),
        (f"{height} × {width}", "px, height × width"),
    ]
    cells = "".join(f"<div><dt>{label}</dt><dd>{number}</dd></div>" for number, label in numbers)
    return f'<div class="vs-price">{_draw(plan)}<dl>{cells}</dl></div>'


def _draw(plan: SlicePlan) -> str:
    """The boxes of the slices over the outline of the image; they may overlap or reach beyond it."""
    boxes = [view.box for view in plan.slices]
    height, width = plan.image_size
    top, left = min(0, *(box[0] for box in boxes)), min(0, *(box[1] for box in boxes))
    bottom, right = max(height, *(box[2] for box in boxes)), max(width, *(box[3] for box in boxes))
    edge = 0.02 * max(bottom - top, right - left)
    shapes = "".join(
        f'<rect class="vs-slice" x="{box[1]:g}" y="{box[0]:g}" '
        f'width="{box[3] - box[1]:g}" height="{box[2] - box[0]:g}"/>'
        for box in boxes
    )
    return (
        f'<svg role="img" aria-label="The slices over the image" viewBox="{left - edge:g} {top - edge:g} '
        f'{right - left + 2 * edge:g} {bottom - top + 2 * edge:g}">'
        f'<rect class="vs-outline" width="{width}" height="{height}"/>{shapes}</svg>'
    )


def _compare(height: int, width: int, config: SlicingConfig, chosen: str) -> str:
    rows = []
    for policy in POLICIES:
        try:
            plan = plan_slices(height, width, dataclasses.replace(config, policy=policy))
        except SlicingError:
            cells = '<td colspan="5">over the budget</td>'
        else:
            cells = (
                f"<td>{plan.grid[0]} × {plan.grid[1]}</td><td>{plan.num_visual_tokens:,}</td>"
                f"<td>{plan.detail:.2g}</td><td>{plan.padded:.0%}</td>"
                f"<td>{plan.distortion:.2f}</td>"
            )
        mark = ' class="vs-chosen"' if policy == chosen else ""
        rows.append(f'<tr{mark}><th scope="row">{html.escape(policy)}</th>{cells}</tr>')
    head = "".join(
        f'<th scope="col" title="{title}">{name}</th>'
        for name, title in (
            ("policy", "Rule by which the image is cut"),
            ("grid", "Rows × columns of slices"),
            ("tokens", "Visual tokens of all views"),
            ("detail", "Pixels that show the image, for each of its pixels"),
            ("padded", "Share of the slices that lies beyond the image"),
            ("distortion", "By how much the aspect ratio was changed; 1 is not at all"),
        )
    )
    return (
        '<details class="vs-compare"><summary>All policies on this image</summary>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></details>"
    )
