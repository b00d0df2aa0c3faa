"""Where a map looks: maps (N, H, W) against the pixels of the explained object, without a pass of the network.

Every metric here is NaN where the image has no annotation of the class, where none of the object's pixels is left in
the input, and where the map is not finite. The Focus score (arXiv:2109.15035) is no metric of its own: on a mosaic it
is ``relevance-mass`` with the tiles of the class as the object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from xcli.metrics.base import Direction, Floats, Measured, Metric, Truth
from xcli.metrics.correlation import ranks
from xcli.registry import metric

Part = Literal["positive", "absolute", "signed"]
Presets = Mapping[str, Mapping[str, object]]


def measured(values: Tensor, map: Tensor, truth: Truth) -> Measured:
    """The values (N,), NaN in rows without a known object or without a finite map."""
    drawn = truth.known & truth.mask.flatten(1).any(1) & map.isfinite().flatten(1).all(1)
    return Measured(torch.where(drawn, values, torch.nan))


def energy(map: Tensor, part: Part) -> Tensor:
    """What counts of a map: its positive part, its absolute value, or all of it with its sign."""
    return map.relu() if part == "positive" else map.abs() if part == "absolute" else map


def share(energy: Tensor, mask: Tensor) -> Tensor:
    """The share (N,) of each row's sum that lies in the mask; NaN where the sum is 0."""
    total = energy.sum((1, 2))
    return torch.where(total != 0, (energy * mask).sum((1, 2)) / total, torch.nan)


def area(mask: Tensor) -> Tensor:
    """Pixels (N,) of each mask, as integers."""
    return mask.flatten(1).sum(1)


def among_top(map: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """How many (N,) of the ``count`` (N,) highest pixels lie in the mask; where the last of them are tied with others,
    the number expected of a fair draw among the tied."""
    flat, inside = map.flatten(1), mask.flatten(1)
    cut = flat.sort(1, descending=True).values.gather(1, count[:, None] - 1)  # (N, 1), the last that counts
    above, tied = flat > cut, flat == cut
    drawn = (count - above.sum(1)) * (tied & inside).sum(1).to(map.dtype) / tied.sum(1)
    return (above & inside).sum(1) + drawn


def enclosing(mask: Tensor) -> Tensor:
    """The smallest upright rectangle around each mask, filled."""
    return between(mask.any(2))[:, :, None] & between(mask.any(1))[:, None, :]


def between(marks: Tensor) -> Tensor:
    """(N, M), bool: from the first mark of a row to its last."""
    return (marks.cumsum(1) > 0) & (marks.flip(1).cumsum(1).flip(1) > 0)


@metric("pointing-game")
class PointingGame(Metric):
    r"""Whether the highest pixel of the map lies on the object, or close by; the summary is a mean over classes.

    A hit (1) is a highest pixel on the object or less than ``tolerance`` away from its nearest pixel, measured between
    pixel centres in pixels of the original image, which may be larger than the input; anything else is a miss (0).

    .. math:: \frac{1}{L} \sum_{c=1}^{L} \frac{\mathrm{hits}_c}{\mathrm{hits}_c + \mathrm{misses}_c}

    over the classes with rows. The sign is kept: only the maximum matters. Among equal highest pixels the first in
    raster order points; ``ties: any`` takes one on the object if there is one. A flat map points nowhere and misses
    (under ``any`` it hits). Source: Zhang et al. 2016, arXiv:1608.00507; tolerance and strict inequality as in
    TorchRay. Departs: TorchRay resizes the map to the original image before it takes the maximum, and counts a class
    without rows as accuracy 0. ``preset: quantus``: no tolerance, any tie.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, 1)
    cost: ClassVar[str] = "no pass"
    source: ClassVar[str] = "Zhang et al. 2016, arXiv:1608.00507"
    presets: ClassVar[Presets] = {
        "torchray": {"tolerance": 15.0, "ties": "first"},
        "quantus": {"tolerance": 0.0, "ties": "any"},
    }

    tolerance: Annotated[
        float, Field(ge=0, description="pixels of the original image that a hit may be off the object")
    ] = 15.0
    ties: Annotated[Literal["first", "any"], Field(description="which of several highest pixels points")] = (
        "first"
    )

    def measure(self, map: Tensor, truth: Truth) -> Measured:
        flat = map.flatten(1)
        top = flat.amax(1, keepdim=True)
        peak = flat == top  # (N, HW)
        squared = self.distance(peak, truth, map.dtype)
        hit = (squared == 0) | (squared < self.tolerance**2)
        hit = hit & (flat.amin(1) < top[:, 0])  # a flat map has no highest pixel
        if self.ties == "any":
            hit = hit | (peak & truth.mask.flatten(1)).any(1)
        return measured(hit.to(map.dtype), map, truth)

    def distance(self, peak: Tensor, truth: Truth, dtype: torch.dtype) -> Tensor:
        """Squared, from the first peak to the nearest pixel of the object (N,), in pixels of the original."""
        _, height, width = truth.mask.shape
        point = peak.int().argmax(1, keepdim=True)  # (N, 1), the first of equals
        tall, wide = truth.pixel.to(dtype).split(1, dim=1)
        down = (torch.arange(height, device=peak.device) - point // width) * tall  # (N, H)
        right = (torch.arange(width, device=peak.device) - point % width) * wide  # (N, W)
        squared = down.square()[:, :, None] + right.square()[:, None, :]
        return torch.where(truth.mask, squared, torch.inf).amin((1, 2))

    def summary(self, values: Floats | None, curve: Floats | None, target: NDArray[Any]) -> float | None:
        """The mean over classes of the share of hits; classes without a defined row are left out."""
        if values is None:
            return None
        known = np.isfinite(values)
        classes = [values[known & (target == label)].mean() for label in np.unique(target[known])]
        return float(np.mean(classes)) if classes else float("nan")


@metric("energy-pointing-game")
class EnergyPointingGame(Metric):
    r"""How much of the map's energy falls into the object's box: the pointing game of a whole map.

    .. math:: \sum_{(i,j) \in \mathrm{box}} L_{ij} \Big/ \sum_{ij} L_{ij}, \quad L = \max(0, \mathrm{map})

    The box is the rectangle that encloses the annotation; ``region: annotated`` takes the annotation as it is, where
    the number is that of ``relevance-mass``. NaN where nothing of the map is positive. Source: Wang et al. 2020
    (Score-CAM), arXiv:1910.01279, whose maps are not negative. Departs: several objects of the class count together.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, 1)
    cost: ClassVar[str] = "no pass"
    source: ClassVar[str] = "Wang et al. 2020, arXiv:1910.01279"

    region: Annotated[
        Literal["annotated", "box"],
        Field(description="the annotation as it is, or the rectangle that encloses it"),
    ] = "box"

    def measure(self, map: Tensor, truth: Truth) -> Measured:
        region = enclosing(truth.mask) if self.region == "box" else truth.mask
        return measured(share(map.relu(), region), map, truth)


