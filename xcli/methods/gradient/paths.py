"""Gradients summed along a path from a picture without content to the picture itself."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from xcli.baselines import Removal
from xcli.errors import ConfigError
from xcli.methods.base import Attribution
from xcli.methods.gradient.base import PixelMethod, rounds
from xcli.registry import method, options
from xcli.score import Score

Rule = Annotated[
    Literal["midpoint", "left", "right", "trapezoid", "gauss-legendre"],
    Field(description="where along the path gradients are taken, and what each counts"),
]

Steps = Annotated[int, Field(ge=1, le=10_000, description="places on the path at which gradients are taken")]


@lru_cache
def quadrature(rule: Rule, steps: int) -> tuple[Tensor, Tensor]:
    """Places in [0, 1] and their weights, which sum to 1, (steps,) float64 each.

    For a smooth integrand the error falls with ``steps`` to the power of -1 (left, right), -2 (midpoint, trapezoid), or
    faster than any power (gauss-legendre).
    """
    even = torch.full((steps,), 1 / steps, dtype=torch.float64)
    index = torch.arange(steps, dtype=torch.float64)
    match rule:
        case "midpoint":
            return (index + 0.5) / steps, even
        case "left":
            return index / steps, even
        case "right":
            return (index + 1) / steps, even
        case "trapezoid":
            inner = torch.full((steps,), 1 / (steps - 1), dtype=torch.float64)
            inner[[0, -1]] /= 2
            return index / (steps - 1), inner
        case _:
            nodes, weights = np.polynomial.legendre.leggauss(steps)
            return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


@options
class PathMethod(PixelMethod):
    r"""The gradient along a path g from g(0), a picture without content, to g(1), the picture itself.

    .. math:: \int_0^1 \nabla y\,(g(t)) \odot g'(t)\, dt

    approximated at ``steps`` places by ``rule``. Its sum over pixels and colours meets the difference in score between
    the ends, as closely as the rule does; ``extras`` have what is missing: ``delta``, that sum less y(g(1)) - y(g(0)),
    in the unit of the score, which is that of the map too. Memory does not grow with ``steps``.
    """

    cost: ClassVar[str] = "steps forwards + backwards, and 2 forwards"
    small: ClassVar[Mapping[str, object]] = {"steps": 3}

    steps: Steps = 50
    rule: Rule = "midpoint"

    def __post_init__(self) -> None:
        if self.rule == "trapezoid" and self.steps < 2:
            raise ConfigError(f"{self.name}: the trapezoid rule takes both ends, so at least 2 steps")

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        places, weights = quadrature(self.rule, self.steps)
        path, total = self.path(score, x), x.new_zeros(())
        for part in rounds(score, self.steps):
            point, speed = path.at(part.image, places[part.sample])  # (M, C, H, W) each
            (grads,) = part.score.gradients(point).grads  # (P, C, H, W)
            weight = weights[part.sample].to(x)[:, None, None, None]
            copy = part.score.image.to(x.device)
            total = total + part.of_rows(grads * (speed * weight)[copy]).sum(1)
        gap = score.clean(x) - self.outset(score, x)
        return Attribution(total, {"delta": total.sum((1, 2, 3)) - gap})

    def outset(self, score: Score, x: Tensor) -> Tensor:
        """The score (N,) where each row's path begins."""
        image = torch.arange(len(x))
        start, _ = self.path(score, x).at(image, torch.zeros(len(x), dtype=torch.float64))
        return score.on(start, image)[0]

    @abstractmethod
    def path(self, score: Score, x: Tensor) -> Path:
        """The path to each of the images ``x`` (B, C, H, W)."""


