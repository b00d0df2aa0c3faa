"""Masks as pictures: palette or grey PNGs whose pixel values name classes, or show the object."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from xcli.decode import MAX_PIXELS
from xcli.errors import ConfigError, InputError
from xcli.inputs import Source
from xcli.readers.grid import Grid, Mask, Values
from xcli.readers.matching import files_below, matched, require_matches, stem

VOID = 255
"""The value of 8-bit masks that ``values: class`` takes for no class."""

_INDEXED = ("1", "L", "P", "I", "I;16", "I;16B")
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


@dataclass(frozen=True)
class Masks:
    """Mask files of each image; the masks of one image are united.

    ``values`` says what a pixel value v shows: "class-plus-one": class v - 1, 0 is background; "class": class v, 255
    of an 8-bit mask is void; "object": anything but 0 is the object, whatever class is explained. Class names play
    no part.
    """

    files: Mapping[str, Sequence[str]]
    values: Values

    @classmethod
    def below(cls, folder: str, sources: Sequence[Source], values: Values) -> Masks:
        """PNG files in the folders of the images, under their names."""
        files = files_below(folder, ".png")
        if not files:
            raise ConfigError(f"{folder}: holds no .png")
        found = matched(sources, files, stem)
        require_matches(folder, found, sources, (f"{name}.png" for name in files))
        return cls({path: [files[name]] for path, name in found.items()}, values)

    @property
    def matched(self) -> int:
        return len(self.files)

    def masks(self, source: Source, grid: Grid, classes: Sequence[int]) -> list[Mask | None]:
        found: list[Mask | None] = [None] * len(classes)
        for file in self.files.get(source.path, ()):
            picture = read_indices(file, colours=self.values == "object")
            here = grid.on((picture.shape[0], picture.shape[1]), file)
            for place, label in enumerate(classes):
                shown, before = self.shown(picture, label), found[place]
                if shown.any():  # anywhere in the picture, even if it is cropped away
                    found[place] = here.raster(shown) if before is None else before | here.raster(shown)
        return found

    def shown(self, picture: NDArray[Any], label: int) -> Mask:
        """Which pixels (h, w) show a class."""
        if self.values == "object":
            return np.asarray(picture != 0)
        value = label + 1 if self.values == "class-plus-one" else label
        if self.values == "class" and value == VOID and picture.dtype.itemsize == 1:
            return np.zeros(picture.shape, dtype=np.bool_)
        return np.asarray(picture == value)


def read_indices(file: str, *, colours: bool = False) -> NDArray[Any]:
    """The pixel values (h, w) of a palette or grey PNG: palette entries, not colours.

    Args:
        colours: take pictures of other modes too, as 1 where a colour is not black.
    Raises:
        InputError: missing, not a PNG, damaged, too large, or in colours.
    """
    try:
        if not Path(file).is_file():
            raise InputError(f"{file}: missing, or not a file")
        with Path(file).open("rb") as data, Image.open(data, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{file}: too many pixels ({image.width}x{image.height} > {MAX_PIXELS})")
            if image.mode not in _INDEXED and not colours:
                raise InputError(
                    f"{file}: a mask holds class numbers in palette or grey pixels; this one is {image.mode}"
                )
            if image.mode not in _INDEXED:
                return np.asarray(np.asarray(image.convert("RGB")).any(-1))
            spread = _spread(file)
            return np.asarray(image) if spread == 1 else np.asarray(image) // spread
    except _DAMAGE as error:
        text = str(error) or type(error).__name__
        raise InputError(f"{file}: not a readable PNG ({text})") from error


def _spread(file: str) -> int:
    """What Pillow multiplies grey pixels of 2 or 4 bits by, to fill 8 bits."""
    with Path(file).open("rb") as data:
        depth, colour = data.read(26)[24:26]  # of the header, which comes first
    return {2: 85, 4: 17}.get(depth, 1) if colour == 0 else 1
