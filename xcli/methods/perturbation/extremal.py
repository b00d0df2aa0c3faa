"""Extremal perturbation: the mask of a given area through which the network still sees what it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.errors import ModelError
from xcli.methods.base import Attribution, Method, Need
from xcli.methods.perturbation.smoothmax import Pooling, SmoothMask
from xcli.registry import method
from xcli.score import Score

RATE, MOMENTUM = 0.01, 0.9
"""Of gradient descent; what is new has a weight of 1 less the momentum, but in the first iteration 1."""

WEIGHT, GROWTH = 300.0, 1.0035
"""Of the area, and what it is multiplied by after each iteration."""

BITS = 16
"""Masks are ranked by their values to so many bits, so that rounding does not tell pixels apart that are equal by
symmetry: which of these are to be 1 would differ from device to device, and the search with it."""

Area = Annotated[float, Field(gt=0, le=1)]


@method("extremal-perturbation")
class ExtremalPerturbation(Method):
    r"""The smooth mask of a given area with the highest score of the picture seen through it.

    .. math:: \max_p\ r(m \otimes x) - \lambda\, \frac{1}{n} \sum_j \big(\mathrm{sort}(m)_j - [j > n (1 - a)]\big)^2

    m is a smooth mask (``SmoothMask``: numbers p in [0, 1], ``step`` pixels apart, each of which reaches ``sigma``
    pixels) of n pixels with its margin, of which the share a = ``areas`` shall be 1 and the others 0; of equal pixels
    the last are to be 1. Where m is 1 the picture is seen as it is, where it is 0 blurred the most, by a Gaussian of
    ``max_blur`` pixels with zeros beyond the border, and between by linear interpolation of ``levels`` blurs at equal
    steps (``perturbation: fade``: darker to 0, the mean colour of the preprocessing).

    ``variant: delete`` looks for what has to be taken out: r is the opposite of the score of the picture through 1 - m;
    ``dual`` adds both. ``reward: contrastive`` is the logit less the highest of the others. With ``jitter`` every
    second picture, the first included, is mirrored. p starts at 1 and follows the gradient for ``iterations`` steps
    (0.01, momentum 0.9 with as much dampening), and lambda grows from 300 by 1.0035 each. The map is the last mask that
    was tried, (N, H, W) in [0, 1]; of several ``areas`` the sum of their masks, or their mean (``combine``). ``extras``
    have, of that iteration and as means over ``areas``, the ``reward`` and the ``area`` of the mask with its margin,
    and ``forwards``, the passes. No graph is kept: a mask is the end of a search.

    ``pooling: sum`` and ``sigmoid`` start at a mask of 1, where nothing moves them, unless ``sigma`` is below a step.
    On pictures of few pixels the steps are large, and a small area may at first leave nothing at all.

    Source: Fong, Patrick and Vedaldi 2019, arXiv:1910.08485, and the code of the authors, TorchRay, whose definition
    this is; the area counts the margin, as there, so the picture's share is somewhat larger. Departures: a mask is
    never smaller than the picture, as theirs is with ``sigma`` below a step; pixels equal to 16 bits are told apart by
    their order instead of by rounding. Preset ``pointing-game``: their areas on VOC, the sum smoothed as at 224 pixels.

    Raises:
        ModelError: the maps are to be trained through.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    cost: ClassVar[str] = "iterations forwards + backwards for each target and area, twice for dual"
    source: ClassVar[str] = "Fong et al. 2019, arXiv:1910.08485"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "pointing-game": {"areas": (0.025, 0.05, 0.1, 0.2), "post_process": ({"smooth": 20.16},)},
    }
    small: ClassVar[Mapping[str, object]] = {
        "iterations": 2,
        "areas": (0.1, 0.3),
        "step": 16,
        "sigma": 16.0,
        "levels": 3,
    }

    areas: Annotated[
        tuple[Area, ...],
        Field(
            min_length=1, description="shares of the picture and its margin that masks cover, one mask each"
        ),
    ] = (0.1,)
    combine: Annotated[
        Literal["sum", "mean"], Field(description="what the map is of the masks of several areas")
    ] = "sum"
    iterations: Annotated[int, Field(ge=1, description="steps of gradient descent")] = 800
    step: Annotated[int, Field(ge=1, description="pixels from one number of a mask to the next")] = 7
    sigma: Annotated[float, Field(gt=0, le=1000, description="how far such a number reaches, pixels")] = 21.0
    pooling: Annotated[Pooling, Field(description="what a mask is of the numbers around a pixel")] = "softmax"
    perturbation: Annotated[
        Literal["blur", "fade"], Field(description="what becomes of the picture where the mask is 0")
    ] = "blur"
    levels: Annotated[int, Field(ge=2, description="pictures that the mask interpolates between")] = 8
    max_blur: Annotated[
        float, Field(gt=0, le=1000, description="for blur: the most, standard deviation in pixels")
    ] = 20.0
    variant: Annotated[
        Literal["preserve", "delete", "dual"],
        Field(
            description="whether the score is to be high through the mask, low through its complement, or both"
        ),
    ] = "preserve"
    reward: Annotated[
        Literal["simple", "contrastive"],
        Field(description="the score, or the logit less the highest of the other classes"),
    ] = "simple"
    jitter: Annotated[bool, Field(description="mirror every second perturbed picture, left and right")] = True

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        if score.create_graph:
            raise ModelError(
                "extremal-perturbation gives no maps that can be trained through: a mask is the end of a search"
            )
        with torch.no_grad():
            return self.searched(score.scaled("contrast") if self.reward == "contrastive" else score, x)

    def searched(self, score: Score, x: Tensor) -> Attribution:
        """``attribute`` of the score that is the reward; the masks of all rows and areas step together."""
        rows, areas = len(score.image), len(self.areas)
        row = torch.arange(rows).repeat_interleave(areas)  # (M,) of each mask
        smooth = SmoothMask((x.shape[-2], x.shape[-1]), self.step, self.sigma, self.pooling, x.device)
        area, own = self.target(math.prod(smooth.outer)), score.image.unique()
        pyramid = Pyramid.of(self, x[own.to(x.device)], torch.searchsorted(own, score.image[row]))
        p = x.new_ones(len(row), *smooth.grid, dtype=precise(x))
        speed, weight = torch.zeros_like(p), WEIGHT
        for step in range(self.iterations):
            pooled = smooth.masks(p)
            reward, uphill = self.rewarded(score, pyramid, row, smooth.cropped(pooled.mask), step)
            if step < self.iterations - 1:  # the last step would change nothing that is returned
                downhill = area.gradient(pooled.mask).mul_(weight).sub_(smooth.padded(uphill))
                downhill = smooth.pull_back(p, pooled, downhill)
                speed = speed.mul_(MOMENTUM).add_(downhill, alpha=1 - MOMENTUM) if step else downhill
                p = p.sub_(speed, alpha=RATE).clamp_(0, 1)
                weight *= GROWTH
        found = smooth.cropped(pooled.mask).unflatten(0, (rows, areas))
        maps = found.sum(1) if self.combine == "sum" else found.mean(1)
        passes = self.iterations * areas * (2 if self.variant == "dual" else 1)
        extras = {
            "forwards": maps.new_full((rows,), passes),
            "reward": reward.unflatten(0, (rows, areas)).mean(1),
            "area": pooled.mask.mean((1, 2)).unflatten(0, (rows, areas)).mean(1).to(x.dtype),
        }
        return Attribution(maps.to(x.dtype), extras)

    def rewarded(
        self, score: Score, pyramid: Pyramid, row: Tensor, mask: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """The rewards (M,) of masks (M, H, W) of rows ``row`` in an iteration, and their gradients at the masks."""
        parts = {"preserve": (1,), "delete": (-1,), "dual": (1, -1)}[self.variant]
        seen, slopes = zip(*(pyramid.seen(mask if sign > 0 else 1 - mask) for sign in parts), strict=True)
        copies, mirrored = torch.cat(seen), self.jitter and step % 2 == 0
        copies = copies.flip(3) if mirrored else copies
        found = score.gradients(copies, row=row.repeat(len(parts)))
        grads = found.grads[0].flip(3) if mirrored else found.grads[0]
        reward: Tensor = torch.zeros((), device=mask.device)
        uphill: Tensor = torch.zeros((), device=mask.device)
        for sign, slope, grad, value in zip(
            parts, slopes, grads.chunk(len(parts)), found.values.chunk(len(parts)), strict=True
        ):
            # A mask is turned over on its way in, and its reward on the way out: the slope has its sign twice.
            uphill = uphill + (slope * grad).sum(1, dtype=mask.dtype)
            reward = reward + sign * value
        return reward, uphill

    def target(self, pixels: int) -> Target:
        """What the area term wants of masks of so many pixels."""
        return Target(pixels, tuple(int(pixels * (1 - area)) for area in self.areas))


def precise(x: Tensor) -> torch.dtype:
    """The type that masks are computed in: single precision at least, as e^20 asks for."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class Target:
    """What masks, those of the areas in turn, shall be: the lowest ``zeros[a]`` of their ``pixels`` 0, the others 1."""

    pixels: int
    zeros: tuple[int, ...]

    def gradient(self, mask: Tensor) -> Tensor:
        """Of the mean square of sort(m) - r, at the masks (M, H', W')."""
        wanted = self.ones(mask.flatten(1)).view_as(mask).to(mask.dtype)
        gradient: Tensor = (mask - wanted).mul_(2 / self.pixels)
        return gradient

    def ones(self, mask: Tensor) -> Tensor:
        """Which pixels of the masks (M, n) shall be 1, bool: after a stable sort those past the zeros."""
        ranked = mask.mul(2**BITS).round_().long()  # no two are equal once their place counts
        ranked = ranked.mul_(self.pixels).add_(torch.arange(self.pixels, device=mask.device))
        ranked = ranked.unflatten(0, (-1, len(self.zeros)))
        lowest = [
            ranked[:, area].kthvalue(zeros + 1, dim=1, keepdim=True).values
            for area, zeros in enumerate(self.zeros)
        ]
        wanted: Tensor = ranked >= torch.stack(lowest, 1)
        return wanted.flatten(0, 1)


@dataclass(frozen=True)
class Pyramid:
    """Images at each level of perturbation, those of a pixel side by side.

    Attributes:
        pixels: (B H W (levels + 1), C), the last level twice, so that there is one above each.
        base: (M, H, W) the place of the lowest level of each pixel of the image of each mask.
        levels: how many there are.
        layout: the memory format of the images.
    """

    pixels: Tensor
    base: Tensor
    levels: int
    layout: torch.memory_format

    @classmethod
    def of(cls, options: ExtremalPerturbation, x: Tensor, image: Tensor) -> Pyramid:
        """The levels of the images ``x``, for masks of the images ``image`` (M,)."""
        share = [level / (options.levels - 1) for level in range(options.levels)]
        if options.perturbation == "blur":
            made = [softened(x, (1 - part) * options.max_blur) for part in share[:-1]] + [x]
        else:
            made = [x * part for part in share]
        stacked = torch.stack([*made, made[-1]], 1).permute(0, 3, 4, 1, 2)  # (B, H, W, levels + 1, C)
        place = torch.arange(x.shape[2] * x.shape[3], device=x.device).view(x.shape[2:])
        base = (image.to(x.device)[:, None, None] * place.numel() + place) * (options.levels + 1)
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        layout = torch.channels_last if last else torch.contiguous_format
        return cls(stacked.flatten(0, 3).contiguous(), base, options.levels, layout)

    def seen(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The images through masks (M, H, W), and their derivatives by the mask, (M, C, H, W) each.

        At a level itself the derivative is that towards the next one, and 0 at the last level.
        """
        place = mask * (self.levels - 1)
        level = place.floor().clamp_(0, self.levels - 1)  # what is not finite has some level too
        ahead = (place - level).to(self.pixels.dtype).flatten()[:, None]
        index = level.nan_to_num_(0).long().add_(self.base).flatten()
        below = self.pixels.index_select(0, index)
        rise = self.pixels.index_select(0, index.add_(1)).sub_(below)
        copies = torch.addcmul(below, rise, ahead).view(*mask.shape, -1).permute(0, 3, 1, 2)
        slope = rise.mul_(self.levels - 1).view(*mask.shape, -1).permute(0, 3, 1, 2)
        return copies.contiguous(memory_format=self.layout), slope


def softened(x: Tensor, sigma: float) -> Tensor:
    """Images (B, C, H, W) through a Gaussian of ``sigma`` pixels that ends at four deviations, zero beyond the border:
    on each side a product with the matrix of its weights."""
    down, right = (smoothing(side, sigma).to(x) for side in x.shape[2:])
    return down @ x @ right


def smoothing(side: int, sigma: float) -> Tensor:
    """The Gaussian between any two of ``side`` pixels, (side, side) float64; without a border its rows sum to 1."""
    reach = math.ceil(4 * sigma)
    weights = torch.exp(-torch.arange(-reach, reach + 1).double().square() / (2 * sigma**2))
    far = (torch.arange(side)[:, None] - torch.arange(side)).abs()
    return torch.where(far <= reach, weights[reach:][far.clamp_max(reach)], 0) / weights.sum()
