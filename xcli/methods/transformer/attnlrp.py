"""Relevance through attention: gradient times input, with another gradient where a network multiplies or norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from xcli.attention import unfused
from xcli.errors import ModelError
from xcli.layers import Layer, Layers
from xcli.linear import Linear
from xcli.methods.base import Attribution, Need
from xcli.methods.gradient.base import INPUT, LayerMethod
from xcli.methods.propagation.base import Origin, Relevance, refuse
from xcli.methods.propagation.lrp import LOWERED, RAISED
from xcli.methods.propagation.rules import Rule, Weighted, by_statistics, stabilised
from xcli.operations import Call, Kind, Step, plainly, ruled
from xcli.precision import full
from xcli.registry import method
from xcli.score import Score

Gamma = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@method("attnlrp")
class AttnLRP(LayerMethod):
    r"""The score, divided among the pixels, through attention and layer norms too: one backward pass.

    What flows back is relevance per unit of activation, so that plain operations keep their gradient (that is LRP-0),
    and the map is

    .. math:: \sum_c x_c \odot \tilde\nabla_c y

    with these changes to the gradient, each the rule of the paper divided by its input:

    - element-wise functions pass relevance on: f(x) / x in place of f'(x), with 1e-10 of its sign added to x;
    - products of two things that depend on the picture (queries and keys, probabilities and values, gates) give each
      one half: gradient / 2;
    - layer, group and RMS norms are divisions by a constant; the mean that is taken off, scale and shift stay;
    - the softmax keeps its gradient, which is the paper's rule :math:`x \odot (R - s \sum R)`, without what that gives
      to its bias; ``attention: cp`` holds probabilities that take means of values by a matrix product (Ali et al.
      2022, arXiv:2202.07304), so that relevance goes through the values alone;
    - convolutions and linear layers with ``gamma_convolution``, ``gamma_linear`` > 0 follow the gamma rule of ``lrp``,
      a batch norm behind them taken in; 0 is LRP-0.

    Attention is written out while the method runs, fused or not, whoever calls it (torchvision, timm, Hugging Face),
    windows of a swin transformer and gates too; convolutional networks need no other rules. With ``layer``, the
    relevance of that layer's output. Signed. Unit: that of the score. ``extras``: ``conservation``, the sum of the map
    over the score; biases, shifts and constants that are added keep their share. Relevance starts as the score: for a
    logit, the logit itself.

    Source: Achtibat et al. 2024, arXiv:2402.05602, propositions 3.1 to 3.4, in the form of arXiv:2502.15886; equal to
    LXT's ``efficient``. ``preset: lxt-vit``: its example for ViT-B/16, ``attention: cp``, gamma 0.25 for convolutions
    and 0.05 for linear layers; there projections inside ``nn.MultiheadAttention`` stay at LRP-0, here they do not.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    cost: ClassVar[str] = "1 forward + 1 backward with attention written out"
    source: ClassVar[str] = "Achtibat et al. 2024, arXiv:2402.05602"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "lxt-vit": {"attention": "cp", "gamma_convolution": 0.25, "gamma_linear": 0.05}
    }

    attention: Annotated[
        Literal["attnlrp", "cp"],
        Field(description="attnlrp: through probabilities and values; cp: through the values alone"),
    ] = "attnlrp"
    gamma_convolution: Annotated[Gamma, Field(description="the gamma rule for convolutions; 0: LRP-0")] = 0.0
    gamma_linear: Annotated[Gamma, Field(description="the gamma rule for linear layers; 0: LRP-0")] = 0.0

    def __post_init__(self) -> None:
        if self.layer != INPUT:
            object.__setattr__(self, "needs", self.needs | {"layer"})

    def looks_at(self, layers: Layers) -> tuple[Layer, ...]:
        refuse(self.name, layers, Implicit.HANDLED, "integrated-gradients takes any network")
        for operation in layers.operations:
            if operation.kind == "normalisation" and operation.name not in NORMS:
                raise ModelError(
                    f"{self.name}: {operation}, and it has no rule for that; integrated-gradients takes any network"
                )
        return super().looks_at(layers)

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        rules = Implicit(self, twice=score.create_graph)
        layers = self.looks_at(score.layers)
        (acts,), (grads,), values = score.within(lambda: rules).gradients(x, at=layers)
        rules.over = True
        if layers:
            acts, grads = layers[0].maps(acts), layers[0].maps(grads)
        relevance = acts * grads
        return Attribution(relevance, {"conservation": (relevance.flatten(1).sum(1) / values).detach()})


