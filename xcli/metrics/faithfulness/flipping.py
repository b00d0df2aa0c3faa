"""Curves of the score while pixels are flipped, or patches removed, in the order of their relevance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from xcli.baselines import Removal, Substrate
from xcli.metrics.base import Direction, Measured, Metric, Watched
from xcli.metrics.curves import Area, area_under, removal_curve, where_finite
from xcli.metrics.faithfulness.deletion import PixelCurve
from xcli.metrics.order import places
from xcli.registry import metric
from xcli.score import Score

Patch = Annotated[int, Field(description="side of a patch, pixels", ge=1)]


@metric("pixel-flipping")
class PixelFlipping(PixelCurve):
    r"""How soon the score falls while the pixels that the map ranks highest are flipped to their opposite, in area.

    The curve is f(x) after each step, the value its mean height. Unit: that of ``score``; lower is better. Source: Bach
    et al. 2015, PLoS ONE 10(7), doi:10.1371/journal.pone.0130140, where black digits become white and white ones black.
    Departs: the paper shows curves and gives no number for them; the area is ours. ``preset: quantus`` paints pixels in
    the lowest value of the image, one a step, and sums; it flips whole pixels, where Quantus flips the colours of one
    pixel at different steps, so the two agree on images of one channel alone.
    """

    direction: ClassVar[Direction] = "lower"
    source: ClassVar[str] = "Bach et al. 2015, doi:10.1371/journal.pone.0130140"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quantus": {"score": "probability", "substrate": "minimum", "pixels": 1, "area": "sum"}
    }

    score: Watched = "logit"
    substrate: Substrate = "negative"


@metric("region-perturbation")
class RegionPerturbation(Removal, Metric):
    r"""How much of the score is lost on average while the most relevant regions are replaced by noise, one by one.

    .. math:: \mathrm{AOPC} = \frac{1}{L + 1} \sum_{k=0}^{L} \big(f(x) - f(x^{(k)})\big)

    where k regions are gone from x^(k), the region with the largest sum of the map first (MoRF). Regions are squares of
    a grid laid centrally over the image, so those at the border may be smaller. Unit: that of ``score``; higher is
    better. NaN where a map is not finite. Source: Samek et al. 2017, arXiv:1509.06321 (9 x 9 pixels, L = 100,
    uniform noise). Departs: the noise is as wide as each channel of the image and drawn once; an image with fewer
    regions than L loses them all. ``preset: quantus`` gives its steps as the curve, f(x) less its number at each.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (None, None)
    cost: ClassVar[str] = "regions passes"
    source: ClassVar[str] = "Samek et al. 2017, arXiv:1509.06321"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quantus": {"score": "probability", "substrate": "minimum", "patch": 8}
    }
    small: ClassVar[Mapping[str, object]] = {"patch": 16, "regions": 6}

    score: Watched = "logit"
    substrate: Substrate = "uniform"
    patch: Patch = 9
    regions: Annotated[int, Field(description="L, how many regions go at most", ge=1)] = 100

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        watched = score.scaled(self.score)
        place, total = patch_places(self.relevance(map), self.patch)
        counts = list(range(min(self.regions, total) + 1))
        curve = where_finite(map, removal_curve(watched, x, place, counts, total, self))
        fraction = torch.tensor(counts, dtype=curve.dtype, device=curve.device) / total
        return Measured((curve[:, :1] - curve).mean(1), curve, fraction)

    def relevance(self, map: Tensor) -> Tensor:
        """What a region is ranked by, summed over its pixels: (N, H, W)."""
        return map


@metric("region-perturbation-lerf")
class RegionPerturbationLeRF(RegionPerturbation):
    """How much of the score is lost on average while the least relevant regions are replaced by noise, one by one.

    As ``region-perturbation``, with the smallest sum of the map first (LeRF): a good map loses nothing, so lower is
    better. Source: Samek et al. 2017, arXiv:1509.06321.
    """

    direction: ClassVar[Direction] = "lower"

    def relevance(self, map: Tensor) -> Tensor:
        return -map


@metric("selectivity")
class Selectivity(Removal, Metric):
    r"""How soon the score falls while patches are removed by descending relevance, in area under the curve.

    .. math:: \int_0^1 f(x \text{ without its most relevant fraction } q \text{ of patches})\, dq

    A patch is as relevant as the sum of the map over it; patches are squares of a grid laid centrally over the image,
    so those at the border may be smaller. Unit: that of ``score``; lower is better. NaN where a map is not finite.
    Source: Montavon et al. 2018, arXiv:1706.07979. Departs: 16 x 16 pixels a patch, where theirs are 4 x 4
    on digits of 28 x 28. ``preset: quantus`` sums instead, without the untouched image.
    """

    direction: ClassVar[Direction] = "lower"
    bounds: ClassVar[tuple[float | None, float | None]] = (None, None)
    cost: ClassVar[str] = (
        "patches - 1 passes; and one an image for each substrate (one a batch for a constant), shared between metrics"
    )
    source: ClassVar[str] = "Montavon et al. 2018, arXiv:1706.07979"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quantus": {"score": "probability", "substrate": "minimum", "patch": 8, "area": "sum"}
    }
    small: ClassVar[Mapping[str, object]] = {"patch": 24}

    score: Watched = "logit"
    patch: Patch = 16
    area: Area = "fraction"

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        place, total = patch_places(map, self.patch)
        counts = list(range(total + 1))
        watched = score.scaled(self.score)
        curve = where_finite(map, removal_curve(watched, x, place, counts, total, self))
        fraction = torch.tensor(counts, dtype=curve.dtype, device=curve.device) / total
        return Measured(area_under(curve, fraction, self.area), curve, fraction)


def patch_places(maps: Tensor, patch: int) -> tuple[Tensor, int]:
    """The place of each pixel's patch, 0 for the largest sum of the map, (N, H, W); and the number of patches.

    The grid of squares is centred: what does not fit is shared between opposite borders.
    """
    height, width = maps.shape[1:]
    down, right = -height % patch, -width % patch
    padded = F.pad(maps, (right // 2, right - right // 2, down // 2, down - down // 2))
    means = F.avg_pool2d(padded[:, None], patch)[:, 0]  # (N, gh, gw), ordered as the sums are
    place = places(means).view(means.shape)
    pixels = place.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return pixels[:, down // 2 :, right // 2 :][:, :height, :width], place[0].numel()
