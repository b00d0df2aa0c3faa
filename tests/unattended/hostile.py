"""What may lie in a folder of images: each kind of bad or odd file, how it is made, and what becomes of it."""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ORIENTATION, EXIF_FOLDER = 0x0112, 0x8769
PNG = b"\x89PNG\r\n\x1a\n"
HUGE = 30_000


class Kind(NamedTuple):
    """A kind of file: its name as bytes, how it is made there, why it fails (a pattern; None: it is explained)."""

    name: bytes
    make: Callable[[bytes], object]
    reason: str | None


@cache
def drawn() -> Image.Image:
    """A small picture of noise."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    """An image as the bytes of a file."""
    data = io.BytesIO()
    (image or drawn()).save(data, kind, **options)
    return data.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG with a right checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def segment(marker: int, data: bytes) -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def head(width: int, height: int) -> bytes:
    """A PNG's beginning: eight bits of grey."""
    return PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))


def bomb(width: int, height: int) -> bytes:
    """A PNG of zeros, small on disk."""
    packer = zlib.compressobj(9)
    body = b"".join([packer.compress(bytes(width + 1)) for _ in range(height)] + [packer.flush()])
    return head(width, height) + chunk(b"IDAT", body[:8]) + chunk(b"IDAT", body[8:]) + chunk(b"IEND", b"")


def with_chunk(*added: bytes) -> bytes:
    """A good PNG with chunks before its pixels."""
    data = encoded("PNG")
    at = data.index(b"IDAT") - 4
    return data[:at] + b"".join(added) + data[at:]


def with_segment(*added: bytes) -> bytes:
    """A good JPEG with segments at its beginning."""
    data = encoded("JPEG")
    return data[:2] + b"".join(added) + data[2:]


