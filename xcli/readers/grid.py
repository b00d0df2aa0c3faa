"""Annotated objects drawn on the grid of a model's input: its pixel centres, seen in the annotation's own pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from xcli.errors import InputError
from xcli.inputs import Source
from xcli.preprocess import Geometry, Size

Mask = NDArray[np.bool_]
Values = Literal["class-plus-one", "class", "object"]
Box = tuple[float, float, float, float]
"""left, top, right, bottom in continuous coordinates: pixel i covers [i, i + 1)."""


@dataclass(frozen=True)
class Grid:
    """The centres of the input's pixels, H rows and W columns, in pixels of a picture.

    Attributes:
        y, x: (H,) and (W,); outside the picture where the input is padding.
        size: (h, w) of the picture.
    """

    y: NDArray[np.floating[Any]]
    x: NDArray[np.floating[Any]]
    size: Size

    @classmethod
    def of(cls, geometry: Geometry) -> Grid:
        """In pixels of the original image."""
        rows, columns = geometry.input
        return cls(
            geometry.scale_y * (np.arange(rows) + 0.5) + geometry.offset_y,
            geometry.scale_x * (np.arange(columns) + 0.5) + geometry.offset_x,
            geometry.original,
        )

    def on(self, size: Size, file: str) -> Grid:
        """In pixels of the same picture at another size.

        Raises:
            InputError: its sides differ by more than a pixel from that of the same picture scaled.
        """
        (height, width), (rows, columns) = self.size, size
        if min(size) < 1 or abs(columns * height - rows * width) > max(height, width):
            raise InputError(
                f"{file}: made for an image of {columns}x{rows} pixels; the image has {width}x{height}"
            )
        return Grid(self.y * (rows / height), self.x * (columns / width), size)

    @property
    def inside(self) -> Mask:
        """(H, W): which pixels show the picture, and not padding."""
        height, width = self.size
        return ((self.y >= 0) & (self.y < height))[:, None] & ((self.x >= 0) & (self.x < width))

    def raster(self, picture: Mask) -> Mask:
        """(H, W) of a mask (h, w) of this size: its nearest pixels."""
        height, width = self.size
        rows, columns = np.floor(self.y).clip(0, height - 1), np.floor(self.x).clip(0, width - 1)
        return picture[np.ix_(rows.astype(np.intp), columns.astype(np.intp))] & self.inside

    def box(self, box: Box) -> Mask:
        """(H, W) of a filled box: the pixels whose centre is in it."""
        left, top, right, bottom = box
        rows, columns = (self.y >= top) & (self.y < bottom), (self.x >= left) & (self.x < right)
        return rows[:, None] & columns & self.inside

    def polygon(self, corners: NDArray[np.floating[Any]]) -> Mask:
        """(H, W) of a closed polygon with corners (P, 2) of x and y: the pixels whose centre is in it (even-odd)."""
        odd = np.zeros((len(self.y), len(self.x)), dtype=np.bool_)
        for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            rows = np.flatnonzero((self.y >= y1) != (self.y >= y2))  # those that the edge crosses
            if len(rows):
                crossing = x1 + (self.y[rows] - y1) * ((x2 - x1) / (y2 - y1))
                odd[rows] ^= self.x >= crossing[:, None]
        return odd & self.inside


@dataclass(frozen=True)
class Thing:
    """One annotated object: the name of its class (``None``: it stands for every class), and how it is drawn."""

    name: str | None
    draw: Callable[[Grid], Mask]

    @classmethod
    def box(cls, name: str | None, box: Box) -> Thing:
        """A filled box."""
        return cls(name, lambda grid: grid.box(box))


class Reader(Protocol):
    """The annotations of a run's images in one format."""

    @property
    def matched(self) -> int:
        """How many of the run's images have annotations."""

    def masks(self, source: Source, grid: Grid, classes: Sequence[int]) -> list[Mask | None]:
        """The masks (H, W) of some classes in one image; ``None`` for a class that is not annotated in it.

        Raises:
            InputError: the annotation of this image cannot be read.
        """


def drawn(
    things: Sequence[Thing], grid: Grid, classes: Sequence[int], index: Callable[[str], int | None]
) -> list[Mask | None]:
    """The union of the things of each class, each drawn once."""
    masks: dict[int, Mask] = {}

    def mask(number: int) -> Mask:
        if number not in masks:
            masks[number] = things[number].draw(grid)
        return masks[number]

    found: list[Mask | None] = []
    for label in classes:
        own = [i for i, thing in enumerate(things) if thing.name is None or index(thing.name) == label]
        found.append(union([mask(number) for number in own]) if own else None)
    return found


def union(masks: Sequence[Mask]) -> Mask:
    """Masks (H, W), one at least, as one."""
    together: Mask = np.logical_or.reduce(masks)
    return together