class Path(ABC):
    """A way to each of some images."""

    @abstractmethod
    def at(self, image: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Points g(t) on the way to the images ``image`` (M,), and g'(t) there, at t = ``place`` (M,), float64 in
        [0, 1]: (M, C, H, W) each."""


class Straight(Path):
    """From baselines to images in a straight line."""

    def __init__(self, start: Tensor, end: Tensor) -> None:
        self.start, self.way = start, end - start

    def at(self, image: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        image = image.to(self.way.device)
        speed = self.way[image]
        return place.to(speed)[:, None, None, None] * speed + self.start[image], speed


class Sharpening(Path):
    """From images seen through a Gaussian of ``sigma`` pixels, ever sharper, to the images themselves; zero beyond
    their borders."""

    def __init__(self, x: Tensor, sigma: float, root: bool) -> None:
        self.x, self.sigma, self.root = x, sigma, root

    def at(self, image: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        left = (1 - place).clamp_min(1e-12)  # the root has no derivative at 0, and nothing moves there
        sigma = self.sigma * (left.sqrt() if self.root else left)  # (M,)
        speed = -self.sigma * (0.5 / left.sqrt() if self.root else torch.ones_like(left))
        x = self.x[image.to(self.x.device)]
        (down, down_by), (right, right_by) = (gaussians(sigma, side, like=x) for side in x.shape[2:])
        across = x @ right.mT  # (M, C, H, W)
        by_sigma = down_by @ across + down @ (x @ right_by.mT)
        return down @ across, by_sigma * speed.to(x)[:, None, None, None]


def gaussians(sigma: Tensor, side: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices that blur a line of ``side`` pixels by ``sigma`` (M,), and their derivatives by sigma: (M, 1, side,
    side) each. The weights of an endless line sum to 1; what lies beyond the border is zero."""
    reach = max(side, math.ceil(9 * float(sigma.max()))) if len(sigma) else side
    squares = torch.arange(-reach, reach + 1, dtype=torch.float64).square()  # (taps,)
    wide = sigma.clamp_min(1e-3)[:, None]  # narrower ones are a single pixel
    weight = (-squares / (2 * wide.square())).exp()
    weight = weight / weight.sum(1, keepdim=True)  # (M, taps)
    by = weight * (squares - (weight * squares).sum(1, keepdim=True)) / wide.pow(3)
    apart = torch.arange(side)[:, None] - torch.arange(side) + reach  # (side, side)
    apart = apart.to(like.device)
    return weight.to(like)[:, None, apart], by.to(like)[:, None, apart]


@method("integrated-gradients")
class IntegratedGradients(PathMethod, Removal):
    r"""The difference in score to a picture without content, shared among the pixels by what they add on the way.

    .. math:: (x - x') \odot \int_0^1 \nabla y\,(x' + t (x - x'))\, dt

    with x' the picture with every pixel removed, as ``substrate`` says: by default 0, the mean colour of the
    preprocessing. Unit: that of the score. Source: Sundararajan et al. 2017, arXiv:1703.01365. Departs: the midpoint
    rule in place of the paper's sum of right ends (``preset: published``), whose error falls with 1 / steps only.
    Presets: ``captum`` (Gauss-Legendre), ``xplique`` (trapezoid, mean over colours), ``zennit`` (20 right ends).
    captum's own trapezoid gives its steps weights that sum to 1 - 1 / steps, so that its maps are that much too
    small.
    """

    source: ClassVar[str] = "Sundararajan et al. 2017, arXiv:1703.01365"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "published": {"rule": "right"},
        "captum": {"rule": "gauss-legendre", "reduce": "none"},
        "xplique": {"rule": "trapezoid", "reduce": "mean"},
        "zennit": {"rule": "right", "steps": 20, "reduce": "none"},
    }

    def path(self, score: Score, x: Tensor) -> Path:
        return Straight(self.whole(score, x), x)

    def outset(self, score: Score, x: Tensor) -> Tensor:
        return self.emptied(score, x)


@method("blur-ig")
class BlurIG(PathMethod):
    r"""Integrated gradients while the picture comes into focus: needs no baseline colour, and says at what scales.

    .. math:: -\int_0^{\sigma} \nabla y\,(L_s) \odot \frac{\partial L_s}{\partial s}\, ds

    with L_s the picture seen through a Gaussian of s pixels, zero beyond its borders, in the units of the network's
    input; s falls evenly from ``sigma`` to 0, or with ``root`` its square does. The map sums to y(x) - y(L_sigma). Most
    of the score changes within the first pixels of blur, where Gauss-Legendre places lie close; midpoints need some
    400 for a ``sigma`` of 50, and with ``root``, whose places lie near the blurred end, still more.

    Unit: that of the score. Source: Xu et al. 2020, arXiv:2004.03383. Departs: the rule, the exact derivative by s, and
    a Gaussian that is not cut off, where the authors' code takes even steps from the sharp end, differences of 0.01
    and four deviations. ``preset: original`` has their steps; its maps differ by the others, about one in a hundred and
    mostly by the differences. Their ``sqrt`` ends at the root of their largest sigma, our ``root`` at ``sigma``.
    """

    cost: ClassVar[str] = "steps forwards + backwards, and 2 forwards"
    source: ClassVar[str] = "Xu et al. 2020, arXiv:2004.03383"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"original": {"rule": "right"}}

    steps: Steps = 100
    rule: Rule = "gauss-legendre"
    sigma: Annotated[
        float, Field(gt=0, le=1000, description="standard deviation at the blurred end, pixels")
    ] = 50.0
    root: Annotated[
        bool,
        Field(
            description="space the places evenly in the square of s, so that more lie near the blurred end"
        ),
    ] = False

    def path(self, score: Score, x: Tensor) -> Path:
        return Sharpening(x, self.sigma, self.root)
