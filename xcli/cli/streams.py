"""Standard streams that an unattended run survives: closed, full, or with nobody at the other end."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from xcli.errors import OutputUnwritable


def steady() -> None:
    """Make standard output and standard error such that a run never ends for want of a listener.

    What is closed is opened on the null device, lest a file of the run takes its place and is written into. Messages
    that cannot be written are dropped; results that cannot be written (``--json``) are an error with words.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", closefd=False))
    sys.stdout = rewrapped(sys.stdout, Results)
    sys.stderr = rewrapped(sys.stderr, Messages)


def rewrapped(stream: TextIO, kind: type[io.TextIOWrapper]) -> TextIO:
    """The same stream as a ``kind``; as it is where it is no plain one."""
    if type(stream) is not io.TextIOWrapper:
        return stream
    stream.flush()
    how = stream.encoding, stream.errors, None, stream.line_buffering, stream.write_through
    return kind(stream.detach(), *how)


def silence(stream: io.TextIOWrapper) -> None:
    """What is still to be written to the stream goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class Messages(io.TextIOWrapper):
    """Standard error."""

    def write(self, text: str, /) -> int:
        """Write the text if that is possible."""
        try:
            return super().write(text)
        except OSError:
            silence(self)
            return len(text)

    def flush(self) -> None:
        """Hand on what was written if that is possible."""
        try:
            super().flush()
        except OSError:
            silence(self)


class Results(io.TextIOWrapper):
    """Standard output. Raises ``BrokenPipeError`` where nobody reads any more, else ``OutputUnwritable``."""

    def write(self, text: str, /) -> int:
        """Write the text."""
        try:
            return super().write(text)
        except OSError as error:
            raise self.failed(error) from error

    def flush(self) -> None:
        """Hand on what was written."""
        try:
            super().flush()
        except OSError as error:
            raise self.failed(error) from error

    def failed(self, error: OSError) -> Exception:
        """The error to raise; nothing more is written."""
        silence(self)
        if isinstance(error, BrokenPipeError):
            return error
        return OutputUnwritable(
            f"cannot write to standard output: {error.strerror}; what a run wrote to its folder is complete"
        )
