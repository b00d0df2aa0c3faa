"""What a results.h5 or a part may consist of: one walk over the file refuses all else before anything of it is read.

A file may come from anybody. Links to other places, data kept in other files, types and filters that are not those of
the contract, columns whose lengths disagree and sizes that the file cannot hold are refused; maps are never read.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d

from xcli.parts import PART_SCHEMA, SCHEMA, axis, is_map
from xcli.visible import shown

DEPTH = {
    "images": 1,
    "explanations": 1,
    "heatmaps": 1,
    "status": 1,
    "extras": 2,
    "metrics": 2,
    "curves": 2,
    "summary": 2,
}
"""The groups of the contract, and how deep in each its datasets lie."""

UNWRITTEN = 64 << 20
"""Bytes that a dataset may have without being stored; what was never written reads as its fill value."""

EXTENTS = 10_000
"""Pieces between holes that are looked for in a file."""

LARGEST_MAP = 1 << 30
"""Bytes of one map."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
_PART = re.compile(r"parts/\d{5,}\.h5")
_DEFLATE, _SHUFFLE, _FLETCHER, _LZF = 1, 2, 3, 32000
_GROWTH = {_DEFLATE: 1100, _LZF: 300}
"""How many times as large data can be as what is stored of it."""

_TEXT = {"images/path", "images/error", "explanations/error", "categories"}
_WHOLE = {*(f"images/{name}" for name in ("label", "width", "height", "bytes", "status")),
          "explanations/image", "explanations/target"}  # fmt: skip
_REAL = {"explanations/score", "explanations/probability"}
_ANY = "tbiuf"
"""Texts, truth values, whole and real numbers; by the letters of NumPy's kinds, and t."""

_NEEDED = ("images/path", "explanations/image")
_TEXT_ATTRS = {
    *("schema", "fingerprint", "inputs", "layout", "config", "created", "model", "weights_sha256"),
    *("metric", "params", "direction", "preset", "bounds", "source", "identity", "method"),
    *("images.truth", "model.checkpoints"),
}
_JSON = {"params": dict, "bounds": list}

DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, MemoryError)
"""What h5py raises on bytes that are not as they were written."""


class Unsound(Exception):
    """Why a file is refused: the place in it and what is wrong there."""


@contextmanager
def damage() -> Iterator[None]:
    """Turn what h5py raises on damaged data into ``Unsound``; only reading belongs inside."""
    try:
        yield
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise Unsound(f"it is damaged: {reason.splitlines()[0]}") from error


def opened(path: Path) -> h5py.File:
    """The HDF5 file ``path``, walked over; the caller closes it.

    Raises:
        Unsound: it is no HDF5 file, or not one of the contract.
    """
    if not path.is_file():  # a FIFO would never answer
        raise Unsound("it is not a regular file")
    try:
        file = h5py.File(path, "r")
    except DAMAGE as error:
        raise Unsound(f"it cannot be read as HDF5: {error}") from error
    try:
        with damage():
            _walk(file, _size_on_disk(path))
    except BaseException:
        file.close()
        raise
    return file


def sources_of(maps: h5py.Dataset) -> list[str]:
    """The parts that virtual maps point to, each once; none where they are stored in the file itself."""
    return sorted({source.file_name for source in maps.virtual_sources()}) if maps.is_virtual else []


# --- the walk ------------------------------------------------------------------------------------------------


def _size_on_disk(path: Path) -> int:
    """Bytes that the file can hold: a hole in it counts nothing, as anybody can make one of any size."""
    with path.open("rb", buffering=0) as file:
        size, found, place = path.stat().st_size, 0, 0
        for _ in range(EXTENTS):  # no more are asked for: what follows counts whole
            try:
                start = os.lseek(file.fileno(), place, os.SEEK_DATA)
                place = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            except OSError as error:
                return found if error.errno == errno.ENXIO else size  # no data any more; or it does not say
            found += place - start
    return found + size - place


def _walk(file: h5py.File, room: int) -> None:
    _check_attrs(file, "/")
    if file.attrs.get("schema") not in (SCHEMA, PART_SCHEMA):
        raise Unsound(f"it is not a {SCHEMA} results file")
    found: dict[str, h5py.Dataset] = {}
    for name in file:
        if name == "categories":
            found[name] = _item(file, name, name, h5py.Dataset)
        elif name in DEPTH:
            found |= _datasets(_item(file, name, name, h5py.Group), name, DEPTH[name])
        else:
            raise Unsound(f"/{shown(name)} is no part of a run")
    for key in _NEEDED:
        if key not in found:
            raise Unsound(f"it lacks /{key}")
    for key, dataset in found.items():
        _check_kind(key, dataset)
        _check_storage(key, dataset, room)
    lengths = {"images": len(found["images/path"]), "rows": len(found["explanations/image"])}
    for key, dataset in found.items():
        _check_length(key, dataset, lengths, found)
    whole = file.attrs["schema"] == SCHEMA
    _check_owners(found["explanations/image"], lengths["images"], whole=whole)


def _datasets(group: h5py.Group, path: str, depth: int) -> dict[str, h5py.Dataset]:
    """The datasets ``depth`` levels below a group, by their path."""
    _check_attrs(group, path)
    kind = h5py.Dataset if depth == 1 else h5py.Group
    items = {f"{path}/{name}": _item(group, name, f"{path}/{name}", kind) for name in group}
    if depth == 1:
        return items
    return {k: v for name, item in items.items() for k, v in _datasets(item, name, depth - 1).items()}


