"""SIGINT, SIGTERM and SIGHUP as exceptions, so that blocks are closed on the way out; or held back to their end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from xcli.errors import Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Asked to stop: by the keyboard, by the system, by the end of the session (a terminal that is closed)."""


class Stopped(BaseException):
    """A signal has come. No library takes this for an error of its own, as it would take an ``Exception``."""


@dataclass
class Signals:
    """What a signal does in a block: raise at once, or be remembered where the block must not be left half-way."""

    waits: bool
    caught: int | None = None

    def stop(self, signum: int, _frame: FrameType | None) -> None:
        """The handler. A second SIGINT or SIGTERM ends the process at once; SIGHUP comes twice when a shell ends."""
        for number in STOPPING:
            if signal.getsignal(number) == self.stop:
                signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
        self.caught = signum
        if not self.waits:
            raise Stopped


@contextmanager
def interruptible(*, at_end: bool = False) -> Iterator[None]:
    """Signals end this block with ``Interrupted``, whatever else they lead to in it: what was being made is lost,
    nothing else. A signal that is ignored stays so (``nohup``, a job in the background of a script).

    Args:
        at_end: let the block finish first: an exception in the middle of an HDF5 call would corrupt its state.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = Signals(at_end)
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):  # None: set by other code than Python's
            signal.signal(number, signals.stop)
    try:
        yield
    except Stopped:
        if signals.caught is None:  # that of a block around this one
            raise
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        if signals.caught is not None:
            raise Interrupted(signals.caught) from None
