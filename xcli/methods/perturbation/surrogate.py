"""Linear models of the network around a picture: LIME and Kernel SHAP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli import draws
from xcli.baselines import Removal
from xcli.errors import ConfigError
from xcli.methods.perturbation.base import Sampling
from xcli.methods.perturbation.coalitions import Coalitions, Fit, least_squares, scattered, wide
from xcli.registry import method
from xcli.score import Score
from xcli.segments import Segments, segmented
from xcli.targets import Scale


@method("lime")
class LIME(Removal, Sampling):
    r"""The coefficients of a linear model that says, near the picture, what the score is when features are missing.

    .. math:: \min_{b, b_0} \sum_{s} e^{-d_s^2 / w^2} \big(f(x_{z_s}) - b_0 - b \cdot z_s\big)^2 + \alpha |b|^2

    over ``samples`` random z in {0, 1}^F: feature i of the picture is kept where z_i is 1, with probability ``keep``,
    and shows the ``substrate`` where it is 0. The map has b at the pixels of each feature. d is the cosine distance of
    z to all ones, or the Euclidean distance of x_z to x, all colours of all pixels, in units of the normalised input;
    w is ``kernel_width``, alpha is ``ridge``, which spares b_0. Unit: that of the score. Solved in float64 on the
    device, once an image for all its rows. ``extras/r2``: the share of the weighted variance of the scores that the
    linear model explains (NaN where they do not vary); near 0 the map means nothing.

    Source: Ribeiro, Singh and Guestrin 2016, arXiv:1602.04938. Departs: features are cells of a grid unless
    ``segments`` names superpixels; every feature counts, instead of the K best. The authors' package takes
    quickshift:4, the square root of the kernel, which is ``kernel_width: 0.3536`` here, each superpixel's mean colour
    as what is shown, and counts the picture itself as a sample. Preset ``xplique``: 150 samples, quickshift:2 (with
    ratio 0.5 there), Euclidean distance, width 45, ridge 2. Its pictures go from 0 to 1; for input that is divided by a
    deviation of 0.225 the same width is 200, and at 45 the weights are so small that ridge leaves nothing of the map.

    Raises:
        ConfigError: Euclidean distance with imputation, which is no sum over features.
    """

    scale: ClassVar[Scale] = "probability"
    cost: ClassVar[str] = "samples forwards"
    source: ClassVar[str] = "Ribeiro et al. 2016, arXiv:1602.04938"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "xplique": {
            "samples": 150,
            "segments": "quickshift:2",
            "distance": "euclidean",
            "kernel_width": 45.0,
            "ridge": 2.0,
        }
    }
    small: ClassVar[Mapping[str, object]] = {"samples": 12, "segments": "grid:3"}

    samples: Annotated[int, Field(ge=2, description="random pictures; with until, at most")] = 1000
    segments: Segments = "grid:7"
    keep: Annotated[float, Field(gt=0, lt=1, description="probability that a feature is kept")] = 0.5
    distance: Annotated[
        Literal["cosine", "euclidean"], Field(description="of the kept features, or of the pictures")
    ] = "cosine"
    kernel_width: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="distance at which a sample weighs 1/e")
    ] = 0.25
    ridge: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="penalty on the squared coefficients")
    ] = 1.0

    def __post_init__(self) -> None:
        if self.distance == "euclidean" and self.substrate == "imputation":
            raise ConfigError(
                "distance: euclidean is a sum over features; what imputation shows for one depends on the others: "
                "take cosine, or another substrate"
            )

    def design(self, score: Score, x: Tensor) -> Coalitions:
        label, features = segmented(score, x, self.segments)
        apart = self.apart(score, x, label, int(features.max()))

        def fit(row: Tensor, image: int, kept: Tensor, scores: Tensor) -> Fit:
            if self.distance == "cosine":
                squared = (1 - kept.mean(1).sqrt()).square()
            else:
                squared = (1 - kept) @ apart[image, : kept.shape[1]]
            return with_intercept(kept, scores, -squared / self.kernel_width**2, self.ridge)

        count = torch.full((len(x),), self.samples)
        seeds = score.seeds(torch.arange(len(x)), self.name)
        remover = self.remover(score, x)
        return Independent(score.image, label, features, remover, seeds, count, fit, keep=self.keep)

    def apart(self, score: Score, x: Tensor, label: Tensor, features: int) -> Tensor:
        """The squared distance that each feature's removal brings, (B, F)."""
        off = (x - self.whole(score, x)).square().sum(1).flatten(1).to(wide(x.device))
        return off.new_zeros(len(x), features).scatter_add(1, label.flatten(1), off)


