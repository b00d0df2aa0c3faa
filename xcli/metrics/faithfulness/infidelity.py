"""Infidelity: how far the map is from saying what a perturbation does to the score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.metrics.base import Direction, Measured
from xcli.metrics.faithfulness.subsets import PRIME, Draws, Pixels, Removing, covered
from xcli.registry import metric
from xcli.score import Score

Copies = Callable[[Tensor], Tensor]


@metric("infidelity")
class Infidelity(Removing):
    r"""How far what the map says of a perturbation is from what the perturbation does to the score, squared.

    .. math:: E_I\big[(I \cdot map - (f(x) - f(x - I)))^2\big]

    ``perturbation``, with ``samples`` of them an image drawn from the run's seed and the image's path:

    - ``square``: a random square of pixels is removed; its side is from 1 pixel to ``largest`` times the shorter side
      of the image, and all squares that fit are equally likely;
    - ``noisy-baseline``: the whole image is replaced by Gaussian noise of ``deviation`` around 0;
    - ``noise``: I is such noise;
    - ``sweep``: squares of ``patch`` pixels are removed one upon the other in raster order; drawn from nothing, with
      as many perturbations as there are squares.

    Where pixels are removed, a map ``means`` either the ``share`` of the score that a pixel has, so that I is 1 there,
    or the ``slope`` of the score at it, so that I is what the pixel lost, added up over the colours, which are all
    taken to have that slope; noise is always met with slopes. ``scaled`` multiplies the map with the number that fits
    best, row by row, so that its unit does not matter.

    Unit: that of ``score``, squared; lower is better. Source: Yeh et al. 2019, arXiv:1901.09392, definition 2.1.
    Presets: ``authors`` scales the map as their code does for squares (and takes every square there is); ``captum``,
    the perturbation of its documentation; ``quantus``, a sweep in the image's lowest number, which that package
    repeats ten times over to the same end.
    """

    direction: ClassVar[Direction] = "lower"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, None)
    cost: ClassVar[str] = "samples passes"
    source: ClassVar[str] = "Yeh et al. 2019, arXiv:1901.09392"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "authors": {"scaled": True},
        "captum": {"perturbation": "noise", "deviation": 0.003, "samples": 10},
        "quantus": {"perturbation": "sweep", "means": "slope", "substrate": "minimum"},
    }
    small: ClassVar[Mapping[str, object]] = {"samples": 8}

    perturbation: Annotated[
        Literal["square", "noisy-baseline", "noise", "sweep"], Field(description="what is done to the image")
    ] = "square"
    samples: Annotated[int, Field(description="random perturbations", ge=1)] = 100
    largest: Annotated[
        float, Field(description="for square: largest side, of the shorter side of the image", gt=0, le=1)
    ] = 0.36
    patch: Annotated[int, Field(description="for sweep: side of a square, pixels", ge=1)] = 4
    deviation: Annotated[
        float, Field(description="for noise: standard deviation, in units of the normalised input", gt=0)
    ] = 0.2
    means: Annotated[Literal["share", "slope"], Field(description="what the map says of a removed pixel")] = (
        "share"
    )
    scaled: Annotated[bool, Field(description="multiply each map with the number that fits best")] = False

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        watched = score.scaled(self.score)
        noisy = self.perturbation in ("noise", "noisy-baseline")
        gone, count = (None, self.samples) if noisy else self.removed(watched, map)
        row = torch.arange(len(map)).repeat_interleave(count)
        image = watched.image[row]
        make = self.noised(watched, x, image) if gone is None else self.copies(x, image, gone)
        left = watched.once((x, self), lambda: watched.at(make, row))  # what is perturbed knows no map
        lost = watched.clean(x)[:, None] - left.view(len(map), count)
        if gone is not None and self.means == "share":
            said = covered(map, row, gone)
        else:
            said = weighed(map, x, row, image, make)
        said = said.view(len(map), count)
        if self.scaled:
            said = said * best_factor(said, lost)
        return Measured((said - lost).square().mean(1))

    def removed(self, score: Score, map: Tensor) -> tuple[Pixels, int]:
        """The pixels that each perturbation removes, and how many perturbations a row has."""
        height, width = map.shape[1:]
        if self.perturbation == "sweep":
            down, right = (torch.arange(side, device=map.device) // self.patch for side in (height, width))
            turn = down[:, None] * -(-width // self.patch) + right  # (H, W)
            count = -(-height // self.patch) * -(-width // self.patch)
            return lambda index: turn <= (index % count).to(map.device)[:, None, None], count
        largest = max(1, round(self.largest * min(height, width)))
        drawn = [
            squares(height, width, largest, self.samples, score.generator(row, self.name))
            for row in range(len(map))
        ]
        square = torch.cat(drawn).to(map.device)  # (N * samples, 3)
        down, right = torch.arange(height, device=map.device), torch.arange(width, device=map.device)

        def inside(index: Tensor) -> Tensor:
            top, left, side = square[index.to(map.device)].T[..., None]  # (m, 1) each
            rows, columns = (down >= top) & (down < top + side), (right >= left) & (right < left + side)
            chosen: Tensor = rows[:, :, None] & columns[:, None]
            return chosen

        return inside, self.samples

    def noised(self, score: Score, x: Tensor, image: Tensor) -> Copies:
        """The function that makes noisy copies of the images ``image`` (M,), or of none."""
        draws = Draws.of(score, self.name, x[0].numel(), self.samples, x.device)

        def make(index: Tensor) -> Tensor:
            noise = self.deviation * gaussian(draws(index)).to(x.dtype).view(-1, *x.shape[1:])
            return noise if self.perturbation == "noisy-baseline" else x[image[index].to(x.device)] - noise

        return make


def squares(height: int, width: int, largest: int, count: int, generator: torch.Generator) -> Tensor:
    """(count, 3), top, left and side of random squares of up to ``largest`` pixels; all that fit are as likely."""
    side = torch.arange(1, largest + 1)
    fitting = ((height - side + 1) * (width - side + 1)).double()
    side = 1 + torch.multinomial(fitting, count, replacement=True, generator=generator)
    down, right = torch.rand(2, count, dtype=torch.float64, generator=generator)
    return torch.stack([(down * (height - side + 1)).long(), (right * (width - side + 1)).long(), side], 1)


def gaussian(keys: Tensor) -> Tensor:
    """Normally distributed numbers, float32, from even ones below PRIME."""
    even = (2 * keys - (PRIME - 1)).float() / PRIME
    limit = 1 - torch.finfo(even.dtype).eps
    normal: Tensor = torch.erfinv(even.clamp(-limit, limit)) * math.sqrt(2)
    return normal


def weighed(map: Tensor, x: Tensor, row: Tensor, image: Tensor, make: Copies, at_once: int = 64) -> Tensor:
    """I * map, added up over all pixels and colours, for I = x - make(index): (M,)."""
    parts = []
    for index in torch.arange(len(row)).split(at_once):
        moved = (x[image[index].to(x.device)] - make(index)).sum(1)  # (m, H, W)
        parts.append((moved * map[row[index].to(map.device)]).flatten(1).sum(1))
    return torch.cat(parts)


def best_factor(said: Tensor, lost: Tensor) -> Tensor:
    """The factor b (N, 1) for which b * said is nearest to lost, (N, S) each; 0 where nothing was said."""
    square = said.square().sum(1, keepdim=True)
    return torch.where(square > 0, (said * lost).sum(1, keepdim=True) / square, 0.0)
