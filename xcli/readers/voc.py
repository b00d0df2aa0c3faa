"""Pascal VOC: an XML file an image, with named boxes."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from xcli.errors import ConfigError, InputError
from xcli.inputs import Source
from xcli.preprocess import Size
from xcli.readers.grid import Box, Grid, Mask, Thing, Values, drawn
from xcli.readers.matching import class_index, files_below, matched, require_classes, require_matches, stem

Difficult = Literal["with-others", "count", "leave-out"]


class VocObject(NamedTuple):
    """One object of a file."""

    name: str
    box: Box
    difficult: bool


@dataclass(frozen=True)
class Voc:
    """The XML file of each image. Boxes are filled.

    Objects marked difficult: ``with-others`` counts them where their class has another object in the image, and else
    the class is unknown there, as in TorchRay's pointing game; ``count`` treats them as all others; ``leave-out`` does
    not see them.
    """

    files: Mapping[str, str]
    index: Callable[[str], int | None]
    values: Values
    difficult: Difficult

    @classmethod
    def below(
        cls,
        folder: str,
        sources: Sequence[Source],
        categories: Sequence[str],
        values: Values,
        difficult: Difficult,
    ) -> Voc:
        """XML files in the folders of the images, or all in one, under their names."""
        files = files_below(folder, ".xml")
        if not files:
            raise ConfigError(f"{folder}: holds no .xml")
        found = matched(sources, files, stem)
        require_matches(folder, found, sources, (f"{name}.xml" for name in files))
        chosen = {path: files[name] for path, name in found.items()}
        if values != "object" and chosen:
            require_classes(folder, _names(chosen.values()), categories)
        return cls(chosen, class_index(categories), values, difficult)

    @property
    def matched(self) -> int:
        return len(self.files)

    def masks(self, source: Source, grid: Grid, classes: Sequence[int]) -> list[Mask | None]:
        file = self.files.get(source.path)
        if file is None:
            return [None] * len(classes)
        size, objects = read_voc(file)
        things = [
            Thing.box(None if self.values == "object" else one.name, one.box)
            for one in objects
            if self.counts(one, objects)
        ]
        return drawn(things, grid if size is None else grid.on(size, file), classes, self.index)

    def counts(self, one: VocObject, objects: Sequence[VocObject]) -> bool:
        """Whether an object of an image is part of the truth."""
        if self.difficult == "count" or not one.difficult:
            return True
        easy = {self.index(other.name) for other in objects if not other.difficult}
        beside = bool(easy) if self.values == "object" else self.index(one.name) in easy
        return self.difficult == "with-others" and beside


def _names(files: Iterable[str]) -> Iterator[str]:
    """The class names of the files that can be read."""
    for file in files:
        try:
            yield from (one.name for one in read_voc(file)[1])
        except InputError:
            continue


class _NoDoctype(ET.TreeBuilder):
    """Refuses document types, and with them entities, which could grow without end or read other files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it declares a document type")


def read_voc(file: str) -> tuple[Size | None, list[VocObject]]:
    """The size (H, W) of the image if it is given, and the objects.

    Boxes are VOC's: whole pixels counted from 1, the last one included.

    Raises:
        InputError: missing, not XML, or not of this format.
    """
    try:
        root = ET.fromstring(Path(file).read_bytes(), ET.XMLParser(target=_NoDoctype()))
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag}>, not <annotation>")
        return _size(root), [_object(one) for one in root.findall("object")]
    except (OSError, ET.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{file}: not a readable VOC annotation ({error})") from error


def _size(root: ET.Element) -> Size | None:
    height, width = root.findtext("size/height"), root.findtext("size/width")
    size = (int(height), int(width)) if height and width else (0, 0)
    return size if min(size) > 0 else None  # some tools write 0


def _object(one: ET.Element) -> VocObject:
    name = (one.findtext("name") or "").strip()
    left, top, right, bottom = (
        float(one.findtext(f"bndbox/{side}") or "nan") for side in ("xmin", "ymin", "xmax", "ymax")
    )
    if not name or not all(map(math.isfinite, (left, top, right, bottom))) or left > right or top > bottom:
        raise ValueError(f"an object {name!r} lacks its name or a box with xmin <= xmax and ymin <= ymax")
    difficult = (one.findtext("difficult") or "0").strip() not in ("", "0")
    return VocObject(name, (left - 1, top - 1, right, bottom), difficult)
