"""Rules as data: how a convolution, a linear layer, a sum divides what it gets among its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xcli.errors import ModelError
from xcli.linear import Linear, normalising
from xcli.operations import Call, Step, apart
from xcli.precision import full

InputPart = Literal["all", "positive", "negative", "one", "low", "high"]
"""The input as it is, its positive or negative part, ones in its place, or the lowest or highest input there can be."""

WeightPart = Literal[
    "all", "positive", "negative", "raised", "lowered", "minus positive", "minus negative", "one", "square"
]
"""W, W+, W-, W + gamma W+, W + gamma W-, -W+, -W-, 1, W^2."""


@dataclass(frozen=True)
class Share:
    """A part of a rule: ``factor`` times the relevance is divided in proportion to the sum of ``terms``.

    ``where``: only the relevance of outputs of that sign. ``bias``: the part of the bias that takes its share, which
    is lost; ``None`` for none.
    """

    terms: tuple[tuple[InputPart, WeightPart], ...]
    bias: WeightPart | None = "all"
    factor: float = 1.0
    where: Literal["all", "positive", "negative"] = "all"


@dataclass(frozen=True)
class Rule:
    """How a convolution or linear layer divides relevance among its inputs.

    .. math:: R_i = \\sum_s f_s \\sum_t x^t_i (W^{t\\top} \\frac{R}{z_s + \\epsilon\\,sign(z_s)})_i, \\quad
        z_s = \\sum_t W^t x^t + b_s

    with the shares s and their terms t; sign(0) = 1.
    """

    shares: tuple[Share, ...]
    epsilon: float = 1e-6
    gamma: float = 0.0
    low: Tensor | None = None  # of the input's shape
    high: Tensor | None = None
    layer: str = ""

    @property
    def boxed(self) -> bool:
        """Whether it asks for the lowest and highest input there can be."""
        return any(of_input == "low" for share in self.shares for of_input, _ in share.terms)


def by_statistics(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Input, scale and shift (K,) of a batch norm.

    Raises:
        ModelError: it takes the statistics of the batch.
    """
    found = normalising(call)
    if found is None:
        raise ModelError(f"a batch norm {BY_BATCH}; give it running statistics")
    return found


BY_BATCH = "takes the statistics of the batch, so that no image can be explained by itself"


def joins(x: Tensor, linear: Linear) -> bool:
    """Whether the channels of a batch norm that reads x, the output of a layer, are the outputs of that layer."""
    return x.ndim == 2 + (0 if linear.name == "linear" else int(linear.name[-2]))


_NOTHING = 1e-20
"""In float32 the inverse of what is larger can still be summed."""


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """z + epsilon sign(z), with sign(0) = 1. With 0 it is z itself, but infinite where that is nothing: what arrives
    there is lost, and no large number is left for the transforms of a convolution to round."""
    if epsilon == 0:
        return torch.where(z.abs() > _NOTHING, z, torch.inf)
    return torch.where(z < 0, z.new_full((), -epsilon), z.new_full((), epsilon)).add_(z)


