"""All files that make up a run read once, without their maps: what results.h5 will look like, how large it can get.

Files come in layers. Each layer covers all images, in order, cut into pieces: the parts of a run; or an older
results.h5, and beside it the parts of an evaluation. A column is taken from the one layer that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np

from xcli.durable import shown
from xcli.errors import ConfigError
from xcli.parts import FILTERS, Compression, axis, compression_of, create, is_map, printable
from xcli.record import Saved, part_path
from xcli.soundness import Unsound, damage, opened

Layout = Literal["merged", "parts"]


class Piece(NamedTuple):
    """A file with the results of some of the images, and which of its datasets count."""

    path: Path
    images: slice  # of the run's list
    keeps: Callable[[str], bool]


class Place(NamedTuple):
    """Where a piece's images and rows begin in results.h5, and how many it holds."""

    piece: Piece
    image: int
    row: int
    images: int
    rows: int

    def start(self, key: str) -> int:
        """Where the entries of the dataset ``key`` begin."""
        return {"images": self.image, "rows": self.row, "shared": 0}[axis(key)]


@dataclass
class ColumnPlan:
    """A dataset of results.h5, as the pieces have it; ``places`` are those that do, with its length there."""

    tail: tuple[int, ...]
    dtype: np.dtype[Any]
    compression: Compression
    attrs: dict[str, Any]
    places: list[tuple[Place, int]] = field(default_factory=list)
    stored: int = 0  # bytes, an upper bound
    held: set[int] = field(default_factory=set)  # identities of ``places``

    def add(self, place: Place, rows: int) -> None:
        """Note that the piece at ``place`` has this column."""
        self.places.append((place, rows))
        self.held.add(id(place))

    def holds(self, place: Place) -> bool:
        """Whether the piece at ``place`` has this column."""
        return id(place) in self.held


def parts_of(root: Path, saved: Saved) -> list[Piece]:
    """The parts of a run, as one layer."""
    return [Piece(part_path(root, n), rows, lambda _key: True) for n, rows in enumerate(saved.plan())]


def is_score(key: str) -> bool:
    """Whether the dataset ``key`` belongs to a metric: an update leaves it empty for its new rows until evaluated."""
    return key.startswith(("metrics/", "curves/"))


def score_name(key: str) -> str:
    """The method and metric, ``gradcam/road``, that a dataset of scores belongs to."""
    _, label, metric = key.split("/", 2)
    return f"{label}/{metric.partition('.')[0]}"


