"""Scoring a finished run: its maps are read back, its images streamed once more, the numbers join results.h5.

As in an explaining run the work is cut into parts, each committed by a rename, so that the same command goes on after a
kill. They lie in ``evaluation/`` until all are there; then results.h5 is written anew, beside its place, and renamed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xcli.batches import Result, in_halves, sent
from xcli.breadcrumbs import breadcrumbs
from xcli.collect import scored_attributes
from xcli.config import Config
from xcli.durable import locked, refuse_links, shown
from xcli.errors import ConfigError, InputError
from xcli.forward import Forward
from xcli.images import Batch, Source
from xcli.merge import EVALUATION_LOCK, LOCKS, current_layout
from xcli.methods.base import OK
from xcli.parts import Array, Part
from xcli.pipeline import aligned, decoding, results, warn
from xcli.plan import Plan, prepared
from xcli.progress import Reporter
from xcli.provenance import other_versions
from xcli.record import PARTS, RESULTS, Saved, load
from xcli.results import RunResults, open_run
from xcli.scoreparts import Work, tidy
from xcli.scoring import Pair, all_pairs, identity, measured, truth_of
from xcli.signals import interruptible
from xcli.targets import ClassRows

LOG = logging.getLogger(__name__)


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
    refuse_links(root, (PARTS, LOCKS))
    saved = finished(root)
    todo = missing(root, config)
    if not todo:
        tidy(root)
        return Evaluated(0, 0, {}, 0.0)
    with interruptible(), locked(root / LOCKS / EVALUATION_LOCK):
        if not (todo := missing(root, config)):  # another process was faster
            return Evaluated(0, 0, {}, 0.0)
        needed = {label for label, _ in todo}
        config = replace(config, methods=tuple(spec for spec in config.methods if spec.label in needed))
        with prepared(config, saved.inputs, saved.record.choices(), todo) as plan:
            if plan.weights_sha256 != saved.record.attrs.get("weights_sha256"):
                raise ConfigError(
                    f"the weights of {plan.model.name} have changed since the run in {shown(root)} was made; "
                    "put the old ones back, or explain again with --fresh"
                )
            if changed := other_versions(saved.record.attrs):
                LOG.warning("the maps were made by other versions: %s", ", ".join(changed))
            work = Work.open(root, saved, plan)
            images, failed = score_parts(plan, work, progress)
        LOG.info("writing %s", root / RESULTS)
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


# ---- images and maps ----------------------------------------------------------------------------------------------


class Stored:
    """The rows of a finished run: which image and class each is, and its maps."""

    def __init__(self, run: RunResults) -> None:
        self.run = run
        self.image: Array = run.explanations["image"].astype(np.int64)
        self.whole: Array = np.asarray(run.explanations["status"]) == OK
        self.target: Array = run.explanations["target"].astype(np.int64)
        if (np.diff(self.image) < 0).any():
            raise InputError(f"the rows of {shown(run.path)} are not in the order of their images")

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
    LOG.info("scoring %d pairs of method and metric on %s", pairs, plan.device)
    LOG.debug("batches of %d", plan.batch_size)
    with open_run(work.root) as run, progress:
        stored = Stored(run)
        refuse_other_maps(stored, plan)
        owners = np.unique(stored.image)
        own = [owners[np.searchsorted(owners, p.images.start) : np.searchsorted(owners, p.images.stop)].tolist()
               for p in left]  # fmt: skip
        progress.start(len(owners), len(owners) - sum(map(len, own)), "scoring")
        runs = aligned(own, plan.batch_size)
        with (
            breadcrumbs(work.root / LOCKS, Path(EVALUATION_LOCK).stem, inputs, decoding(plan)) as crumbs,
            closing(results(plan, inputs, runs, threads, partial(rescored, stored), crumbs)) as found,
        ):
            for piece, images in zip(left, own, strict=True):
                builder = Builder(plan, stored, stored.span(piece.images))
                seen = 0
                while seen < len(images):
                    result = next(found).wait()
                    builder.add(result)
                    lost = (*result.failed, *result.unscored)
                    warn(inputs, lost, len(failed))
                    failed |= {inputs[row].path: reason for row, reason in lost}
                    seen += len(result.images) + len(result.failed)
                    progress.advance(len(result.images) + len(result.failed), len(result.failed))
                refuse_to_lose_all(work.root, len(owners), failed)
                work.commit(piece, builder.part())
    return sum(map(len, own)), failed


def refuse_to_lose_all(root: Path, count: int, failed: Mapping[str, str]) -> None:
    """Raise ``InputError`` where not one image of the run can be read any more, before its scores are written."""
    if count and len(failed) == count:
        path, reason = next(iter(failed.items()))
        raise InputError(
            f"none of the images of the run in {shown(root)} can be scored, the first is {shown(path)}: {reason}; "
            "run this where they can be found by the same paths"
        )


def rescored(stored: Stored, plan: Plan, batch: Batch, sources: Sequence[Source]) -> Iterator[Result]:
    """The scores of a batch of images whose maps are stored; in halves where memory does not suffice."""
    return in_halves(plan, batch, partial(scored_again, plan, stored, sources))


def scored_again(plan: Plan, stored: Stored, sources: Sequence[Source], batch: Batch) -> Result:
    """One forward pass for the scores of the images themselves, then each metric."""
    rows, place = stored.rows(batch.rows)
    x = plan.to_input(batch.pixels.to(plan.device, non_blocking=True))
    target, whole = (torch.from_numpy(column[rows]) for column in (stored.target, stored.whole))
    own = ClassRows(torch.from_numpy(place), target.to(plan.device), plan.model.output).decided()
    forward = Forward(plan.model.module, x, (), plan.execution)
    refuse_unknown_classes(stored, rows, own.logits(forward.outputs[0]).shape[1] if forward.outputs else 0)
    seen = [sources[row] for row in batch.rows]
    score = plan.score(forward, own, [source.path for source in seen])
    names = dict.fromkeys(label for label, _ in plan.scoring.pairs if label in stored.run.names)
    maps = {name: read(stored, name, rows).to(plan.device) for name in names}
    result = Result(list(batch.rows), batch.failed, batch.geometry, torch.from_numpy(rows))
    truth = truth_of(plan, score, seen, batch.geometry, result.lose)
    result.columns = measured(plan, score, x, maps, truth, whole)
    return sent(plan, result)


def refuse_unknown_classes(stored: Stored, rows: Array, classes: int) -> None:
    """Raise ``InputError`` where a row is about a class that the model has not."""
    targets, least = stored.target[rows], np.where(stored.whole[rows], 0, -1)  # -1: none could be told
    wrong = targets[(targets < least) | (targets >= classes)]
    if wrong.size:
        raise InputError(
            f"{shown(stored.run.path)} explains class {wrong[0]}, but the model has {classes} classes: "
            "these are not its results; explain again with --fresh"
        )


def refuse_other_maps(stored: Stored, plan: Plan) -> None:
    """Raise ``InputError`` where maps have another shape than the record of the run says."""
    for label in dict.fromkeys(label for label, _ in plan.scoring.pairs if label in stored.run.names):
        found, said = stored.run.shape(label), plan.shapes.get(label)
        if said is not None and found != said:
            raise InputError(
                f"the maps {label} in {shown(stored.run.path)} are {found}, by the record of the run {said}: "
                "these are not its results; explain again with --fresh"
            )


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
        self.images = self.truth = True  # whether all could be read

    def add(self, result: Result) -> None:
        """Take in a batch; ``result.image`` holds its rows of the whole run."""
        self.images &= not result.failed
        self.truth &= not result.unscored
        rows = result.image.numpy() - self.span.start
        for path, values in result.columns.items():
            if path.endswith(".fraction"):
                self.columns[path] = values.numpy()
            else:
                self.columns[path][rows] = values.numpy()

    def part(self) -> Part:
        """The columns and attributes of the part."""
        columns = {"explanations/image": self.owners, **self.columns}
        return Part(columns, scored_attributes(self.plan, columns, images=self.images, truth=self.truth))
