"""Scoring a finished run: its maps are read back, its images streamed once more, the numbers join results.h5.

As in an explaining run the work is cut into parts, each committed by a rename, so that the same command goes on after a
kill. They lie in ``evaluation/`` until all are there; then results.h5 is written anew, beside its place, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xcli.batches import Result, in_halves, sent
from xcli.collect import scored_attributes
from xcli.config import Config
from xcli.durable import failpoint, locked, make_folder, shown, write_file, writing
from xcli.errors import ConfigError
from xcli.forward import Forward
from xcli.images import Batch, Source
from xcli.merge import LOCKS, RECORD_LOCK, build, current_layout
from xcli.parts import Array, Part, part_bytes
from xcli.pipeline import results
from xcli.plan import Plan, prepared
from xcli.progress import Reporter
from xcli.record import RESULTS, Saved, load
from xcli.results import RunResults, open_run
from xcli.scoring import Pair, all_pairs, identity, measured, truth_of
from xcli.signals import interruptible
from xcli.summaries import add_summaries
from xcli.survey import Piece, is_score, parts_of
from xcli.targets import ClassRows

LOG = logging.getLogger(__name__)
FOLDER, STATE = "evaluation", "evaluation.json"


@dataclass(frozen=True)
class Evaluated:
    """What a call did: ``pairs`` of method and metric were scored now, over so many images; why some failed."""

    pairs: int
    images: int
    failed: dict[str, str]
    seconds: float


def evaluate_run(root: Path, config: Config, progress: Reporter) -> Evaluated:
    """Score what the run in ``root`` has no current scores for; a metric with other options than before is redone.

    Args:
        config: that of the run; its metrics, baselines, ground truth and checkpoints say what is wanted.

    Raises:
        ConfigError, ModelError: the run, its images or its model do not fit.
        OutputLocked, OutputUnwritable, Interrupted: as for an explaining run.
    """
    began = time.monotonic()
    saved = finished(root)
    todo = missing(root, config)
    if not todo:
        discard(root)
        return Evaluated(0, 0, {}, 0.0)
    with interruptible() as signals, locked(root / LOCKS / "evaluation.lock"):
        if not (todo := missing(root, config)):  # another process was faster
            return Evaluated(0, 0, {}, 0.0)
        needed = {label for label, _ in todo}
        config = replace(config, methods=tuple(spec for spec in config.methods if spec.label in needed))
        with prepared(config, saved.inputs, saved.record.resolved, todo) as plan:
            if plan.weights_sha256 != saved.record.attrs["weights_sha256"]:
                raise ConfigError(
                    f"the weights of {plan.model.name} have changed since the run in {shown(root)} was made; "
                    "put the old ones back, or explain again with --fresh"
                )
            work = Work.open(root, saved, plan)
            images, failed = score_parts(plan, work, progress)
        progress.say(f"writing {root / RESULTS}")
        with signals.deferred():
            work.join(todo)
    return Evaluated(len(todo), images, failed, time.monotonic() - began)


def finished(root: Path) -> Saved:
    """The record of the finished run in ``root``.

    Raises:
        InputError: there is none, or it is not finished. ConfigError: it has new images that are not explained yet.
    """
    open_run(root).close()
    saved = load(root)
    if saved is None or current_layout(root, saved) is None:
        raise ConfigError(f"the run in {shown(root)} is not finished; run the same `xai explain` again")
    return saved


def missing(root: Path, config: Config) -> tuple[Pair, ...]:
    """The pairs of the config that results.h5 has no scores for, or not for all rows, or with other options."""
    with open_run(root) as run:
        return tuple(
            (label, spec)
            for label, spec in all_pairs(config)
            if not run.is_scored(label, spec.label, identity(config, spec))
        )


# ---- parts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The parts of one evaluation, in ``root/evaluation``."""

    root: Path
    saved: Saved
    config: Config
    length: int  # images a part

    @classmethod
    def open(cls, root: Path, saved: Saved, plan: Plan) -> Work:
        """Go on with the evaluation that was begun, where it is this one; else begin it."""
        wanted = [[label, identity(plan.config, spec)] for label, spec in plan.scoring.pairs]
        told = json.dumps([wanted, saved.record.fingerprint, saved.digest])
        state = {"of": hashlib.sha256(told.encode()).hexdigest(), "length": plan.part_length}
        path = root / FOLDER / STATE
        try:
            before = json.loads(path.read_bytes())
            if before["of"] == state["of"]:
                return cls(root, saved, plan.config, int(before["length"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none was begun, or what is left of it cannot be used
        discard(root)
        make_folder(root / FOLDER)
        write_file(path, json.dumps(state).encode(), path.with_suffix(".tmp"), "evaluation")
        return cls(root, saved, plan.config, plan.part_length)

    def pieces(self) -> list[Piece]:
        """The parts, done or not."""
        count = len(self.saved.inputs)
        starts = range(0, count, self.length)
        return [
            Piece(self.root / FOLDER / f"{n:05d}.h5", slice(start, min(start + self.length, count)), is_score)
            for n, start in enumerate(starts)
        ]

    def commit(self, piece: Piece, part: Part) -> None:
        """Make a part final. Raises ``OutputUnwritable``; earlier parts are as before."""
        paths = [item.path for item in self.saved.inputs[piece.images]]
        data = part_bytes(part, paths, self.saved.record.fingerprint, "gzip")
        write_file(piece.path, data, piece.path.with_suffix(".tmp"), "scores")

    def join(self, done: Sequence[Pair]) -> None:
        """Write results.h5 anew with the scores of ``done`` in it, and remove the parts.

        Scores of the same name that were made with other options go: one name means one metric in a run.
        """
        replaced = {f"{label}/{spec.label}" for label, spec in done} | self.outdated(done)

        def stays(key: str) -> bool:
            path = key.partition("/")[2]
            return not is_score(key) or not any(f"{path}.".startswith(f"{one}.") for one in replaced)

        with locked(self.root / LOCKS / RECORD_LOCK, wait=None):
            layout = current_layout(self.root, self.saved)
            if layout is None:
                raise ConfigError(f"the run in {shown(self.root)} has changed meanwhile; evaluate it again")
            whole = slice(0, len(self.saved.inputs))
            if layout == "merged":
                layers = [[Piece(self.root / RESULTS, whole, stays)]]
            else:
                maps = [piece._replace(keeps=is_no_score) for piece in parts_of(self.root, self.saved)]
                layers = [maps, [Piece(self.root / RESULTS, whole, lambda key: is_score(key) and stays(key))]]
            build(self.root, self.saved, [*layers, self.pieces()], layout, add_summaries)
        discard(self.root)

    def outdated(self, done: Sequence[Pair]) -> set[str]:
        """The scores in results.h5, ``label/metric``, that are called like new ones and are made in another way."""
        new = {spec.label: identity(self.config, spec) for _, spec in done}
        with open_run(self.root) as run:
            return {
                f"{label}/{metric}"
                for label in run.scored
                for metric in {**run.metrics(label), **run.curves(label)}
                if metric in new and run.metric_attrs(label, metric).get("identity") != new[metric]
            }


def is_no_score(key: str) -> bool:
    """Whether the dataset ``key`` is there before any evaluation."""
    return not is_score(key)


def discard(root: Path) -> None:
    """Remove what an evaluation has left."""
    folder = root / FOLDER
    if folder.is_dir():
        with writing(folder):
            failpoint("discard-evaluation")
            shutil.rmtree(folder)


# ---- images and maps ----------------------------------------------------------------------------------------------


class Stored:
    """The rows of a finished run: which image and class each is, and its maps."""

    def __init__(self, run: RunResults) -> None:
        self.run = run
        self.image: Array = np.asarray(run.explanations["image"])
        self.target: Array = np.asarray(run.explanations["target"])

    def rows(self, images: Sequence[int]) -> tuple[Array, Array]:
        """The explanations of ``images`` (ascending): their rows, and the place of each one's image."""
        first, last = (np.searchsorted(self.image, images, side) for side in ("left", "right"))
        rows = [np.arange(a, b) for a, b in zip(first, last, strict=True)]
        return np.concatenate([np.zeros(0, np.int64), *rows]), np.repeat(np.arange(len(images)), last - first)

    def span(self, images: slice) -> slice:
        """The rows of a run of images."""
        first, last = np.searchsorted(self.image, [images.start, images.stop])
        return slice(int(first), int(last))


def score_parts(plan: Plan, work: Work, progress: Reporter) -> tuple[int, dict[str, str]]:
    """Score what is left to do; returns how many images were read, and why others could not be."""
    pieces = work.pieces()
    left = [piece for piece in pieces if not piece.path.exists()]
    inputs, failed = work.saved.inputs, dict[str, str]()
    workers = plan.config.runtime.workers
    threads = min(8, os.cpu_count() or 1) if workers == "auto" else workers
    pairs = len(plan.scoring.pairs)
    progress.say(f"scoring {pairs} pairs of method and metric on {plan.device}, batches of {plan.batch_size}")
    with open_run(work.root) as run, progress:
        stored = Stored(run)
        own = [[i for i in range(p.images.start, p.images.stop) if i in owners] for p in left] if (
            owners := set(stored.image.tolist())
        ) else [[] for _ in left]  # fmt: skip
        total = len(owners)
        progress.start(total, total - sum(map(len, own)), "scoring")
        again = partial(rescored, stored)
        for piece, images in zip(left, own, strict=True):
            builder = Builder(plan, stored, stored.span(piece.images))
            with closing(results(plan, inputs, [images], threads, again)) as found:
                for result in found:
                    builder.add(result.wait())
                    failed |= {inputs[row].path: reason for row, reason in result.failed}
                    progress.advance(len(result.images) + len(result.failed), len(result.failed))
            work.commit(piece, builder.part())
    return sum(map(len, own)), failed


def rescored(stored: Stored, plan: Plan, batch: Batch, sources: Sequence[Source]) -> Iterator[Result]:
    """The scores of a batch of images whose maps are stored; in halves where memory does not suffice."""
    changed = [(row, reason) for row in batch.rows if (reason := change_of(sources[row]))]
    batch = batch.without(changed)
    return in_halves(plan, batch, partial(scored_again, plan, stored, sources))


def change_of(source: Source) -> str:
    """Why a file is not the one that was explained; empty where it is."""
    try:
        now = Path(source.file).stat()
    except OSError as error:
        return f"cannot be read any more: {error.strerror}"
    same = (now.st_size, now.st_mtime_ns) == (source.size, source.mtime_ns)
    return "" if same else "has changed since it was explained"


def scored_again(plan: Plan, stored: Stored, sources: Sequence[Source], batch: Batch) -> Result:
    """One forward pass for the scores of the images themselves, then each metric."""
    rows, place = stored.rows(batch.rows)
    x = plan.to_input(batch.pixels.to(plan.device, non_blocking=True))
    target = torch.from_numpy(stored.target[rows]).to(plan.device)
    own = ClassRows(torch.from_numpy(place), target, plan.model.output)
    forward = Forward(plan.model.module, x, (), plan.execution)
    seen = [sources[row] for row in batch.rows]
    score = plan.score(forward, own, [source.path for source in seen])
    names = dict.fromkeys(label for label, _ in plan.scoring.pairs if label in stored.run.names)
    maps = {name: read(stored, name, rows).to(plan.device) for name in names}
    truth = truth_of(plan, score, seen, batch.geometry)
    result = Result(list(batch.rows), batch.failed, batch.geometry, torch.from_numpy(rows))
    result.columns = measured(plan, score, x, maps, truth)
    return sent(plan, result)


def read(stored: Stored, name: str, rows: Array) -> Tensor:
    """The maps of some rows, float32."""
    return torch.from_numpy(stored.run.heatmap(name, rows)).float()


class Builder:
    """Gathers the scores of one part's rows; rows whose image could not be read stay NaN."""

    def __init__(self, plan: Plan, stored: Stored, span: slice) -> None:
        self.plan, self.span = plan, span
        self.columns: dict[str, Array] = {
            path: np.full((span.stop - span.start, *tail), np.nan, np.float32)
            for tails in plan.scoring.tails.values()
            for path, tail in tails.items()
        }
        self.owners = stored.image[span]

    def add(self, result: Result) -> None:
        """Take in a batch; ``result.image`` holds its rows of the whole run."""
        rows = result.image.numpy() - self.span.start
        for path, values in result.columns.items():
            if path.endswith(".fraction"):
                self.columns[path] = values.numpy()
            else:
                self.columns[path][rows] = values.numpy()

    def part(self) -> Part:
        """The columns and attributes of the part."""
        columns = {"explanations/image": self.owners, **self.columns}
        return Part(columns, scored_attributes(self.plan, columns))
