"""One picture that explains one image: a row a target, a column a method, with captions and a colour bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 256
"""Longest side of a cell, pixels: larger pictures are reduced, small ones enlarged by a whole factor."""

COLUMNS = 8
"""Most methods side by side."""

_MARGIN, _GAP = 16, 8
_NARROWEST = 128  # columns of a slim image stay wide enough for a method's name
_TITLE, _TEXT, _SMALL = 18, 15, 12  # sizes of type, pixels
_LINE = 24  # height of a line of text
_BAR, _BAR_TEXT = 12, 36  # width of the colour bar and of what is written beside it
_BACKGROUND, _INK, _PALE, _EMPTY = "#ffffff", "#1a1a1a", "#6b6b6b", "#eeeeee"


@dataclass(frozen=True)
class PanelRow:
    """One target of the image."""

    label: str
    """What is explained, as a name; shortened where it does not fit."""
    facts: str
    """Numbers beside it, never shortened: ``p=0.98  logit 12.3``."""
    overlays: Sequence[Image.Image | None]
    """One a method, in the columns' order; none where the method failed."""


def panel(
    picture: Image.Image, rows: Sequence[PanelRow], methods: Sequence[str], table: Tensor, title: str = ""
) -> Image.Image:
    """Draw the image and its overlays in a grid: first column the image, then one column a method.

    More than ``COLUMNS`` methods are spread evenly over several such grids, one under the other.

    Args:
        picture: the image the overlays are made on, RGB.
        rows: at least one.
        methods: names of the columns, at least one.
        table: colours of the overlays for the colour bar, uint8, (256, 3).
        title: line at the top, the image's path for instance; none if empty.

    Returns: RGB image, about ``CELL`` pixels a column and a row.
    Raises:
        ValueError: a row has not one overlay a method.
    """
    for row in rows:
        if len(row.overlays) != len(methods):
            raise ValueError(f"{len(methods)} methods, but {len(row.overlays)} overlays for {row.label!r}")
    lines = -(-len(methods) // COLUMNS)
    each = -(-len(methods) // lines)
    blocks = []
    for start in range(0, len(methods), each):
        part = slice(start, start + each)
        own = [replace(row, overlays=row.overlays[part]) for row in rows]
        blocks.append(_grid(picture, own, methods[part], table, "" if start else title))
    return _stacked(blocks)


def _stacked(blocks: Sequence[Image.Image]) -> Image.Image:
    if len(blocks) == 1:
        return blocks[0]
    size = (max(block.width for block in blocks), sum(block.height for block in blocks))
    canvas, y = Image.new("RGB", size, _BACKGROUND), 0
    for block in blocks:
        canvas.paste(block, (0, y))
        y += block.height
    return canvas


def _grid(
    picture: Image.Image, rows: Sequence[PanelRow], methods: Sequence[str], table: Tensor, title: str
) -> Image.Image:
    size = cell_size(picture.size)
    pitch = max(size[0], _NARROWEST) + _GAP
    top = _MARGIN + (_LINE + _GAP if title else 0)
    row_height = _LINE + size[1] + _GAP
    grid = (len(methods) + 1) * pitch
    canvas = Image.new(
        "RGB",
        (2 * _MARGIN + grid + _BAR + _BAR_TEXT, top + _LINE + len(rows) * row_height + _MARGIN - _GAP),
        _BACKGROUND,
    )
    draw = ImageDraw.Draw(canvas)
    if title:
        _write(draw, (_MARGIN, _MARGIN), title, canvas.width - 2 * _MARGIN, size=_TITLE)
    for column, name in enumerate(["image", *methods]):
        _write_centred(draw, (_MARGIN + column * pitch, top), name, pitch - _GAP)
    for index, row in enumerate(rows):
        y = top + _LINE + index * row_height
        _caption(draw, (_MARGIN, y), row, grid - _GAP)
        for column, cell in enumerate([picture, *row.overlays]):
            _paste(canvas, cell, (_MARGIN + column * pitch, y + _LINE), pitch - _GAP, size)
        _colour_bar(canvas, (_MARGIN + grid, y + _LINE), size[1], table)
    return canvas


def cell_size(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the cell of a picture of this width and height: at most ``CELL`` a side.

    >>> cell_size((64, 48)), cell_size((224, 224)), cell_size((600, 400))
    ((256, 192), (224, 224), (256, 171))
    """
    width, height = size
    longest = max(size)
    if longest <= CELL:
        factor = CELL // longest
        return width * factor, height * factor
    return max(1, round(width * CELL / longest)), max(1, round(height * CELL / longest))


def shortened(text: str, width: float, size: int = _TEXT) -> str:
    """``text`` as one line of at most ``width`` pixels, cut with an ellipsis; what cannot be printed as ``?``."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    font = _font(size)
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    width: float,
    *,
    size: int = _TEXT,
    ink: str = _INK,
) -> float:
    """Write one line into a box ``_LINE`` high; returns its width."""
    line = shortened(text, width, size)
    draw.text((at[0], at[1] + _LINE / 2), line, fill=ink, font=_font(size), anchor="lm")
    return _font(size).getlength(line)


def _write_centred(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, width: float) -> None:
    line = shortened(text, width)
    draw.text((at[0] + width / 2, at[1] + _LINE / 2), line, fill=_PALE, font=_font(_TEXT), anchor="mm")


def _caption(draw: ImageDraw.ImageDraw, at: tuple[int, int], row: PanelRow, width: int) -> None:
    room = width - _font(_TEXT).getlength(row.facts) - 2 * _GAP
    used = _write(draw, at, row.label, room)
    _write(draw, (at[0] + used + 2 * _GAP, at[1]), row.facts, width, ink=_PALE)


def _paste(
    canvas: Image.Image, cell: Image.Image | None, at: tuple[int, int], width: int, size: tuple[int, int]
) -> None:
    """Put one cell, brought to ``size``, in the middle of its column."""
    left = at[0] + (width - size[0]) // 2
    if cell is None:
        draw = ImageDraw.Draw(canvas)
        draw.rectangle((left, at[1], left + size[0] - 1, at[1] + size[1] - 1), fill=_EMPTY)
        middle = (left + size[0] / 2, at[1] + size[1] / 2)
        draw.text(middle, "no map", fill=_PALE, font=_font(_TEXT), anchor="mm")
        return
    enlarged = cell.width <= size[0] and cell.height <= size[1]
    how = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    canvas.paste(cell.resize(size, how), (left, at[1]))


def _colour_bar(canvas: Image.Image, at: tuple[int, int], height: int, table: Tensor) -> None:
    """The colours from the lowest, at the bottom, to the highest."""
    strip = Image.fromarray(table.cpu().flip(0)[:, None].contiguous().numpy())  # one pixel wide
    canvas.paste(strip.resize((_BAR, height), Image.Resampling.NEAREST), at)
    draw = ImageDraw.Draw(canvas)
    x = at[0] + _BAR + 5
    draw.text((x, at[1]), "high", fill=_PALE, font=_font(_SMALL), anchor="la")
    draw.text((x, at[1] + height), "low", fill=_PALE, font=_font(_SMALL), anchor="ld")
