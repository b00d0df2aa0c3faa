"""How alike two maps are: (N, H, W) and (N, H, W) to one number a row, batched, on the device."""

from __future__ import annotations

import math
from functools import reduce
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.metrics.correlation import pearson, spearman

Alike = Annotated[
    Literal["spearman", "pearson", "ssim", "ssim-uniform", "ssim-flat", "hog"],
    Field(description="how two maps are compared"),
]
Scaling = Annotated[
    Literal["unit", "max", "none"],
    Field(description="what ssim and hog compare: each map from 0 to 1, divided by its largest size, or raw"),
]
Window = Literal["gaussian", "uniform"]

K1, K2, SIGMA = 0.01, 0.03, 1.5
CELL, BLOCK, ANGLES, CLIP, EPSILON = 16, 3, 9, 0.2, 1e-5


def similarity(a: Tensor, b: Tensor, how: Alike = "spearman", scaling: Scaling = "unit") -> Tensor:
    """How alike maps (N, H, W) are, (N,), 1 for equal ones; NaN where one of the two is constant or not finite.

    ``spearman`` and ``pearson`` correlate pixels. ``ssim`` has Wang's Gaussian window, ``ssim-uniform`` the square one
    of scikit-image, ``ssim-flat`` takes the pixels in raster order as a signal; ``hog`` is Pearson's correlation of
    the descriptors. Correlations are the same however maps are scaled.
    """
    known = comparable(a) & comparable(b)
    a, b = (torch.where(known[:, None, None], one, 0) for one in (a, b))
    match how:
        case "spearman":
            values = spearman(a.flatten(1), b.flatten(1))
        case "pearson":
            values = pearson(a.flatten(1), b.flatten(1))
        case "ssim":
            values = ssim(scaled(a, scaling), scaled(b, scaling))
        case "ssim-uniform":
            values = ssim(scaled(a, scaling), scaled(b, scaling), "uniform")
        case "ssim-flat":
            a, b = (scaled(one, scaling).flatten(1)[:, None] for one in (a, b))  # (N, 1, HW)
            values = ssim(a, b, "uniform")
        case "hog":
            values = pearson(hog(scaled(a, scaling)), hog(scaled(b, scaling)))
    return torch.where(known, values, torch.nan)


def comparable(maps: Tensor) -> Tensor:
    """Which maps are finite and not constant, (N,)."""
    rows = maps.flatten(1)
    return rows.isfinite().all(1) & (rows.amax(1) > rows.amin(1))


def scaled(maps: Tensor, how: Scaling) -> Tensor:
    """Each map brought to [0, 1], or divided by its largest absolute value, or as it is."""
    match how:
        case "unit":
            low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
            return (maps - low) / (high - low)
        case "max":
            return maps / maps.abs().amax((1, 2), keepdim=True)
        case "none":
            return maps


# --- structural similarity -----------------------------------------------------------------------------------


def ssim(a: Tensor, b: Tensor, window: Window = "gaussian", span: Tensor | None = None) -> Tensor:
    r"""Mean structural similarity of maps (N, H, W), (N,).

    .. math:: \frac{(2 \mu_a \mu_b + C_1)(2 \sigma_{ab} + C_2)}
        {(\mu_a^2 + \mu_b^2 + C_1)(\sigma_a^2 + \sigma_b^2 + C_2)}, \quad C_i = (K_i L)^2

    The mean is over the windows that lie within the map. A window longer than a side shrinks to the longest odd length
    that fits; a map with a side of 1 is a signal with a window along it.

    Args:
        window: ``gaussian`` is Wang's, 11 pixels, sigma 1.5, population moments; ``uniform`` is scikit-image's default,
            7 pixels, sample covariances.
        span: L, the range of the data, (N,); ``None`` takes for each pair its highest value less its lowest one.
    Source: Wang et al. 2004, IEEE Transactions on Image Processing 13.
    """
    if span is None:
        both = torch.cat([a.flatten(1), b.flatten(1)], 1)
        span = both.amax(1) - both.amin(1)
    weights, unbiased = window_of(window, a.shape[1:])
    first, second = ((k * span.view(-1, 1, 1)) ** 2 for k in (K1, K2))
    centre_a, centre_b = a.mean((1, 2), keepdim=True), b.mean((1, 2), keepdim=True)
    a, b = a - centre_a, b - centre_b  # the moments below would cancel otherwise
    mean_a, mean_b = filtered(a, weights), filtered(b, weights)
    variance = filtered(a * a + b * b, weights) - mean_a**2 - mean_b**2
    covariance = filtered(a * b, weights) - mean_a * mean_b
    mean_a, mean_b = mean_a + centre_a, mean_b + centre_b
    light = (2 * mean_a * mean_b + first) / (mean_a**2 + mean_b**2 + first)
    structure = (2 * unbiased * covariance + second) / (unbiased * variance + second)
    return (light * structure).mean((1, 2))


