"""Whether maps of almost the same image are almost the same: the method asked again, about the image's neighbours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from xcli.baselines import fields
from xcli.metrics.base import Direction, Explain, Measured, Metric
from xcli.registry import metric, options
from xcli.score import Score

Presets = Mapping[str, Mapping[str, object]]
Change = tuple[Tensor, Tensor]
"""How much each row changed from its image to a neighbour, (N,), and whether that counts, (N,), bool."""

Samples = Annotated[int, Field(description="neighbours of each image", ge=1)]
SameClass = Annotated[bool, Field(description="leave out neighbours of another predicted class")]


class Neighbour(NamedTuple):
    """A neighbour of every image of a batch.

    Attributes:
        score: the rows, to be asked about the neighbours; what it remembers goes with it.
        x: (B, C, H, W), the neighbours.
        map: (N, H, W), what the method says of them.
        counts: (N,), bool: whether the row's neighbour is one that counts.
    """

    score: Score
    x: Tensor
    map: Tensor
    counts: Tensor


@options
class Neighbours(Metric):
    """Compares the map of an image with those of neighbours, the image with noise on every number of it.

    The noise of an image is drawn from the run's seed and the image's path, the same for all metrics, methods and rows:
    in a metric of the same options, every method has the same neighbours. A method that draws random numbers itself
    draws the same for the image and its neighbours.
    """

    direction: ClassVar[Direction] = "lower"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, None)
    cost: ClassVar[str] = "an explanation a sample; and a pass, with same_class"
    small: ClassVar[Mapping[str, object]] = {"samples": 3}

    samples: Samples = 50
    noise: Annotated[Literal["uniform", "normal"], Field(description="law of the noise")] = "uniform"
    radius: Annotated[
        float,
        Field(description="its half width or deviation, in normalised input", gt=0, allow_inf_nan=False),
    ] = 0.1
    centre: Annotated[float, Field(description="its mean", allow_inf_nan=False)] = 0.0
    same_class: SameClass = False

    def neighbours(self, score: Score, x: Tensor, method: Explain) -> Iterator[Neighbour]:
        """The neighbours, one of each image at a time."""
        image, label = score.image.to(x.device), self.label(score, x)
        for sample in range(self.samples):
            near, fresh = x + self.added(score, x, sample), score.using(score.module)
            same = label == self.label(fresh, near)
            yield Neighbour(fresh, near, method(fresh, near), same[image])

    def label(self, score: Score, x: Tensor) -> Tensor:
        """What a neighbour must share with its image, (B,): with ``same_class`` the predicted class, else nothing."""
        if not self.same_class:
            return torch.zeros(len(x), device=x.device)
        seen = score.logits(x)
        return seen.argmax(1) if seen.shape[1] > 1 else seen[:, 0] > 0

    def added(self, score: Score, x: Tensor, sample: int) -> Tensor:
        """The noise (B, C, H, W) of one neighbour of each image."""
        draw = signed if self.noise == "uniform" else torch.randn
        return self.centre + self.radius * fields(score, x, f"neighbour {sample}", draw)


def signed(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform numbers from -1 to 1."""
    return 2 * torch.rand(shape, generator=generator) - 1


@metric("average-stability")
class AverageStability(Neighbours):
    r"""How far maps of neighbours of an image with the same predicted class are from its own, on average.

    .. math:: mean_j\ D\big(e(x), e(x + u_j)\big), \quad u_j \sim U[-radius, radius)

    with D the Euclidean distance (``l2``) or the sum of absolute differences (``l1``). Unit: that of the map; lower is
    better. NaN where every neighbour is of another class. Source: Bhatt et al. 2020, arXiv:2005.00631, definition 2.
    ``preset: xplique``: neighbours are brighter only, u from 0 to 0.1, and of any class. Departs: Xplique draws the
    noise once for all images of a call.
    """

    source: ClassVar[str] = "Bhatt et al. 2020, arXiv:2005.00631"
    presets: ClassVar[Presets] = {"xplique": {"radius": 0.05, "centre": 0.05, "same_class": False}}

    samples: Samples = 20
    same_class: SameClass = True
    distance: Annotated[Literal["l2", "l1"], Field(description="distance between two maps")] = "l2"

    def measure(self, map: Tensor, x: Tensor, score: Score, method: Explain) -> Measured:
        order = {"l2": 2, "l1": 1}[self.distance]
        near = self.neighbours(score, x, method)
        return Measured(average((norm(other.map - map, order), other.counts) for other in near))


@options
class Sensitivity(Neighbours):
    """The distance between two maps, Euclidean, on its own or as a share of the length of the image's map."""

    relative: Annotated[bool, Field(description="divide by the length of the image's own map")] = False

    def changes(self, map: Tensor, x: Tensor, score: Score, method: Explain) -> Iterator[Change]:
        """How far the map of each neighbour is from that of the image."""
        length = norm(map) if self.relative else torch.ones_like(map[:, 0, 0])
        for near in self.neighbours(score, x, method):
            yield over(norm(near.map - map), length), near.counts


