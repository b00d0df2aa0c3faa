"""CAMs from the main directions of a layer's activations, as they are or weighed by gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from xcli.layers import Layer
from xcli.methods.base import Need
from xcli.methods.cam.base import CAM, GRAD_CAM
from xcli.methods.cam.spectra import Kernel, Sign, first_component, first_kernel_component
from xcli.registry import method, options
from xcli.score import Score


@options
class SpectralCAM(CAM):
    """A map that is a first component: signed, with the sign that ``sign`` fixes."""

    cost: ClassVar[str] = "1 forward + 1 eigendecomposition an image, of side min(hw, K)"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"grad-cam": GRAD_CAM}

    relu: Annotated[bool, Field(description="keep the positive part only; false gives the signed map")] = (
        False
    )
    sign: Sign = "peak"


@method("eigencam")
class EigenCAM(SpectralCAM):
    r"""What stands out in a layer: its activations projected on their first principal component.

    .. math:: (A - \bar A)\, v_1, \qquad A \in R^{hw \times K}

    with the mean of each channel over the places taken off, and v_1 the first right singular vector of the rest.
    Not class specific: rows of one image get one map. Unit: that of the activations; signed, with the sign that
    ``sign`` fixes. A layer that is constant over the places gets a map of zeros.

    Source: Muhammad and Yeasin 2020, arXiv:2008.00299. Departs: the formula printed there takes no mean off, so that
    v_1 is mostly the direction of the mean; ``preset: uncentred`` is that formula. The default is a principal
    component, as in the grad-cam package, whose sign is left to chance; ``preset: grad-cam`` rectifies as it does.
    """

    source: ClassVar[str] = "Muhammad and Yeasin 2020, arXiv:2008.00299"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "grad-cam": GRAD_CAM,
        "uncentred": {"centre": False},
    }

    centre: Annotated[
        bool, Field(description="take the mean of each channel off before the decomposition")
    ] = True

    def maps(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        image = score.image.to(x.device)
        for layer, acts in zip(layers, score.activations(x, at=layers), strict=True):
            yield first_component(layer.maps(acts), self.sign, self.centre)[image]


@method("kpca-cam")
class KPCACAM(SpectralCAM):
    r"""What stands out in a layer, where places are alike by a kernel: the first component of kernel PCA.

    .. math:: \sqrt{\lambda_1}\, v_1 \quad\text{of}\quad H\, [k(a_i, a_j)]_{ij}\, H, \qquad H = I - \tfrac{1}{hw}

    a_i is what the K channels say at place i, with the mean of each channel taken off; H centres the kernel. Kernels
    of a place x and another y: sigmoid tanh(gamma <x, y> + 1), rbf exp(-gamma |x - y|^2), polynomial
    (gamma <x, y> + 1)^degree, cosine <x, y> / |x| |y|, linear <x, y>, which gives EigenCAM. A sigmoid kernel need not
    be positive: lambda_1 is the algebraically largest eigenvalue, never below 0; where it is 0 so is the map.

    Not class specific: rows of one image get one map. Unit: none; signed, with the sign that ``sign`` fixes. The
    kernel is hw x hw and its decomposition takes time of the order of (hw)^3: name a deep layer.
    Source: Karmani et al. 2024, arXiv:2410.00267, with the kernels and defaults of the authors' code in the grad-cam
    package; ``preset: grad-cam`` rectifies as it does.
    """

    source: ClassVar[str] = "Karmani et al. 2024, arXiv:2410.00267"
    cost: ClassVar[str] = "1 forward + 1 eigendecomposition of hw x hw an image"

    kernel: Annotated[Kernel, Field(description="how alike the channels of two places are")] = "sigmoid"
    gamma: Annotated[
        float | None, Field(gt=0, description="scale of the kernel; null takes 1 / number of channels")
    ] = None
    degree: Annotated[int, Field(ge=1, description="exponent of the polynomial kernel")] = 3

    def maps(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        image = score.image.to(x.device)
        for layer, acts in zip(layers, score.activations(x, at=layers), strict=True):
            found = first_kernel_component(layer.maps(acts), self.kernel, self.gamma, self.degree, self.sign)
            yield found[image]


@options
class GradientSpectralCAM(SpectralCAM):
    """The first principal component of activations weighed by the gradients of the score."""

    needs: ClassVar[frozenset[Need]] = frozenset({"layer", "gradients"})
    cost: ClassVar[str] = (
        "1 forward + 1 backward of what follows the layer + 1 eigendecomposition a row, of side min(hw, K)"
    )

    def maps(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        acts, grads, _ = score.gradients(x, at=layers)
        for layer, own, grad in zip(layers, acts, grads, strict=True):
            yield first_component(self.weighted(layer.maps(own), layer.maps(grad)), self.sign)

    @abstractmethod
    def weighted(self, acts: Tensor, grads: Tensor) -> Tensor:
        """The channels A, weighed by the gradients: (N, K, h, w), as both of these are."""


@method("eigengradcam")
class EigenGradCAM(GradientSpectralCAM):
    r"""What stands out in what a layer says about the class: EigenCAM of the activations times their gradients.

    .. math:: (B - \bar B)\, v_1, \qquad B = G \odot A

    with v_1 the first right singular vector of B less the mean of each channel. Unit: that of the score; signed, with
    the sign that ``sign`` fixes, so the sign does not say for or against the class.
    Source: the grad-cam package, after Muhammad and Yeasin 2020, arXiv:2008.00299. Equals HiResCAM with
    ``eigen_smooth``, not rectified; ``preset: grad-cam`` rectifies.
    """

    source: ClassVar[str] = "grad-cam package, after Muhammad and Yeasin 2020, arXiv:2008.00299"

    def weighted(self, acts: Tensor, grads: Tensor) -> Tensor:
        return grads * acts


@method("seg-eigencam")
class SegEigenCAM(GradientSpectralCAM):
    r"""What stands out in a layer where the class reacts to it: EigenCAM of activations times absolute gradients.

    .. math:: (B - \bar B)\, v_1, \qquad B = |G| \odot A

    with v_1 the first right singular vector of B less the mean of each channel, turned so that the largest absolute
    value is positive (``sign: peak``, the paper's rule). Unit: that of the score.
    Source: Chung and Ying 2025, Applied Sciences 15(13), 7562, doi 10.3390/app15137562, eq. 10-13, here for any score
    and not for segmentation alone. ``preset: grad-cam`` rectifies.
    """

    source: ClassVar[str] = "Chung and Ying 2025, doi 10.3390/app15137562"

    def weighted(self, acts: Tensor, grads: Tensor) -> Tensor:
        return grads.abs() * acts
