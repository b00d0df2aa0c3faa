"""The scores of a run as one plain structure, read from results.h5: for gates, tables, CSV files and plots.

This is the one place that knows where results.h5 keeps scores:

    /metrics/<method>/<metric>    (rows,), NaN where not defined; without the attribute ``direction`` it is a further
                                  column of some metric, ``<metric>.<extra>``
    /summary/<method>/<metric>    one number a run
    /curves/<method>/<metric>     (rows, S + 1), and <metric>.fraction (S + 1,)
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import h5py
import numpy as np
from numpy.typing import NDArray

from xcli.durable import make_folder, publish, removed_on_error, shown, writing
from xcli.errors import ConfigError
from xcli.intervals import Floats, Indices
from xcli.parts import printable
from xcli.registry import nearest
from xcli.results import open_run

CSV_ROWS = 4096
OK, FLAT = 0, 1  # of /status; what else there is has no map
Rows = NDArray[np.bool_]


@dataclass(frozen=True)
class Column:
    """One metric of one method.

    Attributes:
        kind: the metric's registered name; params: its options.
        direction: ``higher`` or ``lower``, whichever is better.
        identity: tells apart what is measured with another ground truth or other checkpoints; empty where unknown.
        values: (rows,), NaN where not defined; ``None`` where it is one number a run alone.
        summary: the number of the run; ``None`` where the mean of the values says it all.
        broken: (rows,), whether what is explained, the map, or a step to the value is not finite; ``None``: not known.
    """

    kind: str
    params: Mapping[str, Any]
    direction: str
    values: Floats | None
    summary: float | None
    identity: str = ""
    broken: Rows | None = None

    def take(self, rows: Indices) -> Column:
        """The column of these rows; the number of the run stays that of all."""
        values = None if self.values is None else self.values[rows]
        return replace(self, values=values, broken=None if self.broken is None else self.broken[rows])

    @property
    def wrong(self) -> Rows | None:
        """(rows,), which rows say that something went wrong, other than those that are not defined."""
        found = [] if self.broken is None else [self.broken]
        found += [] if self.values is None else [np.isinf(self.values)]
        return np.logical_or.reduce(found) if found else None

    def differs_from(self, other: Column) -> str:
        """In which way it is measured differently, such as ``steps 32 and 10``; empty where it is not."""
        if self.kind != other.kind:
            return f"{self.kind} and {other.kind}"
        told = [dict(self.params), dict(other.params)]
        keys = [key for key in sorted({*told[0], *told[1]}) if told[0].get(key) != told[1].get(key)]
        if not keys and self.identity and other.identity and self.identity != other.identity:
            return "another ground truth, or other checkpoints"
        return ", ".join(f"{key} {told[0].get(key)} and {told[1].get(key)}" for key in keys)


class Curve(NamedTuple):
    """The steps behind a metric's values: (rows, S + 1) over (S + 1,)."""

    values: Floats
    fraction: Floats


