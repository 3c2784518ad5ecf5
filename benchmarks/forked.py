"""Runs of training in processes of their own, forked from one that has imported everything: no start-up of 10 s each.

The forking process must not have computed anything with torch before (threads do not survive a fork).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def preload() -> None:
    """Imports what training imports, DeepSpeed included."""
    import deepspeed  # noqa: F401  (imported by transformers only once it is needed)

    import vlmslice.training  # noqa: F401


def start(function: Callable[[], None], log: Path, rank: int = 0, world_size: int = 1, port: int = 0) -> int:
    """Forks a process that calls `function`, and returns its id.

    Several get the environment in which torchrun would start them. An error ends the process with code 1; its text and
    all output go to the end of `log`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if world_size > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(children: list[int], seconds: float) -> list[int]:
    """Exit codes, `-signal` for a process that was killed; those left after `seconds`, or once one fails, are."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline or any(codes.values()):
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
                codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.01)
    return [codes[child] for child in children]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