@metric("relevance-mass")
class RelevanceMass(Metric):
    r"""How much of the map's mass lies on the object.

    .. math:: \sum_{p \in \mathrm{object}} R_p \Big/ \sum_p R_p

    R is the ``part`` of the map that counts: positive, absolute, or all of it with its sign, where the value can leave
    [0, 1]. NaN where R sums to 0. Source: Arras et al. 2022 (CLEVR-XAI), arXiv:2003.07258, relevance mass accuracy,
    where R is pooled over colours to be not negative. ``preset: quantus`` keeps the sign.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (None, None)
    cost: ClassVar[str] = "no pass"
    source: ClassVar[str] = "Arras et al. 2022, arXiv:2003.07258"
    presets: ClassVar[Presets] = {"quantus": {"part": "signed"}}

    part: Annotated[Part, Field(description="what counts of a map with both signs")] = "positive"

    def measure(self, map: Tensor, truth: Truth) -> Measured:
        return measured(share(energy(map, self.part), truth.mask), map, truth)


@metric("relevance-rank")
class RelevanceRank(Metric):
    r"""How many of the K highest pixels lie on the object of K pixels.

    .. math:: |\mathrm{top}_K \cap \mathrm{object}| \,/\, K, \quad K = |\mathrm{object}|

    Signed values are ranked as they are. Pixels tied at the K-th place count as a fair draw among them would on
    average, so that a flat map gets the object's share of the image. Source: Arras et al. 2022 (CLEVR-XAI),
    arXiv:2003.07258, relevance rank accuracy. Departs from Quantus in ties alone, which it breaks by the sort.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, 1)
    cost: ClassVar[str] = "no pass"
    source: ClassVar[str] = "Arras et al. 2022, arXiv:2003.07258"
    presets: ClassVar[Presets] = {"quantus": {}}

    def measure(self, map: Tensor, truth: Truth) -> Measured:
        size = area(truth.mask)
        return measured(among_top(map, truth.mask, size.clamp_min(1)) / size, map, truth)


