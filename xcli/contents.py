"""The bytes of one file, read once, of bounded size; and what would take a decoder hours, refused before it begins.

Decoders work on these bytes and never on the file itself, which may be cut, replaced or grow meanwhile: libtiff maps
files into memory and dies with the process where one is cut.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import threading
from collections.abc import Iterator
from itertools import islice, takewhile
from typing import NamedTuple

SLACK = 64 << 20
"""Bytes a file may have for other things than pixels."""
PIXEL = 8
"""Bytes that a pixel may take: four channels of 16 bits."""
READS = 200_000
"""Most reads of one file; the largest PNG in chunks of 4 KiB takes fewer."""
VALUES = 400_000
"""Most numbers in one tag of a TIFF; tiles of 16 x 16 in the largest image are as many."""
SCAN, END = 0xDA, 0xD9
SCANS, BLOCKS, COMMENTS = 100, 100, 10_000
"""Most scans of a JPEG (progressive ones have about ten), blocks of EXIF or Photoshop's in it, comments of a PPM."""
LARGE = threading.Lock()
"""Held by the one file above ``SLACK`` bytes that is in memory."""
CHANGED = "has changed since the run began"

# What makes a small file slow: each scan passes over all pixels; each block, or comment, copies those before it.
_BLOCKS = (b"Exif\0\0", b"Photoshop 3.0\0")
_MARK = re.compile(rb"\xff([^\x00\xff\xd0-\xd8])")  # but for those inside a scan
_BYTES = (1, 2, 6, 7)  # types of TIFF tags that stay bytes; of the others each value becomes an object


class BadImage(ValueError):
    """One file that cannot be explained; the message is a short reason without the file's name."""


class Stamp(NamedTuple):
    """What tells that a file is still the one that was listed."""

    size: int
    mtime_ns: int


class Contents(io.BytesIO):
    """The bytes of a file, for a decoder; one that comes back for tiny pieces without end is stopped.

    A large file holds ``LARGE`` until it is closed, so that threads do not fill the memory with several.
    """

    def __init__(self, data: bytes, *, large: bool) -> None:
        super().__init__(data)
        self._large = large
        self._left = READS
        if data[:2] in (b"BM", *(b"P%d" % kind for kind in range(1, 8))):  # may be read pixel by pixel
            self._left += 2 * len(data)

    def close(self) -> None:
        """Let the bytes go."""
        super().close()
        if self._large:
            self._large = False
            LARGE.release()

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file. Raises ``BadImage`` after `READS` calls."""
        self._left -= 1
        if self._left < 0:
            raise BadImage("damaged (too many pieces)")
        return super().read(size)


def contents(file: str, max_pixels: int, listed: Stamp | None = None) -> Contents:
    """Read a file.

    Args:
        max_pixels: how large an image may be; a file much larger than that many pixels need is not read.
        listed: what the file was when the run's list was made; None: whatever it is now is right.
    Raises:
        OSError: it cannot be read.
        BadImage: it is not a file, empty, too large, not what was listed, or made to take for ever.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):  # noqa: PTH116  (a name may be raw bytes that a Path would normalise)
        raise BadImage("not a file")  # and not opened: that alone can start a device
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):  # it was replaced just now; a FIFO did not block
            raise BadImage("not a file")
        most = PIXEL * max_pixels + SLACK
        if before.st_size > most:
            raise BadImage(f"too large a file ({before.st_size} bytes > {most})")
        large = before.st_size > SLACK
        if large:
            LARGE.acquire()
        try:
            return Contents(_checked(descriptor, before.st_size, max_pixels, listed), large=large)
        except BaseException:
            if large:
                LARGE.release()
            raise
    finally:
        os.close(descriptor)


def _checked(descriptor: int, size: int, max_pixels: int, listed: Stamp | None) -> bytes:
    data = _read(descriptor, size)
    after = os.fstat(descriptor)
    if listed is not None and (after.st_size, after.st_mtime_ns) != listed:
        raise BadImage(CHANGED)
    if not data:
        raise BadImage("empty file")
    _refuse_slow(data, max_pixels)
    return data


def _read(descriptor: int, size: int) -> bytes:
    """What was there when the file was opened: it may be cut meanwhile, or grow without end."""
    pieces: list[bytes] = []
    while size > 0 and (piece := os.read(descriptor, size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _refuse_slow(data: bytes, max_pixels: int) -> None:
    if data[:2] == b"\xff\xd8":
        _refuse_slow_jpeg(data)
    elif data[:2] in (b"P1", b"P2", b"P3"):
        _refuse_more(COMMENTS, "comments", data.count(b"#"))
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _refuse_more(max(VALUES, max_pixels // 200), "values in a tag", _longest_tag(data))


def _refuse_more(most: int, what: str, count: int) -> None:
    if count > most:
        raise BadImage(f"damaged (more than {most} {what})")


def _refuse_slow_jpeg(data: bytes) -> None:
    head = takewhile(lambda piece: piece[0] != SCAN, _pieces(data))
    blocks = (1 for _, place in head if data.startswith(_BLOCKS, place))
    _refuse_more(BLOCKS, "blocks of EXIF or Photoshop's", sum(islice(blocks, BLOCKS + 1)))
    if data.count(b"\xff\xda") > SCANS:  # that is quick, and hardly ever so
        scans = (1 for kind, _ in _pieces(data) if kind == SCAN)
        _refuse_more(SCANS, "scans", sum(islice(scans, SCANS + 1)))


def _pieces(data: bytes) -> Iterator[tuple[int, int]]:
    """Kind and place of the pieces of a JPEG up to its end: what lies behind that, such as a film, does not count."""
    place = 2
    while (mark := _MARK.search(data, place)) is not None and (kind := mark[1][0]) != END:
        place = mark.end()
        yield kind, place + 2
        place += int.from_bytes(data[place : place + 2], "big") if kind != 0x01 else 0


def _longest_tag(data: bytes) -> int:
    """Most values of a tag in the first directory of a TIFF, such as the file could hold; 0 where it ends before."""
    order, large = ("<" if data[:1] == b"I" else ">"), b"+" in data[:4]
    first, length, entry = ("8xQ", "Q", "HHQ8x") if large else ("4xI", "H", "HHI4x")
    try:
        (start,) = struct.unpack_from(order + first, data)
        (entries,) = struct.unpack_from(order + length, data, start)
        start += struct.calcsize(order + length)
        tags = struct.iter_unpack(
            order + entry, data[start : start + entries * struct.calcsize(order + entry)]
        )
        return max((n for _, kind, n in tags if kind not in _BYTES and n < len(data)), default=0)
    except struct.error:
        return 0
