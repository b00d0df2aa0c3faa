"""What happens to the score when the image is multiplied with its map: little should be lost, some may be gained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.metrics.base import Direction, Explain, Measured, Metric, Watched
from xcli.metrics.correlation import pearson
from xcli.registry import metric, options
from xcli.score import Score


@options
class Multiplied(Metric, ABC):
    """Compares the score f(x) of an image with f(x * n), the score of the image multiplied with its map.

    n = (map - min) / (max - min) of each map, and x is the image as the network sees it: where n is 0 it shows the mean
    colour of the preprocessing. A flat map has no n (0 / 0): NaN, unless ``flat: nothing``, as the packages do, which
    let it keep nothing of the image. NaN too where a score or the map is not finite.
    """

    bounds: ClassVar[tuple[float | None, float | None]] = (0, None)
    cost: ClassVar[str] = "1 pass, shared between the metrics that multiply image and map"

    score: Watched = "probability"
    magnitude: Annotated[bool, Field(description="multiply with the map's absolute value, scaled")] = False
    flat: Annotated[
        Literal["undefined", "nothing"],
        Field(description="what a flat map keeps of the image; the metric is undefined, or it keeps nothing"),
    ] = "undefined"

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        watched = score.scaled(self.score)
        before, after = watched.clean(x), self.after(map, x, watched)
        known = before.isfinite() & after.isfinite()
        return Measured(torch.where(known, self.compare(before, after), torch.nan))

    def after(self, map: Tensor, x: Tensor, watched: Score) -> Tensor:
        """f(x * n), (N,); computed once for all metrics that ask for the same."""

        def make() -> Tensor:
            mask, known = unit(map.abs() if self.magnitude else map)
            if self.flat == "nothing":
                known = map.flatten(1).isfinite().all(1)
            return torch.where(known, multiplied(watched, x, mask), torch.nan)

        key = (map, "multiplied", self.magnitude, self.flat)  # a tensor is a key by identity
        return watched.once(key, make)

    @abstractmethod
    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        """The metric from f(x) and f(x * n), (N,) each."""


@metric("average-drop")
class AverageDrop(Multiplied):
    r"""The share of the score that is lost when the image is multiplied with its map; its mean is the Average Drop.

    .. math:: \max(0,\ f(x) - f(x \odot n)) / f(x)

    Without unit, a fraction and not per cent; lower is better. NaN as for all of this family, and where f(x) is not
    positive. Source: Chattopadhay et al. 2018, arXiv:1710.11063. Presets: ``xplique`` (the map's absolute value) and
    ``torch-cam``; both watch whatever number the caller's model gives, here the probability, as their documentation
    advises, and add 1e-8 and 1e-7 to the denominator, which is left out here.
    """

    direction: ClassVar[Direction] = "lower"
    source: ClassVar[str] = "Chattopadhay et al. 2018, arXiv:1710.11063"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "xplique": {"magnitude": True, "flat": "nothing"},
        "torch-cam": {"flat": "nothing"},
    }

    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        return torch.where(before > 0, (before - after).relu() / before, torch.nan)


@metric("increase-in-confidence")
class IncreaseInConfidence(Multiplied):
    r"""Whether the score rises when the image is multiplied with its map; the mean is the share of rows where it does.

    .. math:: 1[f(x \odot n) > f(x)]

    0 or 1; higher is better. Source: Chattopadhay et al. 2018, arXiv:1710.11063.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, 1)
    source: ClassVar[str] = "Chattopadhay et al. 2018, arXiv:1710.11063"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "grad-cam": {"flat": "nothing"},
        "xplique": {"magnitude": True, "flat": "nothing"},
        "torch-cam": {"flat": "nothing"},
    }

    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        return (after > before).to(after.dtype)


@metric("average-gain")
class AverageGain(Multiplied):
    r"""The share of what was missing to full confidence that is gained by multiplying the image with its map.

    .. math:: \max(0,\ f(x \odot n) - f(x)) / (1 - f(x))

    Without unit, a fraction and not per cent; higher is better. NaN as for all of this family, and where f(x) is 1 or
    more, so that nothing can be gained. Source: Zhang et al. 2024 (Opti-CAM), arXiv:2301.07002. ``preset: xplique``
    takes the map's absolute value, and adds 1e-8 to the denominator, which is left out here.
    """

    direction: ClassVar[Direction] = "higher"
    source: ClassVar[str] = "Zhang et al. 2024 (Opti-CAM), arXiv:2301.07002"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "xplique": {"magnitude": True, "flat": "nothing"},
    }

    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        return torch.where(before < 1, (after - before).relu() / (1 - before), torch.nan)


