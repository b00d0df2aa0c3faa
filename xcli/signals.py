"""SIGINT and SIGTERM as exceptions, so that every block on the way out is closed; held back where that must wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from xcli.errors import Interrupted


@dataclass
class Signals:
    """What SIGINT and SIGTERM do: raise ``Interrupted`` at once, or after a block that must not be left half-way."""

    waiting: bool = False
    caught: int | None = None

    def stop(self, signum: int, _frame: FrameType | None) -> None:
        """The handler. A second signal ends the process at once."""
        signal.signal(signum, signal.SIG_DFL)
        if not self.waiting:
            raise Interrupted(signum)
        self.caught = signum

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block finish first: an exception in the middle of an HDF5 call would corrupt its state."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False
        if self.caught is not None:
            raise Interrupted(self.caught)


@contextmanager
def interruptible() -> Iterator[Signals]:
    """SIGINT and SIGTERM raise ``Interrupted`` in here; the part that was being made is lost, nothing else."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