def _item(group: h5py.Group, name: str, path: str, kind: type) -> h5py.HLObject:
    """What ``name`` is in ``group``: of that kind and no link."""
    if not _NAME.fullmatch(name):
        raise Unsound(f"/{shown(path)[:200]}: a name takes letters, digits, . _ + and -")
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise Unsound(f"/{path} is a link to another place or another file")
    item = group[name]
    if not isinstance(item, kind):
        raise Unsound(f"/{path} is a {type(item).__name__}, not a {kind.__name__}")
    return item


def _check_attrs(item: h5py.HLObject, path: str) -> None:
    """Attributes are single texts and numbers; those that are used have the type that they are used as."""
    for name in item.attrs:
        stored = item.attrs.get_id(name)
        text = h5py.check_string_dtype(stored.dtype) is not None
        if stored.shape != () or not (text or stored.dtype.kind in "biuf"):
            raise Unsound(f"the attribute {shown(name)!r} of {path} is no single text or number")
        if name in _TEXT_ATTRS and not text:
            raise Unsound(f"the attribute {name!r} of {path} is no text")
        value = item.attrs[name]
        if name in _JSON and not isinstance(_parsed(value), _JSON[name]):
            raise Unsound(f"the attribute {name!r} of {path} cannot be read")
        if name == "direction" and value not in ("higher", "lower"):
            raise Unsound(f"the attribute 'direction' of {path} is neither higher nor lower")
        if name == "layout" and value not in ("merged", "parts"):
            raise Unsound(f"the attribute 'layout' of {path} is neither merged nor parts")


def _parsed(text: str) -> object:
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found


# --- one dataset ---------------------------------------------------------------------------------------------


def _check_kind(key: str, dataset: h5py.Dataset) -> None:
    """Type and number of dimensions are those of the contract; a column unknown to it may be of any plain type."""
    _check_attrs(dataset, f"/{key}")
    group, dtype = key.partition("/")[0], dataset.dtype
    wanted = _ANY
    if key in _TEXT:
        wanted = "t"
    elif key in _WHOLE or group == "status":
        wanted = "iu"
    elif key in _REAL or group in ("heatmaps", "metrics", "curves", "summary"):
        wanted = "f"
    kind = dtype.kind if dtype.itemsize <= 8 and dtype.isnative else "?"
    if h5py.check_string_dtype(dtype) is not None:
        kind = "t"
    if kind not in wanted:
        raise Unsound(f"/{key} holds {dtype}, which it must not")
    dimensions = {"heatmaps": (3, 4), "curves": (1,) if key.endswith(".fraction") else (2,), "summary": (0,)}
    usual = (1, 2, 3) if wanted == _ANY else (1,)
    if dataset.shape is None or dataset.ndim not in dimensions.get(group, usual):
        raise Unsound(f"/{key} has the shape {dataset.shape}, which it must not")


def _check_storage(key: str, dataset: h5py.Dataset, room: int) -> None:
    """The data lies in this file, in a form that HDF5 reads by itself, and is not larger than it can be."""
    plist = dataset.id.get_create_plist()
    if plist.get_external_count():
        raise Unsound(f"/{key} keeps its data in another file")
    size = dataset.dtype.itemsize * int(np.prod(dataset.shape, dtype=object))
    if is_map(key) and size > LARGEST_MAP * max(1, dataset.shape[0]):
        raise Unsound(f"one map of /{key} has {size // max(1, dataset.shape[0])} bytes")
    if plist.get_layout() == h5d.VIRTUAL:
        _check_virtual(key, dataset)
        return
    filters = {plist.get_filter(number)[0] for number in range(plist.get_nfilters())}
    if foreign := filters - {_DEFLATE, _SHUFFLE, _FLETCHER, _LZF}:
        raise Unsound(f"/{key} needs the filter {min(foreign)}, which is not one of a run")
    stored = dataset.id.get_storage_size()
    growth = max((_GROWTH.get(one, 1) for one in filters), default=1)
    if stored > room or size > max(stored * growth, UNWRITTEN):
        raise Unsound(f"/{key} is said to have {size} bytes, more than the file can hold")


def _check_virtual(key: str, dataset: h5py.Dataset) -> None:
    """Only maps point elsewhere, and only to the same maps in the run's own parts."""
    for source in dataset.virtual_sources() if is_map(key) else [None]:
        if source is None or not _PART.fullmatch(source.file_name) or source.dset_name.lstrip("/") != key:
            raise Unsound(f"/{key} points to data elsewhere")


def _check_length(
    key: str, dataset: h5py.Dataset, lengths: dict[str, int], found: dict[str, h5py.Dataset]
) -> None:
    kind = axis(key)
    if key == "categories" or key.startswith("summary/"):
        return
    if kind == "shared":
        curve = found.get(key.removesuffix(".fraction"))
        wanted = len(dataset) if curve is None else curve.shape[1]
    else:
        wanted = lengths[kind]
    if len(dataset) != wanted:
        raise Unsound(f"/{key} has {len(dataset)} entries instead of {wanted}")


def _check_owners(owners: h5py.Dataset, images: int, *, whole: bool) -> None:
    """Every row has its image; those of a part count from the start of the run."""
    rows = owners[...].astype(np.int64)
    first = 0 if whole or not rows.size else rows.min()
    if rows.size and not (rows.min() >= 0 and rows.max() - first < images):
        raise Unsound(f"/explanations/image names images that are not there: it has {images}")
