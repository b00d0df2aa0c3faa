"""ROAD: the score once pixels are removed so that nothing, not even their outline, tells where they were."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.baselines import IMPUTATION_NOISE, drawn
from xcli.imputation import Solver, impute
from xcli.metrics.base import Direction, Measured, Metric, Watched
from xcli.metrics.curves import where_finite
from xcli.metrics.order import places
from xcli.registry import metric, options
from xcli.score import Score

TENTHS = tuple(range(10, 100, 10))


@options
class Debiased(Metric):
    """Scores after noisy linear imputation of a part of the pixels, at each of ``percentages``.

    A removed pixel becomes the weighted mean of its neighbours, removed ones included (``xcli.imputation``), plus
    noise, drawn once an image from the run's seed and the image's path. ``convention: removed`` removes that per cent
    of the pixels by rank, equal ones in raster order (the least relevant are the same order from its end);
    ``percentile`` those at or above that percentile of the map (for the least relevant: of the negated map), so that 75
    removes 25 %, and more where values are equal. ``report: accuracy`` is 1 where the target still wins and 0 where
    not, whatever ``score`` is. The curve's abscissa is the share removed; ``residual`` is the largest error of the
    imputation's solves, as a share of an image's range. NaN where a map is not finite.
    """

    bounds: ClassVar[tuple[float | None, float | None]] = (None, None)
    source: ClassVar[str] = "Rong et al. 2022, arXiv:2202.00449"
    small: ClassVar[Mapping[str, object]] = {"percentages": (30, 70)}

    score: Watched = "probability"
    percentages: Annotated[
        tuple[Annotated[float, Field(ge=0, le=100)], ...],
        Field(description="where the score is taken, per cent; see convention", min_length=1),
    ] = (20, 40, 60, 80)
    convention: Annotated[
        Literal["removed", "percentile"],
        Field(description="percentages of pixels that go; or percentiles of the map from which on they go"),
    ] = "removed"
    report: Annotated[
        Literal["score", "change", "accuracy"],
        Field(
            description="the score after removal; less that of the image; or whether the target still wins"
        ),
    ] = "score"
    noise: Annotated[
        float,
        Field(description="deviation of the noise on removed pixels, in units of the normalised input", ge=0),
    ] = IMPUTATION_NOISE
    solver: Annotated[
        Solver, Field(description="of the imputation; auto: exact on the CPU, multigrid on other devices")
    ] = "auto"

    def levels(self) -> tuple[list[float], Tensor]:
        """The percentages in ascending order of the share they remove, and that share (S,)."""
        ascending = sorted(set(self.percentages))
        if self.convention == "percentile":
            ascending.reverse()
        share = [100 - p if self.convention == "percentile" else p for p in ascending]
        return ascending, torch.tensor(share, dtype=torch.float64) / 100

    def curve(self, map: Tensor, x: Tensor, score: Score, *, least: bool) -> tuple[Tensor, Tensor]:
        """What is reported at each level (N, S), most or least relevant pixels first; and the residual (N,)."""
        watched = score.scaled("contrast" if self.report == "accuracy" else self.score)
        how = (tuple(self.levels()[0]), self.convention, self.noise, self.solver)
        key = (map, x, "road", least, *how)  # a tensor is a key by identity
        found = watched.once(key, lambda: self.scores(map, x, watched, least=least))
        scores = where_finite(map, found[:, :-1])
        if self.report == "change":
            scores = scores - watched.clean(x)[:, None]
        elif self.report == "accuracy":
            scores = torch.where(scores.isnan(), scores, (scores > 0).to(scores))
        return scores, found[:, -1]

    def scores(self, map: Tensor, x: Tensor, score: Score, *, least: bool) -> Tensor:
        """The scores after removal, and the residual as one more column, (N, S + 1)."""
        count = self.counts(map, least=least)
        place = places(map).view(map.shape)
        if least:
            place = place[0].numel() - 1 - place
        noise = self.noise * drawn(score, x, torch.randn) if self.noise else x.new_zeros(1).expand(x.shape)
        rows, steps = count.shape
        error = x.new_zeros(rows * steps)

        def make(index: Tensor) -> Tensor:
            index = index.to(x.device)
            row = index // steps
            image = score.image.to(x.device)[row]
            removed = place[row] < count.flatten()[index][:, None, None]
            filled, error[index] = impute(x[image], removed, self.solver)
            return torch.where(~removed[:, None], filled, filled + noise[image])

        found = score.at(make, torch.arange(rows).repeat_interleave(steps)).view(rows, steps)
        return torch.cat([found, error.view(rows, steps).amax(1, keepdim=True).to(found)], 1)

    def counts(self, map: Tensor, *, least: bool) -> Tensor:
        """How many pixels of each map are removed at each level, (N, S)."""
        levels, _ = self.levels()
        total = map[0].numel()
        if self.convention == "removed":
            return torch.tensor([int(total * p / 100) for p in levels], device=map.device).expand(
                len(map), -1
            )
        ascending = (-map if least else map).flatten(1).sort(1).values
        # pixels at or above an interpolated percentile are those at or above the next value in order
        at = [math.ceil((total - 1) * p / 100) for p in levels]
        return total - torch.searchsorted(ascending, ascending[:, at].contiguous())


@metric("road-morf")
class ROADMoRF(Debiased):
    r"""What is left of the score once the most relevant pixels have been replaced by what their neighbours suggest.

    .. math:: \frac{1}{S} \sum_{p} f(x \text{ without its most relevant } p\,\%)

    Unit: that of ``score``; lower is better. Source: Rong et al. 2022, arXiv:2202.00449. Departs: the paper plots the
    accuracy at 10, 20, 30, 40, 50, 70 and 90 % and gives no single number; the probability says more of one image and
    the mean over 20, 40, 60 and 80 % is grad-cam's. The authors' code orders equal pixels at random and adds the noise
    before the normalisation. ``preset: grad-cam`` is its average over percentiles, ``percentages: [80]`` with it its
    plain metric; both draw new noise at each level, and their 'auto' (Otsu) has no equal here. ``preset: quantus``
    is its curve, for images of one channel, which are all that it takes.
    """

    direction: ClassVar[Direction] = "lower"
    cost: ClassVar[str] = "a pass and an imputation for each percentage, shared with road"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "grad-cam": {"convention": "percentile", "report": "change", "percentages": TENTHS},
        "quantus": {"report": "accuracy", "percentages": tuple(range(1, 100, 2))},
    }

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        curve, residual = self.curve(map, x, score, least=False)
        return Measured(curve.mean(1), curve, self.levels()[1].to(curve), {"residual": residual})


@metric("road-lerf")
class ROADLeRF(Debiased):
    r"""What is left of the score once the least relevant pixels have been replaced by what their neighbours suggest.

    .. math:: \frac{1}{S} \sum_{p} f(x \text{ without its least relevant } p\,\%)

    Unit: that of ``score``; higher is better. Source: Rong et al. 2022, arXiv:2202.00449. Departs: as ``road-morf``;
    and the authors' code counts what it keeps here, so that its 20 % removes the 80 % least relevant.
    ``preset: grad-cam`` is its average over percentiles, but for the rounding in its 1 - map.
    """

    direction: ClassVar[Direction] = "higher"
    cost: ClassVar[str] = "a pass and an imputation for each percentage, shared with road"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "grad-cam": {"convention": "percentile", "report": "change", "percentages": TENTHS}
    }

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        curve, residual = self.curve(map, x, score, least=True)
        return Measured(curve.mean(1), curve, self.levels()[1].to(curve), {"residual": residual})


@metric("road")
class ROAD(Debiased):
    r"""How much more of the score survives without the least relevant pixels than without the most relevant ones.

    .. math:: \frac{1}{S} \sum_{p} \tfrac{1}{2} \big(f(x \text{ without its least relevant } p\,\%)
        - f(x \text{ without its most relevant } p\,\%)\big)

    Unit: that of ``score``; higher is better, 0 for a map that ranks at random. ``morf`` and ``lerf`` of each row are
    the two means. Source: Rong et al. 2022, arXiv:2202.00449, for the two curves; that half their difference is one
    number is grad-cam's idea (``ROADCombined``), and ``preset: grad-cam`` its definition. Departs: as ``road-morf``.
    """

    direction: ClassVar[Direction] = "higher"
    cost: ClassVar[str] = "two passes and two imputations for each percentage"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "grad-cam": {"convention": "percentile", "report": "change", "percentages": TENTHS}
    }

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        least, error = self.curve(map, x, score, least=True)
        most, residual = self.curve(map, x, score, least=False)
        curve = (least - most) / 2
        extras = {"morf": most.mean(1), "lerf": least.mean(1), "residual": torch.maximum(error, residual)}
        return Measured(curve.mean(1), curve, self.levels()[1].to(curve), extras)
