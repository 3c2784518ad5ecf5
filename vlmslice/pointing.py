"""Points in answers, as ids: pairs of location tokens, row and column of a patch of the canvas (see `spatial_schema`).

Legend: B samples, L ids.
"""

from __future__ import annotations

import torch

from vlmslice.spatial_schema import LOCATION_TOKENS

NOWHERE = -1
"""Row and column where there was no point yet."""


def last_points(input_ids: torch.Tensor, first_location_id: int) -> torch.Tensor | None:
    """The point last completed at or before each id, within an unbroken run of location tokens.

    Args:
        input_ids: `int64[B, L]`.
        first_location_id: id of the first of `LOCATION_TOKENS`; the others follow it.

    Returns:
        `int64[B, L, 2]` rows and columns, `NOWHERE` at ids without one; None if no id has one.

    Example: of `a <|2|><|5|><|2|><|9|> 2` the rows are `-1, -1, 2, 2, 2, -1` and the columns `-1, -1, 5, 5, 9, -1`.
    """
    numbers_BL = input_ids - first_location_id
    is_location_BL = (numbers_BL >= 0) & (numbers_BL < len(LOCATION_TOKENS))
    if not is_location_BL.any():
        return None
    count_BL = is_location_BL.cumsum(dim=1)
    before_run_BL = count_BL.masked_fill(is_location_BL, 0).cummax(dim=1).values
    length_BL = (count_BL - before_run_BL) * is_location_BL  # of the run so far
    has_point_BL = length_BL >= 2
    if not has_point_BL.any():
        return None
    column_BL = torch.arange(input_ids.shape[1], device=input_ids.device) - length_BL % 2
    points_BL2 = numbers_BL.unsqueeze(-1).new_full((*numbers_BL.shape, 2), NOWHERE)
    rows_BL, cols_BL = (numbers_BL.gather(1, (column_BL - back).clamp_min(0)) for back in (1, 0))
    points_BL2[has_point_BL] = torch.stack([rows_BL, cols_BL], dim=-1)[has_point_BL]
    return points_BL2
