"""Does what the map says of a set of pixels agree with what the score loses without them?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli import segments
from xcli.metrics.base import Direction, Measured, Metric, Watched
from xcli.metrics.correlation import pearson, spearman
from xcli.registry import metric, options
from xcli.score import Score

Pixels = Callable[[Tensor], Tensor]
"""The pixels (m, H, W), bool, that are removed from each of the copies ``index`` (m,); pure, so it may run again."""

PRIME = 2**31 - 1
ROUNDING = 64
"""Numbers that differ by fewer units in the last place of the largest than this are the same number."""


@options
class Removing(Metric):
    """Watches the score while sets of pixels are removed, all colours of a pixel at once."""

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (-1, 1)

    score: Watched = "logit"
    substrate: Annotated[
        Literal["constant", "mean", "minimum"],
        Field(
            description="what a removed pixel shows: the mean colour of the preprocessing, 0; the image's own mean "
            "colour; or the image's lowest number, black for most"
        ),
    ] = "constant"

    def without(self, watched: Score, x: Tensor, row: Tensor, gone: Pixels) -> Tensor:
        """The scores (M,) of the rows ``row`` (M,) without the pixels ``gone``."""
        return watched.at(self.copies(x, watched.image[row], gone), row)

    def copies(self, x: Tensor, image: Tensor, gone: Pixels) -> Callable[[Tensor], Tensor]:
        """The function that makes copies of the images ``image`` (M,) without the pixels ``gone``."""
        shown = shown_instead(x, self.substrate)

        def make(index: Tensor) -> Tensor:
            own = image[index].to(x.device)
            return torch.where(gone(index)[:, None], shown[own], x[own])

        return make


@options
class RandomSubsets(Removing, ABC):
    """Correlates what the map says of random sets of pixels, its sum over them, with the loss of score without them.

    The sets are drawn for each image from the run's seed and the image's path. NaN where the map is flat, for then it
    names nothing, and where its sums or the scores are the same for all sets; a difference within rounding is none.
    """

    samples: Annotated[int, Field(description="random sets of each size", ge=2)] = 100
    grid: Annotated[
        int | None,
        Field(description="cells a side, removed as a whole; null: every pixel for itself", ge=1),
    ] = None

    @abstractmethod
    def sizes(self, features: int) -> list[int]:
        """How many of the cells or pixels are in a set; ``samples`` sets of each size."""

    def picked(self, keys: Tensor, size: Tensor) -> Tensor:
        """Which features (m, F), bool, are in a set of ``size`` (m,), by random numbers below PRIME (m, F)."""
        return smallest(keys, size)

    def correlations(self, map: Tensor, x: Tensor, score: Score) -> Tensor:
        """The correlation for each of the sizes, (N, sizes)."""
        cell = cells((map.shape[1], map.shape[2]), self.grid)  # (H, W)
        features = int(cell.max()) + 1
        cell = cell.to(map.device)
        size = torch.tensor(self.sizes(features)).repeat_interleave(self.samples)  # (S,)
        draws = Draws.of(score, self.name, features, len(size), map.device)

        def gone(index: Tensor) -> Tensor:
            picked = self.picked(draws(index), size[index % len(size)].to(map.device))
            return picked[:, cell]

        row = torch.arange(len(map)).repeat_interleave(len(size))
        watched = score.scaled(self.score)
        left = watched.once((x, self), lambda: self.without(watched, x, row, gone))  # the sets know no map
        said = covered(map, row, gone)
        shape = (len(map), -1, self.samples)
        return where_named(map, self.correlated(said.view(shape), -left.view(shape)))  # f(x) itself cancels

    def correlated(self, said: Tensor, lost: Tensor) -> Tensor:
        """(..., S) and (..., S) -> (...)."""
        return pearson(varied(said), varied(lost))


@metric("mu-fidelity")
class MuFidelity(RandomSubsets):
    r"""Whether removing random cells costs as much score as the map says of them, in correlation.

    .. math:: corr_S\Big(\sum_{i \in S} map_i,\ f(x) - f(x \text{ without } S)\Big)

    over ``samples`` random sets S of a ``share`` of the cells. From -1 to 1; higher is better. With ``undefined: zero``
    a row for which there is no correlation counts as 0. Source: Bhatt et al. 2020, arXiv:2005.00631, definition 3.
    Departs: cells instead of pixels, as Xplique advises for images; ``grid: null`` removes pixels. ``preset: xplique``
    has every cell in or out of a set by itself (``draw: bernoulli``), Spearman's correlation, and 0 for no correlation.
    """

    cost: ClassVar[str] = "samples passes"
    source: ClassVar[str] = "Bhatt et al. 2020, arXiv:2005.00631"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "xplique": {"draw": "bernoulli", "correlation": "spearman", "undefined": "zero"}
    }
    small: ClassVar[Mapping[str, object]] = {"samples": 12}

    samples: Annotated[int, Field(description="random sets", ge=2)] = 200
    grid: Annotated[
        int | None, Field(description="cells a side, removed as a whole; null: every pixel for itself", ge=1)
    ] = 9
    share: Annotated[float, Field(description="share of the cells in a set", gt=0, lt=1)] = 0.2
    draw: Annotated[
        Literal["fixed", "bernoulli"],
        Field(description="sets of the same size, or every cell by itself with probability share"),
    ] = "fixed"
    correlation: Annotated[Literal["pearson", "spearman"], Field(description="of values, or of ranks")] = (
        "pearson"
    )
    undefined: Annotated[
        Literal["nan", "zero"], Field(description="what a row without a correlation counts as")
    ] = "nan"

    def sizes(self, features: int) -> list[int]:
        return [max(1, round(self.share * features))]

    def picked(self, keys: Tensor, size: Tensor) -> Tensor:
        return smallest(keys, size) if self.draw == "fixed" else keys < self.share * PRIME

    def correlated(self, said: Tensor, lost: Tensor) -> Tensor:
        return {"pearson": pearson, "spearman": spearman}[self.correlation](varied(said), varied(lost))

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        values = self.correlations(map, x, score)[:, 0]
        return Measured(values.nan_to_num(0.0) if self.undefined == "zero" else values)


@metric("faithfulness-correlation")
class FaithfulnessCorrelation(RandomSubsets):
    r"""Whether removing random pixels costs as much score as the map says of them, in correlation.

    .. math:: corr_S\Big(\sum_{i \in S} map_i,\ f(x) - f(x \text{ without } S)\Big)

    over ``samples`` random sets S of ``subset`` pixels (all, where an image has no more, and then NaN). From -1 to 1;
    higher is better. Source: Bhatt et al. 2020, arXiv:2005.00631, definition 3. ``preset: quantus`` paints removed
    pixels in the image's lowest number. Departs: a feature is a pixel with all its colours, in Quantus one colour of
    a pixel.
    """

    cost: ClassVar[str] = "samples passes"
    source: ClassVar[str] = "Bhatt et al. 2020, arXiv:2005.00631"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"quantus": {"substrate": "minimum"}}
    small: ClassVar[Mapping[str, object]] = {"samples": 12}

    subset: Annotated[int, Field(description="pixels (or cells) in a set", ge=1)] = 224

    def sizes(self, features: int) -> list[int]:
        return [min(self.subset, features)]

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        return Measured(self.correlations(map, x, score)[:, 0])


@metric("sensitivity-n")
class SensitivityN(RandomSubsets):
    r"""Whether n pixels matter as much as the map says of them, few or many: the mean correlation over several n.

    .. math:: corr_{|S| = n}\Big(\sum_{i \in S} map_i,\ f(x) - f(x \text{ without } S)\Big)

    over ``samples`` random sets S, for ``steps`` values of n from 1 to ``largest`` of all pixels, each larger than the
    one before by about the same factor. The value is the mean over the n for which there is a correlation; the curve
    has them all, with n as a fraction of the pixels. From -1 to 1; higher is better: 1 for a map that is sensitive in
    the sense of the paper for all these n.

    Source: Ancona et al. 2018, arXiv:1711.06104. Departs: the paper draws a curve, of which this takes the mean.
    Quantus has something else under the name, and no preset here: it removes pixels in the order of the map, one upon
    the other, but adds up those of the last step alone, and correlates over the images of its first batch.
    """

    cost: ClassVar[str] = "steps * samples passes"
    source: ClassVar[str] = "Ancona et al. 2018, arXiv:1711.06104"
    small: ClassVar[Mapping[str, object]] = {"samples": 6, "steps": 2}

    steps: Annotated[int, Field(description="values of n", ge=1)] = 8
    largest: Annotated[float, Field(description="largest n, as a share of all pixels", gt=0, lt=1)] = 0.8

    def sizes(self, features: int) -> list[int]:
        top = max(1, int(self.largest * features))
        return sorted({round(top ** (k / max(1, self.steps - 1))) for k in range(self.steps - 1)} | {top})

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        curve = self.correlations(map, x, score)
        total = (
            map[0].numel()
            if self.grid is None
            else min(self.grid, map.shape[1]) * min(self.grid, map.shape[2])
        )
        fraction = torch.tensor(self.sizes(total), dtype=curve.dtype, device=curve.device) / total
        return Measured(curve.nanmean(1), curve, fraction)


@dataclass(frozen=True)
class Draws:
    """Random numbers below PRIME, one for each of F features in each of S sets of a row, made when they are asked for.

    code * factor mod PRIME: of an image are kept a random code for each feature, all different, and a random factor
    for each set. Each set is an even draw, two of them are as good as independent, and nothing as large as F times S
    ever exists. In whole numbers, so that every device draws the same.

    Attributes:
        code: (B, F), of the features of each image.
        factor: (B, S), of the sets of each image.
        own: (N,), which of the images a row is about.
    """

    code: Tensor
    factor: Tensor
    own: Tensor

    @classmethod
    def of(cls, score: Score, tag: str, features: int, sets: int, device: torch.device) -> Draws:
        """Drawn for each image from the run's seed, its key and ``tag``."""
        _, own, count = score.image.unique_consecutive(return_inverse=True, return_counts=True)
        codes, factors, stride = [], [], PRIME // features
        for first in (count.cumsum(0) - count).tolist():
            generator = score.generator(first, tag)
            place = torch.randperm(features, generator=generator)
            codes.append(place * stride + torch.randint(1, stride, (features,), generator=generator))
            factors.append(torch.randint(1, PRIME, (sets,), generator=generator))
        return cls(torch.stack(codes).to(device), torch.stack(factors).to(device), own.to(device))

    def __call__(self, index: Tensor) -> Tensor:
        """(m, F), int64, of the copies ``index`` (m,): set ``index % S`` of row ``index // S``."""
        sets = self.factor.shape[1]
        index = index.to(self.own.device)
        own = self.own[index // sets]
        return self.code[own] * self.factor[own, index % sets, None] % PRIME


def smallest(keys: Tensor, count: Tensor) -> Tensor:
    """The ``count`` (m,) smallest of each line of distinct keys (m, F), bool."""
    ordered = keys.int().sort(1).values
    return keys <= ordered.gather(1, count[:, None] - 1)


def cells(size: tuple[int, int], grid: int | None) -> Tensor:
    """Which cell of a grid each pixel of (H, W) is in, that which its middle falls into; without one, each its own."""
    return segments.grid(size, max(size) if grid is None else grid)


def covered(map: Tensor, row: Tensor, gone: Pixels, at_once: int = 64) -> Tensor:
    """The sum of the map (N, H, W) of ``row[i]`` over the pixels ``gone(i)``: (M,)."""
    return torch.cat(
        [
            torch.where(gone(part), map[row[part].to(map.device)], 0.0).flatten(1).sum(1)
            for part in torch.arange(len(row)).split(at_once)
        ]
    )


def varied(values: Tensor) -> Tensor:
    """Values (..., S), made equal where they differ by rounding alone."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    rounding = ROUNDING * torch.finfo(values.dtype).eps * torch.maximum(low.abs(), high.abs())
    return torch.where(high - low <= rounding, 0.0, values)


def where_named(map: Tensor, values: Tensor) -> Tensor:
    """``values`` (N, ...), NaN where the map (N, H, W) is flat or not finite."""
    span = map.amax((1, 2)) - map.amin((1, 2))
    known = (span > 0) & span.isfinite()
    return torch.where(known.view(-1, *[1] * (values.ndim - 1)), values, torch.nan)


def shown_instead(x: Tensor, substrate: str) -> Tensor:
    """What removed pixels of the images (B, C, H, W) show, (B, C, 1, 1)."""
    match substrate:
        case "mean":
            return x.mean((2, 3), keepdim=True)
        case "minimum":
            return x.amin((1, 2, 3), keepdim=True).expand(-1, x.shape[1], -1, -1)
    return x.new_zeros(len(x), x.shape[1], 1, 1)
