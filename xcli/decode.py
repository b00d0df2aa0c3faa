"""One file -> one upright RGB image, or a short reason why not."""

from __future__ import annotations

import ctypes
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin, _imaging
from PIL.ImageFile import ImageFile

from xcli.contents import BadImage, Stamp, contents

MAX_PIXELS = 89_478_485
LARGEST_EXIF = 8 << 20
Colour = tuple[int, int, int]

# Formats are named so that a file can never start another reader of Pillow's (EPS runs Ghostscript), and loaded here
# so that no thread has to. What Pillow has to say about odd files is said by BadImage, not on the terminal.
Image.preinit()
_LOADED = (TiffImagePlugin, WebPImagePlugin)
_FORMATS: list[str] = [
    name for name in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM") if name in Image.OPEN
]
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
with suppress(
    AttributeError, OSError
):  # where libtiff is a library of its own, it writes to the terminal from C
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)

# What Pillow raises on damaged files, found by fuzzing (tests/unattended); only its own calls are guarded.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N")
_PLAIN = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")

# EXIF orientation -> how to turn the stored pixels upright, and whether their last column (row) then lies left (top)
_TURNS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, True, False),
    3: (Image.Transpose.ROTATE_180, True, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: (Image.Transpose.TRANSPOSE, False, False),
    6: (Image.Transpose.ROTATE_270, True, False),
    7: (Image.Transpose.TRANSVERSE, True, True),
    8: (Image.Transpose.ROTATE_90, False, True),
}
_SIDEWAYS = (5, 6, 7, 8)


class Decoded(NamedTuple):
    """An upright RGB image; ``original`` is its full (H, W), ``box`` where the picture lies if decoded smaller."""

    image: Image.Image
    original: tuple[int, int]
    box: tuple[float, float, float, float] | None


def read_image(
    file: str,
    *,
    max_pixels: int = MAX_PIXELS,
    background: Colour = (255, 255, 255),
    draft_to: tuple[int, int] | None = None,
    listed: Stamp | None = None,
) -> Image.Image:
    """Decode one file into an upright RGB image; see `decode`.

    Raises:
        BadImage: with a short reason.
    """
    return decode(file, max_pixels=max_pixels, background=background, draft_to=draft_to, listed=listed).image


def decode(
    file: str,
    *,
    max_pixels: int,
    background: Colour,
    draft_to: tuple[int, int] | None = None,
    listed: Stamp | None = None,
) -> Decoded:
    """Decode one file into an upright RGB image.

    The first frame of animations; EXIF orientation applied; transparency laid on ``background``; 16-bit grey scaled
    to 8 bits by its high byte, as Pillow does for 16-bit colours; embedded colour profiles are not applied.

    Args:
        max_pixels: a header that announces more is refused before anything is decoded. Pillow's own limit, twice
            ``PIL.Image.MAX_IMAGE_PIXELS``, holds as well.
        draft_to: (H, W) that the image will be resized to: JPEGs are decoded at 1/2, 1/4 or 1/8 as long as twice
            that size is left.
        listed: what the file was when the run's list was made; None: whatever it is now is right.
    Raises:
        BadImage: missing, no permission, not a file, empty, changed, not an image, truncated, damaged, too large, or
            a mode that has no 8-bit range (F, wide I).
    """
    with _opened(file, max_pixels, listed) as stored:
        width, height = stored.size
        box = None
        if draft_to is not None and stored.format in ("JPEG", "MPO"):
            tall, wide = draft_to[::-1] if _orientation(stored) in _SIDEWAYS else draft_to
            drafted = stored.draft(None, (2 * wide, 2 * tall))
            box = drafted[1] if drafted and stored.size != (width, height) else None
        stored.load()
        turn = _TURNS.get(_orientation(stored))
        if box is None:
            width, height = stored.size  # Pillow turns TIFFs while it loads them
        image = _to_rgb(stored, background)
    if turn is None:
        return Decoded(image, (height, width), box)
    method, left, top = turn
    image = image.transpose(method)
    if method in (_TURNS[key][0] for key in _SIDEWAYS):
        width, height = height, width
        box = box and (box[1], box[0], box[3], box[2])
    return Decoded(image, (height, width), box and _moved(box, image.size, left, top))


