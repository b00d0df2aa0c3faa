"""CAMs that weigh activations A (N, K, h, w) by the gradients G of the score with respect to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from xcli.methods.cam.base import GradientCAM
from xcli.registry import method


@method("gradcam")
class GradCAM(GradientCAM):
    r"""Which regions of a layer speak for the class, a channel weighing as much as its mean gradient.

    .. math:: \mathrm{ReLU}\Big(\sum_k \big(\tfrac{1}{hw}\sum_{ij} G_{kij}\big) A_k\Big)

    Unit: that of the score. Equals CAM where global average pooling and one linear layer follow (up to 1 / hw).
    Source: Selvaraju et al. 2017, arXiv:1610.02391, eq. 1 and 2. ``preset: captum`` leaves the ReLU out.
    """

    source: ClassVar[str] = "Selvaraju et al. 2017, arXiv:1610.02391"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"captum": {"relu": False}}

    def weighted(self, acts: Tensor, grads: Tensor) -> Tensor:
        return grads.mean((2, 3), keepdim=True) * acts


@method("hirescam")
class HiResCAM(GradientCAM):
    r"""Each place of the layer weighed by its own gradient, so that it shows only what the score really used.

    .. math:: \mathrm{ReLU}\Big(\sum_k G_k \odot A_k\Big)

    Unit: that of the score. Equals Grad-CAM where global average pooling and a linear layer follow (up to 1 / hw).
    Source: Draelos and Carin 2020, arXiv:2011.08891. Departs: the ReLU, which the paper leaves to the picture, is on
    by default as in the other CAMs; ``relu: false`` gives the paper's signed map.
    """

    source: ClassVar[str] = "Draelos and Carin 2020, arXiv:2011.08891"

    def weighted(self, acts: Tensor, grads: Tensor) -> Tensor:
        return grads * acts


@method("layercam")
class LayerCAM(GradientCAM):
    r"""Each place of the layer weighed by its positive gradient; useful in shallow layers too.

    .. math:: \mathrm{ReLU}\Big(\sum_k \mathrm{ReLU}(G_k) \odot A_k\Big)

    Unit: that of the score. Source: Jiang et al. 2021, LayerCAM, IEEE Transactions on Image Processing 30, eq. 4-6.
    """

    source: ClassVar[str] = "Jiang et al. 2021, IEEE TIP 30 (LayerCAM)"

    def weighted(self, acts: Tensor, grads: Tensor) -> Tensor:
        return grads.relu() * acts
