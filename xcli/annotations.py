"""Where the explained objects are: from masks, boxes and polygons on disk to a ``Truth`` on the grid of the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xcli.errors import ConfigError, InputError
from xcli.inputs import Source
from xcli.metrics.base import Truth
from xcli.preprocess import Geometry, Size
from xcli.readers.coco import Coco
from xcli.readers.grid import Grid, Mask, Reader, Values
from xcli.readers.masks import Masks
from xcli.readers.matching import files_below
from xcli.readers.table import open_table
from xcli.readers.voc import Difficult, Voc

Format = Literal["auto", "masks", "voc", "coco", "manifest"]


@dataclass(frozen=True)
class TruthSpec:
    """Where annotations are and how they are meant.

    Attributes:
        path: a folder of masks (.png) or VOC files (.xml), a COCO file (.json), or a table (.csv, .tsv).
        format: "auto" tells it by the suffix, or by what the folder holds.
        values: what the pixel values of masks show (``readers.masks.Masks``). "object" holds in every format:
            whatever is annotated is the truth of every class explained, and class names play no part.
        difficult: what VOC objects marked so are worth (``readers.voc.Voc``).
    """

    path: str | None = None
    format: Format = "auto"
    values: Values = "class-plus-one"
    difficult: Difficult = "with-others"


@dataclass(frozen=True)
class Annotations:
    """The annotations of a run's images. An image is read each time it is asked for; nothing is kept."""

    reader: Reader

    @classmethod
    def open(cls, spec: TruthSpec, sources: Sequence[Source], categories: Sequence[str]) -> Annotations:
        """Find out which images have annotations, without reading those of each image.

        Args:
            sources: the images of the run.
            categories: the model's, in the order of its logits; VOC and COCO name classes so.
        Raises:
            ConfigError: the path is missing, its format cannot be told, it is none of that format, it has nothing on
                any of the images, or no class of it is the model's.
        """
        if not spec.path:
            raise ConfigError("ground truth needs a path: a folder of .png or .xml, or a .json or .csv file")
        if not Path(spec.path).exists():
            raise ConfigError(f"{spec.path!r} does not exist; it should hold the ground truth")
        kind = format_of(spec.path) if spec.format == "auto" else spec.format
        if Path(spec.path).is_dir() != (kind in ("masks", "voc")):
            wanted = "a folder" if kind in ("masks", "voc") else "a file"
            raise ConfigError(f"{spec.path}: ground truth of the format {kind} is {wanted}")
        match kind:
            case "masks":
                return cls(Masks.below(spec.path, sources, spec.values))
            case "voc":
                return cls(Voc.below(spec.path, sources, categories, spec.values, spec.difficult))
            case "coco":
                return cls(Coco.of(spec.path, sources, categories, spec.values))
            case _:
                return cls(open_table(spec.path, sources, categories, spec.values))

    @property
    def matched(self) -> int:
        """How many of the run's images have annotations."""
        return self.reader.matched

    def of(
        self, source: Source, geometry: Geometry, classes: Sequence[int]
    ) -> tuple[Mask, NDArray[np.bool_]]:
        """Where some classes are in one image, on the grid of the input.

        An input pixel shows what is at its centre in the original; padding shows nothing.

        Returns:
            masks (k, H, W) and known (k,): false for a class that is not annotated in this image. A known object can
            have an empty mask: it was cropped away.
        Raises:
            InputError: the annotation is missing, damaged, or made for an image of other proportions.
        """
        found = self.reader.masks(source, Grid.of(geometry), classes)
        nothing = np.zeros(geometry.input, dtype=np.bool_)
        masks = [nothing if mask is None else mask for mask in found]
        known = np.array([mask is not None for mask in found], dtype=np.bool_)
        return np.stack(masks) if masks else np.zeros((0, *geometry.input), dtype=np.bool_), known


def format_of(path: str) -> Format:
    """The format of a file by its suffix, of a folder by what it holds.

    Raises:
        ConfigError: it cannot be told.
    """
    by_suffix: dict[str, Format] = {".json": "coco", ".csv": "manifest", ".tsv": "manifest"}
    if not Path(path).is_dir():
        kind = by_suffix.get(Path(path).suffix.lower())
        if kind is None:
            raise ConfigError(
                f"{path}: the format of this ground truth is not known by its suffix;"
                " give a .json (COCO) or .csv file, or a folder of .png or .xml"
            )
        return kind
    png, xml = files_below(path, ".png"), files_below(path, ".xml")
    if bool(png) == bool(xml):
        text = "both .png and .xml; say which: format: masks or format: voc" if png else "no .png and no .xml"
        raise ConfigError(f"{path}: holds {text}")
    return "masks" if png else "voc"


def truth(
    annotations: Annotations,
    sources: Sequence[Source],
    geometries: Sequence[Geometry],
    image: Tensor,
    target: Tensor,
    size: Size,
    device: torch.device | str,
    *,
    pool: Executor | None = None,
    on_error: Callable[[int, InputError], None] | None = None,
) -> Truth:
    """The truth of N rows over a batch of B images; each image's annotation is read once.

    Args:
        sources, geometries: of the B images.
        image: (N,), index of each row's image; ``target`` (N,): the class that it explains.
        size: (H, W) of the input.
        pool: threads to read in; ``None``: the caller's.
        on_error: told the index of an image whose annotation cannot be read, and why; its rows are not known then.
            ``None``: the first error is raised.
    Returns: on ``device``.
    Raises:
        InputError: an annotation cannot be read, and no ``on_error`` is given.
    """
    rows: dict[int, list[int]] = {}
    for row, index in enumerate(image.tolist()):
        rows.setdefault(index, []).append(row)
    classes = target.tolist()

    def read(index: int) -> tuple[Mask, NDArray[np.bool_]] | InputError:
        try:
            return annotations.of(sources[index], geometries[index], [classes[row] for row in rows[index]])
        except InputError as error:
            return error

    masks = torch.zeros((len(classes), *size), dtype=torch.bool)
    known = torch.zeros(len(classes), dtype=torch.bool)
    for (index, own), found in zip(rows.items(), (pool.map if pool else map)(read, rows), strict=True):
        if not isinstance(found, InputError):
            masks[own], known[own] = torch.from_numpy(found[0]), torch.from_numpy(found[1])
        elif on_error is None:
            raise found
        else:
            on_error(index, found)
    scales = [(geometries[index].scale_y, geometries[index].scale_x) for index in image.tolist()]
    pixel = torch.tensor(scales, dtype=torch.float32).reshape(-1, 2)
    return Truth(masks.to(device), known.to(device), pixel.to(device))