def _moved(
    box: tuple[float, float, float, float], size: tuple[int, int], left: bool, top: bool
) -> tuple[float, float, float, float]:
    """The box that began in the corner of an image of that size, after flips."""
    _, _, width, height = box
    x, y = size[0] - width if left else 0.0, size[1] - height if top else 0.0
    return (x, y, x + width, y + height)


def image_size(file: str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) after EXIF orientation.

    From the headers, wherever they lie: no pixel is decoded, for a decoder that crashes here would take the run with it
    before anything is noted (``breadcrumbs``). Left of that danger is libwebp, which reads a WebP's header.

    Raises:
        BadImage: as `decode` does; not where only the pixels are damaged.
    """
    with _opened(file, max_pixels) as stored:
        width, height = stored.size
        if isinstance(
            stored, TiffImagePlugin.TiffImageFile
        ):  # some versions of Pillow have turned the size already
            width, height = (
                int(stored.tag_v2[tag]) for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength)
            )
        elif stored.format == "PNG" and "exif" not in stored.info:
            stored.load_prepare()
            stored.load_end()  # reads what lies behind the pixels, past them
        return (height, width) if _orientation(stored) in _SIDEWAYS else (width, height)


@contextmanager
def _opened(file: str, max_pixels: int, listed: Stamp | None = None) -> Iterator[ImageFile]:
    """Pillow's image, its size checked, not decoded yet; what a bad file raises in the block becomes BadImage."""
    try:
        with contents(file, max_pixels, listed) as data, Image.open(data, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(f"too many pixels ({width}x{height} > {max_pixels})")
            yield image
    except BadImage:
        raise
    except _DAMAGE as error:
        raise BadImage(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """A short, printable reason for what reading a file raised."""
    known: list[tuple[type[BaseException], str]] = [
        (FileNotFoundError, "missing"),
        (NotADirectoryError, "missing"),
        (PermissionError, "permission denied"),
        (IsADirectoryError, "not a file"),
        (UnidentifiedImageError, "not an image"),
        (
            Image.DecompressionBombError,
            f"too many pixels (over Pillow's limit of {2 * (Image.MAX_IMAGE_PIXELS or 0)})",
        ),
        (MemoryError, "not enough memory"),
        (EOFError, "truncated"),
    ]
    for kind, reason in known:
        if isinstance(error, kind):
            return reason
    if isinstance(error, OSError) and error.errno is not None:
        return (error.strerror or "cannot be read").lower()
    text = " ".join("".join(c if c.isprintable() else "?" for c in str(error)).split())[:80]
    return "truncated" if "truncated" in text.lower() else f"damaged ({text or type(error).__name__})"


def _orientation(stored: ImageFile) -> int:
    """EXIF orientation 1..8; 1 where the metadata is damaged or huge, for the picture need not be."""
    try:
        if len(stored.info.get("exif", b"")) > LARGEST_EXIF:
            return 1
        found = Image.Image.getexif(stored)  # that of a PNG would decode it first
        return int(found.get(ExifTags.Base.Orientation, 1))
    except _DAMAGE:
        return 1


def _to_rgb(image: Image.Image, background: Colour) -> Image.Image:
    if image.mode in _WIDE or image.mode == "I":
        return _narrowed(image).convert("RGB")
    if image.mode not in _PLAIN:
        raise BadImage(f"unsupported mode {image.mode}")
    if not image.has_transparency_data:
        return image.convert("RGB")
    colours = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(colours.convert("RGB"), mask=colours.getchannel("A"))
    return canvas


def _narrowed(image: Image.Image) -> Image.Image:
    """16-bit grey -> 8-bit grey by the high byte; 32-bit integers only where they are in the 16-bit range."""
    values = np.asarray(image)
    if image.mode == "I" and (values.min() < 0 or values.max() > 65535):
        raise BadImage(f"unsupported mode I (values {values.min()}..{values.max()}, not 16-bit)")
    return Image.fromarray((values >> 8).astype(np.uint8))
