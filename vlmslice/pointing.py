"""Points in answers, as ids: pairs of location tokens, row and column of a patch of the canvas (see `spatial_schema`).

Legend: B samples, L ids.
"""

from __future__ import annotations

import torch

from vlmslice.spatial_schema import LOCATION_TOKENS

NOWHERE = -1
"""Row and column where there was no point yet."""


def last_points(
    input_ids: torch.Tensor, first_location_id: int, samples: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The point last completed at or before each id, within an unbroken run of location tokens.

    Args:
        input_ids: `int64[B, L]`.
        first_location_id: id of the first of `LOCATION_TOKENS`; the others follow it.
        samples: `int64[B, L]`, see `packed_rows`; no run goes on in the next sample of a row.

    Returns:
        `int64[B, L, 3]`: its row and column, and the row of the next point if only that is told yet; `NOWHERE` at ids
        without one. None if no id is a location token.

    Example: of `a <|2|><|5|><|2|><|9|> 2` the rows are `-1, -1, 2, 2, 2, -1`, the columns `-1, -1, 5, 5, 9, -1`, and
    the rows told `-1, 2, -1, 2, -1, -1`.
    """
    numbers_BL = input_ids - first_location_id
    is_location_BL = (numbers_BL >= 0) & (numbers_BL < len(LOCATION_TOKENS))
    if not is_location_BL.any():
        return None
    count_BL = is_location_BL.cumsum(dim=1)
    before_run_BL = count_BL.masked_fill(is_location_BL, 0)
    if samples is not None:
        begins_BL = samples.diff(prepend=samples[:, :1] - 1) != 0
        before_run_BL = before_run_BL.where(~begins_BL, count_BL - is_location_BL.long())
    before_run_BL = before_run_BL.cummax(dim=1).values
    length_BL = (count_BL - before_run_BL) * is_location_BL  # of the run so far
    has_point_BL = length_BL >= 2
    column_BL = torch.arange(input_ids.shape[1], device=input_ids.device) - length_BL % 2
    rows_BL, cols_BL = (
        numbers_BL.gather(1, (column_BL - back).clamp_min(0)).where(has_point_BL, NOWHERE) for back in (1, 0)
    )
    told_BL = numbers_BL.where(length_BL % 2 == 1, NOWHERE)
    return torch.stack([rows_BL, cols_BL, told_BL], dim=-1)
