"""A table of masks or boxes: CSV, a line an image or an object."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xcli.errors import ConfigError
from xcli.inputs import Source
from xcli.readers.grid import Grid, Mask, Reader, Thing, Values, drawn
from xcli.readers.masks import Masks
from xcli.readers.matching import class_index, require_classes, require_matches

SIDES = ("xmin", "ymin", "xmax", "ymax")
_PATHS = ("path", "file", "filename", "image")
_COLUMNS = (
    "a first line that names the columns: path and mask, or path, xmin, ymin, xmax, ymax and perhaps label"
)


@dataclass(frozen=True)
class Boxes:
    """The boxes of each image, in continuous coordinates of the original: xmax and ymax are not part of the box."""

    things: Mapping[str, Sequence[Thing]]
    index: Callable[[str], int | None]

    @property
    def matched(self) -> int:
        return len(self.things)

    def masks(self, source: Source, grid: Grid, classes: Sequence[int]) -> list[Mask | None]:
        return drawn(self.things.get(source.path, ()), grid, classes, self.index)


def open_table(file: str, sources: Sequence[Source], categories: Sequence[str], values: Values) -> Reader:
    """The masks or boxes that a table names.

    Paths of images and masks are from the current directory, else from the table's own. ``label`` is the class of a
    box; boxes without one, or with ``values: object``, stand for every class. It says nothing of a mask.

    Raises:
        ConfigError: a column is missing, a box is none, or no image or class is found.
    """
    rows, columns = _rows(file)
    path = next(name for name in _PATHS if name in columns)
    here = {_absolute(source.file): source.path for source in sources}
    own: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        shown = next((here[found] for found in _places(row[path], file) if found in here), None)
        if shown is not None:
            own.setdefault(shown, []).append(row)
    require_matches(file, own, sources, (row[path] for row in rows))
    if "mask" in columns:
        return Masks({shown: _masks(chosen, file) for shown, chosen in own.items()}, values)
    named = [] if values == "object" else [row["label"] for row in rows if row.get("label")]
    if named:
        require_classes(file, named, categories)
    boxes = {
        shown: [_thing(row, file, values) for row in chosen if any(row[side] for side in SIDES)]
        for shown, chosen in own.items()
    }
    return Boxes(boxes, class_index(categories))


def _rows(file: str) -> tuple[list[dict[str, str]], Sequence[str]]:
    """The rows by column, stripped, and the columns; separated by comma, semicolon or tab."""
    try:
        text = os.fsdecode(Path(file).read_bytes().removeprefix(b"\xef\xbb\xbf"))
        first = text.lstrip().partition("\n")[0]
        table = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
        cells = [[cell.strip() for cell in row] for row in table if any(row)]
    except (OSError, csv.Error) as error:
        raise ConfigError(f"{file}: not a readable table: {error}") from error
    columns = [name.lower() for name in cells[0]] if cells else []
    if not set(columns) & set(_PATHS) or not ("mask" in columns or set(SIDES) <= set(columns)):
        raise ConfigError(f"{file}: needs {_COLUMNS}")
    for row in cells[1:]:
        if len(row) != len(columns):
            raise ConfigError(f"{file}: a row lacks a column, or has too many: {row}")
    return [dict(zip(columns, row, strict=True)) for row in cells[1:]], columns


def _places(path: str, file: str) -> tuple[str, str]:
    """Where a path of the table may lie."""
    return _absolute(path), _absolute(str(Path(file).parent / path))


def _absolute(path: str) -> str:
    return os.path.normpath(Path.cwd() / path)


def _masks(rows: Sequence[Mapping[str, str]], file: str) -> list[str]:
    """The mask files of one image; one that is missing is found out when it is read."""
    found = []
    for row in rows:
        if row["mask"]:
            places = _places(row["mask"], file)
            found.append(next((place for place in places if Path(place).exists()), places[1]))
    return found


def _thing(row: Mapping[str, str], file: str, values: Values) -> Thing:
    try:
        left, top, right, bottom = (float(row[side]) for side in SIDES)
    except ValueError:
        left = right = top = bottom = math.nan
    if not (all(map(math.isfinite, (left, top, right, bottom))) and left < right and top < bottom):
        raise ConfigError(f"{file}: no box with xmin < xmax and ymin < ymax: {', '.join(row.values())}")
    return Thing.box(None if values == "object" else row.get("label") or None, (left, top, right, bottom))
