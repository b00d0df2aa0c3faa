"""Pictures of which some features are kept and the others taken out, and least squares over them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xcli.baselines import Remover
from xcli.methods.perturbation.base import Design, Estimate, by_image

Fit = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Of n rows of one image: numbers of its features (n, F), their standard errors (n, F), what the method adds."""


@dataclass
class Coalitions(Design):
    """Random sets of kept features, those of an image by its seed.

    Attributes:
        image: (N,) the image of each row.
        label: (B, H, W) the feature of each pixel; features: (B,) how many an image has.
        seeds: (B,) for ``draws``.
        fit: (rows of one image (n,), the image, its sets (S, F), scores (n, S)) -> what they say; in float64.
    """

    image: Tensor
    label: Tensor
    features: Tensor
    remover: Remover
    seeds: Tensor
    count: Tensor
    fit: Callable[[Tensor, int, Tensor, Tensor], Fit] = field(repr=False)
    unit: int = 1

    @abstractmethod
    def kept(self, image: Tensor, sample: Tensor) -> Tensor:
        """The sets (m, F), bool, F the features of the image that has most; beyond an image's own, anything."""

    def altered(self, image: Tensor, sample: Tensor) -> Tensor:
        return self.remover(
            image, ~on_pixels(self.kept(image, sample), self.label[image.to(self.label.device)])
        )

    def estimate(self, row: Tensor, scores: Tensor) -> Estimate:
        device, image = scores.device, self.image[row]
        maps, errors = scores.new_zeros(len(row), *self.label.shape[1:]), scores.new_zeros(len(row))
        extras = dict[str, Tensor]()
        for one, place in by_image(image):
            sample = torch.arange(min(scores.shape[1], int(self.count[one])))
            kept = self.kept(torch.full_like(sample, one), sample)[:, : int(self.features[one])]
            own = place.to(device)
            values, spread, added = self.fit(
                row[place], one, kept.to(wide(device)), scores[own, : len(sample)].to(wide(device))
            )
            maps = maps.index_copy(0, own, values[:, self.label[one]].to(maps))
            errors = errors.index_copy(0, own, spread.square().mean(1).sqrt().to(errors))
            for name, extra in added.items():
                extras[name] = extras.get(name, torch.zeros_like(errors)).index_copy(0, own, extra.to(errors))
        return Estimate(maps, errors, extras)


def on_pixels(features: Tensor, label: Tensor) -> Tensor:
    """What is known of features (m, F) at the pixels of each: (m, H, W), by labels (m, H, W)."""
    return features.gather(1, label.flatten(1)).view(label.shape)


def wide(device: torch.device) -> torch.dtype:
    """The widest floats that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def least_squares(
    design: Tensor, values: Tensor, weights: Tensor, ridge: float = 0.0
) -> tuple[Tensor, Tensor]:
    r"""The coefficients b that minimise \sum_s w_s (values_s - design_s b)^2 + ridge |b|^2, of least norm.

    Args:
        design: (S, F); values: (n, S); weights: (S,).
    Returns:
        the coefficients (n, F), and what sample s moves each by, for each unit that its value is off: (F, S).
    """
    weighed = design.mT * weights
    gram = weighed @ design
    gram.diagonal().add_(ridge)
    if not torch.isfinite(gram).all():  # a picture that is not finite has no distance
        return values @ weighed.mT * torch.nan, weighed * torch.nan
    lever = torch.linalg.pinv(gram, rtol=1e-10, hermitian=True) @ weighed
    return values @ lever.mT, lever


def scattered(lever: Tensor, off: Tensor, unit: int = 1) -> Tensor:
    """Standard errors (n, F) of least squares from what the values are off (n, S), as they are: no two alike.

    Samples that belong together, ``unit`` at a time, count as one (White 1980; Liang and Zeger 1986). Infinite where
    there are no more of them than features: a fit through every value says nothing about its error.
    """
    moved = (lever * off[:, None]).unflatten(2, (-1, unit)).sum(3)  # (n, F, S / unit)
    free = moved.shape[2] - lever.shape[0]
    if free <= 0:
        return torch.full_like(moved[..., 0], torch.inf) if moved.shape[2] else moved.sum(2)
    error: Tensor = (moved.square().sum(2) * moved.shape[2] / free).sqrt()
    return error
