"""Images as a stream: decode -> transform -> batch, in order; memory stays constant over any number of images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image

from xcli.contents import BadImage
from xcli.decode import MAX_PIXELS, Colour, decode, image_size, read_image
from xcli.inputs import SUFFIXES, Labels, Source, find_images
from xcli.preprocess import Geometry, Preprocess, Size

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "BadImage",
    "Batch",
    "Labels",
    "Source",
    "find_images",
    "image_size",
    "read_image",
    "stream",
]
T = TypeVar("T")


@dataclass
class Batch:
    """The good images among consecutive rows of the list, and why the others failed.

    Args:
        rows: index of each good image in the list; empty where all failed.
        pixels: uint8, (B, 3, H, W), contiguous; B = len(rows).
        geometry: how each input lies in its original.
        failed: (row, reason) of the others.
        originals: the decoded images at full size if they were asked for, else None each.
    """

    rows: list[int]
    pixels: Tensor
    geometry: list[Geometry]
    failed: list[tuple[int, str]]
    originals: list[Image.Image | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.originals = self.originals or [None] * len(self.rows)

    def without(self, lost: Sequence[tuple[int, str]]) -> Batch:
        """The batch without some of its images, which failed for the reasons given."""
        gone = {row for row, _ in lost}
        if not gone:
            return self
        keep = [place for place, row in enumerate(self.rows) if row not in gone]
        return Batch(
            [self.rows[place] for place in keep],
            self.pixels[keep],
            [self.geometry[place] for place in keep],
            [*self.failed, *lost],
            [self.originals[place] for place in keep],
        )


class Noting(Protocol):
    """Keeps track of what is being decoded (``breadcrumbs``)."""

    @property
    def refused(self) -> Mapping[int, str]:
        """Rows that are not to be decoded, and why."""

    def reading(self, row: int) -> AbstractContextManager[None]:
        """Around the decoding of a row, in any thread."""


class Loaded(NamedTuple):
    """The input made of one image."""

    pixels: npt.NDArray[np.uint8]  # (3, H, W)
    geometry: Geometry
    original: Image.Image | None


def stream(
    sources: Sequence[Source],
    rows: Iterable[int],
    preprocess: Preprocess,
    *,
    size: Size,
    batch_size: int,
    workers: int,
    background: Colour = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    draft: bool = True,
    keep_original: bool = False,
    pin: bool = False,
    noting: Noting | None = None,
) -> Generator[Batch, None, None]:
    """Batches of model inputs, in the order of ``rows``; close the generator to stop early, no thread outlives it.

    Args:
        rows: which of ``sources``, consumed as needed; each batch covers the next ``batch_size`` of them, so it
            holds fewer images where some fail, and none where all do.
        size: (H, W) of all inputs; a preprocessing without a fixed size resizes the whole image to it.
        workers: threads that decode (Pillow releases the interpreter lock); 0 decodes in the caller's thread. They
            run ahead of the consumer by one batch and two images each.
        background: what transparent pixels lie on.
        max_pixels: a larger image fails unread; so does a thin strip that would grow beyond it in the resize.
        draft: decode large JPEGs at a lower resolution that is still twice the resized one.
        keep_original: hand out the decoded images too, never drafted.
        pin: put pixels in page-locked memory, for asynchronous copies to a GPU; ignored without one.
        noting: is told what is being decoded, and knows what must not be.
    A file that is not any more what the list says (size, time of change) fails, too.

    Raises:
        ConfigError: ``size`` is not what the preprocessing gives.
    """
    fixed = preprocess.with_size(size)

    def loaded(row: int) -> Loaded | str:
        if noting is not None and row in noting.refused:
            return noting.refused[row]
        try:
            with nullcontext() if noting is None else noting.reading(row):
                return load(sources[row], fixed, background, max_pixels, draft, keep_original)
        except BadImage as error:
            return str(error)  # not the exception: its traceback would keep the pixels alive

    return _batched(_in_order(loaded, rows, workers, ahead=batch_size + 2 * workers), batch_size, size, pin)


def _batched(
    loaded: Generator[tuple[int, Loaded | str], None, None], batch_size: int, size: Size, pin: bool
) -> Generator[Batch, None, None]:
    with closing(loaded):
        while chunk := list(islice(loaded, batch_size)):
            yield _collate(chunk, size, pin)


def load(
    source: Source,
    preprocess: Preprocess,
    background: Colour,
    max_pixels: int,
    draft: bool,
    keep_original: bool = False,
) -> Loaded:
    """Decode one image and make the model's input of it. Raises ``BadImage``."""
    target = preprocess.draft_size if draft and not keep_original else None
    image, original, box = decode(
        source.file, max_pixels=max_pixels, background=background, draft_to=target, listed=source.stamp
    )
    height, width = preprocess.resized(original[1], original[0])
    if height * width > max(max_pixels, MAX_PIXELS):  # a thin strip whose short side is enlarged
        raise BadImage(f"too many pixels once resized ({width}x{height})")
    pixels, geometry = preprocess.apply(image, original=original, box=box)
    return Loaded(np.ascontiguousarray(pixels.transpose(2, 0, 1)), geometry, image if keep_original else None)


def _in_order(
    work: Callable[[int], T], rows: Iterable[int], workers: int, ahead: int
) -> Generator[tuple[int, T], None, None]:
    """(row, work(row)) in order; at most ``ahead`` finished or running calls wait for the consumer."""
    if workers == 0:
        for row in rows:
            yield row, work(row)
        return
    waiting: deque[tuple[int, Future[T]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="xai-decode")
    try:
        for row in rows:
            waiting.append((row, pool.submit(work, row)))
            if len(waiting) > ahead:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _collate(chunk: Sequence[tuple[int, Loaded | str]], size: Size, pin: bool) -> Batch:
    import torch

    good = [(row, loaded) for row, loaded in chunk if not isinstance(loaded, str)]
    pinned = pin and torch.cuda.is_available()
    pixels = torch.empty((len(good), 3, *size), dtype=torch.uint8, pin_memory=pinned)
    for target, (_, loaded) in zip(pixels.numpy(), good, strict=True):
        target[:] = loaded.pixels
    return Batch(
        [row for row, _ in good],
        pixels,
        [loaded.geometry for _, loaded in good],
        [(row, loaded) for row, loaded in chunk if isinstance(loaded, str)],
        [loaded.original for _, loaded in good],
    )
