"""Sufficiency: do images with a similar map get the same class? A property of a whole run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from xcli.metrics.base import Direction, Floats, Measured, Metric
from xcli.registry import metric

AT_ONCE = 2**23
"""Most pairs of rows that are looked at together."""


@metric("sufficiency")
class Sufficiency(Metric):
    r"""Of the rows of a run whose map is similar to a row's, the share that explain the same class, on average.

    .. math:: mean_i\ P(class_j = class_i \mid d_{ij} \le threshold \cdot \max d,\ j \ne i)

    d is the standardised Euclidean distance of two maps: each cell is divided by its standard deviation over the run,
    and cells that are the same in the whole run are left out. Maps are compared by magnitude, averaged over the cells
    of a ``grid``; smaller maps stay as they are. Without unit, from 0 to 1; higher is better.

    One number a run, over all its rows, with the class explained as the label. Rows to which no other is similar have
    nothing to say and are left out; ``undefined: zero`` counts them as 0. NaN where there are none left.

    Source: Dasgupta et al. 2022, arXiv:2202.00734, whose explanations hold for an image or do not; the distance and the
    threshold are those of Quantus. ``preset: quantus`` counts rows on their own as 0. Departs from it: Quantus compares
    the pixels themselves, and only what shares a batch, so that its number depends on the batch; it takes the predicted
    class; and a pixel that is the same in all maps of the batch makes all its distances NaN and its number 0.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, 1)
    cost: ClassVar[str] = "no passes; at the end rows * rows distances, twice"
    source: ClassVar[str] = "Dasgupta et al. 2022, arXiv:2202.00734"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quantus": {"undefined": "zero"},
    }

    threshold: Annotated[
        float,
        Field(description="largest distance of similar maps, as a share of the largest of all", ge=0, le=1),
    ] = 0.6
    grid: Annotated[int, Field(description="cells a side to which larger maps are averaged", ge=1)] = 14
    undefined: Annotated[
        Literal["nan", "zero"], Field(description="what a row counts as to which no other is similar")
    ] = "nan"

    def measure(self, map: Tensor) -> Measured:
        size = min(self.grid, map.shape[1]), min(self.grid, map.shape[2])
        return Measured(None, F.adaptive_avg_pool2d(map.abs(), size).flatten(1))

    def summary(self, values: Floats | None, curve: Floats | None, target: NDArray[Any]) -> float | None:
        assert curve is not None
        known = np.isfinite(curve).all(1)
        if known.sum() < 2:
            return float("nan")
        points, labels = standardised(curve[known].astype(np.float64)), target[known]
        largest = max(float(squared.max()) for _, squared in squared_distances(points))
        limit = (self.threshold**2 + 1e-12) * largest  # what is equal up to rounding is equal
        share = np.concatenate(
            [share_alike(labels, first, squared <= limit) for first, squared in squared_distances(points)]
        )
        if self.undefined == "zero":
            share = np.nan_to_num(share, nan=0.0)
        return float(np.nanmean(share)) if np.isfinite(share).any() else float("nan")


def standardised(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns of (n, d) with mean 0 and deviation 1, without those that are constant."""
    points = points[:, np.ptp(points, 0) > 0]
    scaled: NDArray[np.float64] = (points - points.mean(0)) / points.std(0)
    return scaled


def squared_distances(points: NDArray[np.float64]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Some rows of (n, d) after the other: the first of them, and their squared distances (m, n) to all."""
    norms, step = np.square(points).sum(1), max(1, AT_ONCE // len(points))
    for first in range(0, len(points), step):
        squared = points[first : first + step] @ points.T
        squared *= -2
        squared += norms
        squared += norms[first : first + step, None]
        yield first, squared


def share_alike(labels: NDArray[Any], first: int, similar: NDArray[np.bool_]) -> Floats:
    """Of the rows similar to each of ``first``, ``first`` + 1, ..., the share with its label, (m,); NaN for none."""
    own = np.arange(first, first + len(similar))[:, None]
    similar = similar & (np.arange(len(labels)) != own)
    alike = similar & (labels == labels[own])
    with np.errstate(invalid="ignore"):
        share: Floats = alike.sum(1) / similar.sum(1)
    return share
