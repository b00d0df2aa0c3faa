"""The one place where the stages are chained: images -> batches -> maps -> parts and pictures -> results.h5."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import yaml

from xcli.batches import Result, explained
from xcli.collect import PartBuilder, Pictures
from xcli.config import ANYWHERE, EVALUATION, Config, recorded_config
from xcli.errors import ConfigError
from xcli.images import Batch, Source, stream
from xcli.methods.base import FLAT, NOT_FINITE
from xcli.pictures import PictureWriter
from xcli.plan import Plan, prepared
from xcli.progress import Quiet, Reporter
from xcli.provenance import recorded
from xcli.record import load
from xcli.results import open_run
from xcli.signals import interruptible
from xcli.store import State, Store, open_store, peek
from xcli.summaries import add_summaries

LOG = logging.getLogger(__name__)
FAILURES = 20
"""Failed images that a summary names; results.h5 has them all."""


@dataclass(frozen=True)
class Summary:
    """What a run ended with; ``exit_code`` is 3 where images failed, ``failures`` names the first of them."""

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
    failures: dict[str, str] = field(default_factory=dict)
    exit_code: int = 0

    def as_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


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
        return summarised(root, "already done", began, 0)
    with interruptible() as signals, ExitStack() as undo:
        record, done = state.record, Done()
        if record is None:
            with prepared(config, sources) as plan:
                record = recorded(plan, fingerprint, len(sources), shard[1])
                store = undo.enter_context(open_store(root, record, sources, shard=shard, fresh=fresh))
                if store.record == record:  # else another shard began the run just now
                    done = work(plan, store, progress)
        else:
            store = undo.enter_context(open_store(root, record, sources, shard=shard, update=update))
        if store.todo():
            done = resumed(config, store, progress)
        if not store.complete():
            return pending(root, began, done)
        progress.say(f"writing {root / 'results.h5'}")
        with signals.deferred():
            store.merge(finish=add_summaries)
    return summarised(root, "done", began, done.images)


@dataclass(frozen=True)
class Done:
    """What one call got through: images, and those among them that failed."""

    images: int = 0
    failed: int = 0


def refuse_other_config(root: Path, config: Config, fingerprint: str) -> None:
    """Raise ``ConfigError`` naming the keys in which the run in ``root`` was made from another config."""
    saved = load(root)
    if saved is None or saved.record.fingerprint == fingerprint:
        return
    before, now = (flat(plain) for plain in (yaml.safe_load(saved.record.config), config.plain()))
    unlike = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    changed = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in unlike
        if not any(f"{key}.".startswith(f"{free}.") for free in (*EVALUATION, *ANYWHERE))
    ]
    raise ConfigError(
        f"{root} holds a run with another config ({'; '.join(changed[:4])}{'; ...' if len(changed) > 4 else ''}); "
        "choose a new output.path, or replace that run with --fresh"
    )


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested data by dotted key path."""
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, inner in pairs for key, leaf in flat(inner, f"{path}.{name}").items()}
    return {path.removeprefix("."): value}


def resumed(config: Config, store: Store, progress: Reporter) -> Done:
    """Go on with the choices that the run began with.

    Raises:
        ConfigError: the model's weights are not those of the run.
    """
    begun = recorded_config(store.record.config, "run.json")  # what scores the maps is that of the start, too
    config = replace(
        config, metrics=begun.metrics, baselines=begun.baselines, images=begun.images, model=begun.model
    )
    with prepared(config, store.inputs, store.record.resolved) as plan:
        if plan.weights_sha256 != store.record.attrs["weights_sha256"]:
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
    for line in (*announced(plan), *unlabelled(plan, inputs)):
        progress.say(line)
    if own < share:
        progress.say(f"going on: {share - own} of {share} images are done")
    LOG.info("decided: %s", plan.resolved())
    failed = 0
    runs = aligned((range(rows.start, rows.stop) for _, rows in todo), plan.batch_size)
    workers = plan.config.runtime.workers
    threads = min(8, os.cpu_count() or 1) if workers == "auto" else workers
    with ExitStack() as undo:
        progress = undo.enter_context(progress)
        progress.start(share, share - own)
        pool = undo.enter_context(dropping(ThreadPoolExecutor(max(1, threads), thread_name_prefix="encode")))
        commits = undo.enter_context(Committer(store))
        writer = undo.enter_context(PictureWriter(max(1, threads)))
        pictures = Pictures(plan, store.root, inputs, writer)
        found = undo.enter_context(closing(results(plan, inputs, runs, threads, explained)))
        for number, rows in todo:
            builder = PartBuilder(plan, rows, inputs, pool)
            while not builder.full:
                result = next(found).wait()
                builder.add(result)
                pictures.draw(result)
                failed += len(result.failed)
                progress.advance(len(result.images) + len(result.failed), len(result.failed))
            writer.flush()  # a committed part has its pictures
            commits.submit(number, builder)
    return Done(own, failed)


Each = Callable[[Plan, Batch, Sequence[Source]], Iterator[Result]]
"""What is done with a batch."""


def results(
    plan: Plan, inputs: Sequence[Source], runs: Iterable[Sequence[int]], threads: int, each: Each
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
        )
        with closing(batches):
            for batch in batches:
                for result in each(plan, batch, inputs):
                    started.append(result)
                    if len(started) > 1:
                        yield started.popleft()
    yield from started


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


def announced(plan: Plan) -> Iterator[str]:
    """What a user should know before the run: model, input, layers, batch."""
    yield (
        f"{plan.model.name} ({plan.model.weights}) on {plan.device}, input {plan.size[0]}x{plan.size[1]}, "
        f"batches of {plan.batch_size}, parts of {plan.part_length} images"
    )
    for spec in plan.methods:
        layer = ", ".join(plan.layers_of(spec))
        yield f"{spec.label}: {spec.scale}" + (f" at {layer}" if layer else "")
    if plan.model.weights == "none":
        yield "beware: the weights are random; maps of an untrained network mean nothing"


def unlabelled(plan: Plan, inputs: Sequence[Source]) -> Iterator[str]:
    """A line where labels name no class of the model: such an image is neither right nor wrong, nor its own target."""
    lost = Counter(source.label for source in inputs if source.label and plan.label(source) < 0)
    if lost:
        some = ", ".join(f"{label!r} ({count})" for label, count in lost.most_common(3))
        yield f"beware: the labels of {lost.total()} of {len(inputs)} images are no class of the model: {some}"


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
        exit_code=3 if done.failed else 0,
    )


def summarised(root: Path, status: str, began: float, done: int) -> Summary:
    """Counts of a finished run, read from results.h5."""
    seconds = time.monotonic() - began
    with open_run(root) as run:
        bad = np.flatnonzero(run.images["status"])
        states = {name: run.status(name) for name in run.names}
        return Summary(
            status=status,
            output=str(root),
            results=str(root / "results.h5"),
            images=len(run.images["status"]),
            failed=len(bad),
            explanations=len(run.explanations["image"]),
            seconds=round(seconds, 3),
            images_per_second=round(done / max(seconds, 1e-9), 2),
            flat={name: int((state == FLAT).sum()) for name, state in states.items()},
            not_finite={name: int((state == NOT_FINITE).sum()) for name, state in states.items()},
            failures={run.images["path"][row]: run.images["error"][row] for row in bad[:FAILURES]},
            exit_code=3 if len(bad) and status != "already done" else 0,
        )
