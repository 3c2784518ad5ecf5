"""How fast this machine multiplies matrices: the measure that the speed of training is a share of."""

from __future__ import annotations

import functools
import time

import torch

_CPU_SIDE = 1024
_ACCELERATOR_SIDE = 8192
_NUM_PRODUCTS = 5


@functools.cache
def matmul_peak(dtype: torch.dtype, device_type: str = "cpu") -> float:
    """FLOP/s of the fastest of some products of square matrices, measured once in a process.

    What else runs on the machine meanwhile makes it lower: 1 thread that shares a core measures half of it.

    Args:
        dtype: of the matrices; for a model under bf16 autocast, `torch.bfloat16`.
        device_type: `"cpu"`, `"cuda"`, ...
    """
    side = _CPU_SIDE if device_type == "cpu" else _ACCELERATOR_SIDE
    matrix = torch.ones(side, side, dtype=dtype, device=device_type)
    product = matrix @ matrix  # the first sets up the kernel
    seconds = []
    for _ in range(_NUM_PRODUCTS):
        _wait_for(device_type)
        start = time.perf_counter()
        torch.mm(matrix, matrix, out=product)
        _wait_for(device_type)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)


def _wait_for(device_type: str) -> None:
    """An accelerator works on while Python goes ahead."""
    if device_type != "cpu":
        torch.accelerator.synchronize()