class Implicit(Relevance):
    """Relevance per unit of activation: the gradient, but for what the rules of ``AttnLRP`` change."""

    HANDLED: ClassVar[Mapping[Kind, str]] = {
        **Relevance.HANDLED,
        **dict.fromkeys(("average", "sum", "difference", "scaling", "maximum"), "plain"),
        "product": "halved",
        "normalisation": "normed",
        "softmax": "weighed",
        "attention": "attended",
    }

    def __init__(self, method: AttnLRP, *, twice: bool) -> None:
        super().__init__(self.gamma, name=method.name, twice=twice)
        self.method = method
        self.probabilities = WeakIdKeyDictionary()  # what a softmax gave, wherever its entries went

    def forget(self) -> None:
        super().forget()
        self.probabilities.clear()

    def plain(self, call: Call) -> Any:
        """The gradient."""
        return plainly(call)

    def attended(self, call: Call) -> Any:
        """Attention, written out."""
        return self.inside(lambda: unfused(call))

    def weighed(self, call: Call) -> Any:
        """The gradient of a softmax, which may be about to take means."""
        out = plainly(call)
        if call.name == "softmax":
            self.probabilities[out] = True
        return out

    def moved(self, call: Call) -> Any:
        out = super().moved(call)
        if all(x in self.probabilities for x in call.inputs):
            for part in tree_leaves(out):
                if isinstance(part, Tensor):
                    self.probabilities[part] = True
        return out

    def gamma(self, weight: Tensor, function: str, pixels: bool) -> Rule:
        """The rule of a layer."""
        linear, method = function == "linear", self.method
        return Rule((RAISED, LOWERED), gamma=method.gamma_linear if linear else method.gamma_convolution)

    def weighted(self, call: Call) -> Tensor:
        if self.gamma(call.inputs[0], call.name, False).gamma > 0:
            return super().weighted(call)
        out: Tensor = plainly(call)
        return out

    def step(self, linear: Linear, rule: Rule, signed: bool) -> Step:
        return PerUnit(linear, rule, signed=signed)

    def normalised(self, call: Call) -> Any:
        x, _, _ = by_statistics(call)
        return plainly(call) if self.origin(x).made_by is None else super().normalised(call)

    def passed(self, call: Call) -> Tensor:
        if call.name == "relu":  # f(x) / x is its derivative
            out: Tensor = plainly(call)
            self.note(out, Origin(signed=False))
            return out
        (x,) = call.inputs
        with torch.set_grad_enabled(self.twice):
            value = call.run(x)
            factor = full(value) / stabilised(full(x), 1e-10)
        return ruled(self, Factor(factor, call if self.twice else None), value, x)

    def halved(self, call: Call) -> Any:
        inputs, held = call.inputs, self.taking_means(call)
        share = Factor(1 / (len(inputs) - (held is not None)))
        return call.run(
            *(self.held(x) if place == held else ruled(self, share, x, x) for place, x in enumerate(inputs))
        )

    def taking_means(self, call: Call) -> int | None:
        """Which input of a product, if any, is probabilities that are to be held."""
        if self.method.attention == "attnlrp" or call.name not in ("matmul", "bmm", "mm", "einsum"):
            return None
        return next((place for place, x in enumerate(call.inputs) if x in self.probabilities), None)

    def held(self, x: Tensor) -> Tensor:
        """A constant: nothing is sent back, but for what maps that are differentiated in their turn depend on."""
        return ruled(self, Factor(0.0), x, x) if self.twice else x.detach()

    def normed(self, call: Call) -> Tensor:
        (x,) = call.inputs
        if call.name not in NORMS:
            raise ModelError(f"{self.name}: there is no rule for {call.name}; use integrated-gradients")
        with torch.set_grad_enabled(self.twice):
            norm = NORMS[call.name](call)
        return ruled(self, norm, call.run(x.detach()), x)


