"""How much of the score's variance under random masks is due to each cell: total Sobol indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.methods.perturbation.base import Estimate
from xcli.methods.perturbation.coalitions import wide
from xcli.methods.perturbation.designs import CellDesign, CellMasks, Points, cell_grid, points
from xcli.registry import method
from xcli.score import Score

LEFT_OUT = 32
"""Parts of a design that are left out in turn to find the standard error."""

Estimator = Literal["jansen", "homma", "janon", "glen", "saltelli"]


@method("sobol")
class Sobol(CellMasks):
    r"""The share of the score's variance under random masks that would stay if only this cell's mask varied still.

    .. math:: S_{T_i} = \frac{\mathbb{E}\big[\mathrm{Var}(f \mid m_{j \neq i})\big]}{\mathrm{Var}(f)}
        \approx \frac{\sum_j (f(A_j) - f(C^i_j))^2}{2 N\, \hat V}

    with A and B the two halves of N = ``samples`` points of a cube in twice as many dimensions as there are cells, and
    C^i the masks A with the number of cell i from B. The map has one number a cell, without unit; interactions between
    cells count for each of them, so the sum is 1 for an additive score and more for others. ``estimator``, with V the
    sample variance of f(A) and a, c for f(A), f(C^i): ``jansen`` as above; ``homma`` and ``saltelli``, which agree,
    1 - (mean(a c) - mean(a)^2) / V; ``janon`` the same with mean and variance taken over a and c together; ``glen``,
    1 less the correlation of a and c. Where the score does not vary the map is 0. The indices know no sign.

    Source: Fel et al. 2021, arXiv:2111.04138; Jansen 1999, Homma and Saltelli 1996, Janon et al. 2014, Glen and Isaacs
    2012, Saltelli 2002. Departs: no estimator needs f(B), so it is not run: N (cells + 1) passes instead of
    N (cells + 2); and Janon's variance is the published one, where Xplique divides the squares alone by N - 1, so that
    a constant in the score counts. N is 32 as in Xplique; the authors' package has 64.

    Few points of a sequence do not fill twice as many dimensions as there are cells: with 32 points of the ``sobol``
    sequence on 8 x 8 cells the indices of an additive score come out about six times too small, though in their order;
    those of ``lhs`` and ``random`` have their size, with more noise. The standard error, a jackknife over at most 32
    parts of the design, is meant for independent points and does not know of this.
    """

    cost: ClassVar[str] = "samples * (grid^2 + 1) forwards"
    source: ClassVar[str] = "Fel et al. 2021, arXiv:2111.04138"
    small: ClassVar[dict[str, object]] = {"grid": 2, "samples": 4}

    samples: Annotated[
        int, Field(ge=2, description="points of each half of the design; with until, at most")
    ] = 32
    points: Points = "sobol"
    estimator: Annotated[Estimator, Field(description="of the total index")] = "jansen"

    def design(self, score: Score, x: Tensor) -> CellDesign:
        cell = cell_grid(x, self.grid)
        cells = int(cell.max()) + 1
        drawn = points(self.points, self.samples, 2 * cells, score, self.name, x.device)
        count = torch.full((len(x),), self.samples * (cells + 1))
        return PickFreeze(self, x, self.behind(x), drawn, cell, count, score.image, cells + 1)


@dataclass
class PickFreeze(CellDesign):
    """For each point: the mask A, then A with the number of each cell in turn from B."""

    method: Sobol
    unit: int = 1

    def cells(self, image: Tensor, sample: Tensor) -> Tensor:
        point, turn = sample // self.unit, (sample % self.unit).to(self.x.device)
        first, second = super().cells(image, point).chunk(2, 1)  # (m, cells) each
        changed = torch.arange(first.shape[1], device=turn.device) == turn[:, None] - 1
        return torch.where(changed, second, first)

    def estimate(self, row: Tensor, scores: Tensor) -> Estimate:
        table = scores.to(wide(scores.device)).unflatten(1, (-1, self.unit))  # (n, points, cells + 1)
        index = total_index(table, self.method.estimator)
        parts = min(table.shape[1], LEFT_OUT)
        if parts < 3:  # what one point leaves has no variance
            return Estimate(self.on_grid(index), index.new_full((len(index),), torch.nan))
        part = torch.arange(table.shape[1], device=table.device) % parts
        without = torch.stack(
            [total_index(table[:, part != own], self.method.estimator) for own in range(parts)]
        )
        spread = (without - without.mean(0)).square().sum(0) * (parts - 1) / parts  # (n, cells)
        return Estimate(self.on_grid(index), spread.mean(1).sqrt())


def total_index(table: Tensor, estimator: Estimator) -> Tensor:
    """The total index (n, cells) of each cell, from f(A) and f(C) side by side, (n, points, 1 + cells)."""
    origin = table[
        :, :1, :1
    ]  # scores are taken from one of them on: what does not vary is then 0 to the last bit
    a, c = (table - origin).tensor_split([1], 2)
    middle = a.mean(1)
    variance = a.var(1, correction=1 if a.shape[1] > 1 else 0)
    match estimator:
        case "jansen":
            left = (a - c).square().mean(1) / 2
        case "homma" | "saltelli":
            left = variance - (a * c).mean(1) + middle.square() - origin[:, 0] * (c.mean(1) - middle)
        case "janon":
            shared = (middle + c.mean(1)) / 2
            variance = (a.square() + c.square()).mean(1) / 2 - shared.square()
            left = variance - (a * c).mean(1) + shared.square()
        case _:
            off, change = a - middle[:, None], c - c.mean(1, keepdim=True)
            variance = (off.square().mean(1) * change.square().mean(1)).sqrt()
            left = variance - (off * change).mean(1)
    return torch.where(variance > 0, left / variance.clamp_min(torch.finfo(left.dtype).tiny), 0)
