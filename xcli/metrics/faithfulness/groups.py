"""Does the score depend on the pixels the map names, group by group, or as they are added one upon the other?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.metrics.base import Direction, Measured, Metric, Watched
from xcli.metrics.correlation import pearson, spearman
from xcli.metrics.faithfulness.subsets import (
    ROUNDING,
    Pixels,
    Removing,
    cells,
    covered,
    varied,
    where_named,
)
from xcli.metrics.order import places
from xcli.registry import metric, options
from xcli.score import Score


@options
class GroupByGroup(Metric):
    """Changes one group of pixels at a time: the cells of a grid, or ``pixels`` that follow each other in the map.

    NaN where the map is flat, and where its sums or what the score does are the same for all groups.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (-1, 1)

    score: Watched = "probability"
    grid: Annotated[int, Field(description="cells a side; each is a group", ge=2)] = 14
    pixels: Annotated[
        int | None,
        Field(description="instead of cells, groups of so many pixels in the order of the map", ge=1),
    ] = None

    def groups(self, map: Tensor) -> tuple[Tensor, int]:
        """Which group each pixel is in, (N, H, W), and how many groups there are."""
        if self.pixels is not None:
            group = places(map).view(map.shape) // self.pixels
            return group, -(-map[0].numel() // self.pixels)
        cell = cells((map.shape[1], map.shape[2]), self.grid)
        return cell.to(map.device).expand(map.shape), int(cell.max()) + 1


@metric("faithfulness-estimate")
class FaithfulnessEstimate(GroupByGroup, Removing):
    r"""Whether removing one group of pixels costs as much score as the map says of the group, in correlation.

    .. math:: corr_g\Big(\sum_{i \in g} map_i,\ f(x) - f(x \text{ without } g)\Big)

    over all groups g. From -1 to 1; higher is better. Source: Alvarez-Melis and Jaakkola 2018, arXiv:1806.07538, where
    a group is a concept; here it is a cell of ``grid``. ``preset: quantus``: each pixel is a group, a removed one shows
    the image's lowest number, and the logit is watched; it takes as many passes as there are pixels, unless ``pixels``
    (its ``features_in_step``) is raised. Departs: a pixel goes with all its colours, in Quantus one by one.
    """

    cost: ClassVar[str] = "grid * grid passes"
    source: ClassVar[str] = "Alvarez-Melis and Jaakkola 2018, arXiv:1806.07538"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quantus": {"pixels": 1, "substrate": "minimum", "score": "logit"}
    }
    small: ClassVar[Mapping[str, object]] = {"grid": 4}

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        group, count = self.groups(map)
        row = torch.arange(len(map)).repeat_interleave(count)
        gone = in_turn(group, count)
        left = self.without(score.scaled(self.score), x, row, gone).view(len(map), count)
        said = covered(map, row, gone).view(len(map), count)
        return Measured(where_named(map, pearson(varied(said), varied(-left))))  # f(x) itself cancels


