"""RISE: the mean of random masks, each weighed by what the network makes of the picture behind it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli import draws
from xcli.baselines import Removal
from xcli.methods.base import Attribution
from xcli.methods.perturbation.base import Design, Estimate, Sampling, blended, by_image
from xcli.registry import method
from xcli.score import Score
from xcli.targets import Scale

BLOCKS = 16
"""Runs of masks between whose maps the standard error is measured."""

AT_ONCE = 512
"""Masks in one matrix product."""

Drawn = Literal["rise", "torchray", "xplique"]


@method("rise")
class RISE(Removal, Sampling):
    r"""The mean of random masks, each weighed by the score of the picture behind it.

    .. math:: map = \frac{1}{N p} \sum_{i=1}^{N} f(x \odot M_i)\, M_i

    A mask M is a grid of ``cells`` x ``cells``, each 1 with probability p = ``keep``, brought bilinearly to one cell
    more than the picture needs and cut to it at a random offset of at most one cell. Where a mask is below 1 the
    ``substrate`` shows, 0 in the paper. Unit: that of the score; in expectation, the score given that a pixel is seen.
    Masks belong to the image, the run's seed and their number, so the first 1 000 of 4 000 are those of 1 000.

    Masks are drawn as the authors' code does (``drawn: rise``): a cell has the size that fits rounded up, and the grid
    is mirrored at its border. ``torchray`` makes cells of the size that the picture and one more cell need, rounded up,
    and mirrors the grid likewise; ``xplique`` repeats the outermost cells, and is the picture and one more cell wide,
    rounded down (its own code draws one offset for many masks). ``normalise: coverage`` divides by the sum of the masks
    at each pixel instead of its expectation, which takes the chance surplus of masks out of the map: a constant score
    then gives a flat map, and ``until`` ends sooner.

    Source: Petsiuk, Das and Saenko 2018, arXiv:1806.07421; 4 000 masks as for VGG-16 there, 8 000 for ResNet-50.
    Presets: ``rise-o``, the authors' notebook: 6 000 masks, 8 cells, p 0.1; ``torchray``: 8 000 masks, the logistic
    function of the logit as score, divided by N alone; ``xplique``: coverage plus 1e-4. ``extras`` as for every method
    of ``Sampling``; the standard error is that between the maps of 16 runs of masks.
    """

    scale: ClassVar[Scale] = "probability"
    cost: ClassVar[str] = "masks forwards"
    source: ClassVar[str] = "Petsiuk et al. 2018, arXiv:1806.07421"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "rise-o": {"masks": 6000, "cells": 8, "keep": 0.1},
        "torchray": {"masks": 8000, "drawn": "torchray", "normalise": "count", "logistic": True},
        "xplique": {"drawn": "xplique", "normalise": "coverage", "eps": 1e-4},
    }
    small: ClassVar[Mapping[str, object]] = {"masks": 12}

    masks: Annotated[int, Field(ge=2, description="random masks; with until, at most")] = 4000
    cells: Annotated[int, Field(ge=1, description="cells of a mask along each side")] = 7
    keep: Annotated[float, Field(gt=0, lt=1, description="probability that a cell is seen")] = 0.5
    drawn: Annotated[Drawn, Field(description="whose way to make a mask of a grid")] = "rise"
    normalise: Annotated[
        Literal["expectation", "count", "coverage"],
        Field(description="divide by masks * keep, by masks, or by the sum of the masks at each pixel"),
    ] = "expectation"
    eps: Annotated[float, Field(ge=0, description="for coverage: added to that sum")] = 0.0
    logistic: Annotated[
        bool, Field(description="the logistic function of the logit instead of the score")
    ] = False

    def design(self, score: Score, x: Tensor) -> Masks:
        seeds = score.seeds(torch.arange(len(x)), self.name)
        other = None if self.substrate == "constant" and not self.value else self.whole(score, x)
        bases = tuple(upsampling(side, self.cells, self.drawn, x) for side in x.shape[2:])
        return Masks(self, x, other, seeds, bases, torch.full((len(x),), self.masks), score.image)

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        return super().attribute(score.scaled("logit") if self.logistic else score, x)


@dataclass
class Masks(Design):
    """The masks of a batch; ``bases``: of each side, (shifts, pixels, cells), what a mask is of its grid there."""

    method: RISE
    x: Tensor
    other: Tensor | None
    seeds: Tensor
    bases: tuple[Tensor, ...]
    count: Tensor
    image: Tensor

    def altered(self, image: Tensor, sample: Tensor) -> Tensor:
        grid, down, right = self.parts(image, sample)
        return blended(self.x, self.other, image, down @ grid @ right.mT)

    def parts(self, image: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Masks as products: the grids (m, s, s), and what is left and right of them, (m, H, s) and (m, W, s)."""
        cells, device = self.method.cells, self.x.device
        own = draws.sampled(self.seeds[image].to(device), sample.to(device))
        number = draws.uniform(own, cells * cells + 2)
        grid = (number[:, 2:] < self.method.keep).to(self.x.dtype).unflatten(1, (cells, cells))
        sides = [
            basis[(number[:, side] * len(basis)).long().clamp_max(len(basis) - 1)]
            for side, basis in enumerate(self.bases)
        ]
        return grid, sides[0], sides[1]

    def estimate(self, row: Tensor, scores: Tensor) -> Estimate:
        scores = scores.sigmoid() if self.method.logistic else scores
        found = [
            self.averaged(one, scores[place.to(scores.device)]) for one, place in by_image(self.image[row])
        ]
        maps, errors = zip(*found, strict=True)
        return Estimate(torch.cat(maps), torch.cat(errors))

    def averaged(self, image: int, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Maps and errors of the rows of one image, from their scores (n, S)."""
        total = scores.shape[1]
        ends = sorted({total * block // BLOCKS for block in range(BLOCKS + 1)})
        weights = torch.cat([scores, torch.ones_like(scores[:1])])  # the last one for the coverage
        runs = [self.weighed(image, weights, *own) for own in itertools.pairwise(ends)]
        sums = torch.stack(runs)  # (blocks, n + 1, H, W)
        whole = sums.sum(0)
        size = torch.tensor(ends).diff()[:, None, None, None].to(sums)
        match self.method.normalise:
            case "coverage":
                below = (whole[-1:] + self.method.eps).clamp_min(torch.finfo(whole.dtype).tiny)
                expected = sums[:, -1:] * (whole[:-1] / below)
            case how:
                below = whole.new_tensor(total * (self.method.keep if how == "expectation" else 1.0))
                expected = size / total * whole[:-1]
        maps = whole[:-1] / below
        off = (sums[:, :-1] - expected).square().sum(0) * len(runs) / max(len(runs) - 1, 1)  # of the sum
        return maps, (off.sqrt() / below).square().mean((1, 2)).sqrt()

    def weighed(self, image: int, weights: Tensor, first: int, last: int) -> Tensor:
        """The sum of masks ``first`` to ``last``, each times its weight, (n, H, W) for weights (n, S).

        Since a mask is a product D G R^T of its grid G, the sum is one product too: of all D G side by side, times the
        weights, with all R below each other. No mask is made again.
        """
        total = weights.new_zeros(len(weights), *self.x.shape[2:])
        for start in range(first, last, AT_ONCE):
            sample = torch.arange(start, min(start + AT_ONCE, last))
            grid, down, right = self.parts(torch.full_like(sample, image), sample)
            left = (down @ grid).permute(1, 0, 2)  # (H, m, s)
            below = right.permute(0, 2, 1).flatten(0, 1)  # (m s, W)
            part = weights[:, start : start + len(sample)].to(left)
            total = total + torch.stack([(left * weight[:, None]).flatten(1) @ below for weight in part])
        return total


def upsampling(side: int, cells: int, drawn: Drawn, like: Tensor) -> Tensor:
    """How one side of a mask comes from its grid: (shifts, side, cells), linear, for each offset that can be drawn."""
    size = math.ceil(side / cells)
    match drawn:
        case "rise":
            long, shifts, scale, mirrored = (cells + 1) * size, size, (cells + 1) * size / cells, True
        case "torchray":
            long, shifts = side + size, size
            scale, mirrored = float(math.ceil(long / cells)), True
        case _:
            long = side + side // cells
            shifts, scale, mirrored = long - side + 1, long / cells, False
    place = (
        torch.arange(long, dtype=torch.float64) + 0.5
    ) / scale - 0.5  # in cells, 0 the middle of the first
    basis = torch.zeros(long, cells, dtype=torch.float64)
    low = place.floor()
    for cell, weight in ((low, 1 - (place - low)), (low + 1, place - low)):
        basis.scatter_add_(1, inside(cell.long(), cells, mirrored)[:, None], weight[:, None])
    shifted = torch.arange(shifts)[:, None] + torch.arange(side)
    return basis[shifted].to(like)


def inside(cell: Tensor, cells: int, mirrored: bool) -> Tensor:
    """Numbers of cells beyond the grid, as those that stand for them: mirrored about the outermost, or that itself."""
    if not mirrored or cells == 1:
        return cell.clamp(0, cells - 1)
    period = 2 * (cells - 1)
    turned = cell.remainder(period)
    return torch.minimum(turned, period - turned)