class PerUnit(Weighted):
    """What ``Weighted`` sends back, divided by the input."""

    def __init__(self, linear: Linear, rule: Rule, *, signed: bool) -> None:
        super().__init__(linear, rule, signed=signed)
        self.keeps_value = True

    def back(self, sent: Tensor, value: Tensor | None, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        assert value is not None
        return super().back(full(sent) * full(value), value, tensors)

    def shared(self, part: Tensor) -> Tensor | bool:
        return part != 0 if self.signed else True


class Factor(Step):
    """A function of each entry, the identity if there is no ``call``, whose gradient is a ``factor``."""

    def __init__(self, factor: Tensor | float, call: Call | None = None) -> None:
        self.factor, self.call = factor, call

    def run(self, *tensors: Tensor) -> Tensor:
        out: Tensor = tensors[0] if self.call is None else self.call.run(*tensors)
        return out

    def back(self, sent: Tensor, value: Tensor | None, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return (sent * self.factor,)


@dataclass(frozen=True)
class Norm(Step):
    """A norm over the last axis of x in ``shape``: what divides is held, the mean that is taken off is not.

    Attributes:
        inverse: (..., 1) one over what divides.
        weight: what multiplies the result, broadcast to x.
    """

    call: Call
    shape: tuple[int, ...]
    inverse: Tensor
    weight: Tensor | None
    centred: bool

    def run(self, *tensors: Tensor) -> Tensor:
        out: Tensor = self.call.run(*tensors)
        return out

    def back(self, sent: Tensor, value: Tensor | None, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        own = full(sent) if self.weight is None else full(sent) * self.weight
        own = own.reshape(self.shape) * self.inverse
        own = own - own.mean(-1, keepdim=True) if self.centred else own
        return (own.reshape(sent.shape),)


def _given(call: Call, *names: str) -> dict[str, Any]:
    args, kwargs = call.arguments
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _layer_norm(call: Call) -> Norm:
    given = _given(call, "input", "normalized_shape", "weight", "bias", "eps")
    x: Tensor = given["input"]
    axes = (
        (given["normalized_shape"],)
        if isinstance(given["normalized_shape"], int)
        else given["normalized_shape"]
    )
    shape = (*x.shape[: x.ndim - len(axes)], math.prod(axes))
    inverse = (full(x).reshape(shape).var(-1, correction=0, keepdim=True) + given.get("eps", 1e-5)).rsqrt()
    return Norm(call, shape, inverse, given.get("weight"), True)


def _rms_norm(call: Call) -> Norm:
    given = _given(call, "input", "normalized_shape", "weight", "eps")
    x: Tensor = given["input"]
    axes = tuple(given["normalized_shape"])
    shape = (*x.shape[: x.ndim - len(axes)], math.prod(axes))
    epsilon = given.get("eps")
    epsilon = torch.finfo(x.dtype).eps if epsilon is None else epsilon
    inverse = (full(x).reshape(shape).square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return Norm(call, shape, inverse, given.get("weight"), False)


def _group_norm(call: Call) -> Norm:
    given = _given(call, "input", "num_groups", "weight", "bias", "eps")
    x: Tensor = given["input"]
    shape = (len(x), given["num_groups"], x[0].numel() // given["num_groups"])
    inverse = (full(x).reshape(shape).var(-1, correction=0, keepdim=True) + given.get("eps", 1e-5)).rsqrt()
    weight = given.get("weight")
    return Norm(call, shape, inverse, None if weight is None else weight.view(-1, *(1,) * (x.ndim - 2)), True)


NORMS: Mapping[str, Callable[[Call], Norm]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
}
