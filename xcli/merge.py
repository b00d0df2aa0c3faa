"""Joining the parts of a run into results.h5, at constant memory and without compressing again.

The file is made beside its place and renamed, so a kill leaves the old one or the new one. Its space is reserved
before HDF5 writes a byte, because HDF5 does not survive a full disk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import h5py
import numpy as np

from xcli.allocated import Allocated
from xcli.durable import failpoint, locked, publish, refuse_links, removed_on_error, shown, writing
from xcli.errors import ConfigError
from xcli.parts import SCHEMA, STRING, is_map, printable, write_attrs
from xcli.record import PARTS, RESULTS, Saved, load, part_numbers, part_path
from xcli.signals import interruptible
from xcli.survey import Layout, Piece, Survey, is_score, parts_of, reading

LOCKS, RECORD_LOCK, EVALUATION_LOCK = "locks", "record.lock", "evaluation.lock"
DERIVED = ("metrics.csv", "metrics.csv.tmp", "curves-*.png", "curves-*.png.tmp")
"""What is made of the scores in results.h5 and goes with it. The first is written last: where it is, all are."""
_SHARD_LOCK = re.compile(r"[0-9]+-of-([0-9]+)\.lock")


# --- state ---------------------------------------------------------------------------------------------------


def current_layout(root: Path, saved: Saved) -> Layout | None:
    """How results.h5 is laid out if it holds exactly the run ``saved``; ``None`` if it is missing or older."""
    path = root / RESULTS
    if not path.exists():
        return None
    with reading(path) as file:
        same = (file.attrs.get("fingerprint"), file.attrs.get("inputs")) == (
            saved.record.fingerprint,
            saved.digest,
        )
        return cast(Layout, file.attrs["layout"]) if same else None


def missing_parts(root: Path, saved: Saved) -> list[int]:
    """The parts that are neither committed nor merged already."""
    present = part_numbers(root)  # listed first: a merge elsewhere removes parts after its rename
    gaps = [number for number in range(len(saved.plan())) if number not in present]
    return [] if gaps and current_layout(root, saved) == "merged" else gaps


def settled(root: Path, saved: Saved) -> bool:
    """Whether nothing is left to do: results.h5 is current and, once merged, its parts are gone."""
    layout = current_layout(root, saved)
    if layout == "merged":
        return not part_numbers(root)
    return layout == "parts" and not missing_parts(root, saved)


# --- merging -------------------------------------------------------------------------------------------------


Finish = Callable[[h5py.File], None]
"""Adds to results.h5, once all columns are in, what takes the whole run to compute; at most 100 kB."""


def merge_run(root: str | Path, layout: Layout | None = None, finish: Finish | None = None) -> Path:
    """Join the parts of the run in ``root`` into its results.h5; doing it again changes nothing.

    Args:
        layout: ``merged`` copies and then removes the parts; ``parts`` keeps them and writes an index whose maps are
            virtual datasets; ``None`` takes ``layout`` from the record, else ``merged``. Merged stays merged.
    Raises:
        ConfigError: there is no run, parts are missing, or one is damaged.
        OutputUnwritable: no room, or no permission; results.h5 is as before.
    """
    root = Path(root)
    refuse_links(root, (PARTS, LOCKS))
    if load(root) is None:
        raise ConfigError(f"{shown(root)} holds no run")
    with locked(root / LOCKS / RECORD_LOCK, wait=None):
        saved = load(root)
        if saved is None:
            raise ConfigError(f"{shown(root)} holds no run any more")
        if gaps := missing_parts(root, saved):
            raise ConfigError(_unfinished(root, gaps))
        wanted = layout or cast(Layout, saved.record.resolved.get("layout", "merged"))
        if current_layout(root, saved) not in ("merged", wanted):
            build(root, saved, layers_of(root, saved, wanted), wanted, finish)
        if current_layout(root, saved) == "merged":
            drop_parts(root)
    return root / RESULTS


def layers_of(root: Path, saved: Saved, layout: Layout) -> list[list[Piece]]:
    """The parts; and where they are kept, the scores that only the results.h5 of before an update has."""
    parts = parts_of(root, saved)
    if layout == "merged" or not (root / RESULTS).exists():
        return [parts]
    with reading(root / RESULTS) as file:
        count, mine = len(file["images/path"]), file.attrs.get("fingerprint") == saved.record.fingerprint
    held = set(Survey.of([parts], saved).columns)
    older = Piece(root / RESULTS, slice(0, count), lambda key: is_score(key) and key not in held)
    return [parts, [older]] if mine else [parts]


def _unfinished(root: Path, gaps: Sequence[int]) -> str:
    named = ", ".join(map(str, gaps[:8])) + (", ..." if len(gaps) > 8 else "")
    locks = (_SHARD_LOCK.fullmatch(path.name) for path in (root / LOCKS).glob("*-of-*.lock"))
    counts = {int(lock[1]) for lock in locks if lock}
    if len(counts) == 1 and (count := counts.pop()) > 1:
        owners = sorted({number % count + 1 for number in gaps})
        named += f" (of the shards {', '.join(f'{shard}/{count}' for shard in owners)})"
    return f"the run in {shown(root)} is not finished, parts are missing: {named}; finish it with `xai explain` first"


def drop_parts(root: Path) -> None:
    """Remove the parts of ``root``, and their folder if nothing else is in it."""
    folder = root / PARTS
    if not folder.is_dir():
        return
    with writing(folder):
        numbers = sorted(part_numbers(root))
        for path in [part_path(root, number) for number in numbers] + sorted(folder.glob("*.h5.*.tmp")):
            failpoint("remove-part")
            path.unlink()
        with suppress(OSError):
            folder.rmdir()
    failpoint("remove-done")


def build(
    root: Path, saved: Saved, layers: Sequence[Sequence[Piece]], layout: Layout, finish: Finish | None
) -> None:
    """Make results.h5 of the layers' columns and put it in its place; under the record lock. Signals wait for it."""
    failpoint("merge-start")
    survey = Survey.of(layers, saved)
    bound = survey.bound(layout, saved)
    tmp = root / f"{RESULTS}.tmp"
    with (
        interruptible(at_end=True),
        writing(root / RESULTS, needed=bound),
        removed_on_error(tmp),
        Allocated(tmp, bound) as space,
    ):
        failpoint("merge-allocated")
        try:
            with h5py.File(space, "w") as out:
                _write_head(out, saved, layout)
                survey.create_in(out, layout, root)
                _fill(out, survey, layout, space)
                if finish is not None:
                    finish(out)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            # after a write that failed HDF5 stumbles over what is not there; ``finish`` then names the cause
            if space.error is None and isinstance(error, OSError):
                raise ConfigError(
                    f"a part of {shown(root)} is damaged: {error}; start over with --fresh"
                ) from error
            if space.error is None:
                raise
        failpoint("merge-written")
        space.finish()
        for path in [path for name in DERIVED for path in root.glob(name)]:
            failpoint("remove-derived")
            path.unlink()
        publish(tmp, root / RESULTS, "merge")


