"""Which process the others wait for, when they wait in vain.

A collective call that times out knows only that somebody did not come. So each process leaves word in the store of the
process group before it does what may take long, and again when it has waited in vain; of those that have not, the one
that was first to stop leaving word is the one to name.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch.distributed as dist

from vlmslice.errors import VlmSliceError

_SIGNS = ("gloo", "nccl", "timeout", "timed out", "connection")
"""Found in what collective calls raise. gloo's are plain RuntimeErrors: "Application timeout caused pair closure"."""

_GRACE = 2.0
"""Seconds in which the other processes may tell that they wait, too."""


class LostProcessError(VlmSliceError, RuntimeError):
    """A process died or stands still, and the others waited for it longer than `ddp_timeout`."""


class Whereabouts:
    """What each process is doing, as far as it has told; does nothing in a run of one process."""

    def __init__(self) -> None:
        self._count = 0

    def tell(self, step: int, doing: str) -> None:
        """Leaves word: "step 7: reads its batch"."""
        if not dist.is_initialized():
            return
        self._count += 1
        word = [self._count, f"step {step}: {doing}", time.time()]
        _store().set(_key(dist.get_rank()), json.dumps(word))

    def explain(self, error: Exception) -> LostProcessError | None:
        """The error to raise for a failed collective call, or None if `error` is not of that kind."""
        text = str(error)
        is_loss = isinstance(error, dist.DistError) or any(sign in text.lower() for sign in _SIGNS)
        if not dist.is_initialized() or not is_loss:
            return None
        # Who waits in vain stands not still. The others' calls fail about when this one did.
        _store().set(_key(dist.get_rank()) + "/waits", "")
        time.sleep(_GRACE)
        words = {}
        silent = []
        suspects = [r for r in range(dist.get_world_size()) if not _store().check([_key(r) + "/waits"])]
        for rank in suspects or range(dist.get_world_size()):
            if _store().check([_key(rank)]):
                words[rank] = json.loads(_store().get(_key(rank)))
            else:
                silent.append(rank)
        last = min((count for count, _, _ in words.values()), default=0)
        behind = silent or [rank for rank, (count, _, _) in words.items() if count == last]
        now = time.time()
        told = [
            f"rank {rank} ({words[rank][1]}, {now - words[rank][2]:.0f} s ago)"
            if rank in words
            else f"rank {rank} (nothing yet)"
            for rank in behind
        ]
        who = "the others wait for" if suspects else "all wait for one another:"
        reason = text.splitlines()[0] if text else type(error).__name__
        return LostProcessError(
            f"rank {dist.get_rank()} lost its connection or waited longer than ddp_timeout; {who} {', '.join(told)}. "
            "If it was only slow, raise ddp_timeout; look at what that rank printed, and give the same command again "
            f"to go on from the last checkpoint ({reason:.200})"
        )


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _key(rank: int) -> str:
    return f"vlmslice/whereabouts/{rank}"
