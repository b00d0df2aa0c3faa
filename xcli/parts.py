"""A part: the results of an ordered list of images, as one HDF5 file built in memory.

Paths inside are those of results.h5; the first dimension counts the images of the part below ``images/``
and its explanations elsewhere. Maps are stored one a chunk, so that merging copies bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Literal, cast

import h5py
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Attrs = Mapping[str, str | int | float]
Compression = Literal["gzip", "lzf", "none"]
SCHEMA = "xcli/1"
PART_SCHEMA = "xcli/1 part"
STRING = h5py.string_dtype("utf-8")

_FILTERS: dict[str, dict[str, Any]] = {
    "gzip": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
    "lzf": {"compression": "lzf", "shuffle": True},
    "none": {},
}

FILTERS: tuple[list[int], ...] = ([2, 1], [2, 32000], [])
"""The same as HDF5 numbers them, in the order of writing: shuffle, then gzip or lzf; or nothing."""


@dataclass(frozen=True)
class Encoded:
    """Maps whose chunks are already compressed by ``encode``: the filter is gzip + shuffle."""

    chunks: tuple[bytes, ...]  # one a map
    tail: tuple[int, ...]  # (H, W) or (C, H, W)
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return len(self.chunks)


Column = Array | Sequence[str] | Encoded


@dataclass(frozen=True)
class Part:
    """The columns of a part, by their path in results.h5, and the attributes of some of them.

    ``images/path`` is not among them: the store adds it. ``explanations/image`` holds rows of the whole run.
    """

    columns: Mapping[str, Column]
    attrs: Mapping[str, Attrs] = field(default_factory=dict)


# --- compression ---------------------------------------------------------------------------------------------


def encode(row: Array) -> bytes:
    """One map as the bytes of a gzip + shuffle chunk, for any HDF5 reader; safe and parallel in threads.

    Each byte plane of the shuffled map becomes deflate blocks of its own: noise is stored as it is (the low
    bytes of a mantissa do not shrink), the rest is run-length and Huffman coded. On up-sampled maps this takes a
    quarter (signed) to two thirds (rectified) of the time of deflate level 1, for a tenth more bytes at most.
    """
    contiguous = np.ascontiguousarray(row)
    planes = np.ascontiguousarray(contiguous.view(np.uint8).reshape(contiguous.size, contiguous.itemsize).T)
    pieces = [b"\x78\x01"]  # the zlib header: deflate, window of 32 KiB, fastest
    for index, plane in enumerate(planes):
        level = 0 if _is_noise(plane) else 1
        coder = zlib.compressobj(
            level, zlib.DEFLATED, -15, 8, zlib.Z_RLE
        )  # no header: these are joined below
        pieces.append(coder.compress(plane.data))
        pieces.append(coder.flush(zlib.Z_FINISH if index == len(planes) - 1 else zlib.Z_FULL_FLUSH))
    pieces.append(zlib.adler32(planes.data).to_bytes(4, "big"))
    return b"".join(pieces)


def _is_noise(plane: NDArray[np.uint8]) -> bool:
    """Whether neither runs nor frequent values would shrink ``plane``; judged on a sample."""
    if plane.size < 1024 or np.mean(plane[1:] == plane[:-1]) > 0.1:
        return False
    counts = np.bincount(plane[:: max(1, plane.size // 8192)], minlength=256)
    share = counts[counts > 0] / counts.sum()
    return bool(-(share * np.log2(share)).sum() > 7.8)  # bits a byte


def encoded(maps: Array) -> Encoded:
    """``maps``, (rows, ...), compressed row by row."""
    return Encoded(tuple(encode(row) for row in maps), maps.shape[1:], maps.dtype)


# --- layout --------------------------------------------------------------------------------------------------


def axis(key: str) -> Literal["images", "rows", "shared"]:
    """What the first dimension of the dataset ``key`` counts; ``shared``: it is the same in every part."""
    if key.startswith("images/"):
        return "images"
    return "shared" if key.startswith("curves/") and key.endswith(".fraction") else "rows"


def is_map(key: str) -> bool:
    """Whether the dataset ``key`` is stored compressed, one row a chunk."""
    return key.startswith("heatmaps/")


def create(
    group: h5py.Group,
    key: str,
    shape: tuple[int, ...],
    dtype: Any,
    compression: Compression,
    fill: float | None = None,
) -> h5py.Dataset:
    """An empty dataset with the layout of the contract."""
    if not is_map(key):
        return group.create_dataset(key, shape=shape, dtype=dtype, fillvalue=fill)
    growing = (None, *shape[1:]) if shape[0] == 0 else None  # HDF5 takes no chunk larger than a fixed shape
    chunk = (1, *shape[1:])
    return group.create_dataset(
        key, shape=shape, dtype=dtype, chunks=chunk, maxshape=growing, **_FILTERS[compression]
    )


def compression_of(dataset: h5py.Dataset) -> Compression:
    """The ``compression`` with which ``dataset`` was created."""
    return cast(Compression, dataset.compression or "none")


def printable(texts: Iterable[str]) -> list[str]:
    """``texts`` as HDF5 can hold them: no surrogates (names that are not UTF-8), no NUL."""
    return [text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00") for text in texts]


def write_attrs(target: h5py.Group | h5py.Dataset, attrs: Attrs) -> None:
    """Set ``attrs`` on ``target``, texts made printable."""
    for name, value in attrs.items():
        target.attrs[name] = printable([value])[0] if isinstance(value, str) else value


def is_text(column: Column) -> bool:
    """Whether ``column`` holds strings."""
    return not isinstance(column, Encoded) and (
        not isinstance(column, np.ndarray) or column.dtype.kind in "OU"
    )


# --- writing -------------------------------------------------------------------------------------------------


def part_bytes(part: Part, paths: Sequence[str], fingerprint: str, compression: Compression) -> memoryview:
    """The HDF5 file of ``part``; ``paths`` are the names of its images."""
    check(part, len(paths))
    memory = BytesIO()
    with h5py.File(memory, "w") as file:
        write_attrs(file, {"schema": PART_SCHEMA, "fingerprint": fingerprint})
        for key, column in {"images/path": paths, **part.columns}.items():
            dataset = _write(file, key, column, compression)
            write_attrs(dataset, part.attrs.get(key, {}))
    return memory.getbuffer()


def check(part: Part, images: int) -> None:
    """Raise ``ValueError`` where the columns of ``part`` do not fit together."""
    if "images/path" in part.columns:
        raise ValueError("images/path is added by the store")
    if "explanations/image" not in part.columns:
        raise ValueError("a part needs explanations/image, with no row where nothing was selected")
    rows = len(part.columns["explanations/image"])
    for key, column in part.columns.items():
        wanted = {"images": images, "rows": rows, "shared": len(column)}[axis(key)]
        if len(column) != wanted:
            raise ValueError(f"{key} has {len(column)} rows, expected {wanted}")
    if unknown := set(part.attrs) - set(part.columns):
        raise ValueError(f"attributes for columns that are not there: {', '.join(sorted(unknown))}")


def _write(file: h5py.File, key: str, column: Column, compression: Compression) -> h5py.Dataset:
    if is_text(column):
        texts = np.array(printable(cast(Sequence[str], column)), dtype=object)
        return file.create_dataset(key, shape=texts.shape, data=texts, dtype=STRING)
    if is_map(key) and isinstance(column, np.ndarray) and compression == "gzip":
        column = encoded(column)
    if isinstance(column, Encoded):
        if compression != "gzip":
            raise ValueError(f"{key} is encoded as gzip, but the run is stored with {compression}")
        return _write_chunks(file, key, column)
    values = np.asarray(column)
    dataset = create(file, key, values.shape, values.dtype, compression)
    if values.size:
        dataset[...] = values
    return dataset


def _write_chunks(file: h5py.File, key: str, maps: Encoded) -> h5py.Dataset:
    dataset = create(file, key, (len(maps), *maps.tail), maps.dtype, "gzip")
    origin = (0,) * len(maps.tail)
    for row, chunk in enumerate(maps.chunks):
        dataset.id.write_direct_chunk((row, *origin), chunk)
    return dataset
