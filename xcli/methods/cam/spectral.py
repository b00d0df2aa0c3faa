"""CAMs from the main directions of a layer's activations; no gradient, and the class plays no part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from xcli.layers import Layer
from xcli.methods.cam.base import CAM
from xcli.methods.cam.spectra import Sign, first_component
from xcli.registry import method
from xcli.score import Score


@method("eigencam")
class EigenCAM(CAM):
    r"""What stands out in a layer: its activations projected on their first principal component.

    .. math:: (A - \bar A)\, v_1, \qquad A \in R^{hw \times K}

    with the mean of each channel over the places taken off, and v_1 the first right singular vector of the rest.
    Not class specific: rows of one image get one map. Unit: that of the activations; signed, with the sign that
    ``sign`` fixes. Source: Muhammad and Yeasin 2020, arXiv:2008.00299. Departs: the paper does not take the mean off;
    the grad-cam package does, and so does this.
    """

    source: ClassVar[str] = "Muhammad and Yeasin 2020, arXiv:2008.00299"
    cost: ClassVar[str] = "1 forward + 1 eigendecomposition of hw x hw"

    relu: Annotated[bool, Field(description="keep the positive part only; false gives the signed map")] = (
        False
    )
    sign: Sign = "peak"

    def maps(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        image = score.image.to(x.device)
        for layer, acts in zip(layers, score.activations(x, at=layers), strict=True):
            yield first_component(layer.maps(acts), self.sign)[image]