def exif(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """EXIF with one directory."""
    tags = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + tags + struct.pack("<I", following)


def tiff(*entries: tuple[int, int, int, int]) -> bytes:
    """A TIFF that is a directory only."""
    return exif(*entries).removeprefix(b"Exif\0\0")


def flipped(data: bytes, at: int) -> bytes:
    """One byte turned over."""
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def announced() -> Iterator[tuple[str, bytes]]:
    """Headers that announce 30000 x 30000 pixels, and next to nothing behind them."""
    yield "png", head(HUGE, HUGE) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    size = struct.pack("<ii", HUGE, HUGE)
    yield "bmp", encoded("BMP")[:18] + size + encoded("BMP")[26:]
    yield "gif", encoded("GIF")[:6] + struct.pack("<HH", HUGE, HUGE) + encoded("GIF")[10:]
    plain = ((258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (279, 4, 1, 64))
    yield "tif", tiff((256, 4, 1, HUGE), (257, 4, 1, HUGE), *plain)
    yield "ppm", b"P6 %d %d 255\n" % (HUGE, HUGE) + bytes(99)
    data = encoded("JPEG")
    at = data.index(b"\xff\xc0") + 5
    yield "jpg", data[:at] + struct.pack(">HH", HUGE, HUGE) + data[at + 4 :]
    canvas = struct.pack("<I", HUGE - 1)[:3] * 2
    yield "webp", b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas


def truncated() -> Iterator[tuple[str, bytes]]:
    """A JPEG and a PNG, cut after every tenth."""
    for suffix, data in (("jpg", encoded("JPEG")), ("png", encoded("PNG"))):
        for tenth in range(1, 10):
            yield f"cut-{tenth}0.{suffix}", data[: len(data) * tenth // 10]


def slow() -> Iterator[tuple[str, bytes, str]]:
    """Small files that would keep a decoder busy for minutes or fill the memory."""
    progressive = encoded("JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    yield "scans.jpg", progressive[:-2] + scan * 2_000 + progressive[-2:], r"damaged \(more than 100 scans\)"
    yield (
        "exifs.jpg",
        with_segment(segment(0xE1, exif()) * 2_000),
        r"damaged \(more than 100 blocks of EXIF.*\)",
    )
    yield "fill.jpg", with_segment(b"\xff" * 210_000), r"damaged \(too many pieces\)"
    yield "chunks.png", with_chunk(chunk(b"abCd", b"") * 101_000), r"damaged \(too many pieces\)"
    yield "comments.ppm", b"P3 400 400 255\n" + b"#\n1 " * 250_000, r"damaged \(more than 10000 comments\)"
    size = ((256, 3, 1, 3_000), (257, 3, 1, 3_000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1))
    strips = ((273, 4, 500_000, 200), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 500_000, 200))
    yield (
        "strips.tif",
        tiff(*size, *strips).ljust(2_000_300, b"\1"),
        r"damaged \(more than \d+ values in a tag\)",
    )


def contents() -> Iterator[tuple[str, bytes, str | None]]:
    """Name, bytes, reason."""
    yield "empty.jpg", b"", "empty file"
    yield "one-byte.png", b"\x89", "not an image"
    for name, data in truncated():
        yield name, data, "truncated|not an image"
    yield "really-png.jpg", encoded("PNG"), None
    yield "really-jpeg.gif", encoded("JPEG"), None
    for name, data in [
        ("text.jpg", b"this is not an image\n" * 50),
        ("page.png", b"<!doctype html><title>404</title>"),
        ("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'),
        ("paper.png", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"),
        ("postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n"),
        ("archive.png", b"PK\x03\x04" + bytes(26) + encoded("PNG")),
        ("gzip.jpg", b"\x1f\x8b\x08" + bytes(40)),
        ("program.jpg", b"\x7fELF" + bytes(60)),
        ("icon.png", encoded("ICO")),
        ("zeros.webp", bytes(5_000)),
        ("noise.bmp", np.random.default_rng(1).bytes(5_000)),
    ]:
        yield name, data, "not an image"
    yield "exif-garbage.jpg", with_segment(segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")), None
    yield "exif-loop.jpg", with_segment(segment(0xE1, exif((EXIF_FOLDER, 4, 1, 8), following=8))), None
    yield "exif-9.jpg", with_segment(segment(0xE1, exif((ORIENTATION, 3, 1, 9)))), None
    yield "exif-text.png", with_chunk(chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")), None
    yield "cmyk.jpg", encoded("JPEG", Image.new("CMYK", (50, 40), (0, 200, 9, 30))), None
    yield "cmyk.tif", encoded("TIFF", Image.new("CMYK", (50, 40), (0, 200, 9, 30))), None
    extremes = np.where(np.eye(40, 50, dtype=bool), 0, 65_535).astype(np.uint16)
    yield "sixteen.png", encoded("PNG", Image.fromarray(extremes)), None
    yield "sixteen.tif", encoded("TIFF", Image.fromarray(extremes)), None
    yield (
        "float.tif",
        encoded("TIFF", Image.fromarray(np.full((40, 50), np.nan, np.float32))),
        "unsupported mode F",
    )
    yield "wide.tif", encoded("TIFF", Image.fromarray(np.full((4, 5), -1, np.int32))), "unsupported mode I .*"
    yield "one-bit.png", encoded("PNG", drawn().convert("1")), None
    yield "fax.tif", encoded("TIFF", drawn().convert("1"), compression="group4"), None
    yield "see-through.png", encoded("PNG", drawn().convert("P"), transparency=bytes(range(256))), None
    several = {"save_all": True, "append_images": [drawn().rotate(90), drawn().rotate(180)]}
    for suffix in ("gif", "png", "webp", "tiff"):
        yield f"animated.{suffix}", encoded(suffix.upper(), **several), None
    yield "dot.png", encoded("PNG", Image.new("RGB", (1, 1))), None
    yield "high.png", encoded("PNG", Image.new("RGB", (1, 10_000), (9, 99, 200))), None
    yield "wide.png", encoded("PNG", Image.new("RGB", (10_000, 1), (9, 99, 200))), None
    yield (
        "nothing.png",
        head(0, 0) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""),
        "damaged .*|not an image",
    )
    for suffix, data in announced():
        yield (
            f"announced.{suffix}",
            data,
            r"too many pixels .*|not an image|damaged \(could not create decoder object\)",
        )
    yield "bomb.png", bomb(9_500, 9_500), r"too many pixels \(9500x9500 > 89478485\)"
    yield (
        "mistaken.png",
        head(50, 40) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b""),
        "truncated",
    )
    packed = zlib.compress(bytes(9_000_000), 9)
    yield "text-bomb.png", with_chunk(chunk(b"zTXt", b"a\0\0" + packed)), "damaged .*"
    yield "words-bomb.png", with_chunk(chunk(b"iTXt", b"a\0\1\0\0\0" + packed)), "damaged .*"
    yield "profile-bomb.png", with_chunk(chunk(b"iCCP", b"a\0\0" + packed)), "damaged .*"
    yield "long-chunk.png", with_chunk(b"\x7f\xff\xff\xfftEXta\0b"), "truncated|damaged .*|not an image"
    data = encoded("PNG")
    yield "checksum.png", flipped(data, data.index(b"IDAT") - 6), "damaged .*|not an image"
    yield "pixels.png", flipped(data, len(data) // 2), "damaged .*|truncated"
    yield "middle.jpg", flipped(encoded("JPEG"), 800), None  # nothing tells
    yield "tail.jpg", encoded("JPEG") + bytes(100_000), None
    yield from slow()


def special(name: bytes) -> None:
    """A socket that nobody serves."""
    os.mknod(name, 0o644 | stat.S_IFSOCK)


def sparse(size: int, start: bytes, name: bytes) -> None:
    """A file that is larger than what it holds."""
    write(start, name)
    os.truncate(name, size)


def forbidden(name: bytes) -> None:
    """A good image that nobody may read."""
    write(encoded("PNG"), name)
    os.chmod(name, 0)  # noqa: PTH101


def write(data: bytes, name: bytes) -> None:
    """A file; its folder is made."""
    place = Path(os.fsdecode(name))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)


def link(to: str, name: bytes) -> None:
    """A symbolic link."""
    os.symlink(os.fsencode(to), name)  # noqa: PTH211


def objects(good: Path) -> Iterator[tuple[str, Callable[[bytes], object], str | None]]:
    """What is no file, or none that can be read; ``good`` is an image elsewhere."""
    yield "forbidden.png", forbidden, "permission denied"
    yield "dangling.png", partial(link, "nowhere.png"), "missing"
    yield "looping.png", partial(link, "looping.png"), "too many levels of symbolic links"
    yield "outside.png", partial(link, str(good)), None
    yield "to-folder.png", partial(link, str(good.parent)), "not a file"
    yield "device.png", partial(link, "/dev/zero"), "not a file"
    yield "hole.png", partial(link, "/dev/null"), "not a file"
    yield "process.png", partial(link, "/proc/self/mem"), "empty file|has changed since the run began"
    yield "folder.jpg", os.mkdir, "not a file"
    yield "pipe.jpg", os.mkfifo, "not a file"
    yield "socket.png", special, "not a file"
    yield "sparse.jpg", partial(sparse, 5 << 30, b""), r"too large a file \(5368709120 bytes > \d+\)"
    yield "sparse.webp", partial(sparse, 5 << 30, encoded("WEBP")), r"too large a file .*"
    yield "sparse.png", partial(sparse, 1 << 20, encoded("PNG")), None


NAMES = [
    *(
        "new\nline.png",
        "carriage\r.png",
        "red\x1b[31m.png",
        "title\x1b]0;owned\x07.png",
        "bell\x07.png",
        "tab\t.png",
    ),
    *(
        "-dash.png",
        "--help.png",
        "-.png",
        " space .png",
        "quote'\".png",
        "$(touch owned).png",
        "`id`.png",
        "%s%n.png",
    ),
    *("<b>bold.png", "semi;colon.png", "back\\slash.png", "a|b.png", "star*.png", "ask?.png", "colon:.png"),
    *("\u00e9.png", "e\u0301.png", "\U0001f600.png", "\u202egnp.exe.png", "\u200bzero.png", "\ufeffmark.png"),
    *(
        "Twin.png",
        "twin.png",
        "TWIN.PNG",
        "x.png",
        "x.png.png",
        "x.png.png.png",
        "x~1.png",
        "nul.png",
        "con.jpg",
    ),
    *("ask_.png", "~.png", "a..png", "dots....png", "folder\x1b[2J/inside\n.png"),
    *("\u00fc" * 125 + "x.png", "y" * 250 + ".jpeg"),
]
STRAY = [b"\xff.png", b"\xfe\xff.png", b"caf\xe9.jpg", b"_.png", b"\\xff.png"]


def kinds(folder: Path, good: Path) -> list[Kind]:
    """Every kind, to be made in ``folder``; ``good`` is a good image outside of it."""
    here = os.fsencode(folder) + b"/"
    found = [Kind(here + name.encode(), partial(write, data), reason) for name, data, reason in contents()]
    found += [Kind(here + name.encode(), make, reason) for name, make, reason in objects(good)]
    odd = [name.encode("utf-8", "surrogateescape") for name in NAMES] + STRAY
    return found + [Kind(here + name, partial(write, encoded("PNG")), None) for name in odd]
