"""How strongly the score depends on each cell of random masks: the Hilbert-Schmidt independence criterion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.methods.perturbation.base import Estimate, by_image
from xcli.methods.perturbation.coalitions import wide
from xcli.methods.perturbation.designs import CellDesign, CellMasks, Points, cell_grid, points
from xcli.registry import method
from xcli.score import Score

RBF_WIDTH = 0.5
"""That of the Gaussian kernel on masks, whose numbers go from 0 to 1."""

Kernel = Literal["binary", "rbf", "sobolev"]


@method("hsic")
class HSIC(CellMasks):
    r"""How far the score and the mask of a cell are from being independent, over random masks.

    .. math:: \frac{1}{(n - 1)^2} \mathrm{tr}(K_i H L H), \qquad H = I - \tfrac{1}{n} \mathbf{1}\mathbf{1}^T

    with K_i the kernel between the numbers of cell i in the n ``samples`` masks, and L that between their scores, a
    Gaussian exp(-(y - y')^2 / 2 w^2). ``kernel``: ``binary``, 1/2 - (m - m')^2 on masks rounded to 0 and 1; ``rbf``, a
    Gaussian of width 0.5; ``sobolev``, B_1(m) B_1(m') + B_2(|m - m'|) / 2 with Bernoulli's polynomials B. The last two
    take the masks as they are unless ``binary_masks`` is set. The map has one number a cell, at least 0, without unit
    and sign; 0 where the score does not vary.

    Source: Novello, Fel and Vigouroux 2022, arXiv:2206.06219. ``width: outputs`` takes the median of the scores for w,
    as the authors do, which wants scores that are positive: the probability is explained unless ``score`` says
    otherwise; ``distances`` takes the median distance between two scores, the usual rule. Preset ``xplique``: the Sobol
    sequence, and divided by n instead of (n - 1)^2. The standard error is that of independent masks, for the width as
    it is.
    """

    cost: ClassVar[str] = "samples forwards"
    source: ClassVar[str] = "Novello et al. 2022, arXiv:2206.06219"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "xplique": {"points": "sobol", "divide": "n"},
    }
    small: ClassVar[Mapping[str, object]] = {"grid": 2, "samples": 12}

    samples: Annotated[int, Field(ge=2, description="random masks; with until, at most")] = 500
    points: Points = "lhs"
    kernel: Annotated[Kernel, Field(description="on the numbers of a cell")] = "binary"
    binary_masks: Annotated[
        bool, Field(description="masks rounded to 0 and 1, for any kernel; the binary one always does")
    ] = False
    width: Annotated[
        Literal["outputs", "distances"],
        Field(description="the scores' kernel is as wide as their median, or as that of their distances"),
    ] = "outputs"
    divide: Annotated[
        Literal["(n-1)^2", "n"], Field(description="what the trace is divided by, n the masks")
    ] = "(n-1)^2"

    def design(self, score: Score, x: Tensor) -> CellDesign:
        cell = cell_grid(x, self.grid)
        drawn = points(self.points, self.samples, int(cell.max()) + 1, score, self.name, x.device)
        if self.kernel == "binary" or self.binary_masks:
            drawn = (drawn > 0.5).to(drawn)
        count = torch.full((len(x),), self.samples)
        return Dependence(self, x, self.behind(x), drawn, cell, count, score.image)


@dataclass
class Dependence(CellDesign):
    """Masks whose numbers, cell by cell, are held against the scores."""

    method: HSIC

    def estimate(self, row: Tensor, scores: Tensor) -> Estimate:
        method = self.method
        number = scores.shape[1]
        values, spread = [], []
        for one, place in by_image(self.image[row]):
            sample = torch.arange(number)
            masks = self.cells(torch.full_like(sample, one), sample).to(wide(scores.device))  # (S, cells)
            own = scores[place.to(scores.device)].to(masks.dtype)
            outputs = torch.stack([centred(output_kernel(y, method.width)) for y in own])  # (n, S, S)
            shares = [(centred(input_kernel(m, method.kernel)) * outputs).sum(2) for m in masks.T]
            shared = torch.stack(shares, 2)  # (n, S, cells): what each mask adds to the trace
            values.append(shared.sum(1))
            spread.append(2 * shared.std(1).square().mean(1).mul(number).sqrt())
        divisor = number if method.divide == "n" else (number - 1) ** 2
        return Estimate(self.on_grid(torch.cat(values) / divisor), torch.cat(spread) / divisor)


def input_kernel(masks: Tensor, kernel: Kernel) -> Tensor:
    """The kernel between the numbers (S,) of a cell: (S, S)."""
    apart = masks[:, None] - masks
    match kernel:
        case "binary":
            return 0.5 - apart.square()
        case "rbf":
            return (-apart.square() / (2 * RBF_WIDTH**2)).exp()
        case _:
            off, middle = apart.abs(), masks - 0.5
            return (off.square() - off + 1 / 6) / 2 + middle[:, None] * middle


def output_kernel(values: Tensor, width: str) -> Tensor:
    """The Gaussian kernel between scores (S,): (S, S)."""
    apart = values[:, None] - values
    if width == "outputs":
        wide_by = values.quantile(0.5)
    else:
        first, second = torch.triu_indices(len(values), len(values), 1, device=values.device)
        wide_by = apart[first, second].abs().median()
    off = apart.square() / (2 * wide_by.square())
    return torch.where(apart == 0, 1.0, (-off).exp())


def centred(kernel: Tensor) -> Tensor:
    """A symmetric kernel matrix (S, S) less the means of its rows and columns."""
    mean = kernel.mean(0)
    return kernel - mean - mean[:, None] + mean.mean()