@metric("monotonicity-correlation")
class MonotonicityCorrelation(GroupByGroup):
    r"""Whether the groups of pixels with more in the map are those whose change unsettles the score more, in ranks.

    .. math:: spearman_g\Big(\sum_{i \in g} |map_i|,\ E\big[(f(x) - f(x_g))^2\big]\Big)

    over all groups g, where x_g has the group in one random colour, with the mean over ``samples`` of them. With
    ``colours: image`` every channel is drawn between the image's own extremes, with ``unit`` one number from 0 to 1, of
    the normalised input, stands for all channels. From -1 to 1; higher is better.

    Source: Nguyen and Rodríguez Martínez 2020, arXiv:2007.07584. ``preset: quantus``: each pixel is a group, 100
    ``unit`` colours for each, thus 100 passes a pixel unless ``pixels`` is raised. Departs: Quantus divides by f(x)
    squared, which changes no rank.
    """

    cost: ClassVar[str] = "grid * grid * samples passes"
    source: ClassVar[str] = "Nguyen and Rodríguez Martínez 2020, arXiv:2007.07584"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quantus": {"pixels": 1, "samples": 100, "colours": "unit"}
    }
    small: ClassVar[Mapping[str, object]] = {"grid": 3, "samples": 2}

    grid: Annotated[int, Field(description="cells a side; each is a group", ge=2)] = 7
    samples: Annotated[int, Field(description="random colours for each group", ge=1)] = 10
    colours: Annotated[
        Literal["image", "unit"], Field(description="drawn between the image's extremes, or from 0 to 1")
    ] = "image"

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        watched = score.scaled(self.score)
        group, count = self.groups(map.abs())
        before = watched.clean(x)[:, None]  # (N, 1)
        change = before - self.coloured(watched, x, group, count).view(len(map), -1)  # (N, groups * samples)
        rounding = ROUNDING * torch.finfo(change.dtype).eps * before.abs()
        change = torch.where(change.abs() <= rounding, 0.0, change)
        unsettled = change.view(len(map), count, self.samples).square().mean(2)
        row = torch.arange(len(map)).repeat_interleave(count)
        said = covered(map.abs(), row, in_turn(group, count)).view(len(map), count)
        return Measured(where_named(map, spearman(varied(said), unsettled)))

    def coloured(self, watched: Score, x: Tensor, group: Tensor, count: int) -> Tensor:
        """The scores of each row with each group in each of its random colours, row by row, group by group."""
        shown = self.drawn(watched, x)  # (N, samples, C)
        row = torch.arange(len(group)).repeat_interleave(count * self.samples)
        chosen = in_turn(group, count)

        def make(index: Tensor) -> Tensor:
            own, sample = row[index].to(x.device), (index % self.samples).to(x.device)
            image = watched.image[row[index]].to(x.device)
            return torch.where(
                chosen(index // self.samples)[:, None], shown[own, sample][..., None, None], x[image]
            )

        return watched.at(make, row)

    def drawn(self, score: Score, x: Tensor) -> Tensor:
        """The random colours of each row, (N, samples, C): the same for all its groups, which are thus compared."""
        channels = x.shape[1] if self.colours == "image" else 1
        shape = (self.samples, channels)
        rows = range(len(score.image))
        level = torch.stack(
            [torch.rand(shape, generator=score.generator(row, self.name)) for row in rows]
        ).to(x)
        if self.colours == "unit":
            return level.expand(-1, -1, x.shape[1])
        low, high = (extreme[score.image.to(x.device), None] for extreme in (x.amin((2, 3)), x.amax((2, 3))))
        return low + (high - low) * level


@metric("monotonicity")
class Monotonicity(Removing):
    r"""Whether the score never falls while the pixels of the map are added to an emptied image, the lowest first.

    .. math:: 1\big[f(x_1) \le f(x_2) \le \dots \le f(x)\big]

    where x_k has the k-th part of the pixels; a fall within rounding is none. 0 or 1; higher is better. The extra
    ``share`` is the share of steps that do not fall; the curve has the scores, from the first step on. Equal pixels
    come in raster order; a flat map is NaN.

    Source: Arya et al. 2019, arXiv:1909.03012, section on metrics. Departs: pixels in ``steps`` parts. ``preset:
    aix360``, the authors' code, adds one ``pixels`` at a time, thus takes a pass a pixel. ``preset: quantus`` is what
    Quantus describes, the same with the map's absolute value and the image's lowest number for what is not there yet;
    its code paints every pixel in that number from the start and never adds any, so that each map gets 1.
    """

    bounds: ClassVar[tuple[float | None, float | None]] = (0, 1)
    cost: ClassVar[str] = "steps - 1 passes"
    source: ClassVar[str] = "Arya et al. 2019, arXiv:1909.03012"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "aix360": {"pixels": 1},
        "quantus": {"pixels": 1, "magnitude": True, "substrate": "minimum"},
    }
    small: ClassVar[Mapping[str, object]] = {"steps": 4}

    score: Watched = "probability"
    magnitude: Annotated[bool, Field(description="order pixels by the map's absolute value")] = False
    steps: Annotated[int, Field(description="parts in which the pixels are added", ge=2)] = 32
    pixels: Annotated[int | None, Field(description="pixels a step, instead of steps", ge=1)] = None

    def counts(self, total: int) -> list[int]:
        """How many of ``total`` pixels are there after each step."""
        if self.pixels is not None:
            return [*range(self.pixels, total, self.pixels), total]
        return sorted({max(1, k * total // self.steps) for k in range(1, self.steps + 1)})

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        watched, counts = score.scaled(self.score), self.counts(map[0].numel())
        inner = torch.tensor(counts[:-1], dtype=torch.long)
        place = places(-(map.abs() if self.magnitude else map)).view(map.shape)  # 0 for the lowest
        row = torch.arange(len(map)).repeat_interleave(len(inner))

        def missing(index: Tensor) -> Tensor:
            there = inner[index % len(inner)].to(map.device)[:, None, None]
            return place[row[index].to(map.device)] >= there

        part = (
            self.without(watched, x, row, missing).view(len(map), -1)
            if len(inner)
            else map.new_empty(len(map), 0)
        )
        curve = where_named(map, torch.cat([part, watched.clean(x)[:, None]], 1))  # (N, steps)
        rounding = ROUNDING * torch.finfo(curve.dtype).eps * curve.abs().amax(1, keepdim=True)
        kept = curve.diff() >= -rounding  # (N, steps - 1)
        fraction = torch.tensor(counts, dtype=curve.dtype, device=curve.device) / map[0].numel()
        known = curve.isfinite().all(1)
        values, share = (
            torch.where(known, found, torch.nan) for found in (kept.all(1).to(curve), kept.to(curve).mean(1))
        )
        return Measured(values, curve, fraction, extras={"share": share})


def in_turn(group: Tensor, count: int) -> Pixels:
    """The pixels of group ``index % count`` of row ``index // count``, of the groups (N, H, W)."""

    def chosen(index: Tensor) -> Tensor:
        index = index.to(group.device)
        return group[index // count] == (index % count)[:, None, None]

    return chosen
