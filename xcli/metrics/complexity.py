"""How simple a map is: does it name few pixels, or does it spread over the whole image?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.baselines import Remover, fields
from xcli.metrics.base import Direction, Measured, Metric, Watched
from xcli.metrics.curves import scores_without
from xcli.metrics.order import places
from xcli.registry import metric
from xcli.score import Score


@metric("sparseness")
class Sparseness(Metric):
    r"""How unevenly the map is spread over the pixels: the Gini index of its absolute values.

    .. math:: \frac{\sum_{i=1}^n (2i - n - 1)\, a_{(i)}}{n \sum_i a_i}, \quad
        a = |map|, \ a_{(1)} \le \dots \le a_{(n)}

    No unit: 0 where all n pixels are equal, 1 - 1/n where one has it all; higher is better. NaN for a map of zeros.
    Source: Chalasani et al. 2020, arXiv:1810.06583; the same for every scale of the map. Quantus and Xplique add a
    small number to each pixel (1e-7 of the maximum) or to the sums, which pulls the index of a map with few pixels
    towards 0: a single pixel of 224 x 224 has 0.995 in Quantus instead of 0.99998.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, 1)
    cost: ClassVar[str] = "no passes"
    source: ClassVar[str] = "Chalasani et al. 2020, arXiv:1810.06583"

    def measure(self, map: Tensor) -> Measured:
        size = map.abs().flatten(1).sort(1).values  # (N, n)
        n = size.shape[1]
        rank = torch.arange(1, n + 1, dtype=size.dtype, device=size.device)
        return Measured(((2 * rank - n - 1) * share(size)).sum(1) / n)


@metric("complexity")
class Complexity(Metric):
    r"""How many pixels it takes to tell the map: the entropy of each pixel's share in the absolute values.

    .. math:: -\sum_i p_i \ln p_i, \quad p_i = \frac{|map_i|}{\sum_j |map_j|}

    Unit: nats, from 0, where one pixel has it all, to ln(HW), where all are equal; lower is better. NaN for a map of
    zeros. Source: Bhatt et al. 2020, arXiv:2005.00631. Quantus and Xplique add a small number (1e-12,
    1e-8) inside the logarithm.
    """

    direction: ClassVar[Direction] = "lower"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, None)
    cost: ClassVar[str] = "no passes"
    source: ClassVar[str] = "Bhatt et al. 2020, arXiv:2005.00631"

    def measure(self, map: Tensor) -> Measured:
        part = share(map.abs().flatten(1))  # (N, HW)
        return Measured(-torch.xlogy(part, part).sum(1))


@metric("effective-complexity")
class EffectiveComplexity(Metric):
    r"""How many of the map's top pixels have to stay for the score to stay, whatever the other pixels show.

    .. math:: \min\big\{k : E\big[(f(x) - f(x'))^2 \mid x'_{M_k} = x_{M_k}\big] < tolerance\big\}

    with M_k the k pixels of largest absolute value in the map. The other pixels of x' are drawn from a normal law with
    the image's own mean and deviation, channel by channel, pixel by pixel; the mean is over ``samples`` such draws,
    which belong to the image. k grows in ``steps`` steps. Unit: pixels; lower is better. The curve has the mean over
    the share of pixels that stay. ``rule: size`` asks the score nothing and counts the pixels whose absolute value is
    above ``threshold``, as a share of the largest. NaN for a map of zeros.

    Source: Nguyen and Rodríguez Martínez 2020, arXiv:2007.07584, which leaves the law of the pixels and the loss open.
    Departs: k in steps. ``preset: quantus`` is ``rule: size``; Quantus counts pixels at whatever size, so that a smooth
    map has almost all of them.
    """

    direction: ClassVar[Direction] = "lower"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, None)
    cost: ClassVar[str] = "steps * samples passes; none with rule: size"
    source: ClassVar[str] = "Nguyen and Rodríguez Martínez 2020, arXiv:2007.07584"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"quantus": {"rule": "size"}}
    small: ClassVar[Mapping[str, object]] = {"steps": 4, "samples": 2, "tolerance": 0.001}

    score: Watched = "probability"
    rule: Annotated[
        Literal["loss", "size"],
        Field(
            description="loss: pixels that keep the score; size: pixels whose absolute value is not negligible"
        ),
    ] = "loss"
    tolerance: Annotated[float, Field(description="for loss: largest mean squared change", gt=0)] = 0.01
    steps: Annotated[int, Field(description="for loss: numbers of pixels that are tried", ge=1)] = 50
    samples: Annotated[int, Field(description="for loss: draws of the other pixels", ge=1)] = 10
    threshold: Annotated[
        float, Field(description="for size: in largest absolute values of the map", ge=0, lt=1)
    ] = 1e-5

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        size = map.abs()
        largest = size.amax((1, 2), keepdim=True)
        named = (largest[:, 0, 0] > 0) & largest[:, 0, 0].isfinite()
        if self.rule == "size":
            count = (size > self.threshold * largest).sum((1, 2)).to(map.dtype)
            return Measured(torch.where(named, count, torch.nan))
        total = size[0].numel()
        counts = sorted({max(1, k * total // self.steps) for k in range(1, self.steps + 1)})
        kept = torch.tensor(counts, device=map.device)
        loss = torch.where(named[:, None], self.loss(score.scaled(self.score), x, size, counts), torch.nan)
        enough = loss < self.tolerance  # (N, S)
        fewest = kept[enough.int().argmax(1)].to(map.dtype)
        known = enough.any(1) & loss.isfinite().all(1)
        return Measured(torch.where(known, fewest, torch.nan), loss, kept.to(map.dtype) / total)

    def loss(self, watched: Score, x: Tensor, size: Tensor, kept: list[int]) -> Tensor:
        """The mean squared change (N, S) of the score while the first ``kept`` (S,) pixels of ``size`` stay."""
        place = size[0].numel() - 1 - places(size).view(size.shape)  # (N, H, W), 0 for the first to go
        row = torch.arange(len(size)).repeat_interleave(len(kept))
        gone = (size[0].numel() - torch.tensor(kept)).repeat(len(size))
        before = watched.clean(x)[:, None]
        total = before.new_zeros(len(size), len(kept))
        for redrawn in removers(watched, x, self.samples):
            after = scores_without(watched, redrawn, place, row, gone).view(len(size), -1)
            total += (after - before).square()
        return total / self.samples


def share(size: Tensor) -> Tensor:
    """Each line of (N, n) over its sum; NaN for a line of zeros."""
    return size / size.sum(1, keepdim=True)


def removers(score: Score, x: Tensor, samples: int) -> Iterator[Remover]:
    """Functions that draw removed pixels anew, each the same ones whenever it is called."""
    mean, deviation = x.mean((2, 3), keepdim=True), x.std((2, 3), correction=0, keepdim=True)
    for sample in range(samples):
        noise = fields(score, x, f"effective-complexity {sample}", torch.randn)
        yield showing(x, mean + deviation * noise)


def showing(x: Tensor, other: Tensor) -> Remover:
    """Removed pixels of ``x`` (B, C, H, W) show those of ``other``."""

    def remove(image: Tensor, removed: Tensor) -> Tensor:
        image = image.to(x.device)
        return torch.where(~removed[:, None], x[image], other[image])  # x first: its layout is the result's

    return remove