@dataclass(frozen=True)
class ScoreTable:
    """The scores of a run.

    Attributes:
        name: of the run, for messages: its folder's.
        file: its results.h5.
        attrs: what the run notes about itself: model, weights_sha256, ...
        paths: (images,), the images' paths; sizes: of their files in bytes, none where the run does not say.
        image: (rows,), row of ``paths``; target: (rows,), the class explained.
        columns: by (method, metric).
        baselines: the methods that know nothing of the network.
    """

    name: str
    file: Path
    attrs: Mapping[str, Any]
    paths: Sequence[str]
    sizes: Sequence[int]
    image: Indices
    target: Indices
    columns: Mapping[tuple[str, str], Column]
    baselines: frozenset[str]

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """Every label once, baselines last."""
        labels = dict.fromkeys(method for method, _ in self.columns)
        return tuple(sorted(labels, key=lambda label: label in self.baselines))

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Every label once."""
        return tuple(sorted({metric for _, metric in self.columns}))

    def direction(self, metric: str) -> str:
        """``higher`` or ``lower``, whichever is better."""
        return next(column.direction for (_, label), column in self.columns.items() if label == metric)

    def of(self, metric: str) -> dict[str, Column]:
        """The columns of one metric by method."""
        return {m: self.columns[m, metric] for m in self.methods if (m, metric) in self.columns}

    def only(self, metrics: Sequence[str] | None = None, *, baselines: bool = True) -> ScoreTable:
        """With these metrics alone, and without baselines if so wanted. Raises ``ConfigError`` for an unknown one."""
        for metric in metrics or ():
            if metric not in self.metrics:
                raise ConfigError(
                    f"{self.name} has no metric {metric!r}{nearest(metric, self.metrics)}; "
                    f"it has {', '.join(self.metrics) or 'none'}"
                )
        kept = {
            (method, metric): column
            for (method, metric), column in self.columns.items()
            if (metrics is None or metric in metrics) and (baselines or method not in self.baselines)
        }
        return replace(self, columns=kept, baselines=self.baselines if baselines else frozenset())

    def rows(self) -> list[tuple[str, int, int]]:
        """What each row is about: path, target, and a number where an image has several rows of one target."""
        seen: Counter[tuple[str, int]] = Counter()
        keys: list[tuple[str, int, int]] = []
        for image, target in zip(self.image.tolist(), self.target.tolist(), strict=True):
            key = (self.paths[image], target)
            keys.append((*key, seen[key]))
            seen[key] += 1
        return keys

    def rows_shared_with(self, other: ScoreTable) -> tuple[Indices, Indices]:
        """The rows that both runs have, here in this run's order, there those that match them."""
        mine, theirs = shared_rows([self, other])
        return mine, theirs

    def take(self, rows: Indices) -> ScoreTable:
        """With these rows alone."""
        columns = {key: column.take(rows) for key, column in self.columns.items()}
        return replace(self, image=self.image[rows], target=self.target[rows], columns=columns)


def shared_rows(tables: Sequence[ScoreTable]) -> list[Indices]:
    """The rows that all runs have, by image path and target, in the order of the first run."""
    places = [{key: place for place, key in enumerate(table.rows())} for table in tables]
    common = [key for key in places[0] if all(key in others for others in places[1:])]
    return [np.array([place[key] for key in common], np.int64) for place in places]


# --- reading -------------------------------------------------------------------------------------------------


def read_scores(path: str | Path, name: str | None = None) -> ScoreTable:
    """The scores of the run directory or results.h5 ``path``; a run that was never evaluated has no columns.

    Args:
        name: for messages; ``None``: the folder's.
    Raises:
        InputError: there is no finished run.
    """
    with open_run(path) as run, run.reading() as stored:
        labels = {*stored.get("metrics", {}), *stored.get("summary", {})}
        return ScoreTable(
            name if name is not None else shown(run.path.resolve().parent.name),
            run.path,
            run.attrs,
            list(stored["images/path"].asstr()[...]),
            stored["images/bytes"][...].tolist() if "images/bytes" in stored else (),
            np.asarray(stored["explanations/image"][...]),
            np.asarray(stored["explanations/target"][...]),
            {
                (label, metric): column
                for label in sorted(labels)
                for metric, column in _columns(stored, label)
            },
            frozenset(label for label in labels if _is_baseline(stored, label)),
        )


def _columns(stored: h5py.File, label: str) -> Iterator[tuple[str, Column]]:
    rows, runs = (stored.get(f"{group}/{label}", {}) for group in ("metrics", "summary"))
    broken = _broken(stored, label)
    for metric in sorted({*rows, *runs}):
        values, summary = rows.get(metric), runs.get(metric)
        attrs = (summary if values is None else values).attrs
        if "direction" in attrs:
            yield (
                metric,
                Column(
                    str(attrs.get("metric", metric)),
                    json.loads(attrs.get("params", "{}")),
                    str(attrs["direction"]),
                    None if values is None else np.asarray(values[...]),
                    None if summary is None else float(summary[()]),
                    str(attrs.get("identity", "")),
                    _torn(stored.get(f"curves/{label}/{metric}"), values, broken),
                ),
            )


