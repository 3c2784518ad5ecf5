"""The line before the one model: whoever asks takes a turn, and turns run one after the other.

The model fills all cores, so two answers at once would take twice as long each. A turn knows how many are before it,
collects what its work says, and can be stopped at any time: while it waits at once, while it runs after its next token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Generic, TypeVar

from vlmslice.errors import VlmSliceError

Result = TypeVar("Result")


class LineFullError(VlmSliceError):
    """Too many are waiting."""


class StoppedError(VlmSliceError):
    """The turn was stopped before it began."""


class Turn(Generic[Result]):
    """One piece of work for the model; made by `Line.join`."""

    def __init__(self, line: Line):
        self._line = line
        self._stop = threading.Event()
        self._pieces: list[str] = []
        self._future: Future[Result]

    @property
    def num_before(self) -> int:
        """Turns before this one: 0 while it runs and afterwards."""
        return self._line._num_before(self)

    @property
    def text(self) -> str:
        """What was said until now."""
        return "".join(self._pieces)

    @property
    def stopped(self) -> bool:
        """Whether someone told it to stop."""
        return self._stop.is_set()

    def say(self, piece: str) -> None:
        """Adds to `text`; called by the work."""
        self._pieces.append(piece)

    def stop(self) -> None:
        """Takes it out of the line or, if it runs, tells its work through `stopped`; harmless afterwards."""
        self._stop.set()
        self._future.cancel()

    def follow(self, seconds: float = 0.1) -> Iterator[None]:
        """Yields every `seconds` until the work is done or dropped. Whoever leaves earlier stops it."""
        try:
            while True:
                try:
                    self._future.exception(timeout=seconds)
                except FutureTimeout:
                    yield
                    continue
                except CancelledError:
                    pass
                return
        finally:
            if not self._future.done():
                self.stop()

    def result(self) -> Result:
        """What the work returned; waits for it.

        Raises:
            StoppedError: It was stopped before it began.
            Exception: Whatever the work raised.
        """
        try:
            return self._future.result()
        except CancelledError:
            raise StoppedError("stopped while it waited; ask again") from None


class Line:
    """Runs the work of its turns in one thread, first come, first served.

    Args:
        max_length: Most turns at a time, the running one included.
    """

    def __init__(self, max_length: int = 16):
        self.max_length = max_length
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vlmslice-model")
        self._turns: list[Turn] = []
        self._lock = threading.Lock()

    def join(self, work: Callable[[Turn[Result]], Result]) -> Turn[Result]:
        """A turn for `work`, which is called with it.

        Raises:
            LineFullError: `max_length` turns are there already.
        """
        turn: Turn[Result] = Turn(self)
        with self._lock:
            if len(self._turns) >= self.max_length:
                raise LineFullError(
                    f"{len(self._turns)} questions are waiting for the model, as many as may; try again in a minute"
                )
            self._turns.append(turn)
            turn._future = self._executor.submit(work, turn)
        turn._future.add_done_callback(lambda _: self._leave(turn))
        return turn

    def close(self) -> None:
        """Stops all turns and waits for the running one to end."""
        with self._lock:
            turns = list(self._turns)
        for turn in turns:
            turn.stop()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _leave(self, turn: Turn) -> None:
        with self._lock:
            self._turns.remove(turn)

    def _num_before(self, turn: Turn) -> int:
        with self._lock:
            return self._turns.index(turn) if turn in self._turns else 0
