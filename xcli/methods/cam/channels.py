"""CAMs that weigh the channels of a layer without gradients: by the head, by their own statistics, at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from xcli.errors import ModelError
from xcli.layers import Layer
from xcli.methods.cam.base import CAM, GRAD_CAM, TORCH_CAM, WeightedCAM
from xcli.registry import method
from xcli.score import Score

_AGREE = 1e-4
"""How far a score may be from the closed form, in parts of the sum of the absolute values of its terms."""


@method("cam")
class ClassActivationMap(WeightedCAM):
    r"""What each place adds to the class, where the logits are linear in the mean of the layer over the places.

    .. math:: \sum_k W_{ck} A_k

    for logits z = W mean(A) + b: the mean of the map plus b_c is the logit, in whose unit it is. Signed; equals hw
    times Grad-CAM before its ReLU.

    W is that of the last linear layer (or 1x1 convolution) to run that fits: on every batch the scores are compared
    with the closed form, and a network that is not of this kind is an error, never a map. Not of this kind are hidden
    layers in the head, class tokens, a ReLU after the layer that is no module of its own; and scores that are not
    logits. Grad-CAM is for these.
    Source: Zhou et al. 2016, arXiv:1512.04150, eq. 2; torch-cam's is the same. ``relu`` rectifies, as pictures do.
    """

    source: ClassVar[str] = "Zhou et al. 2016, arXiv:1512.04150"
    cost: ClassVar[str] = "1 forward, and another where none is recorded or the precision is reduced"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"torch-cam": {**TORCH_CAM, "relu": False}}

    relu: Annotated[bool, Field(description="keep the positive part only; false gives the signed map")] = (
        False
    )

    def channels(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        for layer, own in zip(layers, score.activations(x, at=layers), strict=True):
            acts = layer.maps(own)  # (B, K, h, w)
            weights = pooled_weights(score, x, layer, acts).to(acts.dtype)
            yield weights[:, :, None, None] * acts[score.image.to(x.device)]


def in_full(score: Score) -> Score:
    """The score in the precision of the weights: what is compared must not drown in rounding."""
    if score.execution.precision is None:
        return score
    execution = replace(score.execution, precision=None)
    return replace(score, execution=execution, forward=None, memo={}, scales={})


def pooled_weights(score: Score, x: Tensor, layer: Layer, acts: Tensor) -> Tensor:
    """The weights (N, K) that make the scores of the images ``x`` of the means of maps (B, K, h, w), up to a bias.

    Raises:
        ModelError: the scores are no such function of the layer.
    """
    target, exact = score.rows.columns()["target"].to(x.device), in_full(score)
    values = exact.clean(x).to(x.device)
    if exact is not score:
        acts = layer.maps(exact.activations(x, at=(layer,))[0])
    means = acts.mean((2, 3))[score.image.to(x.device)]
    found = list(heads(score, means.shape[1], int(target.max())))
    for head in found:
        weight = head.weight.flatten(1)[target].to(means.dtype)  # (N, K)
        bias = torch.zeros_like(values) if head.bias is None else head.bias[target]
        terms = torch.cat([weight * means, bias[:, None].to(means.dtype)], 1)  # (N, K + 1)
        allowed = max(_AGREE, 8 * torch.finfo(head.weight.dtype).eps) * terms.abs().sum(1)
        if not ((terms.sum(1) - values).abs() > allowed).any():  # NaN agrees: an image that is not finite
            return weight if score.create_graph else weight.detach()
    why = "the score is no linear function of" if found else "no linear layer makes logits of"
    raise ModelError(
        f"cam: {why} the mean of layer {layer.name!r} over its places; use gradcam, or explain the logit at the layer "
        "that is averaged right before the last linear layer"
    )


def heads(score: Score, channels: int, target: int) -> Iterator[nn.Linear | nn.Conv2d]:
    """The linear layers and 1x1 convolutions of ``channels`` inputs that know class ``target``, last to run first."""
    for name in reversed(score.layers.order):
        part = score.module.get_submodule(name)
        if isinstance(part, nn.Linear | nn.Conv2d):
            matrix = part.weight.flatten(1)
            if len(matrix) > target and matrix.shape[1] == channels:
                yield part


@method("fem")
class FEM(CAM):
    r"""Where channels of a layer fire far above their own mean, each place counting the means of those that do.

    .. math:: \sum_k \mu_k\, [A_k > \mu_k + s\, \sigma_k]

    with mu_k and sigma_k the mean and the standard deviation (of all hw places, not hw - 1) of channel k. Not class
    specific: rows of one image get one map. Unit: that of the activations. s is ``sigmas``; no place can be more than
    sqrt(hw - 1) deviations above the mean, so up to rounding a layer of 5 places or fewer has an empty map at 2.

    Source: Fuad et al. 2020, IPTA, doi 10.1109/IPTA50016.2020.9286629. ``preset: xplique`` lets a place at the
    threshold count and enlarges bicubically (as PyTorch does; TensorFlow's cubic is another). ``preset: grad-cam`` is
    another method of that name: the share of places above the threshold weighs the activations themselves.
    """

    source: ClassVar[str] = "Fuad et al. 2020, doi 10.1109/IPTA50016.2020.9286629"
    cost: ClassVar[str] = "1 forward"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "xplique": {"at_threshold": True, "upsampling": "bicubic"},
        "grad-cam": {**GRAD_CAM, "weigh": "activations"},
    }

    relu: Annotated[bool, Field(description="keep the positive part only; false gives the signed map")] = (
        False
    )
    sigmas: Annotated[
        float, Field(ge=0, description="standard deviations above its mean from which a channel counts")
    ] = 2.0
    at_threshold: Annotated[bool, Field(description="whether a place exactly at the threshold counts")] = (
        False
    )
    weigh: Annotated[
        Literal["masks", "activations"],
        Field(
            description="masks: the places above the threshold, by the mean of the channel; activations: the channel, "
            "by the share of places above the threshold"
        ),
    ] = "masks"

    def maps(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        image = score.image.to(x.device)
        for layer, acts in zip(layers, score.activations(x, at=layers), strict=True):
            yield self.map(layer.maps(acts))[image]

    def map(self, acts: Tensor) -> Tensor:
        """The map (B, h, w) of activations (B, K, h, w)."""
        sigma, mean = torch.std_mean(acts, (2, 3), correction=0, keepdim=True)  # (B, K, 1, 1)
        threshold = mean + self.sigmas * sigma
        mask = (acts >= threshold if self.at_threshold else acts > threshold).to(acts.dtype)
        if self.weigh == "masks":
            return (mean * mask).sum(1)
        return (mask.mean((2, 3), keepdim=True) * acts).sum(1)


@method("random-cam")
class RandomCAM(WeightedCAM):
    r"""A baseline for CAMs: the channels of a layer, weighed at random.

    .. math:: \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \qquad w_k \sim U(-1, 1)

    drawn for each image and layer from the run's seed and the image's path; rows of one image get one map. Unit: that
    of the activations. What it scores comes from the layer, not from an explanation of the class.
    Source: the grad-cam package, which draws anew at every call.
    """

    source: ClassVar[str] = "baseline; grad-cam package"
    cost: ClassVar[str] = "1 forward"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"grad-cam": GRAD_CAM}

    def channels(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        image = score.image.to(x.device)
        for layer, own in zip(layers, score.activations(x, at=layers), strict=True):
            acts = layer.maps(own)[image]  # (N, K, h, w)
            tag = f"{self.name} {layer.name}"
            draws = [
                torch.rand(acts.shape[1], generator=score.generator(row, tag)) for row in range(len(acts))
            ]
            weight = 2 * torch.stack(draws).to(acts) - 1  # (N, K)
            yield weight[:, :, None, None] * acts