@metric("drop-in-confidence")
class DropInConfidence(Multiplied):
    r"""How much the score falls when the image is multiplied with its map, not divided by the score as Average Drop is.

    .. math:: \max(0,\ f(x) - f(x \odot n))

    Unit: that of ``score``; lower is better. Source: pytorch-grad-cam, DropInConfidence, which cites Chattopadhay et
    al. 2018, arXiv:1710.11063, where the drop is divided by f(x) (``average-drop``).
    """

    direction: ClassVar[Direction] = "lower"
    source: ClassVar[str] = "pytorch-grad-cam; after Chattopadhay et al. 2018, arXiv:1710.11063"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"grad-cam": {"flat": "nothing"}}

    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        return (before - after).relu()


@metric("confidence-change")
class ConfidenceChange(Multiplied):
    r"""How the score changes when the image is multiplied with its map, up or down.

    .. math:: f(x \odot n) - f(x)

    Unit: that of ``score``; higher is better. The extra ``inverse`` is the same with 1 - n, the image without what the
    map shows, where lower is better. Source: pytorch-grad-cam, CamMultImageConfidenceChange.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (None, None)
    cost: ClassVar[str] = "2 passes, one of them shared between the metrics that multiply image and map"
    source: ClassVar[str] = "pytorch-grad-cam; after Chattopadhay et al. 2018, arXiv:1710.11063"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"grad-cam": {"flat": "nothing"}}

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        watched = score.scaled(self.score)
        before, after = watched.clean(x), self.after(map, x, watched)
        mask, _ = unit(map.abs() if self.magnitude else map)
        inverse = torch.where(after.isnan(), torch.nan, multiplied(watched, x, 1 - mask))
        return Measured(self.compare(before, after), extras={"inverse": self.compare(before, inverse)})

    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        return after - before


@metric("adcc")
class ADCC(Metric):
    r"""Average Drop, Coherency and Complexity in one: a map that is small, repeats itself and keeps the score.

    .. math:: 3 \Big/ \Big(\frac{1}{coherency} + \frac{1}{1 - complexity} + \frac{1}{1 - drop}\Big)

    - coherency (r + 1) / 2, with r Pearson's correlation between the map and the map of the image multiplied with it;
    - complexity, the mean of n = (map - min) / (max - min), that is its L1 norm over the number of pixels;
    - drop max(0, f(x) - f(x * n)) / f(x), of the probability f.

    Without unit; higher is better, 0 where one of the three is worst. The extras are the three numbers. NaN where the
    map or its repetition is flat, so that r is 0 / 0, or f(x) is 0.

    Source: Poppi et al. 2021, arXiv:2104.10252. Departs: where a class other than the predicted one is explained, both
    scores of the drop are that class's; the authors' code compares it with the highest probability of all classes.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, 1)
    cost: ClassVar[str] = "1 pass and 1 explanation a row"
    source: ClassVar[str] = "Poppi et al. 2021, arXiv:2104.10252"

    def measure(self, map: Tensor, x: Tensor, score: Score, method: Explain) -> Measured:
        watched = score.scaled("probability")
        mask, known = unit(map)
        images = x[score.image.to(x.device)] * mask[:, None]  # (N, C, H, W)
        again = method(score.apart(), images)  # (N, H, W)
        before, after = watched.clean(x), watched(images)
        drop = torch.where(known & (before > 0), (before - after).relu() / before, torch.nan)
        coherency = (pearson(map.flatten(1), again.to(map).flatten(1)) + 1) / 2
        complexity = torch.where(known, mask.mean((1, 2)), torch.nan)
        value = 3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - drop))
        return Measured(value, extras={"coherency": coherency, "complexity": complexity, "drop": drop})


def unit(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (N, H, W) scaled to [0, 1] one by one, and whether they can be (N,); zero where they cannot."""
    low = maps.amin((1, 2), keepdim=True)
    span = maps.amax((1, 2), keepdim=True) - low
    known = (span > 0) & span.isfinite()
    return torch.where(known, (maps - low) / span, 0.0), known[:, 0, 0]


def multiplied(score: Score, x: Tensor, mask: Tensor) -> Tensor:
    """The scores (N,) of each row's image multiplied with its mask (N, H, W)."""

    def make(index: Tensor) -> Tensor:
        return x[score.image[index].to(x.device)] * mask[index.to(mask.device), None]

    return score.at(make, torch.arange(len(mask)))
