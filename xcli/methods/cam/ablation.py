"""A CAM whose channel weights are what the score loses without each channel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.layers import Layer
from xcli.methods.cam.base import GRAD_CAM, WeightedCAM, scaled
from xcli.methods.cam.spectra import first_component
from xcli.precision import full
from xcli.registry import method
from xcli.replay import entries
from xcli.score import Score

_DEPTH = 1e7
"""How far under the smallest activation the grad-cam package puts a channel that it takes out."""

_SALIENT = 0.01
"""Where a min-max scaled EigenCAM exceeds this, that package takes the place for part of an object."""


@method("ablationcam")
class AblationCAM(WeightedCAM):
    r"""A channel of a layer weighs as much as the score loses when that channel is taken out.

    .. math:: \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \qquad w_k = \frac{y - y^{(k)}}{|y|}

    with y the score and y^(k) the score with channel k of the layer's output set to ``ablated`` everywhere, class
    token included; no gradients. Unit: that of the activations; with ``divide: none``, that of the score times it.
    The network runs once up to the layer, and once a channel from there on, for all rows of an image together.
    A row whose score is exactly 0 has no relative loss and gets a map that is not finite. Where activations have both
    signs, as tokens after a layer norm, a weight holds the sign of its channel already and the map loses the object:
    the method is for layers after a ReLU. No ``create_graph``: the network runs in parts.

    ``ratio`` below 1 looks at some channels only, and the rest weigh nothing: a channel's overlap is the share of
    its min-max scaled absolute activation that lies where the min-max scaled absolute EigenCAM of the layer exceeds
    0.01; the ``ratio`` K channels of the largest overlap are tried and as many of the smallest, each once. A channel
    that is the same everywhere has no overlap and is not tried.

    Source: Desai and Ramaswamy 2020, Ablation-CAM, WACV, doi:10.1109/WACV45572.2020.9093360. Departs: the paper
    divides by y, which turns the map round wherever the score is negative; here by |y|, the same where y > 0.
    ``preset: published`` divides by y. ``preset: grad-cam`` does, and takes a channel to the layer's smallest
    activation on that image less 1e7 unless that is 0; the package does so for the first channel of each of its
    batches, and sinks deeper with each one that follows.
    """

    source: ClassVar[str] = (
        "Desai and Ramaswamy 2020, WACV (Ablation-CAM), doi:10.1109/WACV45572.2020.9093360"
    )
    cost: ClassVar[str] = "1 forward + K forwards of what follows the layer, K its channels"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "published": {"divide": "score"},
        "grad-cam": {**GRAD_CAM, "divide": "score", "ablated": "below"},
    }

    divide: Annotated[
        Literal["magnitude", "score", "none"],
        Field(description="what the loss of the score is divided by: its absolute value, itself, or nothing"),
    ] = "magnitude"
    ablated: Annotated[
        Literal["zero", "below"],
        Field(
            description="what a channel becomes: 0; or 0 where the smallest activation of the image's layer is 0, "
            "else that less 1e7"
        ),
    ] = "zero"
    ratio: Annotated[
        float,
        Field(
            gt=0, le=1, description="share of the channels tried from either end of the overlap; 1 tries all"
        ),
    ] = 1.0

    def channels(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        image = score.image.to(x.device)
        for layer in layers:
            tail = score.tail(x, layer)
            assert tail.prefix is not None
            acts = tail.prefix.activations()  # (B, ...)
            maps = full(layer.maps(acts))  # (B, K, h, w)
            weights = self.losses(tail, acts, layer, self.tried(maps))
            yield weights[:, :, None, None].to(maps.dtype) * maps[image]

    def losses(self, tail: Score, acts: Tensor, layer: Layer, tried: Tensor) -> Tensor:
        """What each row's score loses without each channel that is ``tried`` (B, K), divided: (N, K), else 0."""
        image, channel = tried.cpu().nonzero(as_tuple=True)  # (M,) each
        axis = 1 if layer.require_map().layout == "NCHW" else -1
        below = self.replacement(acts)

        def without(index: Tensor) -> Tensor:
            own = image[index]
            copies = entries(acts, own)
            copies.movedim(axis, 1)[torch.arange(len(index)), channel[index]] = below[own]
            return copies

        whole = tail.clean(acts)  # (N,)
        values, copy, row = tail.on(without, image)
        loss = whole.new_zeros(len(whole), tried.shape[1])
        loss[row, channel[copy]] = whole[row] - values
        match self.divide:
            case "magnitude":
                return loss / whole[:, None].abs()
            case "score":
                return loss / whole[:, None]
            case _:
                return loss

    def replacement(self, acts: Tensor) -> Tensor:
        """What a channel of each image becomes, (B, 1, ...) with as many axes as a channel of a batch has."""
        low = acts.flatten(1).amin(1).view(-1, *[1] * (acts.ndim - 2))
        if self.ablated == "zero":
            return torch.zeros_like(low)
        return torch.where(low == 0, 0, (low - _DEPTH).clamp_min(torch.finfo(low.dtype).min))

    def tried(self, maps: Tensor) -> Tensor:
        """Which channels of each image are taken out, (B, K), from maps (B, K, h, w)."""
        if self.ratio == 1:
            return torch.ones(maps.shape[:2], dtype=torch.bool)
        salient = scaled(first_component(maps).abs(), "min-max") > _SALIENT  # (B, h, w)
        spread = scaled(maps.abs().flatten(0, 1), "min-max").view_as(maps)
        inside, whole = (spread * salient[:, None]).sum((2, 3)), spread.sum((2, 3))
        overlap = inside / whole  # (B, K), NaN for a channel that is the same everywhere
        rank = overlap.argsort(dim=1, stable=True).argsort(dim=1)  # NaN comes last
        varied = (~overlap.isnan()).sum(1, keepdim=True)
        count = max(1, int(maps.shape[1] * self.ratio))
        chosen: Tensor = (rank < varied) & ((rank < count) | (rank >= varied - count))
        return chosen
