"""The scores of several runs as one table over the rows that they share; refused where that compares unlike things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from xcli.errors import ConfigError
from xcli.scoretable import Column, ScoreTable, shared_rows


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The runs' folders by as few of their last names as tell them apart."""
    whole = [path.resolve() for path in paths]
    whole = [path.parent if path.is_file() else path for path in whole]
    if len({*whole}) < len(whole):
        twice = next(path for path in whole if whole.count(path) > 1)
        raise ConfigError(f"{twice} is given twice")
    for length in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-length:]) for path in whole]
        if len({*names}) == len(names):
            return names
    return [str(path) for path in whole]


def joined(
    runs: Sequence[ScoreTable], *, by_path: bool = False, metrics: Sequence[str] | None = None
) -> tuple[ScoreTable, tuple[str, ...]]:
    """The runs as one table over the rows they share, methods named ``run/method``, and what to know about it."""
    if metrics is not None:
        for metric in metrics:
            if not any(metric in run.metrics for run in runs):
                runs[0].only([metric])  # says what there is
        runs = [run.only([metric for metric in metrics if metric in run.metrics]) for run in runs]
    if len(runs) == 1:
        return runs[0], ()
    rows = shared_rows(runs)
    if not by_path:
        refuse_other_models(runs)
        refuse_other_rows(runs, len(rows[0]))
    refuse_other_options(runs)
    refuse_other_pictures(runs)
    if not len(rows[0]):
        raise ConfigError("the runs share no row: no image path with the same target is in all of them")
    tables = [run.take(place) for run, place in zip(runs, rows, strict=True)]
    partial = [run.name for run in runs if len(run.image) > len(rows[0])]
    if not partial:
        return merged(tables), ()
    notes = [
        f"{len(rows[0])} rows are in all runs; left out are "
        + ", ".join(f"{len(run.image) - len(rows[0])} of {run.name}" for run in runs if run.name in partial)
    ]
    table, dropped = without_scalars(merged(tables))
    if dropped:
        notes.append(f"one number a run, over other rows, hence left out: {', '.join(dropped)}")
    return table, tuple(notes)


def refuse_other_models(runs: Sequence[ScoreTable]) -> None:
    """Raise ``ConfigError`` where the runs are of different models."""
    for first, second in pairwise(runs):
        a, b = ((run.attrs.get("model"), run.attrs.get("weights_sha256")) for run in (first, second))
        if a != b:
            said = [f"{model} (weights {str(weights)[:8]})" for model, weights in (a, b)]
            raise ConfigError(
                f"these runs explain different models: {said[0]} in {first.name}, {said[1]} in {second.name}; "
                "--match path compares the rows they share, whatever the model"
            )


def refuse_other_rows(runs: Sequence[ScoreTable], shared: int) -> None:
    """Raise ``ConfigError`` where the runs do not explain the same classes of the same images."""
    if any(len(run.image) != shared for run in runs):
        counts = ", ".join(f"{run.name} has {len(run.image)}" for run in runs)
        remedy = "--match path compares those alone" if shared else "nothing can be compared"
        raise ConfigError(
            f"these runs explain different rows (image path and target): {counts}, of which {shared} are shared; "
            f"{remedy}"
        )


def refuse_other_pictures(runs: Sequence[ScoreTable]) -> None:
    """Raise ``ConfigError`` where files of one name are of different sizes: other pictures, which no path can match."""
    known: dict[str, tuple[int, str]] = {}
    for run in runs:
        for path, size in zip(run.paths, run.sizes, strict=False):
            before, first = known.setdefault(path, (size, run.name))
            if before != size:
                raise ConfigError(
                    f"these runs explain different pictures of one name: {path} has {before} bytes in {first}, {size} "
                    f"in {run.name}"
                )


def refuse_other_options(runs: Sequence[ScoreTable]) -> None:
    """Raise ``ConfigError`` for metrics of one label that were measured in different ways."""
    problems = []
    for metric in dict.fromkeys(metric for run in runs for metric in run.metrics):
        having = [(run.name, next(iter(run.of(metric).values()))) for run in runs if metric in run.metrics]
        for (first, a), (second, b) in pairwise(having):
            if differs := a.differs_from(b):
                problems.append(f"{metric} is not the same metric in {first} and {second}: {differs}")
    if problems:
        raise ConfigError("\n".join([*problems, "leave it out by --metrics, or score the runs alike"]))


def merged(tables: Sequence[ScoreTable]) -> ScoreTable:
    """Tables over the same rows as one; a baseline that has the same values in all of them is there once."""
    common = {method for method in tables[0].baselines if is_common(tables, method)}
    columns: dict[tuple[str, str], Column] = {}
    baselines = set(common)
    for table in tables:
        names = {method: method if method in common else f"{table.name}/{method}" for method in table.methods}
        columns |= {(names[method], metric): column for (method, metric), column in table.columns.items()}
        baselines |= {names[method] for method in table.baselines}
    return replace(tables[0], name="these runs", columns=columns, baselines=frozenset(baselines))


def is_common(tables: Sequence[ScoreTable], method: str) -> bool:
    """Whether ``method`` is a baseline in every table, with the same values."""
    if not all(method in table.baselines for table in tables):
        return False
    own = [{metric: column for (m, metric), column in t.columns.items() if m == method} for t in tables]
    return all(
        other.keys() == own[0].keys()
        and all(same(column, own[0][metric]) for metric, column in other.items())
        for other in own[1:]
    )


def same(one: Column, other: Column) -> bool:
    """Whether two columns hold the same numbers."""
    if one.summary != other.summary or (one.values is None) != (other.values is None):
        return False
    return one.values is None or np.array_equal(one.values, other.values, equal_nan=True)  # type: ignore[arg-type]


def without_scalars(table: ScoreTable) -> tuple[ScoreTable, list[str]]:
    """Without the numbers that stand for whole runs, and the metrics that this leaves empty."""
    kept = {k: replace(c, summary=None) for k, c in table.columns.items() if c.values is not None}
    left = {metric for _, metric in kept}
    return replace(table, columns=kept), [metric for metric in table.metrics if metric not in left]
