"""Reading a finished run.

>>> import tempfile
>>> import numpy as np
>>> from xcli.store import Input, Part, Record, open_store
>>> folder = tempfile.TemporaryDirectory()
>>> images = [Input("cat.png", "/photos/cat.png", 10, 0, None)]
>>> record = Record("f1", "methods: [gradcam]", {"seed": 0}, {}, 8, "2026-01-01", ("cat", "dog"))
>>> with open_store(folder.name, record, images) as store:
...     for number, rows in store.todo():
...         maps = np.ones((1, 2, 3), np.float32)
...         store.commit(number, Part({"explanations/image": np.array([0]), "heatmaps/gradcam": maps}))
...     path = store.merge()
>>> with open_run(folder.name) as run:
...     run.names, run.heatmap("gradcam").shape, list(run.images["path"])
(('gradcam',), (1, 2, 3), ['cat.png'])
>>> folder.cleanup()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np

from xcli.errors import InputError
from xcli.parts import SCHEMA, Array
from xcli.record import RESULTS, RUN
from xcli.soundness import Unsound, damage, opened, sources_of
from xcli.visible import shown

if TYPE_CHECKING:
    import xarray

Rows = int | slice | Sequence[int] | Array | None


def open_run(path: str | Path) -> RunResults:
    """Open the run directory or results.h5 ``path``; close it, or use it in a ``with`` block.

    Raises:
        InputError: there is no finished run at ``path``, it is no results.h5, or parts it points to are gone.
    """
    path = Path(path)
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        if (file.parent / RUN).is_file():
            raise InputError(
                f"the run in {shown(file.parent)} is not finished: run the same `xai explain` again, "
                f"or `xai merge {shown(file.parent)}` if every shard is done"
            )
        raise InputError(f"{shown(path)} holds no run: there is no {RESULTS}")
    return RunResults(file)


class RunResults:
    """The contents of a results.h5, read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sound: set[str] = set()  # parts that were looked through
        self._sound_maps: set[str] = set()  # maps all of whose parts were
        with self._refusing():
            self._file = opened(path)
        try:
            with self.reading():
                self._check()
        except InputError:
            self.close()
            raise

    def _check(self) -> None:
        if self._file.attrs.get("schema") != SCHEMA:
            raise InputError(f"{shown(self.path)} is not a {SCHEMA} results file")
        for name in self.names:
            sources = sources_of(self._file[f"heatmaps/{name}"])
            gone = [source for source in sources if not (self.path.parent / source).is_file()]
            if gone:
                raise InputError(
                    f"{shown(self.path)} is an index of parts, and these are gone: {', '.join(gone[:8])}"
                )

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except Unsound as error:
            raise InputError(
                f"{shown(self.path)} cannot be taken as the results of a run: {error}; "
                "make it again by `xai explain`, or take it from a backup"
            ) from error

    @contextmanager
    def reading(self) -> Iterator[h5py.File]:
        """The file itself; what h5py raises in the block becomes ``InputError``."""
        with self._refusing(), damage():
            yield self._file

    @cached_property
    def attrs(self) -> dict[str, Any]:
        """Versions, model, device, seed and all else noted about the run."""
        with self.reading() as file:
            return dict(file.attrs)

    @property
    def config(self) -> str:
        """The YAML of the run."""
        return str(self.attrs.get("config", ""))

    @cached_property
    def images(self) -> dict[str, Array]:
        """Columns with one entry an image: path, label, status, ..."""
        return self._columns("images")

    @cached_property
    def explanations(self) -> dict[str, Array]:
        """Columns with one entry an explanation: image (row of ``images``), target, score, ..."""
        return self._columns("explanations")

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """The names of the classes."""
        with self.reading() as file:
            return tuple(_read(file["categories"])) if "categories" in file else ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the maps, in alphabetical order."""
        return tuple(self._file.get("heatmaps", {}))

    def heatmap(self, name: str, rows: Rows = None) -> Array:
        """The raw maps ``name``: (rows, H, W) or (rows, C, H, W); one map where ``rows`` is a number.

        Args:
            rows: which explanations, in any order, repeated or not; ``None``: all.
        Raises: InputError: no such map; IndexError: no such row.
        """
        maps = self._maps(name)
        self._look_through_parts(maps)
        if rows is None or isinstance(rows, int | slice):
            return self._taken(maps, slice(None) if rows is None else rows)
        index = np.asarray(rows)
        if not index.size:
            return self._taken(maps, slice(0))
        chosen = np.arange(len(maps))[index]  # negative rows and boolean masks become indices
        if len(chosen) and (np.diff(chosen) == 1).all():
            return self._taken(maps, slice(chosen[0], chosen[-1] + 1))  # HDF5 reads a range much faster
        ordered, place = np.unique(chosen, return_inverse=True)
        return self._taken(maps, ordered)[place]

    def _taken(self, maps: h5py.Dataset, rows: int | slice | Array) -> Array:
        if isinstance(rows, int) and not -len(maps) <= rows < len(maps):
            raise IndexError(f"there is no row {rows}; {shown(maps.name)} has {len(maps)}")
        with self.reading():
            return np.asarray(maps[rows])

    def _look_through_parts(self, maps: h5py.Dataset) -> None:
        """Refuse parts that are no better than a results.h5 may be: what they point to would be read, too."""
        if maps.name in self._sound_maps:  # to list thousands of parts takes longer than to read a few maps
            return
        for source in sources_of(maps):
            if source not in self._sound:
                with self._refusing():
                    opened(self.path.parent / source).close()
                self._sound.add(source)
        self._sound_maps.add(maps.name)

    def shape(self, name: str) -> tuple[int, ...]:
        """That of one map ``name``: (H, W) or (C, H, W)."""
        return tuple(self._maps(name).shape[1:])

    def heatmap_attrs(self, name: str) -> dict[str, Any]:
        """Method, parameters, layer, preset and source of the maps ``name``."""
        return dict(self._maps(name).attrs)

    def status(self, name: str) -> Array:
        """0 ok, 1 flat, 2 not finite, 3 failed, one entry an explanation."""
        self._maps(name)
        if f"status/{name}" not in self._file:
            raise InputError(f"this run keeps no status of {name}")
        with self.reading() as file:
            return _read(file[f"status/{name}"])

    def extras(self, name: str) -> dict[str, Array]:
        """What the method adds to its maps, one entry an explanation."""
        self._maps(name)
        return self._columns(f"extras/{name}")

    @cached_property
    def scored(self) -> tuple[str, ...]:
        """The methods and baselines that have metrics, in alphabetical order."""
        groups = ("metrics", "curves", "summary")
        return tuple(sorted({name for group in groups for name in self._file.get(group, ())}))

    def metrics(self, name: str) -> dict[str, Array]:
        """The metrics of the method or baseline ``name``, one entry an explanation; empty before an evaluation."""
        if name not in self.scored:
            self._maps(name)
        return self._columns(f"metrics/{name}")

    def metric_attrs(self, name: str, metric: str) -> dict[str, Any]:
        """Direction, bounds, parameters, preset and source of a metric of ``name``. Raises: InputError: not scored."""
        for group in ("metrics", "curves", "summary"):
            if f"{group}/{name}/{metric}" in self._file:
                return dict(self._file[f"{group}/{name}/{metric}"].attrs)
        raise InputError(f"{name} has no metric {metric!r} in this run")

    def measured(self, name: str) -> dict[str, dict[str, Any]]:
        """What is said of each metric of ``name``: its registered name, options, direction; without reading numbers."""
        found: dict[str, dict[str, Any]] = {}
        for group in ("metrics", "curves", "summary"):
            for metric, dataset in self._file.get(f"{group}/{name}", {}).items():
                if "metric" in dataset.attrs:
                    found.setdefault(metric, dict(dataset.attrs))
        return found

    def curves(self, name: str) -> dict[str, Array]:
        """The steps behind the metrics of ``name``, (rows, S + 1); ``<metric>.fraction`` is their abscissa."""
        return self._columns(f"curves/{name}")

    def summary(self, name: str) -> dict[str, float]:
        """The metrics of ``name`` that are one number a run."""
        return {key: float(values) for key, values in self._columns(f"summary/{name}").items()}

    def is_scored(self, name: str, metric: str, identity: str) -> bool:
        """Whether every row of ``name`` has this metric, computed as ``identity`` says."""
        if not len(self.explanations["image"]):
            return True
        found = self._file.get(f"metrics/{name}/{metric}", self._file.get(f"curves/{name}/{metric}"))
        if found is None:
            return False
        return bool(found.attrs.get("complete", False)) and found.attrs.get("identity") == identity

    def to_xarray(self, names: Sequence[str] | None = None) -> xarray.Dataset:
        """The run as one Dataset in memory; the columns are named like their path, maps by their name.

        Args:
            names: the maps to take; ``None``: all.
        Raises: ImportError: xarray is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise ImportError("to_xarray needs xarray: pip install 'xcli[xarray]'") from error
        data: dict[str, tuple[tuple[str, ...], Array]] = {}
        for key, column in self.images.items():
            data[f"images/{key}"] = (("image",), column)
        for key, column in self.explanations.items():
            data[f"explanations/{key}"] = (("explanation",), column)
        sizes: dict[str, int] = {}
        for name in self.names if names is None else names:
            maps = self.heatmap(name)
            data[name] = (("explanation", *_dimensions(name, maps.shape[1:], sizes)), maps)
        return xarray.Dataset(data, attrs=self.attrs)

    def close(self) -> None:
        """Close the file; what was read stays."""
        self._file.close()

    def __enter__(self) -> Self:
        """The results."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def _maps(self, name: str) -> h5py.Dataset:
        if name not in self.names:
            raise InputError(f"no heatmap {name!r} in this run; it has {', '.join(self.names) or 'none'}")
        return self._file[f"heatmaps/{name}"]

    def _columns(self, group: str) -> dict[str, Array]:
        with self.reading() as file:
            found: Mapping[str, h5py.Dataset] = file.get(group, {})
            return Columns({key: _read(dataset) for key, dataset in found.items()})


class Columns(dict[str, Array]):
    """Columns by name; one that the run lacks is an ``InputError``."""

    def __missing__(self, key: str) -> Array:
        raise InputError(f"this run has no column {key}; it has {', '.join(self) or 'none'}")


def _read(dataset: h5py.Dataset) -> Array:
    if h5py.check_string_dtype(dataset.dtype):
        return np.asarray(dataset.asstr()[...], dtype=object)
    return np.asarray(dataset[...])


def _dimensions(name: str, shape: tuple[int, ...], sizes: dict[str, int]) -> tuple[str, ...]:
    """The dimension names of a map; y, x and channel are shared by the maps of one size."""
    shared = ("channel", "y", "x")[3 - len(shape) :]
    return tuple(
        axis if sizes.setdefault(axis, length) == length else f"{axis}_{name}"
        for axis, length in zip(shared, shape, strict=True)
    )