@dataclass
class Survey:
    """All files of a run read once, without their maps: what results.h5 will look like."""

    places: list[Place] = field(default_factory=list)
    columns: dict[str, ColumnPlan] = field(default_factory=dict)
    identities: dict[str, str] = field(default_factory=dict)  # of each metric of a method, as met first

    @classmethod
    def of(cls, layers: Sequence[Sequence[Piece]], saved: Saved) -> Survey:
        """Read the pieces of every layer. Raises ``ConfigError`` where one is damaged or does not belong to the run."""
        survey = cls()
        for layer in layers:
            row = 0
            for piece in layer:
                row += survey._read(piece, row, saved)
            survey._check(layer)
        return survey

    def _read(self, piece: Piece, row: int, saved: Saved) -> int:
        """Take a piece in and return how many rows it has."""
        with reading(piece.path) as file, refusing(piece.path), damage():
            paths = printable(item.path for item in saved.inputs[piece.images])
            if (
                file.attrs.get("fingerprint") != saved.record.fingerprint
                or texts(file["images/path"]) != paths
            ):
                raise _foreign(piece.path)
            owners = file["explanations/image"][...]
            rows, last = len(owners), piece.images.stop
            inside = rows == 0 or piece.images.start <= owners[0] <= owners[-1] < last
            if not (inside and (owners[1:] >= owners[:-1]).all()):
                raise _foreign(piece.path)
            place = Place(piece, piece.images.start, row, len(paths), rows)
            self.places.append(place)
            found = [(key, dataset) for key, dataset in datasets(file) if piece.keeps(key)]
            other = {name for key, dataset in found if (name := self._otherwise(key, dataset))}
            for key, dataset in found:
                if not (is_score(key) and score_name(key) in other):
                    self._add(place, key, dataset)
        return rows

    def _otherwise(self, key: str, dataset: h5py.Dataset) -> str:
        """The name of a metric that this piece has, but made in another way than the pieces before; empty else."""
        if not is_score(key) or "identity" not in dataset.attrs:
            return ""
        name, identity = score_name(key), str(dataset.attrs["identity"])
        return name if self.identities.setdefault(name, identity) != identity else ""

    def _add(self, place: Place, key: str, dataset: h5py.Dataset) -> None:
        if is_map(key) and not dataset.is_virtual and len(dataset) and not is_copyable(dataset):
            raise Unsound(f"/{key} is not stored as xai stores maps, one a chunk")
        seen = ColumnPlan(dataset.shape[1:], dataset.dtype, compression_of(dataset), dict(dataset.attrs))
        plan = self.columns.setdefault(key, seen)
        if (plan.tail, plan.dtype, plan.compression) != (seen.tail, seen.dtype, seen.compression):
            raise ConfigError(
                f"{shown(place.piece.path)}: {key} is {seen.dtype} {seen.tail}, elsewhere in the run it is "
                f"{plan.dtype} {plan.tail}; remove this part and run the same command again"
            )
        plan.attrs["complete"] = bool(plan.attrs.get("complete", True) and seen.attrs.get("complete", True))
        plan.add(place, len(dataset))
        plan.stored += _stored(key, dataset)

    def _check(self, layer: Sequence[Piece]) -> None:
        """Every column that the layer has must be in all of its pieces; those of metrics may have gaps."""
        mine = self.places[-len(layer) :]
        for key, plan in self.columns.items():
            gaps = [place for place in mine if not plan.holds(place)]
            if len(gaps) == len(mine):
                continue
            if gaps and not is_score(key):
                raise ConfigError(
                    f"{shown(gaps[0].piece.path)} lacks {key}; remove this part and run the same command again"
                )

    def total(self, key: str) -> int:
        """The length of the dataset ``key`` in results.h5."""
        kind = axis(key)
        if kind == "shared":
            return self.columns[key].places[0][1]
        return max(
            (
                place.image + place.images if kind == "images" else place.row + place.rows
                for place in self.places
            ),
            default=0,
        )

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
            columns += 512 * len(plan.places) if virtual else plan.stored
            if is_score(key):
                columns += self.total(key) * plan.dtype.itemsize * int(np.prod(plan.tail, dtype=int))
        return 262_144 + head + columns

    def create_in(self, out: h5py.File, layout: Layout, root: Path) -> None:
        """Create every dataset, empty; with the layout ``parts`` the maps point into the parts."""
        for key, plan in self.columns.items():
            shape = (self.total(key), *plan.tail)
            if layout == "parts" and is_map(key) and shape[0]:
                dataset = out.create_virtual_dataset(
                    key, self._virtual(key, shape, root), fillvalue=_empty(plan.dtype)
                )
            else:
                fill = np.nan if is_score(key) and plan.dtype.kind == "f" else None
                dataset = create(out, key, shape, plan.dtype, plan.compression, fill)
            for name, value in plan.attrs.items():
                if name != "complete":
                    dataset.attrs[name] = value
            if is_score(key):
                covered = sum(rows for _, rows in plan.places) >= shape[0]
                dataset.attrs["complete"] = bool(plan.attrs["complete"]) and covered

    def _virtual(self, key: str, shape: tuple[int, ...], root: Path) -> h5py.VirtualLayout:
        plan = self.columns[key]
        layout = h5py.VirtualLayout(shape, plan.dtype)
        for place, rows in plan.places:
            if rows:
                source = h5py.VirtualSource(str(place.piece.path.relative_to(root)), key, (rows, *plan.tail))
                layout[place.row : place.row + rows] = source
        return layout


def is_copyable(maps: h5py.Dataset) -> bool:
    """Whether the chunks of ``maps`` can be copied as they are: one a map, and filtered as ``compression`` says."""
    plist = maps.id.get_create_plist()
    filters = [plist.get_filter(number)[0] for number in range(plist.get_nfilters())]
    return maps.chunks == (1, *maps.shape[1:]) and filters in FILTERS


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
    """Open ``path``; raises ``ConfigError`` where it is no sound file of a run."""
    with refusing(path):
        file = opened(path)
    with file:
        yield file


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn ``Unsound`` of the block into ``ConfigError`` for ``path``."""
    try:
        yield
    except Unsound as error:
        raise ConfigError(
            f"{shown(path)} cannot be read: {error}; remove it and run the same command again, or use --fresh"
        ) from error


def datasets(file: h5py.File) -> list[tuple[str, h5py.Dataset]]:
    """The datasets of ``file`` that parts share: all but the categories and numbers that are one a run."""
    found: list[tuple[str, h5py.Dataset]] = []
    file.visititems(lambda name, item: found.append((name, item)) if isinstance(item, h5py.Dataset) else None)
    return [(name, item) for name, item in found if name != "categories" and not name.startswith("summary/")]


def texts(dataset: h5py.Dataset) -> list[str]:
    """The strings of ``dataset``."""
    return [str(text) for text in dataset.asstr()[...]]
