"""The one place where the stages are chained: images -> batches -> maps -> parts and pictures -> results.h5."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Self

from xcli.batches import Result, explained
from xcli.breadcrumbs import Decoding, breadcrumbs
from xcli.collect import PartBuilder, Pictures
from xcli.config import ANYWHERE, EVALUATION, Config, recorded_config
from xcli.errors import ConfigError
from xcli.images import Batch, Noting, Source, stream
from xcli.merge import LOCKS
from xcli.pictures import PictureWriter
from xcli.plan import Plan, prepared
from xcli.progress import Quiet, Reporter
from xcli.provenance import flat, recorded, refuse_changes
from xcli.record import load
from xcli.signals import interruptible
from xcli.store import State, Store, open_store, peek
from xcli.summaries import add_summaries
from xcli.summary import FAILURES, Done, pending, summarised
from xcli.summary import Summary as Summary
from xcli.visible import shown
from xcli.yamlfile import read_yaml

LOG = logging.getLogger(__name__)


def explain_folder(
    config: Config,
    sources: Sequence[Source],
    *,
    shard: tuple[int, int] = (1, 1),
    fresh: bool = False,
    update: bool = False,
    progress: Reporter | None = None,
) -> Summary:
    """Explain every image of ``sources`` and write the run directory ``config.output.path``.

    Goes on with its own unfinished work; finished and unchanged, it does nothing.

    Raises:
        XaiError: with the exit code of what went wrong; ``Interrupted`` after a signal, progress kept.
    """
    progress = progress or Quiet()
    began = time.monotonic()
    root = Path(config.output.folder(date.today()))
    fingerprint = config.fingerprint()
    if not fresh:
        refuse_other_config(root, config, fingerprint)
    state = State("new", None) if fresh else peek(root, fingerprint, sources, update=update)
    if state.kind == "done":
        return summarised(root, "already done", began, Done())
    with interruptible(), ExitStack() as undo:
        record, done = state.record, Done()
        if record is None:
            with prepared(config, sources) as plan:
                record = recorded(plan, fingerprint, len(sources), shard[1])
                store = undo.enter_context(open_store(root, record, sources, shard=shard, fresh=fresh))
                if store.record == record:  # else another shard began the run just now
                    done = work(plan, store, progress)
        else:
            if update:  # before its list grows
                refuse_changes(root, record, config)
            store = undo.enter_context(open_store(root, record, sources, shard=shard, update=update))
        if store.todo():
            done = resumed(config, store, progress)
        if not store.complete():
            return pending(root, began, done)
        LOG.info("writing %s", root / "results.h5")
        store.merge(finish=add_summaries)
    return summarised(root, "done", began, done)


def refuse_other_config(root: Path, config: Config, fingerprint: str) -> None:
    """Raise ``ConfigError`` naming the keys in which the run in ``root`` was made from another config."""
    saved = load(root)
    if saved is None or saved.record.fingerprint == fingerprint:
        return
    before, now = (flat(plain) for plain in (read_yaml(saved.record.config, "run.json").data, config.plain()))
    unlike = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    changed = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in unlike
        if not any(f"{key}.".startswith(f"{free}.") for free in (*EVALUATION, *ANYWHERE))
    ]
    more = "; ..." if len(changed) > 4 else ""
    raise ConfigError(
        f"{shown(root)} holds a run with another config ({'; '.join(changed[:4])}{more}); "
        "choose a new output.path, or replace that run with --fresh"
    )


def resumed(config: Config, store: Store, progress: Reporter) -> Done:
    """Go on with the choices that the run began with.

    Raises:
        ConfigError: the run began with other versions, files, another device or other weights.
    """
    refuse_changes(store.root, store.record, config)
    begun = recorded_config(store.record.config, "run.json")  # what scores the maps is that of the start, too
    config = replace(
        config, metrics=begun.metrics, baselines=begun.baselines, images=begun.images, model=begun.model
    )
    with prepared(config, store.inputs, store.record.choices()) as plan:
        if plan.weights_sha256 != store.record.attrs.get("weights_sha256"):
            raise ConfigError(
                f"the weights of {plan.model.name} have changed since the run in {store.root} began; "
                "put the old ones back, choose a new output.path, or start over with --fresh"
            )
        return work(plan, store, progress)


def work(plan: Plan, store: Store, progress: Reporter) -> Done:
    """Explain what is left to do of this shard, part by part."""
    inputs, todo = store.inputs, store.todo()
    own: int = sum(rows.stop - rows.start for _, rows in todo)
    share = store.images_of_shard()
    announce(plan, inputs)
    if own < share:
        LOG.info("going on: %d of %d images are done", share - own, share)
    done = Done()
    runs = aligned((range(rows.start, rows.stop) for _, rows in todo), plan.batch_size)
    workers = plan.config.runtime.workers
    threads = min(8, os.cpu_count() or 1) if workers == "auto" else workers
    with ExitStack() as undo:
        progress = undo.enter_context(progress)
        progress.start(share, share - own)
        pool = undo.enter_context(dropping(ThreadPoolExecutor(max(1, threads), thread_name_prefix="encode")))
        commits = undo.enter_context(Committer(store))
        writer = undo.enter_context(PictureWriter(max(1, threads), root=store.root))
        pictures = Pictures(plan, store.root, inputs, writer)
        crumbs = undo.enter_context(breadcrumbs(store.root / LOCKS, store.name, inputs, decoding(plan)))
        found = undo.enter_context(closing(results(plan, inputs, runs, threads, explained, crumbs)))
        for number, rows in todo:
            builder = PartBuilder(plan, rows, inputs, pool)
            while not builder.full:
                result = next(found).wait()
                builder.add(result)
                pictures.draw(result)
                warn(inputs, result.failed, done.failed)
                done.add(result)
                progress.advance(len(result.images) + len(result.failed), len(result.failed))
            writer.flush()  # a committed part has its pictures
            commits.submit(number, builder)
    done.end(plan.execution)
    return done


Each = Callable[[Plan, Batch, Sequence[Source]], Iterator[Result]]
"""What is done with a batch."""


def results(
    plan: Plan,
    inputs: Sequence[Source],
    runs: Iterable[Sequence[int]],
    threads: int,
    each: Each,
    noting: Noting,
) -> Generator[Result]:
    """The results of the batches of each run of images, each read only after the next one has been started, so that a
    GPU never waits."""
    images = plan.config.images
    started: deque[Result] = deque()
    for rows in runs:
        batches = stream(
            inputs,
            rows,
            plan.preprocess,
            size=plan.size,
            batch_size=plan.batch_size,
            workers=threads,
            background=images.background_rgb,
            max_pixels=images.max_pixels,
            draft=images.draft,
            pin=plan.device.type == "cuda",
            noting=noting,
        )
        with closing(batches):
            for batch in batches:
                for result in each(plan, batch, inputs):
                    started.append(result)
                    if len(started) > 1:
                        yield started.popleft()
    yield from started


def decoding(plan: Plan) -> Decoding:
    """How an image becomes the model's input."""
    images = plan.config.images
    fixed = plan.preprocess.with_size(plan.size)
    return Decoding(fixed, images.background_rgb, images.max_pixels, images.draft)


