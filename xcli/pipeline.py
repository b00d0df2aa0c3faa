"""The one place where the stages are chained: images -> batches -> maps -> parts and pictures -> results.h5."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from xcli import __version__
from xcli.batches import Result, explained
from xcli.collect import PartBuilder, Pictures
from xcli.config import Config
from xcli.errors import Interrupted
from xcli.images import Source, stream
from xcli.methods.base import FLAT, NOT_FINITE
from xcli.pictures import PictureWriter
from xcli.plan import Plan, prepared
from xcli.progress import Quiet, Reporter
from xcli.results import open_run
from xcli.store import Record, Store, open_store, peek


@dataclass(frozen=True)
class Summary:
    """What a run ended with; ``exit_code`` is 3 where images failed."""

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
    state = None if fresh else peek(root, fingerprint, sources, update=update)
    if state is not None and state.kind == "done":
        return summarised(root, "already done", began, 0)
    known = state.record.resolved if state is not None and state.record is not None else None
    with interruptible(), prepared(config, sources, known) as plan:
        for line in announced(plan):
            progress.say(line)
        record = recorded(plan, fingerprint)
        with open_store(root, record, sources, shard=shard, fresh=fresh, update=update) as store:
            done = work(plan, store, progress)
            if not store.complete():
                return pending(root, began, done)
            progress.say(f"writing {root / 'results.h5'}")
            store.merge()
    return summarised(root, "done", began, done)


def work(plan: Plan, store: Store, progress: Reporter) -> int:
    """Explain what is left to do of this shard, part by part; returns the number of images."""
    inputs, todo = store.inputs, store.todo()
    own: int = sum(rows.stop - rows.start for _, rows in todo)
    workers = plan.config.runtime.workers
    threads = min(8, os.cpu_count() or 1) if workers == "auto" else workers
    with ExitStack() as undo:
        progress = undo.enter_context(progress)
        progress.start(len(inputs), len(inputs) - own)
        pool = undo.enter_context(dropping(ThreadPoolExecutor(max(1, threads), thread_name_prefix="encode")))
        commits = undo.enter_context(Committer(store))
        writer = undo.enter_context(PictureWriter(max(1, threads)))
        pictures = Pictures(plan, store.root, inputs, writer)
        parts = iter(todo)
        builder: PartBuilder | None = None
        number = -1
        for result in results(plan, inputs, [rows for _, rows in todo], threads):
            if builder is None:
                number, rows = next(parts)
                builder = PartBuilder(plan, rows, inputs, pool)
            builder.add(result.wait())
            pictures.draw(result)
            progress.advance(len(result.images) + len(result.failed), len(result.failed))
            if builder.full:
                writer.flush()  # a committed part has its pictures
                commits.submit(number, builder)
                builder = None
    return own


def results(plan: Plan, inputs: Sequence[Source], parts: Sequence[slice], threads: int) -> Iterator[Result]:
    """The results of all batches, each read only after the next one has been started, so that a GPU never waits."""
    images = plan.config.images
    stack = stream(
        inputs,
        (row for rows in parts for row in range(rows.start, rows.stop)),
        plan.preprocess,
        size=plan.size,
        batch_size=plan.batch_size,
        workers=threads,
        background=images.background_rgb,
        max_pixels=images.max_pixels,
        draft=images.draft,
        pin=plan.device.type == "cuda",
    )
    with closing(stack):
        started: deque[Result] = deque()
        for batch in stack:
            for result in explained(plan, batch, inputs):
                started.append(result)
                if len(started) > 1:
                    yield started.popleft()
        yield from started


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


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise ``Interrupted`` in here; the part that was being made is lost, nothing else."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_DFL)  # a second one ends the process at once
        raise Interrupted(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def recorded(plan: Plan, fingerprint: str) -> Record:
    """What is written down at the start: the config, the choices made, and where the numbers come from."""
    output = plan.config.output
    attrs: dict[str, str | int | float] = {
        "model": f"{plan.model.source}:{plan.model.name}",
        "weights": plan.model.weights,
        "weights_sha256": plan.weights_sha256,
        "device": str(plan.device),
        "seed": plan.config.runtime.seed,
        "versions": json.dumps(versions()),
        "size": json.dumps(list(plan.size)),
        "preprocess": json.dumps(plan.preprocess.describe()),
    }
    if (revision := git_revision()) is not None:
        attrs["git"] = revision
    resolved = {**plan.resolved(), "compression": output.compression, "layout": output.layout}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(
        fingerprint, plan.config.text(), attrs, resolved, plan.part_length, created, plan.model.categories
    )


def versions() -> dict[str, str]:
    """Of this tool, Python and the libraries that compute."""
    names = ("torch", "torchvision", "numpy", "h5py", "pillow")
    return {
        "xcli": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def git_revision() -> str | None:
    """The revision of the current directory, where it is a git checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def announced(plan: Plan) -> Iterator[str]:
    """What a user should know before the run: model, input, layers, batch."""
    yield (
        f"{plan.model.name} ({plan.model.weights}) on {plan.device}, input {plan.size[0]}x{plan.size[1]}, "
        f"batches of {plan.batch_size}, parts of {plan.part_length} images"
    )
    for spec in plan.methods:
        layer = ", ".join(plan.layers_of(spec))
        yield f"{spec.label}: {spec.scale}" + (f" at {layer}" if layer else "")


def pending(root: Path, began: float, done: int) -> Summary:
    """This shard is through; others are not."""
    seconds = time.monotonic() - began
    return Summary("shard done", str(root), None, done, 0, 0, seconds, done / max(seconds, 1e-9))


def summarised(root: Path, status: str, began: float, done: int) -> Summary:
    """Counts of a finished run, read from results.h5."""
    seconds = time.monotonic() - began
    with open_run(root) as run:
        failed = int((run.images["status"] != 0).sum())
        states = {name: run.status(name) for name in run.names}
        return Summary(
            status=status,
            output=str(root),
            results=str(root / "results.h5"),
            images=len(run.images["status"]),
            failed=failed,
            explanations=len(run.explanations["image"]),
            seconds=round(seconds, 3),
            images_per_second=round(done / max(seconds, 1e-9), 2),
            flat={name: int((state == FLAT).sum()) for name, state in states.items()},
            not_finite={name: int((state == NOT_FINITE).sum()) for name, state in states.items()},
            exit_code=3 if failed and status != "already done" else 0,
        )
