"""CAMs that weigh activations A (N, K, h, w) by the gradients G of the score with respect to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from xcli.methods.cam.base import GRAD_CAM, TORCH_CAM, Fusion, GradientCAM, Normalise
from xcli.registry import method

Epsilon = Annotated[
    float,
    Field(ge=0, description="added to the denominator; with 0, a quotient is 0 where its denominator is"),
]


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where ``below`` is 0; there the derivative is 0 as well."""
    nothing = below == 0
    return (above / below.masked_fill(nothing, 1)).masked_fill(nothing, 0)


@method("gradcam")
class GradCAM(GradientCAM):
    r"""Which regions of a layer speak for the class, a channel weighing as much as its mean gradient.

    .. math:: \mathrm{ReLU}\Big(\sum_k \big(\tfrac{1}{hw}\sum_{ij} G_{kij}\big) A_k\Big)

    Unit: that of the score. Equals CAM where global average pooling and one linear layer follow (up to 1 / hw).
    Source: Selvaraju et al. 2017, arXiv:1610.02391, eq. 1 and 2. ``preset: captum`` leaves the ReLU out; ``xplique``
    grows the map with a bicubic kernel after the ReLU (its kernel has a = -0.5, that of torch -0.75, so that only the
    maps before growing are equal).
    """

    source: ClassVar[str] = "Selvaraju et al. 2017, arXiv:1610.02391"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "captum": {"relu": False},
        "grad-cam": GRAD_CAM,
        "torch-cam": TORCH_CAM,
        "xplique": {"upsampling": "bicubic"},
    }

    def weighted(self, acts: Tensor, grads: Tensor) -> Tensor:
        return grads.mean((2, 3), keepdim=True) * acts


@method("gradcam++")
class GradCAMPlusPlus(GradientCAM):
    r"""Like Grad-CAM, with only positive gradients counting, each the more the more weakly its channel responds, so
    that several objects of the class show alike.

    .. math:: \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \quad w_k = \sum_{ij} \alpha_{kij}\,\mathrm{ReLU}(G_{kij}), \quad
        \alpha_{kij} = \frac{G_{kij}^2}{2 G_{kij}^2 + S_k G_{kij}^3}, \quad S_k = \sum_{ab} A_{kab}

    with alpha 0 where the denominator is 0. Unit: that of the score. Where activations are negative, 2 + S G can come
    near 0 and alpha grows without bound: a layer after a ReLU is what the paper means.
    Source: Chattopadhay et al. 2018, arXiv:1710.11063, eq. 7 and 19. Departs: the paper explains exp(score), which
    multiplies each map by that number; it is left out here, as in all packages.

    Presets: ``original`` divides the alphas of a channel by their sum over the places with a positive gradient, as the
    authors' code does. ``grad-cam`` adds 1e-6 to the denominator, which rules where gradients are below 1e-3.
    ``torch-cam`` writes its quotient to a copy, so that its alpha is G^2 alone; what it means to compute, and what
    ``denominator: products`` gives, is 2 G^2 + sum_ab A_ab G_ab^3, which is not the paper's either. ``xplique`` takes
    means over the places in S and w.
    """

    source: ClassVar[str] = "Chattopadhay et al. 2018, arXiv:1710.11063"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "original": {"normalised": True},
        "grad-cam": {**GRAD_CAM, "eps": 1e-6},
        "torch-cam": {**TORCH_CAM, "denominator": "none"},
        "xplique": {"pool": "mean", "upsampling": "bicubic"},
    }

    denominator: Annotated[
        Literal["paper", "products", "none"],
        Field(description="of alpha; paper: 2 G^2 + S G^3, products: 2 G^2 + the sum of A G^3, none: 1"),
    ] = "paper"
    pool: Annotated[
        Literal["sum", "mean"], Field(description="how S and the weights gather the places of a channel")
    ] = "sum"
    normalised: Annotated[
        bool,
        Field(description="divide the alphas of a channel by their sum over the places of positive gradient"),
    ] = False
    eps: Epsilon = 0.0

    def weighted(self, acts: Tensor, grads: Tensor) -> Tensor:
        alphas = self._alphas(acts, grads)
        if self.normalised:
            alphas = ratio(alphas, (alphas * (grads > 0)).sum((2, 3), keepdim=True))
        return self._gathered(alphas * grads.relu()) * acts

    def _alphas(self, acts: Tensor, grads: Tensor) -> Tensor:
        squares, cubes = grads.square(), grads.pow(3)
        match self.denominator:
            case "paper":
                return ratio(squares, 2 * squares + self._gathered(acts) * cubes + self.eps)
            case "products":
                return ratio(squares, 2 * squares + self._gathered(acts * cubes) + self.eps)
            case "none":
                return squares

    def _gathered(self, maps: Tensor) -> Tensor:
        return maps.sum((2, 3), keepdim=True) if self.pool == "sum" else maps.mean((2, 3), keepdim=True)


