"""A polite end: at SIGTERM or SIGINT the processes agree on a step, save once, and leave with their own exit code."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from vlmslice.errors import VlmSliceError

EXIT_INTERRUPTED = os.EX_TEMPFAIL
"""75, "temporary failure, try again" of sysexits.h: the same command goes on."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(VlmSliceError):
    """A stage was stopped by a signal, after a checkpoint was saved."""


class SignalStop(TrainerCallback):
    """Ends training after the step in which any process got a signal, with a checkpoint.

    Used as a context manager: handlers are installed on entering and restored on leaving. A second signal changes
    nothing, for a save is under way; `kill -9` is always safe.

    Attributes:
        requested: the signal that this process got, or None.
        agreed: True once all processes know that one of them did.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self.agreed = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalStop:
        for number in _SIGNALS:
            # What is ignored (SIGINT under nohup or in a background job) stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number)

    def on_step_end(self, args, state, control, **kwargs):
        flag = torch.tensor(int(self.requested is not None), device=args.device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item():
            self.agreed = True
            control.should_save = True
            control.should_training_stop = True
        return control
