"""How a picture is cut into features that are taken out as a whole: cells of a grid, superpixels, label maps."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tokenize import TokenError
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError
from torch import Tensor

from xcli.errors import ConfigError
from xcli.score import Score

KINDS: dict[str, type] = {"grid": int, "slic": int, "quickshift": float, "felzenszwalb": float}
"""What the number behind each name is."""

LEAST = {"grid": 1, "slic": 1, "quickshift": 1}
"""The smallest number of each, where not any above 0."""

FILES = (".png", ".npy")
GIVEN = "given:"

UNREADABLE = (OSError, ValueError, TypeError, EOFError, SyntaxError, TokenError, Image.DecompressionBombError)
"""What Pillow and NumPy raise, depending on where a file is damaged."""


def is_file(spec: str) -> bool:
    """Whether ``spec`` names a label map."""
    return Path(spec).suffix.lower() in FILES and not spec.startswith(GIVEN)


def _known(spec: str) -> str:
    kind, _, number = spec.partition(":")
    if (spec.startswith(GIVEN) and number) or is_file(spec):
        return spec
    if kind not in KINDS:
        raise PydanticCustomError(
            "segments", "grid:7, slic:50, quickshift:4, felzenszwalb:100, or a label map (.png, .npy)"
        )
    try:
        value = KINDS[kind](number)
    except ValueError:
        value = 0
    if not LEAST.get(kind, 0) <= value < 1e6 or not value:
        least = f"a number of at least {LEAST[kind]}" if kind in LEAST else "a positive number"
        raise PydanticCustomError("segments", f"{kind}: needs {least} behind it, such as {kind}:7")
    if kind != "grid" and find_spec("skimage") is None:
        raise PydanticCustomError("segments", f"{kind} needs scikit-image: pip install 'xcli[segments]'")
    return spec


Segments = Annotated[
    str,
    AfterValidator(_known),
    Field(
        description="the features: grid:7 (7 x 7 cells), slic:50 (so many are asked for), quickshift:4 (kernel size) "
        "or felzenszwalb:100 (scale), superpixels of scikit-image; or a file .png or .npy whose numbers (or colours) "
        "label the input's pixels"
    ),
]


def segmented(score: Score, x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """The feature of each pixel of the images (B, C, H, W), and how many features each has.

    ``given:NAME`` takes the label maps that the Python interface was handed as ``pictures={NAME: ...}``, (1, 1, H, W)
    for all images or (B, 1, H, W).

    Returns:
        labels (B, H, W), int64, on the device of ``x``, those of an image 0 to its number less one; the numbers (B,),
        on the CPU.
    Raises:
        ConfigError: a label map cannot be read, or is of another size.
    """
    return score.once(
        (x, "segments", spec), lambda: _segmented(score, x, spec)
    )  # a tensor is a key by identity


def _segmented(score: Score, x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    kind, _, number = spec.partition(":")
    size = (x.shape[-2], x.shape[-1])
    if is_file(spec):
        labels = label_map(spec, size).expand(len(x), -1, -1)
    elif kind == "grid":
        labels = grid(size, int(number)).expand(len(x), -1, -1)
    elif spec.startswith(GIVEN):
        labels = _given(score.picture(number), x)
    else:
        shown = [shaded(image) for image in x.cpu().double()]
        labels = torch.stack([consecutive(superpixels(image, kind, float(number))) for image in shown])
    return labels.to(x.device), labels.amax((1, 2)) + 1


def grid(size: tuple[int, int], cells: int) -> Tensor:
    """The cell (H, W) of each pixel, that which its middle falls into, of ``cells`` x ``cells``, row by row; along a
    side of fewer pixels each is its own."""
    down, right = ((2 * torch.arange(side) + 1) * min(cells, side) // (2 * side) for side in size)
    return down[:, None] * (int(right[-1]) + 1) + right


def shaded(image: Tensor) -> np.ndarray[Any, Any]:
    """A normalised image (C, H, W) as scikit-image likes it, (H, W, C) from 0 to 1."""
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp_min(1e-12)).permute(1, 2, 0).numpy()


def superpixels(image: np.ndarray[Any, Any], kind: str, number: float) -> np.ndarray[Any, Any]:
    """Labels (H, W) of a picture (H, W, C) from 0 to 1.

    ``slic`` asks for ``number`` superpixels of compactness 10; ``quickshift`` has the kernel size ``number``, the
    ratio 0.2 and the distance 200 of the LIME package; ``felzenszwalb`` has the scale ``number``.
    """
    from skimage import segmentation

    match kind:
        case "slic":
            found = segmentation.slic(image, n_segments=int(number), compactness=10.0, channel_axis=-1)
        case "quickshift":  # which wants three colours
            colours = image if image.shape[2] == 3 else np.repeat(image[..., :1], 3, axis=2)
            found = segmentation.quickshift(
                colours, kernel_size=number, max_dist=200, ratio=0.2, rng=0, convert2lab=True
            )
        case _:
            found = segmentation.felzenszwalb(image, scale=number, channel_axis=-1)
    return np.asarray(found)


def consecutive(labels: np.ndarray[Any, Any]) -> Tensor:
    """Labels as numbers from 0 without gaps, in their order; int64."""
    return torch.from_numpy(np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int64))


def label_map(path: str, size: tuple[int, int]) -> Tensor:
    """The label map of a file, brought to ``size`` (H, W) by its nearest pixels: (H, W).

    Raises:
        ConfigError: it is missing or no label map.
    """
    try:
        if path.lower().endswith(".npy"):
            read: np.ndarray[Any, Any] = np.lib.format.open_memmap(path, mode="r")
        else:
            with Image.open(path) as image:
                read = np.asarray(image)
    except UNREADABLE as error:
        raise ConfigError(f"segments: {path} cannot be read as a label map: {error}") from None
    if read.ndim == 3 and read.size and read.dtype.kind in "iub":  # every colour is a label
        read = np.unique(read.reshape(-1, read.shape[2]), axis=0, return_inverse=True)[1].reshape(
            read.shape[:2]
        )
    if read.ndim != 2 or not read.size or read.dtype.kind not in "iub":
        raise ConfigError(f"segments: {path} holds {read.dtype} {read.shape}, not whole numbers (H, W)")
    down, right = (torch.arange(side) * old // side for side, old in zip(size, read.shape, strict=True))
    return consecutive(read[down.numpy()[:, None], right.numpy()])


def _given(maps: Tensor, x: Tensor) -> Tensor:
    if maps.shape[1:] != (1, *x.shape[2:]) or len(maps) not in (1, len(x)):
        raise ConfigError(
            f"segments: the label maps are {tuple(maps.shape)}; for these images they have to be "
            f"(1, 1, {x.shape[2]}, {x.shape[3]}), or one for each of the {len(x)}"
        )
    found = torch.stack([consecutive(one[0].cpu().numpy()) for one in maps])
    return found.expand(len(x), -1, -1)
