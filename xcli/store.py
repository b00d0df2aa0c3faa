"""The run directory as a pipeline sees it: what is left to do, committing a part, joining the parts.

``peek`` looks, ``open_store`` locks and settles what the run is, ``Store.commit`` makes a part final by a rename,
``Store.merge`` writes results.h5. The same calls after a kill at any point finish the work.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np

from xcli.breadcrumbs import forget
from xcli.durable import (
    failpoint,
    held_by_another,
    is_held,
    locked,
    make_folder,
    publish,
    refuse_links,
    write_file,
    writing,
)
from xcli.errors import ConfigError
from xcli.inputs import Source as Input
from xcli.merge import (
    DERIVED,
    EVALUATION_LOCK,
    LOCKS,
    RECORD_LOCK,
    Finish,
    current_layout,
    drop_parts,
    merge_run,
    missing_parts,
    settled,
)
from xcli.parts import Column, Compression, Encoded, Part, encode, encoded, part_bytes
from xcli.record import (
    INPUTS,
    PARTS,
    RESULTS,
    RUN,
    Record,
    Saved,
    additions,
    create,
    grown,
    load,
    part_path,
    refuse_orphans,
    relocated,
    save,
)
from xcli.survey import Layout

__all__ = [
    "Column",
    "Encoded",
    "Input",
    "Part",
    "Record",
    "State",
    "Store",
    "encode",
    "encoded",
    "merge_run",
    "open_store",
    "peek",
]

Shard = tuple[int, int]  # (I, N), I from 1
PICTURES = ("overlays", "heatmaps", "panels")
SCORES = ("evaluation", *DERIVED)
"""What an evaluation leaves beside results.h5."""

OPEN_WAIT = 10.0  # seconds to wait for another process that starts or merges
_TMP_OWNER = re.compile(r".*\.h5\.(\d+-of-\d+)\.tmp")


@dataclass(frozen=True)
class State:
    """What lies in an output directory; ``record`` is ``None`` for a new one."""

    kind: Literal["new", "unfinished", "done"]
    record: Record | None


def peek(root: str | Path, fingerprint: str, inputs: Sequence[Input], *, update: bool = False) -> State:
    """Say what running with this config on these images would meet in ``root``; writes nothing.

    ``unfinished`` includes a run whose parts are all there but not yet joined.

    Raises:
        ConfigError: another config, a grown list (unless ``update``), changed or vanished images, results without a
            record, or a damaged record; the message names the way out.
        OutputUnwritable: ``root`` is not a folder.
    """
    root = Path(root)
    saved = load(root)
    if saved is None:
        refuse_orphans(root)
        return State("new", None)
    added = additions(root, saved, fingerprint, inputs)
    if added and not update:
        raise grown(root, len(added))
    return State("done" if settled(root, saved) and not added else "unfinished", saved.record)


@contextmanager
def open_store(
    root: str | Path,
    record: Record,
    inputs: Sequence[Input],
    *,
    shard: Shard = (1, 1),
    fresh: bool = False,
    update: bool = False,
) -> Iterator[Store]:
    """Begin the run of ``root`` or go on with it, under the lock of (directory, shard).

    Args:
        record: used for a new run; of an old one only the fingerprint is compared, ``Store.record`` is its own.
        shard: (I, N), I from 1: this process owns the parts whose number modulo N is I - 1.
        fresh: remove the run that is there, its results and its pictures first.
        update: images that are new since the run began are appended; only they are left to do.
    Raises:
        OutputLocked: the shard runs elsewhere; or a run with another N does; or, with ``fresh`` or a grown list,
            any other shard does.
        ConfigError: as ``peek``. InputError: no image. OutputUnwritable: the directory cannot be written.
    """
    root = Path(root)
    refuse_links(root, (PARTS, LOCKS, *(() if fresh else ("evaluation", *PICTURES))))
    if not 1 <= shard[0] <= shard[1]:
        raise ConfigError(f"shard {shard[0]}/{shard[1]}: give I/N with I from 1 to N")
    with ExitStack() as stack:
        with locked(root / LOCKS / RECORD_LOCK, wait=OPEN_WAIT):
            stack.enter_context(locked(_lock_path(root, shard)))
            _refuse_company(root, shard, same_count=True)
            saved = _settle(root, record, inputs, shard, fresh=fresh, update=update)
            _sweep(root, shard)
        yield Store(root, saved, shard)


@dataclass(frozen=True)
class Store:
    """A run that this process may write to; from ``open_store``."""

    root: Path
    saved: Saved
    shard: Shard

    @property
    def record(self) -> Record:
        """The record of the run; it may be older than the one given to ``open_store``."""
        return self.saved.record

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The images in the order of /images, which ``todo`` slices; not always the order given."""
        return self.saved.inputs

    @property
    def name(self) -> str:
        """What the files of this shard are called."""
        return named(self.shard)

    def todo(self) -> list[tuple[int, slice]]:
        """The parts of this shard that are not committed: their numbers and their rows of ``inputs``."""
        index, count = self.shard
        plan = self.saved.plan()
        return [(n, plan[n]) for n in missing_parts(self.root, self.saved) if n % count == index - 1]

    def images_of_shard(self) -> int:
        """How many images are this shard's, done or not."""
        index, count = self.shard
        return sum(
            rows.stop - rows.start for n, rows in enumerate(self.saved.plan()) if n % count == index - 1
        )

    def commit(self, number: int, part: Part) -> None:
        """Make ``part`` final; on return it survives a kill and a power cut. Safe in threads, for different numbers.

        Raises:
            ValueError: the columns do not fit together or are not those of this part.
            OutputUnwritable: nothing of the part is left, earlier parts are as before.
        """
        index, count = self.shard
        rows = self.saved.plan()[number]
        if number % count != index - 1:
            raise ValueError(f"part {number} belongs to another shard than {index}/{count}")
        owners = np.asarray(cast("Sequence[int]", part.columns.get("explanations/image", ())))
        if owners.size and not (rows.start <= owners.min() and owners.max() < rows.stop):
            raise ValueError(
                f"explanations/image leaves the rows {rows.start} to {rows.stop} of part {number}"
            )
        compression = cast(Compression, self.record.resolved.get("compression", "gzip"))
        paths = [item.path for item in self.inputs[rows]]
        data = part_bytes(part, paths, self.record.fingerprint, compression)
        path = part_path(self.root, number)
        make_folder(path.parent)
        write_file(path, data, path.with_name(f"{path.name}.{index}-of-{count}.tmp"), "part")

    def complete(self) -> bool:
        """Whether all parts of all shards are there, or merged already."""
        return not missing_parts(self.root, self.saved)

    def merge(self, layout: Layout | None = None, finish: Finish | None = None) -> Path:
        """Join all parts into results.h5 (see ``merge_run``); waits where another shard is doing it."""
        return merge_run(self.root, layout, finish)