@dataclass
class Independent(Coalitions):
    """Each feature kept by itself, with probability ``keep``."""

    keep: float = 0.5

    def kept(self, image: Tensor, sample: Tensor) -> Tensor:
        device = self.label.device
        own = draws.sampled(self.seeds[image].to(device), sample.to(device))
        return draws.uniform(own, int(self.features.max())) < self.keep


def with_intercept(kept: Tensor, scores: Tensor, log_weights: Tensor, ridge: float, unit: int = 1) -> Fit:
    """Weighted ridge regression with an intercept of its own: coefficients, errors, and r2.

    Weights come as logarithms, as all of them may be too small to be told from 0.
    """
    share, weights = log_weights.softmax(0), log_weights.exp()
    scores = scores - scores[:, :1]  # so that scores that do not vary are exactly 0
    middle, mean = share @ kept, scores @ share
    centred, off = kept - middle, scores - mean[:, None]
    found, lever = least_squares(centred, off, weights, ridge)
    left = off - found @ centred.mT
    r2 = 1 - (left.square() @ share) / (off.square() @ share)
    return found, scattered(lever, left, unit), {"r2": r2}


@method("kernel-shap")
class KernelSHAP(Removal, Sampling):
    r"""What each feature adds to the score, shared fairly: Shapley values by weighted least squares.

    .. math:: \min_\phi \sum_z \frac{F - 1}{\binom{F}{|z|}\, |z|\, (F - |z|)}
        \big(f(x_z) - f(x_0) - \phi \cdot z\big)^2 \quad \text{with} \quad \sum_i \phi_i = f(x) - f(x_0)

    over the sets z of kept features, x_0 the picture without any. ``samples`` sets are drawn with the kernel's own
    probability, so each weighs the same; where there are no more than ``samples`` proper sets, all are taken once with
    their weights, and the map is the exact Shapley value. The two constraints, at the empty and the whole picture, hold
    exactly: the numbers of the features sum to f(x) - f(x_0). The map has phi at the pixels of each feature. Unit: that
    of the score. Solved in float64 on the device, once an image for all its rows.

    Source: Lundberg and Lee 2017, arXiv:1705.07874. ``paired``: each set is followed by its complement, as in the
    authors' package, which takes the noise of interactions between two features out of the estimate (Covert and Lee
    2021, arXiv:2012.01536), and adds some for those between three. Preset ``xplique``:
    800 single sets, quickshift:2 (with ratio 0.5 there), and a free intercept in place of the constraints.
    """

    cost: ClassVar[str] = "samples forwards, at most 2^features - 2; and 1 of the image and 1 of none of it"
    source: ClassVar[str] = "Lundberg and Lee 2017, arXiv:1705.07874"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "xplique": {"samples": 800, "segments": "quickshift:2", "paired": False, "constrained": False}
    }
    small: ClassVar[Mapping[str, object]] = {"samples": 12, "segments": "grid:3"}

    samples: Annotated[
        int, Field(ge=2, description="sets of features; with until, at most; rounded up to pairs")
    ] = 1000
    segments: Segments = "grid:7"
    paired: Annotated[bool, Field(description="each set is followed by its complement")] = True
    constrained: Annotated[
        bool,
        Field(
            description="exact at the empty and the whole picture; false: neither is asked for, a free intercept"
        ),
    ] = True

    def design(self, score: Score, x: Tensor) -> Coalitions:
        label, features = segmented(score, x, self.segments)
        unit = 2 if self.paired else 1
        count = sets(features).clamp_max(-(-self.samples // unit) * unit)
        exact = count == sets(features)
        ends = (self.emptied(score, x), score.clean(x)) if self.constrained else None

        def fit(row: Tensor, image: int, kept: Tensor, scores: Tensor) -> Fit:
            weights = shapley_kernel(kept) if exact[image] else torch.ones_like(kept[:, 0])
            if ends is None:
                found, error, _ = with_intercept(kept, scores, weights.log(), 0.0, unit)
            else:
                none, whole = (end[row.to(end.device)].to(scores) for end in ends)
                found, error = shared_out(kept, scores - none[:, None], weights, whole - none, unit)
            if exact[image]:  # some of all sets, in their order, are no sample
                error = torch.full_like(error, 0.0 if len(kept) == count[image] else torch.inf)
            return found, error, {}

        seeds = score.seeds(torch.arange(len(x)), self.name)
        remover = self.remover(score, x)
        return ByKernel(score.image, label, features, remover, seeds, count, fit, unit)


def sets(features: Tensor) -> Tensor:
    """How many sets of each number of features (B,) there are but for the empty and the whole one; 2^62 stands for
    more."""
    whole: Tensor = 2 ** features.clamp_max(62) - 2
    return whole


def shapley_kernel(kept: Tensor) -> Tensor:
    """The weight (S,) of each set (S, F)."""
    features = kept.shape[1]
    table = [
        0.0,
        *((features - 1) / (comb(features, k) * k * (features - k)) for k in range(1, features)),
        0.0,
    ]
    return kept.new_tensor(table)[kept.sum(1).long()]


def shared_out(
    kept: Tensor, scores: Tensor, weights: Tensor, total: Tensor, unit: int
) -> tuple[Tensor, Tensor]:
    """Coefficients (n, F) that sum to ``total`` (n,) and fit the scores (n, S) of the sets (S, F) best; their errors.

    What is left after equal shares is fitted by coefficients that sum to 0, the least of these where several do.
    """
    features = kept.shape[1]
    equal = total[:, None] / features
    uneven = kept - kept.mean(1, keepdim=True)  # the sets seen by coefficients that sum to 0
    left = scores - equal * kept.sum(1)
    found, lever = least_squares(uneven, left, weights)
    return equal + found, scattered(lever, left - found @ uneven.mT, unit)


@dataclass
class ByKernel(Coalitions):
    """Sets drawn by the Shapley kernel, alone or with their complements; or, where ``count`` says so, all there are."""

    def kept(self, image: Tensor, sample: Tensor) -> Tensor:
        device, most = self.label.device, int(self.features.max())
        place = torch.arange(most, device=device)
        own, number = image.to(device), sample.to(device)
        features = self.features.to(device)[own][:, None]
        uniform = draws.uniform(draws.sampled(self.seeds.to(device)[own], number // self.unit), most + 1)
        size = (uniform[:, :1] > kernel_sizes(self.features).to(device)[own]).sum(1, keepdim=True)
        rank = torch.where(place < features, uniform[:, 1:], 2).argsort(1).argsort(1)
        kept = (rank < size) ^ (number % self.unit == 1)[:, None]
        bits = (number[:, None] + 1) >> place.clamp_max(62) & 1
        exact = (self.count == sets(self.features)).to(device)[own]
        return torch.where(exact[:, None], bits == 1, kept)


def kernel_sizes(features: Tensor) -> Tensor:
    """The probability (B, most features) that a set drawn by the kernel is of at most 0, 1, 2, ... features.

    Of k among F features it is in proportion to 1 / (k (F - k)), 0 for none and for all.
    """
    size = torch.arange(int(features.max()))
    own = features[:, None]
    proper = (size > 0) & (size < own)
    share = torch.where(proper, 1.0 / (size * (own - size)).clamp_min(1).double(), 0.0)
    whole = share.sum(1, keepdim=True).clamp_min(1e-300)
    found: Tensor = (share / whole).cumsum(1)
    return torch.where(size < own - 1, found, 1.0)