def _write_head(out: h5py.File, saved: Saved, layout: Layout) -> None:
    record = saved.record
    write_attrs(out, {**record.attrs, "schema": SCHEMA, "created": record.created, "config": record.config})
    write_attrs(out, {"fingerprint": record.fingerprint, "inputs": saved.digest, "layout": layout})
    names = np.array(printable(record.categories), dtype=object)
    out.create_dataset("categories", shape=names.shape, data=names, dtype=STRING)


def _fill(out: h5py.File, survey: Survey, layout: Layout, space: Allocated) -> None:
    """Copy the columns of every piece to their rows."""
    for place in survey.places:
        with reading(place.piece.path) as file:
            for key, plan in survey.columns.items():
                if plan.holds(place) and not (layout == "parts" and is_map(key)):
                    _copy(file[key], out[key], place.start(key))
                    space.check()
                    failpoint("merge-dataset")


def _copy(source: h5py.Dataset, target: h5py.Dataset, offset: int) -> None:
    """Copy the rows of ``source`` to ``target`` from ``offset`` on; compressed chunks as they are."""
    rows = len(source)
    if not is_map(source.name.lstrip("/")):
        if rows:
            target[offset : offset + rows] = source[...]
        return
    origin = (0,) * (source.ndim - 1)
    for row in range(rows):
        mask, chunk = source.id.read_direct_chunk((row, *origin))
        target.id.write_direct_chunk((offset + row, *origin), chunk, mask)