# --- what the run is -----------------------------------------------------------------------------------------


def _settle(
    root: Path, record: Record, inputs: Sequence[Input], shard: Shard, *, fresh: bool, update: bool
) -> Saved:
    """The run to work on, created, checked or extended; under the record lock."""
    if fresh:
        _refuse_company(root, shard)
        _remove_run(root)
    saved = load(root)
    if saved is None:
        forget(root / LOCKS)
        return create(root, record, inputs)
    added = additions(root, saved, record.fingerprint, inputs)
    if not added:
        return relocated(saved, inputs)
    if not update:
        raise grown(root, len(added))
    _refuse_company(root, shard)
    return relocated(_extend(root, saved, added), inputs)


def _extend(root: Path, saved: Saved, added: Sequence[Input]) -> Saved:
    """Append ``added``; the results of a finished run become part 0."""
    before, after = len(saved.inputs), len(saved.inputs) + len(added)
    longer = replace(saved, inputs=(*saved.inputs, *added), generations=(*saved.generations, after))
    if current_layout(root, saved) == "merged":
        drop_parts(root)
        _adopt_results(root)
        longer = replace(longer, base=before, generations=(before, after))
    save(root, longer)
    return longer


def _adopt_results(root: Path) -> None:
    """Give results.h5 a second name as part 0; a copy where the file system has no links."""
    path = part_path(root, 0)
    make_folder(path.parent)
    tmp = path.with_name(f"{path.name}.0-of-0.tmp")
    failpoint("base-start")
    with writing(path, needed=(root / RESULTS).stat().st_size):
        tmp.unlink(missing_ok=True)
        try:
            tmp.hardlink_to(root / RESULTS)
        except OSError:
            shutil.copyfile(root / RESULTS, tmp)
            with tmp.open("rb") as copy:
                os.fsync(copy.fileno())
        publish(tmp, path, "base")


def _remove_run(root: Path) -> None:
    """Remove the results, the parts and what only a run makes; the record last, so that a kill leaves no orphans."""
    had_record = (root / RUN).exists()
    with writing(root):
        for name in (RESULTS, f"{RESULTS}.tmp"):
            (root / name).unlink(missing_ok=True)
        failpoint("fresh-results")
        drop_parts(root)
        for name in (*PICTURES, *SCORES) if had_record else ():
            for path in root.glob(name):
                _remove(path)
            failpoint("fresh-pictures")
        for name in (RUN, INPUTS):
            (root / name).unlink(missing_ok=True)
            failpoint("fresh-record")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# --- who works on it -----------------------------------------------------------------------------------------


def _lock_path(root: Path, shard: Shard) -> Path:
    return root / LOCKS / f"{named(shard)}.lock"


def named(shard: Shard) -> str:
    """What the files of a shard are called."""
    return f"{shard[0]}-of-{shard[1]}"


def _refuse_company(root: Path, shard: Shard, *, same_count: bool = False) -> None:
    """Raise ``OutputLocked`` if another shard runs; with ``same_count`` those of the same N may."""
    scoring = root / LOCKS / EVALUATION_LOCK
    if not same_count and scoring.exists() and is_held(scoring):
        raise held_by_another(scoring)
    for path in sorted((root / LOCKS).glob("*-of-*.lock")):
        sibling = same_count and path.stem.endswith(f"-of-{shard[1]}")
        if path != _lock_path(root, shard) and not sibling and is_held(path):
            raise held_by_another(path)


def _sweep(root: Path, shard: Shard) -> None:
    """Remove the half-written files of runs that are dead; only names this module gives."""
    leftovers = [root / f"{name}.tmp" for name in (RESULTS, RUN, INPUTS)]
    for path in (root / PARTS).glob("*.tmp"):
        owner = _TMP_OWNER.fullmatch(path.name)
        if owner and (
            owner[1] == f"{shard[0]}-of-{shard[1]}" or not is_held(root / LOCKS / f"{owner[1]}.lock")
        ):
            leftovers.append(path)
    for path in leftovers:
        with suppress(FileNotFoundError), writing(path):
            path.unlink(missing_ok=True)
