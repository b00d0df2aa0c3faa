"""What a run tells while it goes on, always on standard error: a live bar and plain text on a terminal, elsewhere one
line an event with time and level, as in a log.

Events are those of the module ``logging``: problems are warnings, decisions (``--verbose``) debugging.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from datetime import datetime
from functools import cache
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from xcli.durable import shown

LOG = logging.getLogger(__name__)
EVERY = 10.0
"""Seconds between two events of a bar that nobody sees."""


class Reporter(Protocol):
    """Counts the images of a run; used as a context manager around them."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def start(self, total: int, done: int, doing: str = "explaining") -> None:
        """``total`` images, ``done`` of them in an earlier run."""

    def advance(self, images: int, failed: int) -> None:
        """So many more images are through, so many of them failed."""


class Quiet:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def start(self, total: int, done: int, doing: str = "explaining") -> None: ...
    def advance(self, images: int, failed: int) -> None: ...


class Events(Quiet):
    """An event every ten seconds, for logs."""

    def __init__(self) -> None:
        self.total = self.done = self.first = self.failed = 0
        self.began = self.said = time.monotonic()

    def start(self, total: int, done: int, doing: str = "explaining") -> None:
        self.total, self.done, self.first = total, done, done
        self.began = self.said = time.monotonic()

    def advance(self, images: int, failed: int) -> None:
        self.done += images
        self.failed += failed
        now = time.monotonic()
        if now - self.said >= EVERY or self.done == self.total:
            self.said = now
            rate = (self.done - self.first) / max(now - self.began, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            LOG.info(
                "%d/%d images, %.1f/s, %.0f s left, %d failed", self.done, self.total, rate, left, self.failed
            )


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "- images/s", style="cyan")


class LiveBar(Quiet):
    """A bar with images/s, the time left and the failures, for a terminal."""

    def __init__(self) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("[red]{task.fields[failed]}"),
            console=terminal(),
            transient=True,
        )
        self.failed = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def start(self, total: int, done: int, doing: str = "explaining") -> None:
        self.task = self.progress.add_task(doing, total=total, completed=done, failed="")
        self.progress.start()

    def advance(self, images: int, failed: int) -> None:
        self.failed += failed
        self.progress.update(self.task, advance=images, failed=f"{self.failed} failed" if self.failed else "")


@cache
def terminal() -> Console:
    """Standard error, shared by the bar and the events that are printed above it."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def reporter(*, quiet: bool) -> Reporter:
    """The one that fits: silent, a live bar on a terminal, events elsewhere."""
    if quiet:
        return Quiet()
    return LiveBar() if sys.stderr.isatty() else Events()


# --- events --------------------------------------------------------------------------------------------------


class OnTerminal(logging.Handler):
    """Prints events as they are, problems in colour."""

    def emit(self, record: logging.LogRecord) -> None:
        warned = record.levelno >= logging.WARNING
        text = Text(shown(record.getMessage()), style="yellow" if warned else "")
        terminal().print(text, soft_wrap=True)


class InLog(logging.Formatter):
    """One line an event: time, level, text."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{stamp(record.created, record.levelname)} {shown(record.getMessage())}"


def stamp(seconds: float, level: str) -> str:
    """How a line of a log begins."""
    return f"{datetime.fromtimestamp(seconds).astimezone().isoformat(timespec='seconds')} {level}"


def listen(*, quiet: bool = False, verbose: bool = False) -> None:
    """Print what the package and its libraries have to say on standard error: events, problems alone where ``quiet``,
    decisions too where ``verbose``."""
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    handler = OnTerminal() if sys.stderr.isatty() else logging.StreamHandler(sys.stderr)
    if not sys.stderr.isatty():
        handler.setFormatter(InLog())
    warnings.formatwarning = lambda message, category, *_, **__: f"{category.__name__}: {message}"
    logging.captureWarnings(True)
    for name, least in (("xcli", level), ("py.warnings", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
