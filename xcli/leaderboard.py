"""Methods compared over one or more runs, metric by metric: means, ranks, and paired tests against the best.

Ranks count methods alone, 1 is the best, equal means share one; the mean rank is over the metrics that every method
has. A difference is the method's minus the best's, over the rows where both are defined; its p is that of Wilcoxon's
signed-rank test on the differences averaged an image, corrected by Holm over the comparisons of the metric. The best
is chosen by the same rows, so its lead is flattered a little.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xcli.errors import ConfigError
from xcli.intervals import MEAN, Estimate, Indices, estimates, holm, signed_rank
from xcli.joining import distinct_names, joined
from xcli.scoretable import Column, ScoreTable, cell, read_scores

NAN = float("nan")


@dataclass(frozen=True)
class Standing:
    """One method in one metric.

    Attributes:
        mean: over the defined rows; of a metric that is one number a run, that number, with no rows.
        summary: the one number of the run, where the metric has one.
        rank: ``None`` for a baseline and where nothing is defined.
        difference: to the best method; ``None`` for that one, and where there are no rows.
        p, p_holm: NaN where there is no difference.
        beaten: whether some baseline is as good or better.
    """

    method: str
    baseline: bool
    mean: Estimate
    summary: float | None = None
    rank: float | None = None
    difference: Estimate | None = None
    p: float = NAN
    p_holm: float = NAN
    beaten: bool = False

    @property
    def scalar(self) -> bool:
        """Whether the mean is the one number of the run, for want of rows."""
        return not self.mean.n and not math.isnan(self.mean.value)


@dataclass(frozen=True)
class Contest:
    """One metric: its standings, best first, baselines after the methods."""

    metric: str
    direction: str
    params: Mapping[str, Any]
    best: str | None
    standings: tuple[Standing, ...]


@dataclass(frozen=True)
class Leaderboard:
    """The comparison.

    Attributes:
        runs: what is compared, with the rows each has.
        rows, images: those compared.
        contests: one a metric.
        overall: mean rank of each method, best first; empty where no metric is common to all.
        counted: the metrics of which it is the mean.
        notes: what a reader has to know beside.
    """

    runs: tuple[ScoreTable, ...]
    scores: ScoreTable
    contests: tuple[Contest, ...]
    overall: Mapping[str, float]
    counted: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def rows(self) -> int:
        return len(self.scores.image)

    @property
    def images(self) -> int:
        return len(np.unique(self.scores.image))


def compared(
    paths: Sequence[Path],
    *,
    by_path: bool = False,
    metrics: Sequence[str] | None = None,
    baselines: bool = True,
) -> Leaderboard:
    """The leaderboard of the runs in ``paths``.

    Args:
        by_path: compare the rows that the runs share, whatever their models.
        metrics: only these.
        baselines: whether they are shown.
    Raises:
        ConfigError: a run has no metric; the runs explain other images, classes or models; a metric was measured
            with other options; all with what to do.
    """
    runs = [read_scores(path, name) for path, name in zip(paths, distinct_names(paths), strict=True)]
    for path, run in zip(paths, runs, strict=True):
        if not run.columns:
            raise ConfigError(f"{run.name} holds no metric: run `xai evaluate {path}` first")
    return leaderboard(runs, by_path=by_path, metrics=metrics, baselines=baselines)


def leaderboard(
    runs: Sequence[ScoreTable],
    *,
    by_path: bool = False,
    metrics: Sequence[str] | None = None,
    baselines: bool = True,
) -> Leaderboard:
    """As ``compared``, of runs that are read already."""
    scores, notes = joined(runs, by_path=by_path, metrics=metrics)
    scores = scores.only(baselines=baselines)
    if not scores.columns:
        raise ConfigError("only baselines were scored: without them nothing is left")
    contests = tuple(contest(scores, metric) for metric in scores.metrics)
    overall, counted = mean_ranks(contests, [m for m in scores.methods if m not in scores.baselines])
    return Leaderboard(tuple(runs), scores, contests, overall, counted, notes)


# --- one metric ----------------------------------------------------------------------------------------------


def contest(scores: ScoreTable, metric: str) -> Contest:
    """The standings of every method in one metric, each but the best compared with the best."""
    found = standings(scores, metric)
    best = next((one.method for one in found if not math.isnan(one.mean.value)), None)
    columns = scores.of(metric)
    against = {} if best is None else differences(columns, best, scores.image)
    compared = [
        replace(one, difference=d, p=p, p_holm=corrected)
        for one in found
        for d, p, corrected in [against.get(one.method, (None, NAN, NAN))]
    ]
    params = next(iter(columns.values())).params
    return Contest(metric, scores.direction(metric), params, best, tuple(compared))


def run_of(label: str) -> str:
    """The run in ``run/method``; empty where there is one run, or a baseline is the same in all."""
    return label.rpartition("/")[0]


def standings(scores: ScoreTable, metric: str) -> list[Standing]:
    """Every method in one metric, best first, baselines after the methods; without comparisons."""
    columns, sign = scores.of(metric), -1 if scores.direction(metric) == "higher" else 1
    means = dict(zip(columns, means_of(list(columns.values()), scores.image), strict=True))
    badness = {method: sign * found.value for method, found in means.items() if not math.isnan(found.value)}
    ranks = ranked({method: value for method, value in badness.items() if method not in scores.baselines})
    bars = {method: value for method, value in badness.items() if method in scores.baselines}

    def bar(method: str) -> float:
        """The best baseline of the method's own run, or of all runs alike."""
        runs = ("", run_of(method))
        return min((value for name, value in bars.items() if run_of(name) in runs), default=math.inf)

    found = [
        Standing(
            method,
            method in scores.baselines,
            means[method],
            column.summary,
            ranks.get(method),
            beaten=method in ranks and badness[method] >= bar(method),
        )
        for method, column in columns.items()
    ]
    return sorted(found, key=lambda one: (one.baseline, badness.get(one.method, math.inf), one.method))