def window_of(window: Window, shape: torch.Size) -> tuple[list[float], float]:
    """The weights along a side of a map of this shape, and the factor from population to the covariance meant."""
    sides = [side for side in shape if side > 1]
    length = min([11 if window == "gaussian" else 7, *sides])
    length -= 1 - length % 2
    if window == "uniform":
        count = length ** len(sides)
        return [1 / length] * length, count / max(count - 1, 1)
    bell = [math.exp(-(((i - length // 2) / SIGMA) ** 2) / 2) for i in range(length)]
    return [weight / sum(bell) for weight in bell], 1.0


def filtered(maps: Tensor, weights: list[float]) -> Tensor:
    """Weighted means in the windows that lie within the map; a side of 1 is left alone."""
    for dim in (1, 2):
        size = maps.shape[dim] - len(weights) + 1
        if maps.shape[dim] > 1:
            maps = reduce(torch.add, (w * maps.narrow(dim, i, size) for i, w in enumerate(weights)))
    return maps


# --- histograms of oriented gradients ------------------------------------------------------------------------


def hog(maps: Tensor) -> Tensor:
    """Histograms of oriented gradients (N, D) of maps (N, H, W); D is 0 below 48 pixels a side.

    Nine orientations without sign, cells of 16 x 16 pixels, blocks of 3 x 3 cells normalised by L2-Hys, as in
    scikit-image with ``pixels_per_cell=(16, 16)``. Source: Dalal and Triggs 2005.
    """
    down, right = torch.zeros_like(maps), torch.zeros_like(maps)
    down[:, 1:-1] = maps[:, 2:] - maps[:, :-2]
    right[..., 1:-1] = maps[..., 2:] - maps[..., :-2]
    size = torch.hypot(down, right)
    turn = torch.rad2deg(torch.atan2(down, right)) % 180 // (180 / ANGLES)
    cells = torch.stack([in_cells(size * (turn == angle)) for angle in range(ANGLES)], -1)  # (N, h, w, 9)
    if min(cells.shape[1:3]) < BLOCK:
        return maps.new_zeros(len(maps), 0)
    blocks = cells.unfold(1, BLOCK, 1).unfold(2, BLOCK, 1)  # (N, h - 2, w - 2, 9, 3, 3)
    blocks = blocks.movedim(3, -1).flatten(3)
    blocks = normalised(normalised(blocks).clamp_max(CLIP))
    return blocks.flatten(1)


def in_cells(values: Tensor) -> Tensor:
    """Means over whole cells, (N, H, W) -> (N, H // 16, W // 16)."""
    height, width = (side // CELL for side in values.shape[1:])
    values = values[:, : height * CELL, : width * CELL]
    return values.reshape(len(values), height, CELL, width, CELL).mean((2, 4))


def normalised(blocks: Tensor) -> Tensor:
    """Each block (..., D) over its length."""
    return blocks / (blocks.square().sum(-1, keepdim=True) + EPSILON**2).sqrt()