def aligned(parts: Iterable[Iterable[int]], batch: int) -> Iterator[list[int]]:
    """The rows of all parts in as few runs as possible, such that a batch never reaches into the next part: the
    batches, and with them the last bits of the numbers, are the same whichever parts were done before."""
    run: list[int] = []
    for rows in parts:
        run += rows
        if len(run) % batch:
            yield run
            run = []
    if run:
        yield run


class Committer:
    """Commits parts one after the other in a thread of its own, at most one waiting; errors surface at the next."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self.running: Future[None] | None = None

    def submit(self, number: int, builder: PartBuilder) -> None:
        """Commit a full part; returns once the one before it is committed."""
        self.settle()
        self.running = self.pool.submit(lambda: self.store.commit(number, builder.part()))

    def settle(self) -> None:
        """Wait for what is being committed; raises what went wrong."""
        running, self.running = self.running, None
        if running is not None:
            running.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.settle()
        finally:
            self.pool.shutdown(wait=True)  # a commit that has begun is finished, also after a signal


@contextmanager
def dropping(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """A pool whose waiting work is dropped where the block ends early."""
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown(wait=True)


def announce(plan: Plan, inputs: Sequence[Source]) -> None:
    """Say what a user should know before the run, and what was decided: preprocessing, batch, layers."""
    model = plan.model
    LOG.info("%s (%s) on %s, %d methods", model.name, model.weights, plan.device, len(plan.methods))
    height, width = plan.size
    LOG.debug("input %dx%d, preprocessing %s", height, width, plan.preprocess.describe())
    LOG.debug("batches of %d, parts of %d images", plan.batch_size, plan.part_length)
    for spec in plan.methods:
        layer = ", ".join(plan.layers_of(spec))
        LOG.debug("%s: %s%s", spec.label, spec.scale, f" at {layer}" if layer else "")
    if model.weights == "none":
        LOG.warning("the weights are random; maps of an untrained network mean nothing")
    lost = Counter(source.label for source in inputs if source.label and plan.label(source) < 0)
    if lost:  # such an image is neither right nor wrong, nor its own target
        some = ", ".join(f"{label!r} ({count})" for label, count in lost.most_common(3))
        LOG.warning(
            "the labels of %d of %d images are no class of the model: %s", lost.total(), len(inputs), some
        )


def warn(inputs: Sequence[Source], failed: Sequence[tuple[int, str]], before: int) -> None:
    """Say why images failed, of the first that do; ``before`` have already."""
    for row, reason in failed[: max(0, FAILURES - before)]:
        LOG.warning("%s failed: %s", inputs[row].path, reason)
    if before < FAILURES <= before + len(failed):
        LOG.warning("more that fail are not named here; /images/error of results.h5 has them all")
