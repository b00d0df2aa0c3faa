"""CAMs from gradients at noisy copies of the image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.layers import Layer
from xcli.methods.base import Need
from xcli.methods.cam.base import TORCH_CAM, WeightedCAM
from xcli.methods.cam.gradient import Epsilon, ratio
from xcli.registry import method
from xcli.score import Score


@method("smooth-gradcam++")
class SmoothGradCAMpp(WeightedCAM):
    r"""Grad-CAM++ with its derivatives averaged over noisy copies of the image, so that chance gradients cancel out.

    .. math:: \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \qquad w_k = \sum_{ij} \alpha_{kij}\,\mathrm{ReLU}(D^1_{kij}),
        \qquad \alpha = \frac{D^2}{2 D^2 + D^3 \sum_{ab} A_{kab}}

    with D^p the mean of G^p, element by element, over ``samples`` copies x + e, e ~ N(0, noise^2), and A that of the
    image itself; alpha is 0 where its denominator is. The noise is drawn for each image; its rows and the views of
    ``aug_smooth`` share it, and the first copies do not depend on how many follow. Memory does not grow with
    ``samples``.

    Options: ``noise`` in units of the network's normalised input, or with ``relative`` as a share of each image's
    range there (largest minus smallest value), as in SmoothGrad; with 0 the map is that of Grad-CAM++.
    Unit: that of the score. Source: Omeiza et al. 2019, arXiv:1908.01224.
    Departs: the paper prints D^1 as the numerator of alpha, which without noise is not Grad-CAM++; ``preset: printed``
    has it. The defaults of ``samples`` and ``noise`` are torch-cam's. ``preset: torch-cam``: the sum of A D^3 over the
    places for D^3 times the sum of A, 1e-8 added to the denominator, and G in w and A in the map from the last noisy
    copy alone.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"layer", "gradients"})
    cost: ClassVar[str] = "samples + 1 forwards + samples backwards of what follows the layer"
    source: ClassVar[str] = "Omeiza et al. 2019, arXiv:1908.01224"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "printed": {"numerator": "first"},
        "torch-cam": {**TORCH_CAM, "denominator": "products", "eps": 1e-8, "last": True},
    }
    small: ClassVar[Mapping[str, object]] = {"samples": 2}

    samples: Annotated[int, Field(ge=1, description="noisy copies of an image")] = 4
    noise: Annotated[
        float, Field(ge=0, description="standard deviation of the noise on the network's input")
    ] = 0.3
    relative: Annotated[bool, Field(description="noise is a share of the range of each image's input")] = (
        False
    )
    numerator: Annotated[
        Literal["first", "second"], Field(description="the mean power of the gradient on top of alpha")
    ] = "second"
    denominator: Annotated[
        Literal["paper", "products"],
        Field(description="of alpha; paper: 2 D2 + D3 times the sum of A, products: 2 D2 + the sum of A D3"),
    ] = "paper"
    eps: Epsilon = 0.0
    last: Annotated[
        bool,
        Field(
            description="the rectified gradient and the map's activations are those of the last noisy copy, not the "
            "mean gradient and the image's own activations"
        ),
    ] = False

    def channels(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        image = score.image.to(x.device)
        clean = [acts[image] for acts in score.activations(x, at=layers)]
        means: list[Tensor] = []
        for sample in range(self.samples):
            acts, grads, _ = score.gradients(x + self.drawn(score, x, sample), at=layers)
            powers = [torch.stack([g, g.square(), g * g.square()]) / self.samples for g in grads]
            means = [a + b for a, b in zip(means, powers, strict=True)] if means else powers
        for layer, own, mean, act, grad in zip(layers, clean, means, acts, grads, strict=True):
            first, second, third = map(layer.maps, mean)  # (N, K, h, w) each
            alpha = self.alpha(layer.maps(own), first, second, third)
            gain = (alpha * (layer.maps(grad) if self.last else first).relu()).sum((2, 3), keepdim=True)
            yield gain * layer.maps(act if self.last else own)

    def drawn(self, score: Score, x: Tensor, sample: int) -> Tensor:
        """The noise of one copy of each image (B, C, H, W); 0 for images that have no row."""
        noise = torch.zeros(x.shape)
        for image in score.image.unique().tolist():
            row = int(torch.searchsorted(score.image, image))
            generator = score.generator(row, f"{self.name} {sample}")
            noise[image] = torch.randn(x.shape[1:], generator=generator)
        flat = x.flatten(1)
        unit = (flat.amax(1) - flat.amin(1))[:, None, None, None] if self.relative else 1.0
        return (noise * self.noise).to(x) * unit

    def alpha(self, acts: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        """The weight of each place of a channel, from A and the mean powers of G: (N, K, h, w), as they are."""
        total = acts.sum((2, 3), keepdim=True) * third
        if self.denominator == "products":
            total = (acts * third).sum((2, 3), keepdim=True)
        return ratio(first if self.numerator == "first" else second, 2 * second + total + self.eps)
