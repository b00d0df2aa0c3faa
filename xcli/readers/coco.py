"""COCO: one JSON file with the polygons, run lengths or boxes of all images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xcli.decode import MAX_PIXELS
from xcli.errors import ConfigError, InputError
from xcli.inputs import Source
from xcli.preprocess import Size
from xcli.readers.grid import Grid, Mask, Thing, Values, drawn, union
from xcli.readers.matching import class_index, matched, require_classes, require_matches

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """An image of the file: its size (H, W) if given, and its annotations as they stand there."""

    size: Size | None
    annotations: Sequence[Record]


@dataclass(frozen=True)
class Coco:
    """The annotations of each image. A segmentation goes before a box; crowds count, as in TorchRay's pointing game."""

    file: str
    pictures: Mapping[str, Picture]
    names: Mapping[Any, str]
    index: Callable[[str], int | None]
    values: Values

    @classmethod
    def of(cls, file: str, sources: Sequence[Source], categories: Sequence[str], values: Values) -> Coco:
        """The annotations of the run's images; an image is found by its path, else by its name if that is unique."""
        images, annotations, kinds = _lists(file)
        try:
            names = {kind["id"]: str(kind["name"]) for kind in kinds}
            by_name = {str(image["file_name"]): image for image in images}
            found = matched(sources, by_name, str, basenames=True)
            require_matches(file, found, sources, by_name)
            own: dict[Any, list[Record]] = {by_name[name]["id"]: [] for name in found.values()}
            for one in annotations:
                if one["image_id"] in own:
                    own[one["image_id"]].append(_slim(one))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{file}: not a COCO annotation file: an entry lacks {error}") from error
        if values != "object" and found:
            require_classes(file, names.values(), categories)
        pictures = {
            path: Picture(_size(by_name[name]), own[by_name[name]["id"]]) for path, name in found.items()
        }
        return cls(file, pictures, names, class_index(categories), values)

    @property
    def matched(self) -> int:
        return len(self.pictures)

    def masks(self, source: Source, grid: Grid, classes: Sequence[int]) -> list[Mask | None]:
        picture = self.pictures.get(source.path)
        if picture is None:
            return [None] * len(classes)
        try:
            here = grid if picture.size is None else grid.on(picture.size, f"{self.file}, {source.path}")
            things = [self.thing(one) for one in picture.annotations]
            return drawn(things, here, classes, self.index)
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise InputError(f"{self.file}: damaged annotation of {source.path} ({error})") from error

    def thing(self, one: Record) -> Thing:
        name = None if self.values == "object" else self.names[one["category_id"]]
        return Thing(name, partial(draw, one))


def draw(one: Record, grid: Grid) -> Mask:
    """An annotation as a mask (H, W)."""
    shape = one.get("segmentation")
    if isinstance(shape, Mapping):
        return grid.raster(_runs(shape, grid.size))
    if shape:
        return union([grid.polygon(_corners(ring)) for ring in shape])
    left, top, width, height = (float(number) for number in one["bbox"])
    return grid.box((left, top, left + width, top + height))


def _corners(ring: NDArray[np.float32]) -> NDArray[np.float64]:
    corners = np.asarray(ring, dtype=np.float64).reshape(-1, 2)
    if not np.isfinite(corners).all():
        raise ValueError("a polygon with coordinates that are no numbers")
    return corners


def _runs(shape: Record, size: Size) -> NDArray[np.bool_]:
    """A mask (h, w) from run lengths down the columns, of 0 and 1 in turn."""
    height, width = (int(side) for side in shape["size"])
    counts = shape["counts"]
    lengths = np.asarray(inflated(counts) if isinstance(counts, str) else counts, dtype=np.int64)
    if (height, width) != size:
        raise ValueError(f"run lengths for {width}x{height} pixels in an image of {size[1]}x{size[0]}")
    if height * width > MAX_PIXELS or not fills(lengths, height * width):
        raise ValueError("run lengths that do not fill the image")
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T


def fills(lengths: NDArray[np.int64], total: int) -> bool:
    """Whether run lengths, none of them negative, add up to a number of pixels."""
    return bool(((lengths >= 0) & (lengths <= total)).all() and lengths.sum() == total)


def inflated(text: str) -> list[int]:
    """The run lengths in COCO's compressed text.

    Each character holds 5 bits above "0", the lowest first, and a sixth bit that says whether more follow; the last
    one's fifth bit is the sign. From the fourth number on they are differences to the last but one.
    """
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"no run length: {letter!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def _lists(file: str) -> tuple[list[Record], list[Record], list[Record]]:
    """The images, annotations and categories of the file."""
    try:
        content = json.loads(Path(file).read_bytes())
        images, annotations, kinds = (content[key] for key in ("images", "annotations", "categories"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not a readable JSON file ({error})") from error
    except (KeyError, TypeError, IndexError):
        raise ConfigError(
            f"{file}: not a COCO annotation file: it needs images, annotations and categories"
        ) from None
    return images, annotations, kinds


def _slim(one: Record) -> Record:
    """What is needed of an annotation; polygons as arrays, a tenth of their size as lists."""
    shape = one.get("segmentation")
    if isinstance(shape, list):
        try:
            shape = [np.asarray(ring, dtype=np.float32) for ring in shape]
        except (ValueError, TypeError):
            shape = [np.array([np.nan, np.nan])]  # its image will say so
    return {"category_id": one.get("category_id"), "bbox": one.get("bbox"), "segmentation": shape}


def _size(image: Record) -> Size | None:
    height, width = image.get("height"), image.get("width")
    return (
        (height, width) if isinstance(height, int) and isinstance(width, int) and height and width else None
    )
