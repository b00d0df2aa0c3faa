"""Maps to colour: scaling, colour tables, overlays; batched torch on the maps' device, one copy to the host.

Maps stay raw everywhere else; what is scaled here is for pictures only.  All arithmetic after the scaling is
on integers, so a picture is the same bytes on every device and in every batch.
"""

from __future__ import annotations

import difflib
from functools import cache
from typing import Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

from xcli.errors import ConfigError

UNSEEN = 0.6
"""Brightness of the part of an original image that the model did not see, as a share of its own."""


class Placement(Protocol):
    """Where the model's input lies in the original image: what `overlay_original` needs of a geometry."""

    def to_original(self, maps: Tensor, /) -> Tensor:
        """Bring maps on the input grid (..., h, w) to (..., H, W); outside the input 0 or NaN."""


def colormap_names() -> list[str]:
    """Every colour map of matplotlib, sorted; each also exists reversed, as ``<name>_r``."""
    from matplotlib import colormaps

    return sorted(colormaps)


def colour_table(name: str, device: torch.device | str = "cpu") -> Tensor:
    """Return the colours of a matplotlib colour map, lowest first; uint8, (256, 3).

    The tensor is made once a name and device and shared: do not write to it.

    Raises:
        ConfigError: matplotlib has no colour map of that name.
    """
    return _table(name, str(torch.device(device)))


@cache
def _table(name: str, device: str) -> Tensor:
    import numpy as np
    from matplotlib import colormaps

    if name not in colormaps:
        raise ConfigError(_unknown_colormap(name))
    rgba = colormaps[name](np.linspace(0.0, 1.0, 256), bytes=True)  # (256, 4)
    return torch.from_numpy(np.ascontiguousarray(rgba[:, :3])).to(device)  # (256, 3)


def _unknown_colormap(name: str) -> str:
    by_folded = {known.casefold(): known for known in colormap_names()}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=3)
    hint = f"did you mean {' or '.join(repr(by_folded[key]) for key in near)}?" if near else ""
    return f"unknown colour map {name!r}; {hint or 'for example jet, turbo, viridis, magma or coolwarm'}"


def normalise(maps: Tensor, signed: Literal["auto"] | bool = "auto", clip: float = 0.0) -> Tensor:
    """Scale each map to [0, 1] for a picture: lowest colour = min(0, minimum), highest = max(0, maximum).

    Zero always lies inside the range, so a map without negative values is divided by its maximum (0 stays
    0), a map with both signs is min-max scaled, and a tiny negative value moves the colours only a tiny bit.
    A map without a positive value never reaches the highest colour.  A flat-zero map gives 0, never NaN;
    values that are not finite count as 0.

    Args:
        maps: raw, any float type, (N, H, W).
        signed: ``"auto"``: the rule above; ``False``: negative values count as 0 (Grad-CAM practice);
            ``True``: zero is 0.5 and both signs share one scale, for diverging colour maps (a flat-zero map
            gives 0.5).
        clip: percent of pixels that share the end colour, at each end; an end where that would leave no
            colour at all (a sparse map) is not clipped.

    Returns: float32, (N, H, W).
    Raises:
        ConfigError: ``clip`` is not in [0, 100).
    """
    if not 0 <= clip < 100:
        raise ConfigError(f"clip is a percentage of pixels, 0 <= clip < 100; got {clip}")
    x = maps.detach() if maps.dtype == torch.float64 else maps.detach().float()
    x = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)  # (N, H, W)
    if signed is False:
        x = x.clamp_min(0)
    x = x / _or_one(x.abs().amax((1, 2), keepdim=True))  # now in [-1, 1]: no overflow below
    top, bottom = _end(x, clip), -_end(-x, clip)  # (N, 1, 1) each
    if signed is True:
        top = _or_one(torch.maximum(top, -bottom))
        bottom = -top
    return ((x - bottom) / _or_one(top - bottom)).clamp(0, 1).float()


def _end(x: Tensor, clip: float) -> Tensor:
    """Upper end of the colours, at least 0: the maximum after leaving out ``clip`` percent; (N, 1, 1)."""
    flat = x.flatten(1)  # (N, P)
    most = flat.amax(1)
    leave_out = int(flat.shape[1] * clip / 100)
    if leave_out:
        kept = flat.topk(leave_out + 1, dim=1).values[:, -1]
        most = torch.where(kept > 0, kept, most)
    return most.clamp_min(0)[:, None, None]


