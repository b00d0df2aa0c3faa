"""Timing on a shared machine: contenders take turns, and a repeat that other processes disturbed is dropped."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

DISTURBED = 0.10
"""Share of the cores' time that others may have taken in a repeat that still counts."""


@dataclass
class Timing:
    """Seconds of the repeats that counted, and how many were dropped."""

    seconds: list[float] = field(default_factory=list)
    dropped: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else float("nan")


def busy() -> tuple[float, float]:
    """(seconds that all cores were busy since boot, seconds that this process and its children took)."""
    ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    all_busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return all_busy, sum(one.ru_utime + one.ru_stime for one in usage)


def taken_by_others(run: Callable[[], object]) -> tuple[float, float]:
    """Run once: (seconds, share of the cores' time that other processes took meanwhile)."""
    before, own_before, start = *busy(), time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    after, own_after = busy()
    others = max(0.0, (after - before) - (own_after - own_before))
    return seconds, others / (seconds * (os.cpu_count() or 1))


def race(
    contenders: Mapping[str, Callable[[], object]], repeats: int = 5, tries: int = 15
) -> dict[str, Timing]:
    """Every contender once per round, after a warm-up, until each has ``repeats`` quiet runs or the tries are up.

    A contender without a quiet run keeps its least disturbed one, counted as dropped too.
    """
    found = {name: Timing() for name in contenders}
    least: dict[str, tuple[float, float]] = {}
    for run in contenders.values():
        run()
    for _ in range(tries):
        for name, run in contenders.items():
            if len(found[name].seconds) >= repeats:
                continue
            seconds, others = taken_by_others(run)
            if others > DISTURBED:
                found[name].dropped += 1
                least[name] = min(least.get(name, (others, seconds)), (others, seconds))
            else:
                found[name].seconds.append(seconds)
    for name, timing in found.items():
        if not timing.seconds:
            timing.seconds.append(least[name][1])
    return found


def peak_megabytes() -> float:
    """Most memory this process has held, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
