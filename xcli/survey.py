"""All parts of a run read once, without their maps: what results.h5 will look like and how large it can get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np

from xcli.durable import shown
from xcli.errors import ConfigError
from xcli.parts import Compression, axis, compression_of, create, is_map, printable
from xcli.record import PARTS, Saved, part_path

Layout = Literal["merged", "parts"]
_FILLED = ("metrics/", "curves/")  # an update leaves these empty for its new rows until evaluated


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
            columns += 8_192 + sum(_text_bound(str(value)) for value in plan.attrs.values())
            columns += 512 * len(self.sizes) if virtual else plan.stored
            if key.startswith(_FILLED):
                columns += self.total(key) * plan.dtype.itemsize * int(np.prod(plan.tail, dtype=int))
        return 131_072 + head + columns

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


def _foreign(path: Path) -> ConfigError:
    return ConfigError(f"{shown(path)} does not belong to this run; remove it and run the same command again")


# --- reading -------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path) -> Iterator[h5py.File]:
    """Open ``path``; raises ``ConfigError`` where it is no sound HDF5 file."""
    try:
        file = h5py.File(path, "r")
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
