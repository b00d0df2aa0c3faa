"""Curves of a score while an image loses its pixels, and the area under them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.baselines import Removal, Remover
from xcli.score import Score

Area = Annotated[
    Literal["fraction", "steps", "sum"],
    Field(
        description="area under the curve: over the fraction removed; in equal steps from 0 to 1; or in steps of 1, "
        "without the untouched image"
    ),
]


def area_under(curve: Tensor, fraction: Tensor, how: Area) -> Tensor:
    """The area under each curve (N, S + 1) by the trapezoid rule, (N,).

    ``fraction`` integrates over the abscissa (S + 1,) and divides by its length, ``steps`` takes all steps as equally
    long; both are the mean height of the curve. ``sum`` takes steps of length 1 and starts at the first step.
    """
    match how:
        case "fraction":
            return torch.trapezoid(curve, fraction.to(curve), dim=1) / (fraction[-1] - fraction[0]).to(curve)
        case "steps":
            return torch.trapezoid(curve, dim=1) / (curve.shape[1] - 1)
        case "sum":
            return torch.trapezoid(curve[:, 1:], dim=1)


def scores_without(score: Score, removed: Remover, place: Tensor, row: Tensor, count: Tensor) -> Tensor:
    """The scores (M,) of ``row[i]`` without the pixels of its first ``count[i]`` places.

    Args:
        place: (N, H, W), when each pixel goes, 0 for the first; pixels that go together share a place.
        row: (M,) and count: (M,), on the CPU.
    """

    def make(index: Tensor) -> Tensor:
        own, gone = row[index].to(place.device), count[index].to(place.device)
        return removed(score.image[row[index]], place[own] < gone[:, None, None])

    return score.at(make, row) if len(row) else torch.empty(0, device=place.device)


def removal_curve(
    score: Score, x: Tensor, place: Tensor, counts: Sequence[int], total: int, removal: Removal
) -> Tensor:
    """The score as more and more is removed: (N, S + 1), a column for each of ``counts``.

    Nothing removed is the image itself, ``total`` removed is the emptied image; both are shared with other metrics,
    everything between is one call.
    """
    inner = [count for count in counts if 0 < count < total]
    row = torch.arange(len(place)).repeat_interleave(len(inner))
    count = torch.tensor(inner, dtype=torch.long).repeat(len(place))
    between = scores_without(score, removal.remover(score, x), place, row, count)
    columns = dict(zip(inner, between.view(len(place), len(inner)).unbind(1), strict=True))
    if 0 in counts:
        columns[0] = score.clean(x)
    if total in counts:
        columns[total] = removal.emptied(score, x)
    return torch.stack([columns[count] for count in counts], 1)


def where_finite(maps: Tensor, values: Tensor) -> Tensor:
    """``values`` (N, ...) where all of a row's map (N, H, W) is finite; else there is no order of its pixels: NaN."""
    known = maps.flatten(1).isfinite().all(1)
    return torch.where(known.view(-1, *[1] * (values.ndim - 1)).to(values.device), values, torch.nan)