@method("xgradcam")
class XGradCAM(GradientCAM):
    r"""Like Grad-CAM, with a channel's gradients averaged over where the channel is active.

    .. math:: \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \qquad
        w_k = \frac{\sum_{ij} G_{kij} A_{kij}}{\sum_{ij} A_{kij}}

    with a weight of 0 where the sum below is 0. The signed map (``relu: false``) sums to that of HiResCAM, and to the
    score where what follows is linear. Unit: that of the score. Where activations have both signs (tokens after a
    layer norm), a sum near 0 makes one channel rule; the paper is about layers after a ReLU.
    Source: Fu et al. 2020, arXiv:2008.02312. Presets: the epsilon that the authors' code (1e-6), grad-cam
    (1e-7) and torch-cam (1e-8) add below.
    """

    source: ClassVar[str] = "Fu et al. 2020, arXiv:2008.02312"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "original": {"eps": 1e-6},
        "grad-cam": {**GRAD_CAM, "eps": 1e-7},
        "torch-cam": {**TORCH_CAM, "eps": 1e-8},
    }

    eps: Epsilon = 0.0

    def weighted(self, acts: Tensor, grads: Tensor) -> Tensor:
        sums = acts.sum((2, 3), keepdim=True) + self.eps
        return ratio((grads * acts).sum((2, 3), keepdim=True), sums) * acts


@method("hirescam")
class HiResCAM(GradientCAM):
    r"""Each place of the layer weighed by its own gradient, so that it shows only what the score really used.

    .. math:: \mathrm{ReLU}\Big(\sum_k G_k \odot A_k\Big)

    Unit: that of the score. Equals Grad-CAM where global average pooling and a linear layer follow (up to 1 / hw).
    Source: Draelos and Carin 2020, arXiv:2011.08891. Departs: the ReLU, which the paper leaves to the picture, is on
    by default as in the other CAMs; ``relu: false`` gives the paper's signed map, which TorchRay calls the linear
    approximation (``preset: torchray``).
    """

    source: ClassVar[str] = "Draelos and Carin 2020, arXiv:2011.08891"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "grad-cam": GRAD_CAM,
        "torchray": {"relu": False},
    }

    def weighted(self, acts: Tensor, grads: Tensor) -> Tensor:
        return grads * acts


@method("gradcam-elementwise")
class ElementwiseGradCAM(GradientCAM):
    r"""What speaks for the class anywhere in a layer, with nothing that speaks against it taken off.

    .. math:: \sum_k \mathrm{ReLU}(G_k \odot A_k)

    HiResCAM with the ReLU before the sum over channels; at least as large as HiResCAM everywhere. Unit: that of the
    score. Source: the grad-cam package (GradCAMElementWise); there is no paper.
    """

    source: ClassVar[str] = "grad-cam package, GradCAMElementWise"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"grad-cam": GRAD_CAM}

    def weighted(self, acts: Tensor, grads: Tensor) -> Tensor:
        return (grads * acts).relu()


@method("layercam")
class LayerCAM(GradientCAM):
    r"""Each place of the layer weighed by its positive gradient; useful in shallow layers too.

    .. math:: \mathrm{ReLU}\Big(\sum_k \mathrm{ReLU}(G_k) \odot A_k\Big)

    Several layers are fused by their largest value, after tanh(2 M / max M).

    Unit: that of the score. Source: Jiang et al. 2021, LayerCAM, IEEE Transactions on Image Processing 30, eq. 4-6
    and 9. Departs: the paper takes the tanh of shallow layers alone, here it is that of every layer, as in torch-cam.
    """

    source: ClassVar[str] = "Jiang et al. 2021, IEEE TIP 30 (LayerCAM), doi:10.1109/TIP.2021.3089943"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "grad-cam": GRAD_CAM,
        "torch-cam": {**TORCH_CAM, "normalise": "min-max-tanh"},
    }

    fusion: Fusion = "max"
    normalise: Normalise = "tanh"

    def weighted(self, acts: Tensor, grads: Tensor) -> Tensor:
        return grads.relu() * acts


@method("seg-xres-cam")
class SegXResCAM(GradientCAM):
    r"""Between HiResCAM and Grad-CAM: each place weighed by the gradients of the window of the grid it lies in.

    .. math:: \mathrm{ReLU}\Big(\sum_k P(G_k) \odot A_k\Big)

    with P the largest (or mean) gradient of each window of ``pool`` x ``pool`` cells, given to all its cells. With
    windows of one cell it is HiResCAM; with one window for the whole map and means it is Grad-CAM. Unit: that of the
    score; made for the score of a region of a segmentation, of use for any.
    Source: Hasany et al. 2023, CVPR workshops, Seg-XRes-CAM, read from the authors' code alone. The window is the
    user's choice there, the default of 2 is ours. Departs: where ``pool`` does not divide the grid, that code fills
    the last windows up with zeros and stretches the pooled map over the grid, so that windows no longer cover their
    own cells; here the last windows are smaller and stay in place.
    """

    source: ClassVar[str] = "Hasany et al. 2023, CVPR workshops (Seg-XRes-CAM)"

    pool: Annotated[int, Field(ge=1, description="side of a window, in cells of the layer's grid")] = 2
    pooling: Annotated[Literal["max", "mean"], Field(description="what a window takes of its gradients")] = (
        "max"
    )

    def weighted(self, acts: Tensor, grads: Tensor) -> Tensor:
        h, w = grads.shape[-2:]
        window = (min(self.pool, h), min(self.pool, w))
        pool = F.max_pool2d if self.pooling == "max" else F.avg_pool2d
        pooled = pool(grads, window, ceil_mode=True)  # (N, K, rows of windows, columns of windows)
        spread = pooled.repeat_interleave(window[0], 2).repeat_interleave(window[1], 3)
        return spread[..., :h, :w] * acts