class Pass(Step):
    """Relevance goes through as it is. ``call``: what is computed, where maps are to be differentiated in turn; else a
    step need not keep what it holds."""

    def __init__(self, call: Call | None) -> None:
        self.call = call

    def run(self, *tensors: Tensor) -> Tensor:
        assert self.call is not None
        out: Tensor = self.call.run(*tensors)
        return out

    def back(self, sent: Tensor, value: Tensor | None, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return (sent,)


class Proportional(Step):
    """Relevance of a linear map without weights goes to its inputs in proportion to what each adds; with ``positive``,
    to what their positive parts add by the positive parts of constants."""

    keeps_tensors = True

    def __init__(self, call: Call, epsilon: float, positive: bool) -> None:
        self.call, self.epsilon, self.positive = call, epsilon, positive

    def run(self, *tensors: Tensor) -> Tensor:
        out: Tensor = self.call.run(*tensors)
        return out

    def back(self, sent: Tensor, value: Tensor | None, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            xs = [full(x) for x in apart(tensors if again else [x.detach() for x in tensors])]
            xs = [x.clamp(min=0) for x in xs] if self.positive else xs
            at = [x if x.requires_grad else x.requires_grad_() for x in xs]
            z = (_excited(self.call) if self.positive else self.call).run(*at)
            given = full(sent) / stabilised(z, self.epsilon)
            shares = torch.autograd.grad(z, at, given, create_graph=again)
        return [x * share for x, share in zip(xs, shares, strict=True)]


def _excited(call: Call) -> Call:
    """The call with the positive parts of whatever it is given besides its inputs."""
    leaves = [
        leaf.clamp(min=0) if isinstance(leaf, Tensor) and place not in call.places else leaf
        for place, leaf in enumerate(call.leaves)
    ]
    return Call(call.func, leaves, call.spec, call.places)


class Weighted(Step):
    """Relevance of a convolution or linear layer, by a rule; its tensors are input, weights and, if any, bias. Backward
    passes are not under autocast, so it computes in full precision what it gets."""

    keeps_tensors = True

    def __init__(self, linear: Linear, rule: Rule, *, signed: bool) -> None:
        self.linear, self.rule, self.signed = linear, rule, signed
        self.keeps_value = any(share.where != "all" or _whole(share) for share in rule.shares)

    def run(self, *tensors: Tensor) -> Tensor:
        return self.linear(*map(full, tensors))

    def back(self, sent: Tensor, value: Tensor | None, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        sent, (x, weight, *rest) = full(sent), map(full, tensors)
        bias = rest[0] if rest else None
        total = None if self.rule.shares else sent
        for share in self.rule.shares:
            terms = [
                (self.part(x, of_input), self.weights(weight, of_weights))
                for of_input, of_weights in share.terms
                if self.signed or of_input != "negative"
            ]
            if _whole(share) and value is not None:
                z = full(value)
            else:
                own = None if bias is None or share.bias is None else self.weights(bias, share.bias)
                z = self.linear(*terms[0], own)
                for of_input, of_weights in terms[1:]:
                    z = z + self.linear(of_input, of_weights)
            given = sent / stabilised(z, self.rule.epsilon)
            if share.where != "all" and value is not None:
                given = given * (value > 0 if share.where == "positive" else value < 0)
            for of_input, of_weights in terms:
                found = self.shared(of_input) * self.linear.back(given, of_weights, x)
                found = found if share.factor == 1 else share.factor * found
                total = found if total is None else total + found
        assert total is not None
        return (total,)

    def shared(self, part: Tensor) -> Tensor | bool:
        """What the share of each unit of a part of the input is multiplied by."""
        return part

    def part(self, x: Tensor, which: InputPart) -> Tensor:
        """The part of the input that a term asks for."""
        match which:
            case "positive":
                return x.clamp(min=0) if self.signed else x
            case "negative":
                return x.clamp(max=0)
            case "one":
                return torch.ones_like(x)
            case "low" | "high":
                bound = self.rule.low if which == "low" else self.rule.high
                assert bound is not None
                return bound.to(x)
        return x

    def weights(self, w: Tensor, which: WeightPart) -> Tensor:
        """The part of the weights, or the bias, that a term asks for."""
        match which:
            case "positive":
                return w.clamp(min=0)
            case "negative":
                return w.clamp(max=0)
            case "raised":
                return w + self.rule.gamma * w.clamp(min=0)
            case "lowered":
                return w + self.rule.gamma * w.clamp(max=0)
            case "minus positive":
                return -w.clamp(min=0)
            case "minus negative":
                return -w.clamp(max=0)
            case "one":
                return torch.ones_like(w)
            case "square":
                return w.square()
        return w


def _whole(share: Share) -> bool:
    """Whether what it divides by is the value of the layer itself."""
    return share.terms == (("all", "all"),) and share.bias == "all"
