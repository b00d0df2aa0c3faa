"""The end of an evaluation: scores brought up to date, tables and curves written, gates judged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xcli.config import Config, recorded_config
from xcli.evaluation import Evaluated, evaluate_run, finished
from xcli.gates import Verdict, judge, lines, parse
from xcli.images import Source
from xcli.intervals import estimates
from xcli.overrides import Changes
from xcli.pipeline import Summary, explain_folder
from xcli.plots import curves
from xcli.progress import Reporter
from xcli.record import RUN
from xcli.results import open_run
from xcli.scoretable import ScoreTable, read_scores, write_csv

DEFAULT_METRICS = ("deletion", "insertion", "road")
"""What is scored where neither the config nor the command line says."""

CSV = "metrics.csv"
SURROUNDINGS = ("images.truth", "model.checkpoints")


@dataclass(frozen=True)
class Scorecard:
    """What came of an evaluation.

    Attributes:
        evaluated: what was computed now.
        scores: of the whole run.
        verdicts: of each gate for each method it is about.
        curves: the pictures that were drawn.
    """

    root: Path
    evaluated: Evaluated
    scores: ScoreTable
    verdicts: tuple[Verdict, ...]
    curves: tuple[Path, ...]

    @property
    def exit_code(self) -> int:
        """4 where a gate fails, else 3 where images could not be scored, else 0."""
        if not all(verdict.passed for verdict in self.verdicts):
            return 4
        return 3 if self.evaluated.failed else 0

    def as_json(self) -> dict[str, Any]:
        """The scores and verdicts as plain data; a number that is not defined is null."""
        told: dict[str, dict[str, Any]] = {method: {} for method in self.scores.methods}
        for metric in self.scores.metrics:
            columns = self.scores.of(metric)
            values = {method: c.values for method, c in columns.items() if c.values is not None}
            found = dict(zip(values, estimates(list(values.values()), self.scores.image), strict=True))
            for method, column in columns.items():
                own = found.get(method)
                mean = {"mean": own.value, "low": own.low, "high": own.high, "n": own.n} if own else {}
                run = {"run": column.summary} if column.summary is not None else {}
                told[method][metric] = {key: nullable(value) for key, value in {**mean, **run}.items()}
        return {
            "scores": told,
            "gates": [verdict.as_json() for verdict in self.verdicts],
            "scored_now": self.evaluated.pairs,
            "not_scored": self.evaluated.failed,
        }

    def failures(self) -> Iterator[str]:
        """Which images could not be scored, and why: the first five."""
        failed = list(self.evaluated.failed.items())
        if failed:
            yield f"{len(failed)} images could not be scored:"
            yield from (f"  {path}: {reason}" for path, reason in failed[:5])

    def gates(self) -> list[str]:
        """A line a verdict."""
        return lines(self.verdicts)


def nullable(value: float) -> float | None:
    """``None`` for what is not a number."""
    return value if math.isfinite(value) else None


def reference_of(config: Config) -> ScoreTable | None:
    """The run that gates are held against. Raises ``InputError`` where there is none: before anything is run."""
    return None if config.against is None else read_scores(config.against)


def scorecard(root: Path, config: Config, reference: ScoreTable | None, progress: Reporter) -> Scorecard:
    """Score the run in ``root`` as far as it is not yet, write metrics.csv and the curves beside it, judge the gates.

    Raises:
        XaiError: as ``evaluate_run``; a gate that cannot be judged.
    """
    evaluated = evaluate_run(root, config, progress)
    scores = read_scores(root)
    write_csv(scores, root / CSV)
    drawn = curves(scores, root)
    verdicts = [verdict for gate in config.gates for verdict in judge(parse(gate), scores, reference)]
    return Scorecard(root, evaluated, scores, tuple(verdicts), tuple(drawn))


def explain_and_score(
    config: Config,
    sources: Sequence[Source],
    progress: Reporter,
    *,
    shard: tuple[int, int] = (1, 1),
    fresh: bool = False,
    update: bool = False,
) -> tuple[Summary, Scorecard | None]:
    """Explain a folder and, once all of it is there, score it, where the config names metrics.

    Raises:
        XaiError: as ``explain_folder`` and ``scorecard``.
    """
    reference = reference_of(config)
    summary = explain_folder(config, sources, shard=shard, fresh=fresh, update=update, progress=progress)
    if not config.metrics or summary.results is None:
        return summary, None
    return summary, scorecard(Path(summary.output), config, reference, progress)


def add_baselines(root: Path, progress: Reporter) -> Evaluated:
    """Score random, centre and sobel with every metric that the run in ``root`` has, where that is not done yet.

    Raises:
        XaiError: as ``evaluate_run``.
    """
    known: dict[str, dict[str, Any]] = {}
    with open_run(root) as run:
        for label in run.scored:
            for metric in {**run.metrics(label), **run.summary(label)}:
                attrs = run.metric_attrs(label, metric)
                if "metric" in attrs:
                    known.setdefault(metric, attrs)
    if not known:
        return Evaluated(0, 0, {}, 0.0)
    entries = [
        {"name": attrs["metric"], "as": label, "preset": attrs["preset"], **json.loads(attrs["params"])}
        for label, attrs in known.items()
    ]
    around = {key: attrs[key] for attrs in known.values() for key in SURROUNDINGS if key in attrs}
    changes = [f"metrics={json.dumps(entries)}", *(f"{key}={value}" for key, value in around.items())]
    text = finished(root).record.config
    config = recorded_config(text, str(root / RUN), Changes(overrides=changes, baselines=True))
    return evaluate_run(root, config, progress)
