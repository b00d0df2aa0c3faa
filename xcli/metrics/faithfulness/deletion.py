"""Deletion and insertion: the score while pixels go, or come, in the order that the map names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.baselines import Removal, Substrate
from xcli.metrics.base import Direction, Measured, Metric, Watched
from xcli.metrics.curves import Area, area_under, removal_curve, where_finite
from xcli.metrics.order import places
from xcli.registry import metric, options
from xcli.score import Score


@options
class PixelCurve(Removal, Metric):
    """The area under a curve of the score over the fraction of pixels, taken in the order of the map.

    Pixels go highest first, equal ones in raster order, with all their colours at once. Step k of ``steps`` has taken
    floor(k HW / steps) pixels; with ``rounding: up`` every step takes as many as the first, rounded up, and the last
    what is left, and with ``pixels`` as many as that. ``until`` ends the curve earlier; the area is then that up to
    there, divided by it. NaN where a map is not finite.
    """

    bounds: ClassVar[tuple[float | None, float | None]] = (None, None)
    cost: ClassVar[str] = (
        "steps - 1 passes; and one an image for each substrate (one a batch for a constant), shared between metrics"
    )
    small: ClassVar[Mapping[str, object]] = {"steps": 4}

    score: Watched = "probability"
    steps: Annotated[int, Field(description="steps of the curve", ge=1)] = 32
    pixels: Annotated[int | None, Field(description="pixels a step, instead of steps", ge=1)] = None
    rounding: Annotated[
        Literal["even", "up"], Field(description="steps as even as whole pixels allow, or rounded up")
    ] = "even"
    until: Annotated[float, Field(description="fraction of the pixels at the end", gt=0, le=1)] = 1.0
    area: Area = "fraction"

    def counts(self, total: int) -> list[int]:
        """How many of ``total`` pixels are gone after each step, 0 first."""
        last = max(1, int(total * self.until))
        if self.pixels is None and self.rounding == "even":
            return sorted({k * last // self.steps for k in range(self.steps + 1)})
        return [*range(0, last, self.pixels or -(-last // self.steps)), last]

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        counts = self.counts(map[0].numel())
        curve = where_finite(map, self.curve(score.scaled(self.score), x, map, counts))
        fraction = torch.tensor(counts, dtype=curve.dtype, device=curve.device) / map[0].numel()
        return Measured(area_under(curve, fraction, self.area), curve, fraction)

    def curve(self, score: Score, x: Tensor, map: Tensor, counts: list[int]) -> Tensor:
        """The score (N, S + 1) once the first ``counts`` pixels of the map have gone."""
        return removal_curve(score, x, places(map).view(map.shape), counts, map[0].numel(), self)


@metric("deletion")
class Deletion(PixelCurve):
    r"""How soon the score falls while the pixels that the map ranks highest are removed, in area under the curve.

    .. math:: \int_0^1 f(x \text{ without its highest fraction } q)\, dq

    Unit: that of ``score``; lower is better. Source: Petsiuk et al. 2018, arXiv:1806.07421, algorithm 1. Departs: the
    area is over the true fraction removed, which differs from theirs (``area: steps``) in the last step alone, and the
    number of steps is 32. Presets: ``rise``, the authors' code, 224 pixels a step; ``xplique``; ``torch-cam``.
    """

    direction: ClassVar[Direction] = "lower"
    source: ClassVar[str] = "Petsiuk et al. 2018, arXiv:1806.07421"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "rise": {"pixels": 224, "area": "steps"},
        "xplique": {"score": "logit", "steps": 10, "area": "steps"},
        "torch-cam": {"score": "logit", "steps": 20, "rounding": "up"},
    }


@metric("insertion")
class Insertion(PixelCurve):
    r"""How soon the score rises while an emptied image regains the pixels that the map ranks highest, in area.

    .. math:: \int_0^1 f(\text{an emptied image with the highest fraction } q \text{ of } x)\, dq

    Unit: that of ``score``; higher is better. The image is emptied by blur, which gives no edges away as pixels come
    back. Source: Petsiuk et al. 2018, arXiv:1806.07421. Departs: as ``deletion`` does. Presets: ``rise``, the authors'
    code; ``xplique`` and ``torch-cam``, which start from zeros.
    """

    direction: ClassVar[Direction] = "higher"
    source: ClassVar[str] = "Petsiuk et al. 2018, arXiv:1806.07421"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "rise": {"pixels": 224, "area": "steps"},
        "xplique": {"score": "logit", "substrate": "constant", "steps": 10, "area": "steps"},
        "torch-cam": {"score": "logit", "substrate": "constant", "steps": 20, "rounding": "up"},
    }

    substrate: Substrate = "blur"

    def curve(self, score: Score, x: Tensor, map: Tensor, counts: list[int]) -> Tensor:
        """The score (N, S + 1) once the first ``counts`` pixels of the map are there and all others are not."""
        total = map[0].numel()
        place = total - 1 - places(map).view(map.shape)  # the lowest go first
        return removal_curve(score, x, place, [total - count for count in counts], total, self)
