"""What a run tells while it goes on: a live bar on a terminal, dated plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from datetime import datetime
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

EVERY = 10.0
"""Seconds between two plain lines."""


class Reporter(Protocol):
    """Listens to a run; used as a context manager around the images."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def say(self, text: str) -> None:
        """One line about what happens."""

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

    def say(self, text: str) -> None: ...
    def start(self, total: int, done: int, doing: str = "explaining") -> None: ...
    def advance(self, images: int, failed: int) -> None: ...


class PlainLines(Quiet):
    """One dated line when something happens and every ten seconds, for logs."""

    def __init__(self) -> None:
        self.total = self.done = self.first = self.failed = 0
        self.began = self.said = time.monotonic()

    def say(self, text: str) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        print(f"{now} {text}", file=sys.stderr, flush=True)

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
            self.say(
                f"{self.done}/{self.total} images, {rate:.1f}/s, {left:.0f} s left, {self.failed} failed"
            )


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "- images/s", style="cyan")


class LiveBar(Quiet):
    """A bar with images/s, the time left and the failures, for a terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("[red]{task.fields[failed]}"),
            console=self.console,
            transient=True,
        )
        self.failed = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        self.console.print(Text(text))

    def start(self, total: int, done: int, doing: str = "explaining") -> None:
        self.task = self.progress.add_task(doing, total=total, completed=done, failed="")
        self.progress.start()

    def advance(self, images: int, failed: int) -> None:
        self.failed += failed
        self.progress.update(self.task, advance=images, failed=f"{self.failed} failed" if self.failed else "")


def reporter(*, quiet: bool) -> Reporter:
    """The one that fits: silent, a live bar on a terminal, dated lines elsewhere."""
    if quiet:
        return Quiet()
    return LiveBar() if sys.stderr.isatty() else PlainLines()