@metric("top-k-intersection")
class TopKIntersection(Metric):
    r"""How many of the ``k`` highest pixels lie on the object.

    .. math:: |\mathrm{top}_k \cap \mathrm{object}| \,/\, k

    ``weighted`` divides by the object's share of the image (the paper's concept influence: above 1 the object draws
    more than its area). Signed values are ranked as they are; ties as in ``relevance-rank``. NaN where the input has
    fewer than ``k`` pixels. An object smaller than ``k`` cannot reach 1. Source: Theiner et al. 2022,
    arXiv:2104.14995; k = 1000 as in Quantus.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, None)
    cost: ClassVar[str] = "no pass"
    source: ClassVar[str] = "Theiner et al. 2022, arXiv:2104.14995"
    presets: ClassVar[Presets] = {"quantus": {}}

    k: Annotated[int, Field(ge=1, description="pixels of the input that count as the top")] = 1000
    weighted: Annotated[bool, Field(description="divide by the object's share of the image")] = False

    def measure(self, map: Tensor, truth: Truth) -> Measured:
        size, pixels = area(truth.mask), map.shape[1] * map.shape[2]
        if self.k > pixels:
            return Measured(torch.full_like(map[:, 0, 0], torch.nan))
        found = among_top(map, truth.mask, torch.full_like(size, self.k)) / self.k
        return measured(found * pixels / size if self.weighted else found, map, truth)


@metric("attribution-localisation")
class AttributionLocalisation(Metric):
    r"""How much of the positive relevance lies inside the object, if asked against what its size would give.

    .. math:: \mu = R_{in} / R_{tot}, \qquad \mu_w = \mu \cdot S_{tot} / S_{in} \;\; (\mathtt{weighted})

    with R sums of the ``part`` of the map that counts and S numbers of pixels; a map that ignores the object has
    :math:`\mu_w` = 1. NaN where R sums to 0 or the object covers more than ``max_size`` of the input. Unweighted it
    is ``relevance-mass``. Source: Kohlbrenner et al. 2020, arXiv:1910.09840 (inside-total relevance ratio).
    ``preset: quantus`` takes the absolute map; Quantus' own ``weighted`` multiplies by a size where the paper divides.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, None)
    cost: ClassVar[str] = "no pass"
    source: ClassVar[str] = "Kohlbrenner et al. 2020, arXiv:1910.09840"
    presets: ClassVar[Presets] = {"quantus": {"part": "absolute"}}

    part: Annotated[
        Literal["positive", "absolute"], Field(description="what counts of a map with both signs")
    ] = "positive"
    weighted: Annotated[bool, Field(description="divide by the object's share of the image")] = False
    max_size: Annotated[
        float, Field(gt=0, le=1, description="leave out objects that cover more of the input")
    ] = 1.0

    def measure(self, map: Tensor, truth: Truth) -> Measured:
        size = area(truth.mask).to(map.dtype) / (map.shape[1] * map.shape[2])
        found = share(energy(map, self.part), truth.mask)
        found = torch.where(size <= self.max_size, found / size if self.weighted else found, torch.nan)
        return measured(found, map, truth)


@metric("iou")
class IntersectionOverUnion(Metric):
    r"""How well the object is outlined by what exceeds a fraction of the map's maximum.

    .. math:: |S \cap \mathrm{object}| \,/\, |S \cup \mathrm{object}|, \quad S = \{p : L_p \ge t\}

    L is the map over its maximum, or scaled from its minimum and maximum to [0, 1] (``scale: min-max``, where negative
    values count: zero may exceed t). NaN where the maximum is not above 0, or the map is flat. Source: the threshold
    of 0.2 and the maximum: Zhou et al. 2016 (CAM), arXiv:1512.04150; ``preset: wsol`` scales as Choe et al. 2020,
    arXiv:2001.07437, who show that t decides much and sweep it. Departs: both compare boxes around the largest
    connected part; here it is the pixels.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, 1)
    cost: ClassVar[str] = "no pass"
    source: ClassVar[str] = "Zhou et al. 2016, arXiv:1512.04150; Choe et al. 2020, arXiv:2001.07437"
    presets: ClassVar[Presets] = {"wsol": {"scale": "min-max"}}

    threshold: Annotated[
        float, Field(gt=0, le=1, description="of the scaled map, from which on a pixel counts as found")
    ] = 0.2
    scale: Annotated[Literal["max", "min-max"], Field(description="what is brought to 0")] = "max"

    def measure(self, map: Tensor, truth: Truth) -> Measured:
        low = map.amin((1, 2), keepdim=True) if self.scale == "min-max" else torch.zeros_like(map[:, :1, :1])
        high = map.amax((1, 2), keepdim=True) - low
        found = map - low >= self.threshold * high
        union = area(found | truth.mask)
        overlap = area(found & truth.mask).to(map.dtype) / union
        return measured(torch.where(high[:, 0, 0] > 0, overlap, torch.nan), map, truth)


@metric("localisation-auc")
class LocalisationAUC(Metric):
    r"""How surely a pixel of the object stands above one that is not: the area under the ROC curve of the map.

    .. math:: P(R_{in} > R_{out}) + \tfrac12 P(R_{in} = R_{out})

    over all pairs of a pixel in and a pixel outside the object, exactly, by mid-ranks (Mann and Whitney); 0.5 for a
    flat map. Signed values are ranked as they are. NaN where the object fills the input. Source: Fawcett 2006, Pattern
    Recognition Letters 27; as in Quantus.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, 1)
    cost: ClassVar[str] = "no pass"
    source: ClassVar[str] = "Fawcett 2006, Pattern Recognition Letters 27"
    presets: ClassVar[Presets] = {"quantus": {}}

    def measure(self, map: Tensor, truth: Truth) -> Measured:
        inside, size = truth.mask.flatten(1), area(truth.mask)
        twice = (2 * ranks(map.flatten(1).nan_to_num())).long()  # whole numbers: their sum is exact
        wins = (twice * inside).sum(1) - size * (size + 1)
        pairs = 2 * size * (inside.shape[1] - size)
        return measured(wins.to(map.dtype) / pairs, map, truth)