def _torn(curve: h5py.Dataset | None, values: h5py.Dataset | None, broken: Rows | None) -> Rows | None:
    """``broken``, and the rows without a value whose curve begins with numbers and goes on without."""
    if curve is None or values is None:
        return broken
    finite = np.isfinite(curve[...])
    torn: Rows = np.isnan(values[...]) & finite.any(1) & ~finite.all(1)
    return torn if broken is None else broken | torn


def _broken(stored: h5py.File, label: str) -> Rows | None:
    """Which rows have no number to explain, or no map of ``label``, for want of finite numbers."""
    explained, maps = (stored.get(path) for path in ("explanations/status", f"status/{label}"))
    found = [] if explained is None else [explained[...] != OK]
    found += [] if maps is None else [~np.isin(maps[...], (OK, FLAT))]
    return np.logical_or.reduce(found) if found else None


def _is_baseline(stored: h5py.File, label: str) -> bool:
    """Whether ``label`` was only scored, beside the methods, or its maps are a baseline's by their source."""
    maps = stored.get(f"heatmaps/{label}")
    return maps is None or str(maps.attrs.get("source", "")).startswith("baseline")


def curves_of(scores: ScoreTable) -> dict[str, list[str]]:
    """The metrics that have curves to draw, each with its methods."""
    found: dict[str, list[str]] = {}
    with open_run(scores.file) as run, run.reading() as stored:
        for method, metric in scores.columns:
            if {metric, f"{metric}.fraction"} <= set(stored.get(f"curves/{method}", {})):
                found.setdefault(metric, []).append(method)
    return found


def read_curve(scores: ScoreTable, method: str, metric: str) -> Curve:
    """The curves of one metric and method."""
    with open_run(scores.file) as run, run.reading() as stored:
        curves = stored[f"curves/{method}"]
        return Curve(np.asarray(curves[metric][...]), np.asarray(curves[f"{metric}.fraction"][...]))


# --- writing -------------------------------------------------------------------------------------------------


def write_csv(scores: ScoreTable, path: Path) -> None:
    """Every value of every row as a line ``path,target,method,metric,value``; empty where not defined. One at a time.

    Raises:
        OutputUnwritable: ``path`` is then as before.
    """
    tmp = path.with_name(f"{path.name}.tmp")
    make_folder(path.parent)
    with writing(path), removed_on_error(tmp):
        tmp.unlink(missing_ok=True)
        with tmp.open("x", encoding="utf-8", newline="") as file:
            _write_lines(scores, file)
            file.flush()
            os.fsync(file.fileno())
        publish(tmp, path, "csv")


def _write_lines(scores: ScoreTable, file: TextIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("path", "target", "method", "metric", "value"))
    paths = [cell(path) for path in printable(scores.paths)]
    columns = {key: column.values for key, column in scores.columns.items() if column.values is not None}
    for start in range(0, len(scores.image), CSV_ROWS):
        part = slice(start, start + CSV_ROWS)
        texts = {key: _texts(values[part]) for key, values in columns.items()}
        for row, (image, target) in enumerate(
            zip(scores.image[part].tolist(), scores.target[part].tolist(), strict=True)
        ):
            writer.writerows((paths[image], target, *key, text[row]) for key, text in texts.items())


def cell(text: str) -> str:
    """A path or name as no spreadsheet takes it for a formula: ``./=x.png`` names the same file as ``=x.png``."""
    return f"./{text}" if text[:1] in tuple("=+-@\t\r") else text


def _texts(values: Floats) -> list[str]:
    """Each value in as few digits as give it back."""
    return ["" if text == "nan" else text for text in values.astype(str).tolist()]