@metric("max-sensitivity")
class MaxSensitivity(Sensitivity):
    r"""How far the map moves at most while the image moves a little.

    .. math:: \max_j \big\lVert e(x + u_j) - e(x) \big\rVert_2, \quad u_j \sim U[-radius, radius)

    Unit: that of the map; with ``relative``, lengths of the map itself, and NaN for a map of zeros, of which captum
    gives the distance. Lower is better. Source: Yeh et al. 2019, arXiv:1901.09392; the maximum over the
    ball is that of ``samples`` random neighbours, as in their code. Presets: ``saliency-evaluation``, that code, which
    divides by the length; ``captum``; ``quantus``, which also skips neighbours whose map is not a number.
    """

    source: ClassVar[str] = "Yeh et al. 2019, arXiv:1901.09392"
    presets: ClassVar[Presets] = {
        "saliency-evaluation": {"relative": True, "radius": 0.2},
        "captum": {"relative": True, "radius": 0.02, "samples": 10},
        "quantus": {"relative": True, "radius": 0.2, "samples": 200},
    }

    def measure(self, map: Tensor, x: Tensor, score: Score, method: Explain) -> Measured:
        return Measured(highest(self.changes(map, x, score, method)))


@metric("average-sensitivity")
class AverageSensitivity(Sensitivity):
    r"""How far the map moves on average while the image moves a little.

    .. math:: mean_j \big\lVert e(x + u_j) - e(x) \big\rVert_2, \quad u_j \sim U[-radius, radius)

    Of the same neighbours as ``max-sensitivity``, which it never exceeds; unit and NaN as there. Lower is better.
    Source: the mean counterpart of Yeh et al. 2019, arXiv:1901.09392, as in Quantus. ``preset: quantus`` divides by the
    length of the map.
    """

    source: ClassVar[str] = "Yeh et al. 2019, arXiv:1901.09392"
    presets: ClassVar[Presets] = {"quantus": {"relative": True, "radius": 0.2, "samples": 200}}

    def measure(self, map: Tensor, x: Tensor, score: Score, method: Explain) -> Measured:
        return Measured(average(self.changes(map, x, score, method)))


@metric("local-lipschitz")
class LocalLipschitz(Neighbours):
    r"""How much faster the map moves than the image, at most: a local Lipschitz constant of the method.

    .. math:: \max_j \frac{\lVert e(x) - e(x_j) \rVert_2}{\lVert x - x_j \rVert_2}, \quad x_j = x + u_j

    Unit: that of the map, per unit of the normalised input; lower is better. ``scaled`` divides each map by its largest
    absolute value first, and is NaN where that is 0. Source: Alvarez-Melis and Jaakkola 2018, arXiv:1806.08049.
    Departs: random neighbours in the box instead of a search by Bayesian optimisation, which finds larger ratios.
    ``preset: quantus``: normal noise, scaled maps. Departs: Quantus scales the maps of a batch by the largest of them
    all, so that its number depends on the batch.
    """

    source: ClassVar[str] = "Alvarez-Melis and Jaakkola 2018, arXiv:1806.08049"
    presets: ClassVar[Presets] = {"quantus": {"noise": "normal", "samples": 200, "scaled": True}}

    samples: Samples = 100
    scaled: Annotated[bool, Field(description="divide each map by its largest absolute value")] = False

    def measure(self, map: Tensor, x: Tensor, score: Score, method: Explain) -> Measured:
        image, own = score.image.to(x.device), self.prepared(map)
        near = self.neighbours(score, x, method)
        ratios = (
            (over(norm(self.prepared(one.map) - own), norm(one.x - x)[image]), one.counts) for one in near
        )
        return Measured(highest(ratios))

    def prepared(self, map: Tensor) -> Tensor:
        return over(map, map.abs().amax((1, 2), keepdim=True)) if self.scaled else map


@options
class RelativeStability(Neighbours, ABC):
    """Compares the change of the map with the change of something that the network saw, both relative.

    ``change: pixel`` is the Euclidean length of (a - b) / a, number by number, where a zero in a counts as ``epsilon``:
    few numbers close to zero decide it, as in a rectified map or layer. ``change: length`` is the length of a - b over
    that of a. A denominator below ``epsilon`` counts as ``epsilon``. Neighbours of another predicted class are left
    out; NaN where that is all of them, and for a map of zeros.
    """

    cost: ClassVar[str] = "an explanation and a pass a sample"
    presets: ClassVar[Presets] = {
        "quantus": {"samples": 200, "radius": 0.09, "centre": 0.11},
        "openxai": {"samples": 100, "noise": "normal", "radius": 1e-5, "change": "length", "epsilon": 1e-12},
    }
    source: ClassVar[str] = "Agarwal et al. 2022, arXiv:2203.06877"

    same_class: SameClass = True
    change: Annotated[
        Literal["pixel", "length"], Field(description="relative to each number of the map, or to its length")
    ] = "pixel"
    epsilon: Annotated[float, Field(description="what stands in for smaller denominators", gt=0)] = 1e-6

    def measure(self, map: Tensor, x: Tensor, score: Score, method: Explain) -> Measured:
        image, before = score.image.to(x.device), self.seen(score, x)

        def ratios() -> Iterator[Change]:
            for near in self.neighbours(score, x, method):
                moved = self.moved(before, self.seen(near.score, near.x)).clamp_min(self.epsilon)
                yield self.relative(map, near.map) / moved[image], near.counts

        return Measured(torch.where(norm(map) > 0, highest(ratios()), torch.nan))

    @abstractmethod
    def seen(self, score: Score, x: Tensor) -> Tensor:
        """What the change of the map is compared with, (B, ...)."""

    def moved(self, before: Tensor, after: Tensor) -> Tensor:
        """How much that changed, (B,)."""
        return self.relative(before, after)

    def relative(self, before: Tensor, after: Tensor) -> Tensor:
        """How much (M, ...) changed relative to what it was, (M,)."""
        if self.change == "length":
            return over(norm(before - after), norm(before))
        return norm((before - after) / torch.where(before == 0, self.epsilon, before))


