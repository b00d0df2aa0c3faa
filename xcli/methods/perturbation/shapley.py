"""Shapley values by random orders in which the features of a picture appear."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from xcli import draws
from xcli.baselines import Removal
from xcli.methods.base import Attribution
from xcli.methods.perturbation.base import BlackBox, asked, by_image, numbered
from xcli.methods.perturbation.coalitions import on_pixels
from xcli.registry import method
from xcli.score import Score
from xcli.segments import Segments, segmented


@method("shapley-sampling")
class ShapleySampling(Removal, BlackBox):
    r"""What a feature adds to the score when it joins those before it, on average over random orders of all features.

    .. math:: \phi_i = \frac{1}{O} \sum_{o=1}^{O} \big(f(x_{P_o(i) \cup \{i\}}) - f(x_{P_o(i)})\big)

    with P_o(i) the features before i in the o-th of ``orders`` orders, and x_S the picture of which only the features S
    are kept. Every order adds up to f(x) - f(x_0), so the numbers of the features do, whatever ``orders`` is; they are
    unbiased. The map has phi at the pixels of each feature. Unit: that of the score. ``extras/forwards``: pictures that
    were run; ``extras/standard_error``: root of the mean over the features of their squared standard errors, NaN for
    a single order.

    Source: Castro, Gomez and Tejada 2009, doi:10.1016/j.cor.2008.04.004; Strumbelj and Kononenko 2010, JMLR 11. The
    number of orders is captum's.
    """

    cost: ClassVar[str] = "orders * (features - 1) forwards; and 1 of the image and 1 of none of it"
    source: ClassVar[str] = "Castro et al. 2009, doi:10.1016/j.cor.2008.04.004"
    small: ClassVar[dict[str, object]] = {"orders": 4, "segments": "grid:2"}

    orders: Annotated[int, Field(ge=1, description="random orders of the features")] = 25
    segments: Segments = "grid:7"

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        label, features = segmented(score, x, self.segments)
        seeds, remover = score.seeds(torch.arange(len(x)), self.name), self.remover(score, x)

        def joined(image: Tensor, sample: Tensor) -> Tensor:
            steps = (features[image] - 1).clamp_min(1)
            rank = self.ranks(
                seeds[image].to(x.device), sample.to(x.device) // steps.to(x.device), features[image]
            )
            present = rank <= (sample % steps).to(x.device)[:, None]
            return remover(image, ~on_pixels(present, label[image.to(x.device)]))

        count = self.orders * (features - 1)
        table = asked(score, x, *numbered(count, score.image.unique()), joined)
        ends = torch.stack([self.emptied(score, x), score.clean(x)], 1).to(table)  # (N, 2)
        maps, errors = x.new_zeros(len(table), *x.shape[2:]), x.new_zeros(len(table))
        for image, place in by_image(score.image):
            own, number = place.to(x.device), int(features[image])
            between = table[own, : int(count[image])].unflatten(1, (self.orders, number - 1))
            none, whole = (ends[own, end, None, None].expand(-1, self.orders, 1) for end in (0, 1))
            added = torch.cat([none, between, whole], 2).diff(dim=2)  # (n, orders, F) by place in the order
            order = torch.arange(self.orders, device=x.device)
            rank = self.ranks(seeds[image].to(x.device).expand(self.orders), order, features[image].expand(1))
            added = added.gather(2, rank[:, :number].expand(len(own), -1, -1))  # by feature
            maps = maps.index_copy(0, own, added.mean(1)[:, label[image]])
            error = added.var(1).mean(1) / self.orders if self.orders > 1 else added[:, 0, 0] * torch.nan
            errors = errors.index_copy(0, own, error.sqrt())
        return Attribution(maps, {"forwards": count[score.image].to(maps), "standard_error": errors})

    def ranks(self, seeds: Tensor, order: Tensor, features: Tensor) -> Tensor:
        """The place (m, F) of every feature in an order (m,) of an image with ``features`` (m,) of them."""
        most = int(features.max())
        number = draws.uniform(draws.sampled(seeds, order), most)
        beyond = torch.arange(most, device=seeds.device) >= features.to(seeds.device)[:, None]
        return torch.where(beyond, 2, number).argsort(1).argsort(1)
