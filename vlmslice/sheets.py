"""The maps of patches on which convolutions run: slices that tile an image lie side by side.

Legend: V views, T patches per view (padded), N images.

So a glyph or a shape that a seam cuts is seen whole. Slices that share some of the image (policy `overlap`) have no
such map, as two patches would lie in one place: each is a map by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sheet(NamedTuple):
    """A map of patches.

    Attributes:
        patches: `int64[height, width]`, indices into the V * T patches.
        image: which of the N images it shows.
        is_overview: whether it is the overview of it.
        corner: row and column of its first patch on the canvas.
        canvas: patches (height, width) of the canvas.
    """

    patches: torch.Tensor
    image: int
    is_overview: bool
    corner: tuple[int, int]
    canvas: tuple[int, int]


def lay_out_sheets(
    target_sizes: torch.Tensor,
    num_patches: int,
    canvas_boxes: torch.Tensor | None = None,
    num_views: torch.Tensor | None = None,
) -> list[Sheet]:
    """Puts every patch on one sheet.

    An overview is a sheet of its own, before that of its slices; without `canvas_boxes`, so is every view.

    Args:
        target_sizes: `int64[V, 2]` patch grids.
        num_patches: T.
        canvas_boxes: `int64[V, 4]`, see `view_packing.PackedViews`.
        num_views: `int64[N]`, as well.

    Example: an overview of (1, 1) patch and slices of (1, 2) and (1, 2) beside each other, T = 2, give the patches
    `[[0]]` and `[[2, 3, 4, 5]]`.
    """
    device = target_sizes.device
    grids = [tuple(grid) for grid in target_sizes.tolist()]
    own = [
        torch.arange(height * width, device=device).view(height, width) + view * num_patches
        for view, (height, width) in enumerate(grids)
    ]
    if canvas_boxes is None or num_views is None:
        return [
            Sheet(patches, view, False, (0, 0), grid)
            for view, (patches, grid) in enumerate(zip(own, grids, strict=True))
        ]
    sheets, first = [], 0
    is_overview, boxes = find_overviews(canvas_boxes, num_views).tolist(), canvas_boxes.tolist()
    for image, number in enumerate(num_views.tolist()):
        slices = range(first + is_overview[first], first + number)
        tops, lefts, bottoms, rights = zip(*(boxes[view] for view in slices), strict=True)
        canvas = (max(bottoms) - min(tops), max(rights) - min(lefts))
        if is_overview[first]:
            sheets.append(Sheet(own[first], image, True, (0, 0), canvas))
        corners = [(top - min(tops), left - min(lefts)) for top, left in zip(tops, lefts, strict=True)]
        if sum(own[view].numel() for view in slices) == canvas[0] * canvas[1]:
            sheet = own[first].new_zeros(canvas)
            for view, (row, col) in zip(slices, corners, strict=True):
                sheet[row : row + grids[view][0], col : col + grids[view][1]] = own[view]
            sheets.append(Sheet(sheet, image, False, (0, 0), canvas))
        else:
            sheets += [
                Sheet(own[view], image, False, corner, canvas)
                for view, corner in zip(slices, corners, strict=True)
            ]
        first += number
    return sheets


def find_overviews(canvas_boxes: torch.Tensor, num_views: torch.Tensor) -> torch.Tensor:
    """`bool[V]`: True for the first view of an image where it covers more of the canvas than the next one.

    Args:
        canvas_boxes: `int64[V, 4]`.
        num_views: `int64[N]`.
    """
    areas_V = (canvas_boxes[:, 2:] - canvas_boxes[:, :2]).prod(dim=1)
    first = (num_views.cumsum(0) - num_views)[num_views > 1]
    is_overview_V = torch.zeros_like(areas_V, dtype=torch.bool)
    is_overview_V[first] = areas_V[first] > areas_V[first + 1]
    return is_overview_V
