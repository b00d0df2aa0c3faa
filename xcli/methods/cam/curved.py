"""CAMs that look at how the score bends at a layer: its gradient G and the product of its Hessian H with A."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from xcli.layers import Layer
from xcli.methods.base import Need
from xcli.methods.cam.base import GRAD_CAM, WeightedCAM
from xcli.registry import method
from xcli.score import Score
from xcli.targets import Scale


@method("shapleycam")
class ShapleyCAM(WeightedCAM):
    r"""The part each channel plays in the score, as Shapley values of its expansion to the second order.

    .. math:: \mathrm{ReLU}\Big(\sum_k \big(\tfrac{1}{hw}\sum_{ij} U_{kij}\big) A_k\Big),
        \qquad U = G - \tfrac12 H A

    with G the gradient and H the Hessian of the score at A, the whole output of the layer: all tokens of a
    transformer, though only patches are on the map. On a score that is quadratic in A, U . A is the difference to
    A = 0. The paper's score is z_c + log softmax_c (``rest``); where what follows the layer is piecewise linear, as
    ReLU networks are, H is zero for ``score: logit`` and the map is that of Grad-CAM (of HiResCAM with ``hires``).

    Options: ``form``, the paper's variants: ``mean`` is ShapleyCAM, above; ``hires``, ShapleyCAM-H, weighs each place
    by its own U; ``element``, ShapleyCAM-E, rectifies U A before the sum over channels.
    Unit: that of the score. Source: Cai 2025, arXiv:2501.06261, The Visual Computer. The grad-cam package explains
    the logit unless it is told otherwise: ``preset: grad-cam`` with ``score: logit``.
    """

    scale: ClassVar[Scale] = "rest"
    needs: ClassVar[frozenset[Need]] = frozenset({"layer", "gradients"})
    cost: ClassVar[str] = "1 forward + 3 backward of what follows the layer"
    source: ClassVar[str] = "Cai 2025, arXiv:2501.06261"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"grad-cam": GRAD_CAM}

    form: Annotated[
        Literal["mean", "hires", "element"],
        Field(
            description="how G - HA/2 weighs a channel: by its mean; place by place; place by place, positive only"
        ),
    ] = "mean"

    def channels(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        acts, grads, products, _ = score.curvature(x, at=layers)
        for layer, own, grad, product in zip(layers, acts, grads, products, strict=True):
            yield self.weighted(layer.maps(own), layer.maps(grad - product / 2))

    def weighted(self, acts: Tensor, shares: Tensor) -> Tensor:
        """The channels A, weighed by U: (N, K, h, w), as both of these are."""
        match self.form:
            case "mean":
                return shares.mean((2, 3), keepdim=True) * acts
            case "hires":
                return shares * acts
            case _:
                return (shares * acts).relu()
