"""Whether networks that learnt the same explain the same: distances between the maps of several checkpoints.

A network is right about a row where it prefers the row's class to all others (``contrast`` above 0). For predicted
classes the first network is always right. Take images that no checkpoint was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from xcli.metrics.base import Direction, Explain, Floats, Measured, Metric
from xcli.metrics.correlation import ranks
from xcli.metrics.similarity import comparable
from xcli.registry import metric
from xcli.score import Score

COST = "an explanation and a pass for each further checkpoint, shared by both metrics"
SOURCE = "Fel et al. 2020, arXiv:2009.04521"


def distance(a: Tensor, b: Tensor) -> Tensor:
    r"""sqrt(1 - \|Spearman\|) of maps (N, H, W), (N,); exactly 0 for equal ones, NaN where one is flat or not finite.

    For vectors u, v of length 1, 1 - u v is half the square of their difference, which does not cancel.
    """
    first, second = (unit(ranks(maps.flatten(1))) for maps in (a, b))
    near = torch.minimum((first - second).square().sum(1), (first + second).square().sum(1))
    return torch.where(comparable(a) & comparable(b), (near / 2).clamp_max(1).sqrt(), torch.nan)


def unit(rows: Tensor) -> Tensor:
    """Rows (N, M) without their mean, at length 1."""
    rows = rows - rows.mean(1, keepdim=True)
    return rows / rows.square().sum(1, keepdim=True).sqrt()


def compared(map: Tensor, x: Tensor, score: Score, method: Explain, models: tuple[Score, ...]) -> Tensor:
    """Of every pair of networks, (3, N, P): the distance of their maps, 1 where both are right, 1 where one is.

    Computed once for both metrics.
    """

    def make() -> Tensor:
        maps = [map, *(method(model, x) for model in models)]
        right = [(own.scaled("contrast").clean(x) > 0).to(map) for own in (score, *models)]  # (N,) each
        parts = [map.new_zeros(3, len(map), 0)]
        for i, j in combinations(range(len(maps)), 2):
            found = [distance(maps[i], maps[j]), right[i] * right[j], (right[i] - right[j]).abs()]
            parts.append(torch.stack(found)[..., None])
        return torch.cat(parts, 2)

    return score.once((map, *(model.module for model in models)), make)  # keys by identity


@metric("mege")
class MeGe(Metric):
    r"""How close the maps of checkpoints are that are all right about an image: whether explanations generalise.

    .. math:: \mathrm{MeGe} = \frac{1}{1 + \mathrm{mean}\, S^=}, \quad
        \delta_{ij}(x) = \sqrt{1 - |\mathrm{Spearman}(e(f_i, x), e(f_j, x))|}

    with S= the distances of all pairs and rows where both networks are right: they prefer the row's class to all
    others, so the targets must be the true labels. No unit; from 0.5 to 1, higher is better; NaN where no pair is right
    together. One number a run; the curve has each row's distances, a pair a column, NaN where the two are not both
    right or a map is flat. Source: Fel et al. 2020, arXiv:2009.04521. Departs: every pair is compared on every image,
    where the paper takes those that one of the two was trained on and the other not.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (0.5, 1.0)
    cost: ClassVar[str] = COST
    source: ClassVar[str] = SOURCE

    def measure(
        self, map: Tensor, x: Tensor, score: Score, method: Explain, models: tuple[Score, ...]
    ) -> Measured:
        found, both, _ = compared(map, x, score, method, models)
        return Measured(None, torch.where(both > 0, found, torch.nan))

    def summary(self, values: Floats | None, curve: Floats | None, target: NDArray[Any]) -> float:
        same = known(curve)
        return 1 / (1 + float(same.mean())) if len(same) else float("nan")


@metric("reco")
class ReCo(Metric):
    r"""Whether distances between the maps of checkpoints tell if they agree about an image or contradict each other.

    .. math:: \mathrm{ReCo} = \max_\gamma \frac{|\{\delta \in S^= : \delta \le \gamma\}|}{|S^=|} +
        \frac{|\{\delta \in S^{\neq} : \delta > \gamma\}|}{|S^{\neq}|} - 1

    with the distances of ``mege``, S= where both networks of a pair are right and S!= where one of them is; the targets
    must be the true labels here too. No unit; from 0, where the two sets cannot be told apart, to 1; higher is better;
    NaN where one of them is empty. One number a run; the curve has each row's distances of S=, a pair a column, then
    those of S!=, NaN elsewhere. Source: Fel et al. 2020, arXiv:2009.04521. Departs: as ``mege`` does. Preset
    ``xplique``: at most 20 of the distances are thresholds, and distances equal to a threshold do not count.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (0.0, 1.0)
    cost: ClassVar[str] = COST
    source: ClassVar[str] = SOURCE
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"xplique": {"thresholds": 20}}

    thresholds: Annotated[
        int | None,
        Field(description="how many of the distances are tried, without ties; null: all of them", ge=1),
    ] = None

    def measure(
        self, map: Tensor, x: Tensor, score: Score, method: Explain, models: tuple[Score, ...]
    ) -> Measured:
        found, both, one = compared(map, x, score, method, models)
        curve = torch.where(torch.cat([both, one], 1) > 0, torch.cat([found, found], 1), torch.nan)
        return Measured(None, curve)

    def summary(self, values: Floats | None, curve: Floats | None, target: NDArray[Any]) -> float:
        if curve is None:
            return float("nan")
        pairs = curve.shape[1] // 2
        return separation(known(curve[:, :pairs]), known(curve[:, pairs:]), self.thresholds)


def known(curve: Floats | None) -> Floats:
    """The distances that there are, sorted, in double precision."""
    flat: Floats = np.zeros(0) if curve is None else curve.ravel().astype(np.float64)
    return np.sort(flat[~np.isnan(flat)])


def separation(same: Floats, other: Floats, thresholds: int | None) -> float:
    """The best sum of true positive and true negative rate, less 1, of sorted distances; NaN for an empty set."""
    if not len(same) or not len(other):
        return float("nan")
    tried: Floats = np.sort(np.concatenate([same, other]))
    if thresholds is None:
        positive: Floats = np.searchsorted(same, tried, "right") / len(same)
        negative: Floats = 1 - np.searchsorted(other, tried, "right") / len(other)
    else:
        tried = tried[:: len(tried) // thresholds + 1]
        positive, negative = shares(same, tried)[0], shares(other, tried)[1]
    return max(0.0, float((positive + negative - 1).max()))


def shares(ordered: Floats, tried: Floats) -> tuple[Floats, Floats]:
    """The shares of values below and above each threshold, among those that differ from it."""
    below = np.searchsorted(ordered, tried, "left")
    above = len(ordered) - np.searchsorted(ordered, tried, "right")
    count = np.maximum(below + above, 1)
    return below / count, above / count
