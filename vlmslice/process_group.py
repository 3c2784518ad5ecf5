"""What the processes of one training run must agree on."""

from __future__ import annotations

import torch
import torch.distributed as dist


def average_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The mean of `values` over all processes while they train together; else `values` itself.

    A loss divided by it, averaged over the processes, is the loss of one process with all samples.
    """
    if torch.is_grad_enabled() and dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def leave_process_group() -> None:
    """Waits for the other processes, then parts from them; one that ends without it may be aborted at its exit."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
