"""The end of an evaluation: scores brought up to date, tables and curves written, gates judged."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xcli.config import Config, recorded_config
from xcli.durable import locked
from xcli.entries import PAPER
from xcli.errors import ConfigError
from xcli.evaluation import Evaluated, evaluate_run, finished
from xcli.gates import Verdict, judge, lines, parse, resolve
from xcli.images import Source
from xcli.intervals import estimates
from xcli.merge import DERIVED, LOCKS, RECORD_LOCK
from xcli.methods.baselines import BASELINES
from xcli.overrides import Changes
from xcli.pipeline import Summary, explain_folder
from xcli.plots import curves
from xcli.progress import Reporter
from xcli.record import RUN
from xcli.results import open_run
from xcli.scoretable import ScoreTable, read_scores, write_csv
from xcli.scoring import baseline_specs

DEFAULT_METRICS = ("deletion", "insertion", "road")
"""What is scored where neither the config nor the command line says."""

CSV = DERIVED[0]
SURROUNDINGS = ("images.truth", "model.checkpoints")


@dataclass(frozen=True)
class Scorecard:
    """What came of an evaluation.

    Attributes:
        evaluated: what was computed now.
        scores: of the whole run.
        verdicts: of each gate for each method it is about.
    """

    root: Path
    evaluated: Evaluated
    scores: ScoreTable
    verdicts: tuple[Verdict, ...]

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

    def gates(self) -> list[str]:
        """A line a verdict."""
        return lines(self.verdicts)


def nullable(value: float) -> float | None:
    """``None`` for what is not a number."""
    return value if math.isfinite(value) else None


def reference_of(config: Config) -> ScoreTable | None:
    """The run that gates are held against.

    Raises, before anything is run:
        InputError: there is none. ConfigError: it lacks what a gate compares with it.
    """
    if config.against is None:
        return None
    reference = read_scores(config.against)
    labels = [spec.label for spec in (*config.methods, *baseline_specs(config))]
    plain = [spec.label for spec in (*config.methods, *baseline_specs(config)) if spec.name in BASELINES]
    for gate in filter(lambda gate: gate.reference, map(parse, config.gates)):
        for method, metric in resolve(gate, labels, [spec.label for spec in config.metrics], plain):
            if (method, metric) not in reference.columns:
                raise ConfigError(
                    f"gate {gate.text!r}: the reference {reference.name} has no {metric} of {method}; score it first: "
                    f"xai evaluate {config.against} --metrics {metric}"
                )
    return reference


def scorecard(root: Path, config: Config, reference: ScoreTable | None, progress: Reporter) -> Scorecard:
    """Score the run in ``root`` as far as it is not yet, write metrics.csv and the curves beside it, judge the gates.

    Raises:
        XaiError: as ``evaluate_run``; a gate that cannot be judged.
    """
    evaluated = evaluate_run(root, config, progress)
    if not (root / CSV).exists():
        with locked(root / LOCKS / RECORD_LOCK, wait=None):  # so that the scores stay what they are
            scores = read_scores(root)
            curves(scores, root)
            write_csv(scores, root / CSV)  # last: where it is, all is
    scores = read_scores(root)
    verdicts = tuple(verdict for gate in config.gates for verdict in judge(parse(gate), scores, reference))
    return Scorecard(root, evaluated, scores, verdicts)


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


def stored_metrics(root: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The metrics that the run in ``root`` has, as entries of a config; and other keys of it that they depend on."""
    known: dict[str, dict[str, Any]] = {}
    with open_run(root) as run:
        for label in run.scored:
            for metric, attrs in run.measured(label).items():
                known.setdefault(metric, attrs)
    entries = [
        {"name": attrs["metric"], "as": label, "preset": attrs.get("preset", PAPER)}
        | json.loads(attrs.get("params", "{}"))
        for label, attrs in known.items()
    ]
    return entries, {key: attrs[key] for attrs in known.values() for key in SURROUNDINGS if key in attrs}


def config_of_run(root: Path, changes: Changes) -> Config:
    """The config to score the finished run in ``root`` with: what it wrote down, the metrics that it has, the changes.

    Metrics that are chosen come first; those that the run has stay among them, with their options, so that gates may
    name them. Without any, ``DEFAULT_METRICS``. Baselines stay as they are, unless the changes say otherwise.

    Raises:
        InputError: there is no finished run. InvalidConfigError: what is wrong with the changes.
    """
    saved = finished(root)
    entries, around = stored_metrics(root)
    with open_run(root) as run:
        beside = bool(set(run.scored) & set(BASELINES) - set(run.names))
    before = [f"{key}={value}" for key, value in around.items()]
    overrides = [*before, *([f"metrics={json.dumps(entries)}"] if entries else []), *changes.overrides]
    baselines = True if beside and changes.baselines is None else changes.baselines
    wanted = replace(changes, overrides=overrides, baselines=baselines)
    return recorded_config(
        saved.record.config, str(root / RUN), wanted, metrics=DEFAULT_METRICS, kept=[e["as"] for e in entries]
    )


def add_baselines(root: Path, progress: Reporter, metrics: Sequence[str] | None = None) -> Evaluated:
    """Score random, centre and sobel with the metrics that the run in ``root`` has, where that is not done yet.

    Args:
        metrics: with these alone.
    Raises:
        XaiError: as ``evaluate_run``.
    """
    if not stored_metrics(root)[0]:
        return Evaluated(0, 0, {}, 0.0)
    config = config_of_run(root, Changes(baselines=True))
    chosen = tuple(spec for spec in config.metrics if metrics is None or spec.label in metrics)
    return evaluate_run(root, replace(config, metrics=chosen), progress)
