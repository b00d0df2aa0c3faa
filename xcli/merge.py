"""Joining the parts of a run into results.h5, at constant memory and without compressing again.

The file is made beside its place and renamed, so a kill leaves the old one or the new one. Its space is reserved
before HDF5 writes a byte, because HDF5 does not survive a full disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import h5py
import numpy as np

from xcli.allocated import Allocated
from xcli.durable import failpoint, locked, publish, removed_on_error, shown, unwritable, writing
from xcli.errors import ConfigError
from xcli.parts import (
    SCHEMA,
    STRING,
    Compression,
    axis,
    compression_of,
    create,
    is_map,
    printable,
    write_attrs,
)
from xcli.record import PARTS, RESULTS, Saved, load, part_numbers, part_path

Layout = Literal["merged", "parts"]
LOCKS, RECORD_LOCK = "locks", "record.lock"
_FILLED = ("metrics/", "curves/")  # an update leaves these empty for its new rows until evaluated


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


def merge_run(root: str | Path, layout: Layout | None = None) -> Path:
    """Join the parts of the run in ``root`` into its results.h5; doing it again changes nothing.

    Args:
        layout: ``merged`` copies and then removes the parts; ``parts`` keeps them and writes an index whose maps are
            virtual datasets; ``None`` takes ``layout`` from the record, else ``merged``. Merged stays merged.
    Raises:
        ConfigError: there is no run, parts are missing, or one is damaged.
        OutputUnwritable: no room, or no permission; results.h5 is as before.
    """
    root = Path(root)
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
            _build(root, saved, wanted)
        if current_layout(root, saved) == "merged":
            drop_parts(root)
    return root / RESULTS


def _unfinished(root: Path, gaps: Sequence[int]) -> str:
    named = ", ".join(map(str, gaps[:8])) + (", ..." if len(gaps) > 8 else "")
    counts = {int(path.stem.split("-of-")[1]) for path in (root / LOCKS).glob("*-of-*.lock")}
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
            failpoint("remove")
            path.unlink()
        with suppress(OSError):
            folder.rmdir()
    failpoint("removed")


def _build(root: Path, saved: Saved, layout: Layout) -> None:
    failpoint("merge-start")
    survey = Survey.of(root, saved)
    bound = survey.bound(layout, saved)
    tmp = root / f"{RESULTS}.tmp"
    with writing(tmp, needed=bound), removed_on_error(tmp), Allocated(tmp, bound) as space:
        failpoint("merge-allocated")
        try:
            with h5py.File(space, "w") as out:
                _write_head(out, saved, layout)
                survey.create_in(out, layout)
                _fill(out, root, survey, layout)
        except (OSError, RuntimeError) as error:  # HDF5 hides the cause of a failed write
            if space.error:
                raise unwritable(tmp, space.error, bound) from error
            raise ConfigError(f"a part of {shown(root)} is damaged: {error}; use --fresh") from error
        failpoint("merge-written")
        space.finish()
        publish(tmp, root / RESULTS, "merge")


def _write_head(out: h5py.File, saved: Saved, layout: Layout) -> None:
    record = saved.record
    write_attrs(out, {**record.attrs, "schema": SCHEMA, "created": record.created, "config": record.config})
    write_attrs(out, {"fingerprint": record.fingerprint, "inputs": saved.digest, "layout": layout})
    names = np.array(printable(record.categories), dtype=object)
    out.create_dataset("categories", shape=names.shape, data=names, dtype=STRING)


def _fill(out: h5py.File, root: Path, survey: Survey, layout: Layout) -> None:
    """Copy the columns of every part to their rows."""
    offsets = {"images": 0, "rows": 0, "shared": 0}
    for number, size in enumerate(survey.sizes):
        with reading(part_path(root, number)) as file:
            for key in survey.columns:
                if key in file and not (layout == "parts" and is_map(key)):
                    _copy(file[key], out[key], offsets[axis(key)])
                    failpoint("merge-dataset")
        offsets["images"] += size.images
        offsets["rows"] += size.rows


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


# --- survey --------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """What a part holds."""

    images: int
    rows: int


@dataclass
class ColumnPlan:
    """A dataset of results.h5, as the parts have it; ``parts`` names those that do, with their rows."""

    tail: tuple[int, ...]
    dtype: np.dtype[Any]
    compression: Compression
    attrs: dict[str, Any]
    parts: dict[int, int] = field(default_factory=dict)
    stored: int = 0  # bytes, an upper bound


@dataclass
class Survey:
    """All parts of a run read once, without their maps: what results.h5 will look like."""

    sizes: list[Size] = field(default_factory=list)
    columns: dict[str, ColumnPlan] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path, saved: Saved) -> Survey:
        """Read the parts of ``saved``. Raises ``ConfigError`` where one is damaged or does not belong to it."""
        survey = cls()
        for number, rows in enumerate(saved.plan()):
            path = part_path(root, number)
            with reading(path) as file:
                paths = printable(item.path for item in saved.inputs[rows])
                if (
                    file.attrs.get("fingerprint") != saved.record.fingerprint
                    or texts(file["images/path"]) != paths
                ):
                    raise _foreign(path)
                survey._add(path, number, file)
        survey._check(root)
        return survey

    def _add(self, path: Path, number: int, file: h5py.File) -> None:
        self.sizes.append(Size(len(file["images/path"]), len(file["explanations/image"])))
        for key, dataset in datasets(file):
            seen = ColumnPlan(dataset.shape[1:], dataset.dtype, compression_of(dataset), dict(dataset.attrs))
            plan = self.columns.setdefault(key, seen)
            if (plan.tail, plan.dtype, plan.compression) != (seen.tail, seen.dtype, seen.compression):
                raise ConfigError(
                    f"{shown(path)}: {key} is {seen.dtype} {seen.tail}, elsewhere in the run it is {plan.dtype} "
                    f"{plan.tail}; remove this part and run the same command again"
                )
            plan.parts[number] = len(dataset)
            plan.stored += _stored(key, dataset)

    def _check(self, root: Path) -> None:
        for key, plan in self.columns.items():
            gaps = [number for number in range(len(self.sizes)) if number not in plan.parts]
            if gaps and not key.startswith(_FILLED):
                raise ConfigError(
                    f"{shown(part_path(root, gaps[0]))} lacks {key}; remove this part and run the same command again"
                )

    def total(self, key: str) -> int:
        """The length of the dataset ``key`` in results.h5."""
        kind = axis(key)
        if kind == "shared":
            return next(iter(self.columns[key].parts.values()))
        return sum(size.images if kind == "images" else size.rows for size in self.sizes)

    def bound(self, layout: Layout, saved: Saved) -> int:
        """Bytes that results.h5 surely fits in."""
        record = saved.record
        head = sum(
            _text_bound(text)
            for text in (*record.categories, record.config, *map(str, record.attrs.values()))
        )
        columns = 0
        for key, plan in self.columns.items():
            virtual = layout == "parts" and is_map(key)
            columns += 16_384 + sum(_text_bound(str(value)) for value in plan.attrs.values())
            columns += 512 * len(self.sizes) if virtual else plan.stored
            if key.startswith(_FILLED):
                columns += self.total(key) * plan.dtype.itemsize * int(np.prod(plan.tail, dtype=int))
        return 262_144 + head + columns

    def create_in(self, out: h5py.File, layout: Layout) -> None:
        """Create every dataset, empty; with the layout ``parts`` the maps point into the parts."""
        for key, plan in self.columns.items():
            shape = (self.total(key), *plan.tail)
            if layout == "parts" and is_map(key) and shape[0]:
                dataset = out.create_virtual_dataset(
                    key, self._virtual(key, shape), fillvalue=_empty(plan.dtype)
                )
            else:
                fill = np.nan if key.startswith(_FILLED) and plan.dtype.kind == "f" else None
                dataset = create(out, key, shape, plan.dtype, plan.compression, fill)
            for name, value in plan.attrs.items():
                dataset.attrs[name] = value

    def _virtual(self, key: str, shape: tuple[int, ...]) -> h5py.VirtualLayout:
        plan, offset = self.columns[key], 0
        layout = h5py.VirtualLayout(shape, plan.dtype)
        for number, rows in plan.parts.items():
            if rows:
                source = h5py.VirtualSource(f"{PARTS}/{number:05d}.h5", key, (rows, *plan.tail))
                layout[offset : offset + rows] = source
            offset += rows
        return layout


def _empty(dtype: np.dtype[Any]) -> float:
    return np.nan if dtype.kind == "f" else 0


def _stored(key: str, dataset: h5py.Dataset) -> int:
    """Bytes that a copy of ``dataset`` takes at most."""
    if is_map(key):
        return int(dataset.id.get_storage_size()) + 192 * len(dataset)  # and its entry in a half-full B-tree
    if h5py.check_string_dtype(dataset.dtype):
        return sum(map(_text_bound, texts(dataset)))
    return int(dataset.nbytes)


def _text_bound(text: str) -> int:
    return 2 * (len(text.encode()) + 48)  # heaps may be half empty


# --- reading -------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path) -> Iterator[h5py.File]:
    """Open ``path``; raises ``ConfigError`` where it is no sound HDF5 file."""
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise ConfigError(
            f"{shown(path)} cannot be read ({error}); remove it and run the same command again, or use --fresh"
        ) from error
    with file:
        yield file


def datasets(file: h5py.File) -> list[tuple[str, h5py.Dataset]]:
    """The datasets of ``file`` that parts share: all but the categories and numbers that are one a run."""
    found: list[tuple[str, h5py.Dataset]] = []
    file.visititems(lambda name, item: found.append((name, item)) if isinstance(item, h5py.Dataset) else None)
    return [(name, item) for name, item in found if name != "categories" and not name.startswith("summary/")]


def texts(dataset: h5py.Dataset) -> list[str]:
    """The strings of ``dataset``."""
    return [str(text) for text in dataset.asstr()[...]]


def _foreign(path: Path) -> ConfigError:
    return ConfigError(f"{shown(path)} does not belong to this run; remove it and run the same command again")
