"""Gradients with another rule for rectifiers: deconvnet, guided backpropagation, and its product with a CAM."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from xcli.errors import ConfigError, ModelError
from xcli.layers import Layer, Layers
from xcli.methods.base import Attribution, Method, Need, resized
from xcli.methods.cam.base import CAM
from xcli.methods.gradient.base import INPUT, LayerMethod, PixelMethod
from xcli.methods.nested import Around, Spec
from xcli.rectifiers import RECTIFIERS, Rectified, derivative
from xcli.registry import method, options
from xcli.score import Score


@options
class RectifierMethod(LayerMethod):
    """The gradient with another rule for the backward pass of every ReLU and ReLU6, however the network calls them.

    Other activations keep their gradient; how many of a network's the rule reaches, ``xai check`` says. A network
    without any is refused: the map would be the plain gradient.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"gradients", "rectifiers"})

    def __post_init__(self) -> None:
        if self.layer != INPUT:  # at the input, the pass without the rule is of no use
            object.__setattr__(self, "needs", self.needs | {"layer"})

    def looks_at(self, layers: Layers) -> tuple[Layer, ...]:
        if not any(name in layers.activations for name in RECTIFIERS):
            there = ", ".join(sorted(layers.activations)) or "none"
            raise ModelError(
                f"{self.name}: its rule is for ReLU, and this network has no ReLU (its activations: {there}); use "
                "saliency or smoothgrad"
            )
        return super().looks_at(layers)

    def attribute(self, score: Score, x: Tensor) -> Tensor:
        rule = self.rule()
        _, grads = self.acts_and_grads(score.within(lambda: rule), x)
        rule.over = True
        return grads

    @abstractmethod
    def rule(self) -> Rectified:
        """The rule, in force inside the block."""


@method("deconvnet")
class DeconvNet(RectifierMethod):
    r"""What pattern in the picture a positive response comes from, by running the network backwards.

    .. math:: r_{in} = \mathrm{ReLU}(r_{out})

    in place of the gradient of each ReLU: only what adds to the score is passed on, whether or not the unit was
    active; all other layers pass gradients, max-pooling to where the maximum was. Signed. Unit: that of the score per
    unit of the normalised input. Known not to follow the class asked for (Nie et al. 2018, arXiv:1805.07039). Source:
    Zeiler and Fergus 2013, arXiv:1311.2901; as a rule for gradients arXiv:1412.6806. ``preset: captum`` and
    ``zennit`` leave the colours apart.
    """

    source: ClassVar[str] = "Zeiler and Fergus 2013, arXiv:1311.2901"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "captum": {"reduce": "none"},
        "zennit": {"reduce": "none"},
    }

    def rule(self) -> Rectified:
        return Rectified(deconvolved)


@method("guided-backprop")
class GuidedBackprop(RectifierMethod):
    r"""What pattern in the picture a positive response comes from, where units were active on the way.

    .. math:: r_{in} = r_{out} \cdot 1[r_{out} > 0] \cdot 1[z > 0]

    in place of the gradient of each ReLU, z its input. Signed. Unit: that of the score per unit of the normalised
    input. Sharp, and known not to follow the class asked for (Nie et al. 2018, arXiv:1805.07039): it shows the
    picture. Source: Springenberg et al. 2014, arXiv:1412.6806. ``preset: captum`` and ``zennit`` leave the colours
    apart.
    """

    source: ClassVar[str] = "Springenberg et al. 2014, arXiv:1412.6806"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "captum": {"reduce": "none"},
        "zennit": {"reduce": "none"},
    }

    def rule(self) -> Rectified:
        return Rectified(guided)


def deconvolved(grad: Tensor, out: Tensor, top: float) -> Tensor:
    """The positive part of the gradient."""
    return grad.relu()


def guided(grad: Tensor, out: Tensor, top: float) -> Tensor:
    """The positive part of the gradient where the unit was neither silent nor saturated."""
    own = derivative(grad, out, top)
    return own.relu() if torch.is_grad_enabled() else own.relu_()


REGION = Around(CAM, ours=Method)
DETAIL = Around(
    PixelMethod,
    {
        "guided-gradcam": "cannot be used around itself",
        "linear-approximation": "has a map of a layer, not of the pixels",
    },
)


@method("guided-gradcam")
class GuidedGradCAM(PixelMethod):
    r"""The detail of a pixel map, where a CAM says that the class is.

    .. math:: \mathrm{up}(M_{\text{CAM}}) \odot M_{\text{pixels}}

    the map of ``cam``, brought to the input's size by ``upsampling``, times that of ``base`` at each colour. Unit:
    that of the score, squared, per unit of the normalised input; both explain the number that the CAM explains.
    ``extras`` are those of the base. Source: Selvaraju et al. 2017, arXiv:1610.02391, section 3. ``preset: captum``:
    nearest-neighbour up-sampling, colours apart.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"gradients", "layer", "rectifiers"})
    cost: ClassVar[str] = "that of its CAM and of its base"
    source: ClassVar[str] = "Selvaraju et al. 2017, arXiv:1610.02391"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "captum": {"upsampling": "nearest", "reduce": "none"}
    }

    cam: Annotated[
        Spec,
        REGION,
        Field(
            description="the CAM that says where: a name, or name: and its options",
            json_schema_extra=REGION.schema_default,
        ),
    ] = "gradcam"
    base: Annotated[
        Spec,
        DETAIL,
        Field(
            description="the method that gives the detail: a name, or name: and its options",
            json_schema_extra=DETAIL.schema_default,
        ),
    ] = "guided-backprop"

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", self.region.needs | self.detail.needs)
        object.__setattr__(self, "scale", self.region.scale)
        if "layer" in self.detail.needs:
            raise ConfigError(
                "guided-gradcam: its base gives the detail of the pixels, so it looks at the input"
            )

    @cached_property
    def region(self) -> CAM:
        """The CAM that says where."""
        made: CAM = REGION.method(self.cam)
        return made

    @cached_property
    def detail(self) -> PixelMethod:
        """The method that gives the detail."""
        made: PixelMethod = DETAIL.method(self.base)
        return made

    def looks_at(self, layers: Layers) -> tuple[Layer, ...]:
        self.detail.looks_at(layers)  # refuses a network that it cannot be computed on
        return self.region.looks_at(layers)

    def draws_from(self) -> tuple[str, ...]:
        return self.detail.draws_from()

    def pinned(self, layers: Layers, names: Sequence[str] = ()) -> Self:
        self.detail.looks_at(layers)
        return replace(self, cam=REGION.pinned(self.cam, layers, names))

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        size = (x.shape[-2], x.shape[-1])
        region, detail = (Attribution.of(part.attribute(score, x)) for part in (self.region, self.detail))
        where = resized(region.map, size, self.upsampling)[:, None]  # (N, 1, H, W)
        return Attribution(where * detail.map, detail.extras)
