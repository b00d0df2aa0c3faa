"""Statistics of another method's maps over noisy copies of the picture."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from xcli import draws
from xcli.layers import Layer, Layers
from xcli.methods.base import Attribution
from xcli.methods.gradient.base import PixelMethod, Reduced, rounds
from xcli.methods.nested import Around, Spec
from xcli.registry import method, options
from xcli.score import Score

_NESTED = "is itself such a statistic; one over the other needs the product of their samples"
BASE = Around(
    PixelMethod,
    dict.fromkeys(("smoothgrad", "squaregrad", "vargrad"), _NESTED),
    defaults={"saliency": {"absolute": False}},
)

_CAPTUM: dict[str, object] = {"samples": 5, "noise": 1.0, "relative": False, "reduce": "none"}
_XPLIQUE: dict[str, object] = {"samples": 50, "noise": 0.2, "relative": False, "reduce": "mean"}


@options
class NoiseStatistic(PixelMethod):
    """A statistic of the maps of ``base`` at the copies x + e, e ~ N(0, s^2), for each colour of each pixel.

    s is the share ``noise`` of the range of the image's input (largest minus smallest value), or with ``relative:
    false`` that many units of the normalised input. The noise belongs to the image, the run's seed and the number of
    the copy: the rows of an image and the three statistics share it, and the first copies do not depend on how many
    follow. Statistics are taken as copies come, so that memory does not grow with ``samples``. ``extras`` are the
    means of the base's.
    """

    cost: ClassVar[str] = "samples times that of the base: 1 forward + 1 backward for a gradient"
    small: ClassVar[Mapping[str, object]] = {"samples": 3}

    base: Annotated[
        Spec,
        BASE,
        Field(
            description="the method whose maps these are: a name, or name: and its options",
            json_schema_extra=BASE.schema_default,
        ),
    ] = "saliency"
    samples: Annotated[int, Field(ge=1, description="noisy copies of an image")] = 50
    noise: Annotated[
        float,
        Field(ge=0, description="standard deviation of the noise, see relative", allow_inf_nan=False),
    ] = 0.15
    relative: Annotated[
        bool,
        Field(description="noise is a share of the range of each image's input; false: in its units"),
    ] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", self.inner.needs - {"pixels"})
        object.__setattr__(self, "scale", self.inner.scale)

    @cached_property
    def inner(self) -> PixelMethod:
        """The method whose maps these are."""
        made: PixelMethod = BASE.method(self.base)
        return made

    def looks_at(self, layers: Layers) -> tuple[Layer, ...]:
        return self.inner.looks_at(layers)

    def draws_from(self) -> tuple[str, ...]:
        return self.inner.draws_from()

    def pinned(self, layers: Layers, names: Sequence[str] = ()) -> Self:
        return replace(self, base=BASE.pinned(self.base, layers, names))

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        seeds, deviation = score.seeds(torch.arange(len(x)), "noise"), self.deviation(x)
        running, extras = Running(), dict[str, Tensor]()
        for part in rounds(score, self.samples):
            image = part.image.to(x.device)
            noise = draws.normal(draws.sampled(seeds[part.image], part.sample).to(x.device), x.shape[1:])
            own, copies = part.score.renamed(part.sample), x[image] + noise.to(x) * deviation[image]
            found = Attribution.of(self.inner.attribute(own, copies))
            running = running.with_samples(part.of_rows(found.map))
            for name, values in found.extras.items():
                extras[name] = extras.get(name, 0) + part.of_rows(values).sum(1) / self.samples
        return Attribution(self.statistic(running.mean, running.squares / self.samples), extras)

    def deviation(self, x: Tensor) -> Tensor:
        """The standard deviation of each image's noise, (B, 1, 1, 1)."""
        if not self.relative:
            return x.new_full((len(x), 1, 1, 1), self.noise)
        return self.noise * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))

    @abstractmethod
    def statistic(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The map from the mean and the variance (that of the samples, divided by their number) of maps (N, ...)."""


@dataclass(frozen=True)
class Running:
    """Mean and sum of squared differences from it, of the samples so far (Chan et al. 1979)."""

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def with_samples(self, maps: Tensor) -> Running:
        """The same of further samples (N, count, ...) too."""
        more, own = maps.shape[1], maps.mean(1)
        squares = (maps - own[:, None]).square().sum(1)
        if not self.count:
            return Running(more, own, squares)
        count, gap = self.count + more, own - self.mean
        between = gap.square() * (self.count * more / count)
        return Running(count, self.mean + gap * (more / count), self.squares + squares + between)


@method("smoothgrad")
class SmoothGrad(NoiseStatistic):
    r"""The mean map over noisy copies of the picture: what fluctuates from pixel to pixel averages out.

    .. math:: \frac{1}{M} \sum_m \nabla y\,(x + e_m)

    with signed gradients; ``reduce: max`` then takes absolute values, as in saliency. Unit: that of the base's map.
    Source: Smilkov et al. 2017, arXiv:1706.03825; the noise is 15 % of the range, in the middle of the 10 to 20 % that
    they recommend. Presets: ``xplique`` and ``captum`` (a given deviation, other numbers of samples), ``zennit`` (10 %,
    20 samples; its last sample is the picture itself, ours is not).
    """

    source: ClassVar[str] = "Smilkov et al. 2017, arXiv:1706.03825"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "xplique": _XPLIQUE,
        "captum": _CAPTUM,
        "zennit": {"samples": 20, "noise": 0.1, "reduce": "none"},
    }

    reduce: Reduced = "max"

    def statistic(self, mean: Tensor, variance: Tensor) -> Tensor:
        return mean


@method("squaregrad")
class SquareGrad(NoiseStatistic):
    r"""The mean of the squared map over noisy copies of the picture.

    .. math:: \frac{1}{M} \sum_m \big(\nabla y\,(x + e_m)\big)^2

    colour by colour. Unit: the square of that of the base's map. It is SmoothGrad squared plus VarGrad.
    Source: Hooker et al. 2018, arXiv:1806.10758 (SG-SQ). Presets ``xplique`` and ``captum`` as for ``smoothgrad``.
    """

    source: ClassVar[str] = "Hooker et al. 2018, arXiv:1806.10758"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"xplique": _XPLIQUE, "captum": _CAPTUM}

    def statistic(self, mean: Tensor, variance: Tensor) -> Tensor:
        return mean.square() + variance


@method("vargrad")
class VarGrad(NoiseStatistic):
    r"""The variance of the map over noisy copies of the picture.

    .. math:: \frac{1}{M} \sum_m \Big(\nabla y\,(x + e_m) - \frac{1}{M} \sum_n \nabla y\,(x + e_n)\Big)^2

    colour by colour; 0 where the score is linear, and where ``samples`` is 1. Unit: the square of that of the base's
    map. Source: Adebayo et al. 2018, arXiv:1810.03292. Presets ``captum`` and ``xplique`` as for ``smoothgrad``; the
    latter divides by M - 1.
    """

    source: ClassVar[str] = "Adebayo et al. 2018, arXiv:1810.03292"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "xplique": {**_XPLIQUE, "unbiased": True},
        "captum": _CAPTUM,
    }

    unbiased: Annotated[bool, Field(description="divide by one sample less than there are")] = False

    def statistic(self, mean: Tensor, variance: Tensor) -> Tensor:
        return variance * (self.samples / max(1, self.samples - 1)) if self.unbiased else variance