@metric("relative-input-stability")
class RelativeInputStability(RelativeStability):
    r"""How many times more the map changes than the image does, at most, each relative to what it was.

    .. math:: \max_j \frac{\lVert (e(x) - e(x_j)) / e(x) \rVert_2}
        {\max\big(\lVert (x - x_j) / x \rVert_2,\ \epsilon\big)}

    over neighbours with the same predicted class. No unit; lower is better. Source: Agarwal et al. 2022,
    arXiv:2203.06877; ``preset: openxai`` is its authors' later benchmark, with ``change: length`` and noise of
    1e-5. ``preset: quantus`` has its neighbours, noise from 0.02 to 0.2 that makes every image brighter. Departs:
    Quantus gives NaN as soon as one neighbour is of another class.
    """

    def seen(self, score: Score, x: Tensor) -> Tensor:
        return x


@metric("relative-output-stability")
class RelativeOutputStability(RelativeStability):
    r"""How many times more the map changes, relative to what it was, than the logits do, at most.

    .. math:: \max_j \frac{\lVert (e(x) - e(x_j)) / e(x) \rVert_2}
        {\max\big(\lVert h(x) - h(x_j) \rVert_2,\ \epsilon\big)}

    with h all logits of the network, over neighbours with the same predicted class. Unit: 1 / logit; lower is better.
    Source: Agarwal et al. 2022, arXiv:2203.06877. Presets and departures as in ``relative-input-stability``;
    with ``change: length`` the change of the logits is relative too, as in OpenXAI.
    """

    def seen(self, score: Score, x: Tensor) -> Tensor:
        return score.logits(x)

    def moved(self, before: Tensor, after: Tensor) -> Tensor:
        return self.relative(before, after) if self.change == "length" else norm(before - after)


@metric("relative-representation-stability")
class RelativeRepresentationStability(RelativeStability):
    r"""How many times more the map changes than a layer's output does, at most, each relative to what it was.

    .. math:: \max_j \frac{\lVert (e(x) - e(x_j)) / e(x) \rVert_2}
        {\max\big(\lVert (L(x) - L(x_j)) / L(x) \rVert_2,\ \epsilon\big)}

    with L the output of ``layer``, several of them one after the other, over neighbours with the same predicted class.
    No unit; lower is better. Source: Agarwal et al. 2022, arXiv:2203.06877. Presets and departures as in
    ``relative-input-stability``; Quantus takes all layers of the network where none is named.
    """

    cost: ClassVar[str] = "an explanation and two passes a sample"

    layer: Annotated[
        str | tuple[str, ...],
        Field(description="auto (see xai layers), a module name, a list of them, or a wildcard like layer*"),
    ] = "auto"

    def seen(self, score: Score, x: Tensor) -> Tensor:
        return torch.cat([acts.flatten(1) for acts in score.activations(x, score.layers.find(self.layer))], 1)


# --- what they share -----------------------------------------------------------------------------------------


def norm(differences: Tensor, order: int = 2) -> Tensor:
    """The length of each of (M, ...), (M,)."""
    lengths: Tensor = torch.linalg.vector_norm(differences.flatten(1), order, dim=1)
    return lengths


def over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, NaN where b is 0."""
    return torch.where(b > 0, a / b, torch.nan)


def highest(changes: Iterable[Change]) -> Tensor:
    """The largest change of each row among those that count, (N,); NaN where none does."""
    best = torch.tensor(-torch.inf)
    for change, counts in changes:
        best = best.to(change)
        best = torch.where(counts, torch.maximum(best, change), best)
    return torch.where(best == -torch.inf, torch.nan, best)


def average(changes: Iterable[Change]) -> Tensor:
    """The mean change of each row over those that count, (N,); NaN where none does."""
    total, number = torch.zeros(()), torch.zeros(())
    for change, counts in changes:
        total = total.to(change) + torch.where(counts, change, 0.0)
        number = number.to(change) + counts
    return total / number
