"""The bundled model with another connector, for the pilots in docs/experiments/connect.md."""

from __future__ import annotations

import dataclasses

from recipes.nano import SLICING, nano
from vlmslice.training import Stage


def nano_resampler() -> list[Stage]:
    """`nano` with the connector `resampler`, 16 visual tokens a view.

    Command: `python train/train.py --recipe nano_resampler --output-dir runs/nano_resampler`
    Hardware: as `nano`.
    """
    return nano("resampler", dataclasses.replace(SLICING, tokens_per_view=16))
