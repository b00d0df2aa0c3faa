"""One gradient and what it is multiplied by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from xcli.methods.gradient.base import LayerMethod, LayerName, Reduced
from xcli.registry import method
from xcli.score import Score


@method("saliency")
class Saliency(LayerMethod):
    r"""How strongly the score reacts to a small change of each pixel.

    .. math:: \max_c \left| \frac{\partial y}{\partial x_c} \right|

    Unit: that of the score per unit of the normalised input. ``absolute: false`` with ``reduce: sum``, ``mean`` or
    ``none`` keeps the sign. With ``layer``, the gradient at the output of that layer, its channels reduced alike.
    Source: Simonyan et al. 2013, arXiv:1312.6034, section 3.1. Presets: ``captum`` and ``zennit`` leave the channels
    apart, the latter with their sign; ``signed`` is the sum of the signed gradient over the colours.
    """

    source: ClassVar[str] = "Simonyan et al. 2013, arXiv:1312.6034"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "captum": {"reduce": "none"},
        "zennit": {"absolute": False, "reduce": "none"},
        "signed": {"absolute": False, "reduce": "sum"},
    }

    absolute: Annotated[bool, Field(description="take the size of each gradient, before colours are one")] = (
        True
    )
    reduce: Reduced = "max"

    def attribute(self, score: Score, x: Tensor) -> Tensor:
        _, grads = self.acts_and_grads(score, x)
        return grads.abs() if self.absolute else grads


@method("input-x-gradient")
class InputTimesGradient(LayerMethod):
    r"""What each pixel adds to the score of the linear function that meets the network at this picture.

    .. math:: \sum_c x_c \odot \frac{\partial y}{\partial x_c}

    Unit: that of the score. It sums to the score itself where the network is piecewise linear without biases. The
    input is the normalised one, so a pixel of the mean colour gets 0. With ``layer``, the activations there times the
    gradient. Source: Shrikumar et al. 2016, arXiv:1605.01713; named so in arXiv:1704.02685. Presets: ``captum``
    leaves the colours apart, ``xplique`` takes their mean.
    """

    source: ClassVar[str] = "Shrikumar et al. 2016, arXiv:1605.01713"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "captum": {"reduce": "none"},
        "xplique": {"reduce": "mean"},
    }

    def attribute(self, score: Score, x: Tensor) -> Tensor:
        acts, grads = self.acts_and_grads(score, x)
        return acts * grads


@method("linear-approximation")
class LinearApproximation(InputTimesGradient):
    r"""What each place of a layer adds to the score of the linear function that meets the rest of the network there.

    .. math:: \sum_k A_k \odot G_k

    with the activations A of the layer and the gradient G of the score there; signed. It is ``input-x-gradient`` at a
    layer, by default the last one with a map: HiResCAM without its ReLU. Unit: that of the score.
    Source: the TorchRay package (linear approximation); there is no paper.
    """

    source: ClassVar[str] = "TorchRay package, linear approximation"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}

    layer: LayerName = "auto"