def _or_one(divisor: Tensor) -> Tensor:
    return torch.where(divisor > 0, divisor, 1.0)


def levels(maps01: Tensor) -> Tensor:
    """Index of each value's colour, as matplotlib counts: 256 equal steps, 1 in the last; uint8, same shape.

    Values outside [0, 1] take the end colours, NaN the lowest.
    """
    return torch.nan_to_num(maps01 * 256).clamp(0, 255).to(torch.uint8)


def colourise(maps01: Tensor, table: Tensor) -> Tensor:
    """Look up the colour of each value; maps in [0, 1] (N, H, W), table (256, 3) -> uint8 (N, 3, H, W).

    The result is laid out pixel by pixel (channels last), as `to_images` and the encoders want it.
    """
    return _look_up(maps01, table).permute(0, 3, 1, 2)  # (N, 3, H, W)


def _look_up(maps01: Tensor, table: Tensor) -> Tensor:
    return table.index_select(0, levels(maps01).flatten().int()).view(*maps01.shape, 3)  # (N, H, W, 3)


def overlay(pixels: Tensor, maps01: Tensor, table: Tensor, alpha: float = 0.5) -> Tensor:
    """Blend ``(1 - alpha) * image + alpha * colour``, the usual picture of a heatmap on its image.

    Args:
        pixels: what the model saw, uint8, (N, 3, H, W).
        maps01: scaled maps, (N, H, W), on the same device.
        table: colours, (256, 3).
        alpha: weight of the colour, taken to the nearest 1/128.

    Returns: uint8 (N, 3, H, W), channels last, halves rounded up.
    Raises:
        ConfigError: ``alpha`` is not in [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha is the weight of the colour, 0 to 1; got {alpha}")
    weight = round(alpha * 128)  # 128 * 255 + 64 still fits 16 bits
    blended = _look_up(maps01, table.short() * weight + 64)  # (N, H, W, 3)
    blended += pixels.permute(0, 2, 3, 1).short() * (128 - weight)
    return (blended >> 7).to(torch.uint8).permute(0, 3, 1, 2)  # (N, 3, H, W)


def overlay_original(
    image: Image.Image, map01: Tensor, geometry: Placement, table: Tensor, alpha: float = 0.5
) -> Image.Image:
    """Lay a map of the model's input over the whole original image; what the model did not see is dimmed.

    Args:
        image: the original, RGB, (H, W) as ``geometry`` knows it.
        map01: scaled map on the input grid, (h, w).
        geometry: where the input lies in the original.
        table: colours, (256, 3), on the map's device.
        alpha: weight of the colour, as in `overlay`.

    Returns: RGB image, (H, W).
    Raises:
        ConfigError: ``alpha`` is not in [0, 1].
    """
    placed = geometry.to_original(map01[None])  # (1, H, W)
    seen = geometry.to_original(torch.ones_like(map01)[None]) > 0.5  # (1, H, W); NaN counts as not seen
    pixels = from_image(image).to(map01.device)  # (1, 3, H, W)
    dimmed = (pixels.float() * UNSEEN + 0.5).to(torch.uint8)
    return to_images(torch.where(seen[:, None], overlay(pixels, placed, table, alpha), dimmed))[0]


def heatmap_image(level: Tensor, table: Tensor) -> Image.Image:
    """One map as an 8-bit palette image, a quarter of the work and half the bytes of an RGB PNG.

    The stored byte is the level (0 lowest, 255 highest), so the file reads back as the map itself, not only
    as colours.  ``level``: `levels` of one map, uint8, (H, W); ``table``: colours, (256, 3).
    """
    image = Image.fromarray(level.cpu().contiguous().numpy())
    image.putpalette(table.cpu().numpy().tobytes())
    return image


def from_image(image: Image.Image) -> Tensor:
    """RGB image -> uint8 (1, 3, H, W)."""
    raw = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return raw.view(1, image.height, image.width, 3).permute(0, 3, 1, 2)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Copy a batch to the host, once: uint8 (N, 3, H, W) -> N RGB images."""
    rows = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()  # (N, H, W, 3)
    return [Image.fromarray(row) for row in rows]
