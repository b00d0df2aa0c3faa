"""What "removed" means: what stands in for pixels that are taken out of an image."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from xcli.registry import options
from xcli.score import Score

IMPUTATION_NOISE = 0.01
"""Standard deviation of the noise on imputed pixels, in units of the normalised input (arXiv:2202.00449)."""

Substrate = Annotated[
    Literal["constant", "mean", "minimum", "blur", "uniform", "gaussian", "negative", "imputation"],
    Field(description="what stands in for removed pixels"),
]

Remover = Callable[[Tensor, Tensor], Tensor]
"""Copies (m, C, H, W) of the images ``image`` (m,) without the pixels ``removed`` (m, H, W), bool."""


@options
class Removal:
    """Options of everything that takes pixels out: what a removed pixel shows instead, all its colours at once.

    - ``constant``: the number ``value``; 0 is the mean colour of the preprocessing;
    - ``mean``: the image's mean colour, channel by channel;
    - ``minimum``: the lowest number in the image, black for most;
    - ``blur``: the image seen through a Gaussian of ``sigma`` pixels, cut to ``kernel`` pixels, zero outside;
    - ``uniform``, ``gaussian``: noise as wide as the image's own range, or with its own mean and deviation, channel by
      channel; one field an image, drawn from the run's seed and the image's path;
    - ``negative``: the opposite of what was there, as black becomes white;
    - ``imputation``: what its neighbours suggest, by noisy linear imputation; nothing suggests a whole image, which
      becomes its mean colour.
    """

    substrate: Substrate = "constant"
    value: Annotated[
        float, Field(description="for constant: in units of the normalised input", allow_inf_nan=False)
    ] = 0.0
    kernel: Annotated[int, Field(description="for blur: side of its window, pixels", ge=1)] = 11
    sigma: Annotated[float, Field(description="for blur: standard deviation, pixels", gt=0, le=1000)] = 5.0

    def remover(self, score: Score, x: Tensor) -> Remover:
        """The function that takes pixels out of the images ``x`` (B, C, H, W); pure, so it may run again."""
        noise = self._noise(score, x)

        def stand_in(image: Tensor, removed: Tensor) -> Tensor:
            image = image.to(x.device)
            return torch.where(
                ~removed[:, None], x[image], other[image]
            )  # x first: its layout is the result's

        def imputed(image: Tensor, removed: Tensor) -> Tensor:
            from xcli.imputation import impute

            image = image.to(x.device)
            filled, _ = impute(x[image], removed)
            return torch.where(~removed[:, None], x[image], filled + noise[image])

        if self.substrate == "imputation":
            return imputed
        other = self._whole(x, noise)
        return stand_in

    def whole(self, score: Score, x: Tensor) -> Tensor:
        """The images (B, C, H, W) with every pixel removed."""
        return self._whole(x, self._noise(score, x)).expand(x.shape)

    def emptied(self, score: Score, x: Tensor) -> Tensor:
        """The score (N,) of each row with every pixel removed; metrics that mean the same share one pass an image."""

        def make() -> Tensor:
            whole = self.whole(score, x)
            if self.substrate == "constant":  # one picture for all
                return score.elsewhere(whole[:1])[0]
            image = score.image.unique()
            return score.on(lambda index: whole[image[index].to(x.device)], image)[0]

        return score.once((x, "emptied", *self._meaning()), make)  # a tensor is a key by identity

    def _meaning(self) -> tuple[object, ...]:
        """The options that count."""
        match self.substrate:
            case "constant":
                return self.substrate, self.value
            case "blur":
                return self.substrate, self.kernel, self.sigma
        return (self.substrate,)

    def _noise(self, score: Score, x: Tensor) -> Tensor:
        """Random numbers (B, C, H, W) that belong to the images; zero where none are needed."""
        match self.substrate:
            case "uniform":
                return drawn(score, x, torch.rand)
            case "gaussian":
                return drawn(score, x, torch.randn)
            case "imputation":
                return drawn(score, x, torch.randn) * IMPUTATION_NOISE
        return x.new_zeros(len(x), 1, 1, 1)

    def _whole(self, x: Tensor, noise: Tensor) -> Tensor:
        """The images with every pixel removed, (B, C, H, W), or with sides of 1 where all along them is the same."""
        match self.substrate:
            case "constant":
                whole = x.new_full((len(x), 1, 1, 1), self.value)
            case "minimum":
                whole = x.amin((1, 2, 3), keepdim=True)
            case "blur":
                whole = blurred(x, self.kernel, self.sigma)
            case "uniform":
                low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
                whole = low + (high - low) * noise
            case "gaussian":
                deviation = x.std((2, 3), correction=0, keepdim=True)
                whole = x.mean((2, 3), keepdim=True) + deviation * noise
            case "negative":
                whole = -x
            case "mean" | "imputation":
                whole = x.mean((2, 3), keepdim=True) + noise
        return whole


def drawn(score: Score, x: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    """One field of random numbers an image (B, C, H, W), zero for an image without rows; drawn once a batch."""

    return score.once((x, "drawn", draw), lambda: fields(score, x, "removal", draw))  # x is a key by identity


def fields(score: Score, x: Tensor, tag: str, draw: Callable[..., Tensor]) -> Tensor:
    """A field of ``draw``, ``torch.rand`` or ``torch.randn``, in the shape and layout of each image of ``x``.

    (B, C, H, W); it belongs to the run's seed, the image's key and ``tag``; zero for an image without rows. Drawn on
    the CPU, so that every device gets the same numbers.
    """
    found = torch.zeros_like(x, device="cpu")
    image, count = score.image.unique_consecutive(return_counts=True)
    for own, first in zip(image.tolist(), (count.cumsum(0) - count).tolist(), strict=True):
        found[own] = draw(x.shape[1:], generator=score.generator(first, tag))
    return found.to(x.device)


def blurred(x: Tensor, kernel: int, sigma: float) -> Tensor:
    """Images (B, C, H, W) through a Gaussian window of ``kernel`` x ``kernel`` pixels, zero beyond the border."""
    before, after = kernel // 2, kernel - 1 - kernel // 2
    weights = window(kernel, sigma)
    down = F.pad(x, (0, 0, before, after))
    x = sum((w * down[:, :, i : i + x.shape[2]] for i, w in enumerate(weights)), torch.zeros_like(x))
    right = F.pad(x, (before, after))
    return sum((w * right[..., i : i + x.shape[3]] for i, w in enumerate(weights)), torch.zeros_like(x))


def window(kernel: int, sigma: float) -> list[float]:
    """One side of RISE's window: a delta in ``kernel`` pixels seen through a Gaussian of four deviations' reach.

    What falls outside is folded back in, so a ``sigma`` as wide as the window makes it almost flat.
    """
    reach = int(4 * sigma + 0.5)
    gauss = [math.exp(-0.5 * (step / sigma) ** 2) for step in range(-reach, reach + 1)]
    weights = [0.0] * kernel
    for step, weight in zip(range(-reach, reach + 1), gauss, strict=True):
        place = (kernel // 2 + step) % (2 * kernel)
        weights[min(place, 2 * kernel - 1 - place)] += weight / sum(gauss)
    return weights