def means_of(columns: Sequence[Column], image: Indices) -> list[Estimate]:
    """The mean of each column; of one number a run, that."""
    rows = [column.values for column in columns if column.values is not None]
    found = iter(estimates(rows, image))
    return [
        next(found)
        if column.values is not None
        else Estimate(MEAN, NAN if column.summary is None else column.summary, NAN, NAN, 0, 0)
        for column in columns
    ]


def ranked(badness: Mapping[str, float]) -> dict[str, float]:
    """The ranks of the methods, 1 for the lowest; equal ones share the mean of their ranks."""
    values = sorted(badness.values())
    return {
        method: 1 + values.index(value) + (values.count(value) - 1) / 2 for method, value in badness.items()
    }


def differences(
    columns: Mapping[str, Column], best: str, image: Indices
) -> dict[str, tuple[Estimate, float, float]]:
    """Of each other method to the best: the mean difference, its p, and that after Holm's correction."""
    reference = columns[best].values
    if reference is None:
        return {}
    rows = {
        method: np.asarray(column.values, np.float64) - reference
        for method, column in columns.items()
        if method != best and column.values is not None
    }
    gaps = estimates(list(rows.values()), image)
    p = [signed_rank(values, image) for values in rows.values()]
    return dict(zip(rows, zip(gaps, p, holm(p), strict=True), strict=True))


def mean_ranks(
    contests: Sequence[Contest], methods: Sequence[str]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """The mean rank of each method, best first, over the metrics in which all have one; and which these are."""
    ranks = {
        c.metric: {one.method: one.rank for one in c.standings if one.rank is not None} for c in contests
    }
    counted = tuple(metric for metric, found in ranks.items() if found and all(m in found for m in methods))
    if not counted:
        return {}, ()
    means = {method: float(np.mean([ranks[metric][method] for metric in counted])) for method in methods}
    return dict(sorted(means.items(), key=lambda item: (item[1], item[0]))), counted


# --- for programs --------------------------------------------------------------------------------------------


def as_json(board: Leaderboard) -> dict[str, Any]:
    """The leaderboard as plain data; what is not defined is null."""
    return {
        "runs": [
            {
                "name": run.name,
                "path": str(run.file.parent),
                "model": run.attrs.get("model"),
                "rows": len(run.image),
            }
            for run in board.runs
        ],
        "rows": board.rows,
        "images": board.images,
        "metrics": [
            {
                "metric": contest.metric,
                "direction": contest.direction,
                "params": dict(contest.params),
                "best": contest.best,
                "standings": [told(one) for one in contest.standings],
            }
            for contest in board.contests
        ],
        "mean_rank": dict(board.overall),
        "mean_rank_of": list(board.counted),
        "notes": list(board.notes),
    }


def told(one: Standing) -> dict[str, Any]:
    """One standing as flat plain data."""
    gap = one.difference
    numbers: dict[str, Any] = {
        "method": one.method,
        "baseline": one.baseline,
        "rank": one.rank,
        "mean": one.mean.value,
        "low": one.mean.low,
        "high": one.mean.high,
        "n": one.mean.n,
        "images": one.mean.images,
        "summary": one.summary,
        "difference": None if gap is None else gap.value,
        "difference_low": None if gap is None else gap.low,
        "difference_high": None if gap is None else gap.high,
        "p": one.p,
        "p_holm": one.p_holm,
        "no_better_than_a_baseline": one.beaten,
    }
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in numbers.items()
    }


def csv_text(board: Leaderboard) -> str:
    """The leaderboard as CSV, a line for each method and metric; what is not defined is empty."""
    lines = [
        {
            "metric": contest.metric,
            "direction": contest.direction,
            **told(one),
            "method": cell(one.method),
            "mean_rank": board.overall.get(one.method),
        }
        for contest in board.contests
        for one in contest.standings
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()
