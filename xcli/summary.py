"""What came of a call: counted while it runs, and read from results.h5 once it is through."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xcli.batches import Result
from xcli.execution import Execution
from xcli.methods.base import FAILED, FLAT, NOT_FINITE, OK
from xcli.results import open_run

LOG = logging.getLogger(__name__)
FAILURES = 20
"""Failed images that a summary names; results.h5 has them all."""


@dataclass(frozen=True)
class Summary:
    """What a run ended with.

    Attributes:
        flat, not_finite, not_found: maps that are all one number, that hold NaN or infinity, that no decomposition
            gave, by method.
        scores_not_finite: explanations without a finite number to explain, and so without maps.
        failures: the first of the images that failed, and why.
        halved: where memory ran out, inputs at once at first and in the end.
        exit_code: 3 where images failed.
    """

    status: str
    output: str
    results: str | None
    images: int
    failed: int
    explanations: int
    seconds: float
    images_per_second: float
    flat: dict[str, int] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)
    not_found: dict[str, int] = field(default_factory=dict)
    scores_not_finite: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    halved: tuple[int, int] | None = None
    exit_code: int = 0

    def as_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


@dataclass
class Done:
    """What one call got through: images, those among them that failed, and what went wrong with numbers."""

    images: int = 0
    failed: int = 0
    wrong: Counter[str] = field(default_factory=Counter)  # by the path of the column of states
    halved: tuple[int, int] | None = None

    def add(self, result: Result) -> None:
        """Count a batch whose tensors have arrived."""
        self.images += len(result.images) + len(result.failed)
        self.failed += len(result.failed)
        for path, states in result.columns.items():
            if path.startswith("status/") or path == "explanations/status":
                self.wrong[path] += int((states > FLAT).sum())

    def end(self, execution: Execution) -> None:
        """Warn of what went wrong, once each with a count."""
        self.halved = execution.halved
        for path, count in self.wrong.items():
            what = (
                "explanations have no finite score"
                if path.startswith("e")
                else f"maps of {path[7:]} are not finite or not there"
            )
            if count:
                LOG.warning("%d %s: see /%s in results.h5", count, what, path)
        if self.halved:
            LOG.warning("out of memory: batches of %d were cut to %d", *self.halved)


def pending(root: Path, began: float, done: Done) -> Summary:
    """This shard is through, others are not; the counts are of this call."""
    seconds = time.monotonic() - began
    return Summary(
        status="shard done",
        output=str(root),
        results=None,
        images=done.images,
        failed=done.failed,
        explanations=0,
        seconds=round(seconds, 3),
        images_per_second=round(done.images / max(seconds, 1e-9), 2),
        halved=done.halved,
        exit_code=3 if done.failed else 0,
    )


def summarised(root: Path, status: str, began: float, done: Done) -> Summary:
    """Counts of a finished run, read from results.h5."""
    seconds = time.monotonic() - began
    with open_run(root) as run:
        bad = np.flatnonzero(run.images["status"])
        states = {name: run.status(name) for name in run.names}
        flat, not_finite, not_found = (
            {name: int((own == what).sum()) for name, own in states.items()}
            for what in (FLAT, NOT_FINITE, FAILED)
        )
        return Summary(
            status=status,
            output=str(root),
            results=str(root / "results.h5"),
            images=len(run.images["status"]),
            failed=len(bad),
            explanations=len(run.explanations["image"]),
            seconds=round(seconds, 3),
            images_per_second=round(done.images / max(seconds, 1e-9), 2),
            flat=flat,
            not_finite=not_finite,
            not_found=not_found,
            scores_not_finite=int((run.explanations["status"] != OK).sum()),
            failures={run.images["path"][row]: run.images["error"][row] for row in bad[:FAILURES]},
            halved=done.halved,
            exit_code=3 if len(bad) and status != "already done" else 0,
        )
