"""The bundled model with another connector, for the pilots in docs/experiments/connect.md."""

from __future__ import annotations

from recipes.nano import nano
from vlmslice.training import Stage


def nano_pixel_unshuffle() -> list[Stage]:
    """`nano` with the connector `pixel_unshuffle`.

    Command: `python train/train.py --recipe nano_pixel_unshuffle --output-dir runs/nano_pixel_unshuffle`
    Hardware: as `nano`.
    """
    return nano("pixel_unshuffle")
