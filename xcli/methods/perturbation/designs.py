"""Masks of a few cells with values from 0 to 1, drawn as points of a cube, and what a picture looks like behind one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from xcli import draws
from xcli.errors import ConfigError
from xcli.methods.perturbation.base import Design, Sampling
from xcli.registry import options
from xcli.score import Score
from xcli.segments import grid
from xcli.targets import Scale

Points = Annotated[
    Literal["sobol", "halton", "lhs", "random"],
    Field(
        description="the points of the cube: the Sobol or Halton sequence from the origin on, the same for every "
        "image; a Latin hypercube or independent points, drawn for each image"
    ),
]

MOST_SOBOL = torch.quasirandom.SobolEngine.MAXDIM


@options
class CellMasks(Sampling):
    """A method that hides cells of a ``grid`` x ``grid`` more or less, and asks which of them the score depends on.

    A mask has a number m from 0 to 1 a cell. ``inpainting`` shows m x; ``blurring`` m x + (1 - m) blur(x), the mean
    over a window of ``window`` pixels, the picture mirrored at its border; ``amplitude`` x (m - 1/2) ``sigma``, which
    is what Xplique computes under the name, and ``shift`` x + (m - 1/2) ``sigma``, which is what it documents. The
    units of ``sigma`` and of the zeros behind ``inpainting`` are those of the normalised input.
    """

    scale: ClassVar[Scale] = "probability"

    grid: Annotated[int, Field(ge=1, description="cells along each side")] = 8
    perturbation: Annotated[
        Literal["inpainting", "blurring", "amplitude", "shift"],
        Field(description="what a mask does to the picture"),
    ] = "inpainting"
    window: Annotated[int, Field(ge=1, description="for blurring: side of the window, pixels")] = 10
    sigma: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="for amplitude and shift: their strength")
    ] = 1.0
    upsampling: Annotated[
        Literal["bilinear", "bicubic", "nearest"],
        Field(description="how a map smaller than the input is brought to its size"),
    ] = "bicubic"

    def behind(self, x: Tensor) -> Tensor:
        """What shows where a mask is 0 under ``blurring``, (B, C, H, W); zeros otherwise."""
        return box_blurred(x, self.window) if self.perturbation == "blurring" else x.new_zeros(1, 1, 1, 1)

    def perturbed(self, x: Tensor, behind: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """Copies (m, C, H, W) of the images ``image`` (m,) behind masks (m, H, W)."""
        own, mask = x[image.to(x.device)], mask[:, None]
        match self.perturbation:
            case "inpainting":
                return own * mask
            case "blurring":
                return torch.lerp(behind[image.to(x.device)], own, mask)
            case "amplitude":
                return own * ((mask - 0.5) * self.sigma)
            case _:
                return own + (mask - 0.5) * self.sigma


@dataclass
class CellDesign(Design):
    """Masks of the images ``x``; ``points``: (1 or B, samples, dimensions), ``cell``: (H, W) the cell of each pixel."""

    method: CellMasks
    x: Tensor
    behind: Tensor
    points: Tensor
    cell: Tensor
    count: Tensor
    image: Tensor

    def cells(self, image: Tensor, sample: Tensor) -> Tensor:
        """The masks (m, cells)."""
        drawn: Tensor = self.points[image.to(self.x.device) % len(self.points), sample.to(self.x.device)]
        return drawn

    def altered(self, image: Tensor, sample: Tensor) -> Tensor:
        mask = self.cells(image, sample).to(self.x.dtype)[:, self.cell]  # (m, H, W)
        return self.method.perturbed(self.x, self.behind, image, mask)

    def on_grid(self, values: Tensor) -> Tensor:
        """Numbers of cells (n, cells) as maps (n, h, w)."""
        across = int(self.cell[0, -1]) + 1
        return values.view(len(values), -1, across)


def cell_grid(x: Tensor, cells: int) -> Tensor:
    """The cell (H, W) of each pixel of images (B, C, H, W).

    Raises:
        ConfigError: there are more cells than pixels along a side.
    """
    size = (x.shape[-2], x.shape[-1])
    if cells > min(size):
        raise ConfigError(
            f"a grid of {cells} x {cells} cells does not fit {size[0]} x {size[1]} pixels; take a smaller `grid`"
        )
    return grid(size, cells).to(x.device)


def points(kind: str, count: int, dimensions: int, score: Score, tag: str, device: torch.device) -> Tensor:
    """``count`` points in the cube of ``dimensions``, (1, count, dimensions), or (B, ...) where images differ.

    Raises:
        ConfigError: the sequence does not go that far.
    """
    match kind:
        case "sobol":
            if dimensions > MOST_SOBOL:
                raise ConfigError(f"the Sobol sequence ends at {MOST_SOBOL} dimensions; take a smaller grid")
            return sobol_points(count, dimensions).to(device)[None]
        case "halton":
            if count < (base := largest_base(dimensions)):
                raise ConfigError(
                    f"{tag}: the Halton sequence needs at least {base} points to fill {dimensions} dimensions, not "
                    f"{count}; take other `points`, more `samples` or a smaller `grid`"
                )
            return halton_points(count, dimensions).to(device)[None]
    images = int(score.image.max()) + 1 if len(score.image) else 0
    seeds = score.seeds(torch.arange(images), tag).to(device)
    found = uniform(seeds, torch.arange(dimensions, device=device), count)
    if kind == "lhs":  # one point in each of as many slices along every dimension
        inner = uniform(seeds, torch.arange(dimensions, 2 * dimensions, device=device), count)
        found = (found.argsort(2).argsort(2) + inner) / count
    return found.permute(0, 2, 1)


def uniform(seeds: Tensor, dimension: Tensor, count: int) -> Tensor:
    """``count`` numbers in (0, 1) for each of the seeds (B,) and dimensions (D,): (B, D, count)."""
    own = draws.sampled(seeds.repeat_interleave(len(dimension)), dimension.repeat(len(seeds)))
    return draws.uniform(own, count).view(len(seeds), len(dimension), count)


@lru_cache(maxsize=8)
def sobol_points(count: int, dimensions: int) -> Tensor:
    """The first points of the Sobol sequence (Joe and Kuo's numbers), from the origin on: (count, dimensions)."""
    return torch.quasirandom.SobolEngine(dimensions).draw(count, dtype=torch.float64)


def largest_base(dimensions: int) -> int:
    """The base in which the last dimension of the Halton sequence counts: the prime of that number."""
    most = max(16, math.ceil(dimensions * (math.log(dimensions) + math.log(math.log(dimensions + 2)) + 1)))
    prime = [False, False, *[True] * most]
    for number in range(2, math.isqrt(most) + 1):
        if prime[number]:
            prime[number * number :: number] = [False] * len(range(number * number, len(prime), number))
    return [number for number, one in enumerate(prime) if one][dimensions - 1]


@lru_cache(maxsize=8)
def halton_points(count: int, dimensions: int) -> Tensor:
    """The first points of the Halton sequence, from the origin on: (count, dimensions)."""
    from scipy.stats import qmc

    return torch.from_numpy(qmc.Halton(dimensions, scramble=False).random(count))


def box_blurred(x: Tensor, window: int) -> Tensor:
    """The mean of the ``window`` x ``window`` pixels around each, the images mirrored about their outermost pixels.

    Raises:
        ConfigError: the window is larger than the shorter side.
    """
    if window > min(x.shape[-2:]):
        raise ConfigError(
            f"a window of {window} pixels does not fit {x.shape[-2]} x {x.shape[-1]} pixels; take a smaller `window`"
        )
    before, after = window // 2, window - 1 - window // 2
    found: Tensor = F.avg_pool2d(F.pad(x, (before, after, before, after), mode="reflect"), window, stride=1)
    return found
