"""Relevance: what flows back through a network when each operation divides what it gets among its inputs.

How rules reach operations, and why that way, ``operations`` says; what they are, ``rules``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from xcli.errors import ModelError
from xcli.layers import Layers
from xcli.linear import Linear, normalising
from xcli.methods.propagation.rules import Pass, Proportional, Rule, Weighted
from xcli.operations import Call, Handler, Kind, Rules, Step, plainly, ruled
from xcli.score import Score
from xcli.targets import Rows


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from: the linear map that gave it, if one did, and whether it can be negative.

    ``pixels``: the picture itself, but for where its numbers stand and what multiples of them.
    """

    made_by: tuple[Linear, Tensor, Tensor, Tensor | None] | None = None
    signed: bool = True
    pixels: bool = False


_UNSIGNED = frozenset(("relu", "relu6", "sigmoid", "softplus", "hardsigmoid"))

Chosen = Callable[[Tensor, str, bool], Rule]
"""(weights of a layer, name of its function, whether it reads the picture itself) -> its rule."""


class Relevance(Rules):
    """Sends relevance back through what runs in the block: at the outputs, what the gradient there is; from the layers
    on, relevance.

    Convolutions and linear layers follow ``rule``. A batch norm by running statistics that reads the very output of one
    becomes part of it; another passes relevance on, or with ``norms`` keeps the share of its shift.
    Sums and averages, constants among them, divide it in proportion; activations and multiples by constants pass it on;
    of a maximum, the entry that was the largest has it all.

    Args:
        rule: gives each layer its rule.
        epsilon: stabilises what divides in proportion.
        positive: sums and averages divide among positive parts alone.
        fold: join batch norms with the layer before them.
        from_pixels: the first tensor that is seen is the picture, not the output of some layer.
    """

    def __init__(
        self,
        rule: Chosen,
        *,
        epsilon: float = 1e-6,
        positive: bool = False,
        fold: bool = True,
        norms: bool = False,
        from_pixels: bool = True,
        twice: bool = False,
    ) -> None:
        table: Mapping[Kind, Handler] = {
            "rearrangement": self.moved,
            "weighted": self.weighted,
            "batch-norm": self.normalised,
            "average": self.divided,
            "sum": self.divided,
            **({} if positive else {"difference": self.divided}),
            "scaling": self.passed,
            "maximum": self.picked,
            "activation": self.passed,
        }
        super().__init__(table, twice=twice)
        self.rule, self.epsilon, self.positive, self.norms = rule, epsilon, positive, norms
        self.fold, self.from_pixels = fold, from_pixels
        self.origins = WeakIdKeyDictionary()
        self.joined: set[int] = set()  # by the id of their weights: layers that a batch norm was joined with

    def __enter__(self) -> Relevance:
        self.begun = False
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def forget(self) -> None:
        super().forget()
        self.origins.clear()

    def called(self, call: Call) -> Any:
        if not self.begun:
            self.begun = True
            self.origins[call.inputs[0]] = Origin(pixels=self.from_pixels)
        return super().called(call)

    def origin(self, x: Tensor) -> Origin:
        found: Origin = self.origins.get(x, _UNKNOWN)
        return found

    def moved(self, call: Call) -> Any:
        out, origins = plainly(call), [self.origin(x) for x in call.inputs]
        args, kwargs = call.arguments
        signed = any(origin.signed for origin in origins)
        if call.name in ("pad", "constant_pad_nd"):
            signed = signed or (kwargs.get("value") or (args[3] if len(args) > 3 else 0) or 0) < 0
        self.note(out, Origin(signed=signed, pixels=all(origin.pixels for origin in origins)))
        return out

    def note(self, out: Any, origin: Origin) -> None:
        """Remember where what a call gave comes from."""
        for tensor in out if isinstance(out, tuple | list) else (out,):
            self.origins[tensor] = origin

    def weighted(self, call: Call) -> Tensor:
        linear, x, weight, bias = Linear.of(call)
        with torch.no_grad():
            value = call.run(*call.inputs)
        return self.by_rule(linear, value, x, weight, bias, weight)

    def by_rule(
        self, linear: Linear, value: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, owner: Tensor
    ) -> Tensor:
        """``value`` of a layer at ``x``, sent back by the rule for the layer whose weights ``owner`` is."""
        origin = self.origin(x)
        rule = self.rule(owner, linear.name, origin.pixels)
        if not rule.shares and value.shape != x.shape:
            raise ModelError(
                "lrp: pass is for layers that keep the shape of their input; give this one another rule"
            )
        step = Weighted(linear, rule, signed=origin.signed)
        out = ruled(self, step, value, x, weight, *(() if bias is None else (bias,)))
        self.origins[out] = Origin(made_by=(linear, x, weight, bias))
        return out

    def normalised(self, call: Call) -> Any:
        found = normalising(call)
        if found is None:
            raise ModelError(
                "a batch norm takes the statistics of the batch, so no image can be explained by itself"
            )
        x, scale, shift = found
        with torch.no_grad():
            value = call.run(*call.inputs)
        before = self.origin(x).made_by if self.fold else None
        if before is not None:
            linear, own, weight, bias = before
            self.joined.add(id(weight))
            return self.by_rule(linear, value, own, *linear.folded(weight, bias, scale, shift), weight)
        if self.origin(x).pixels or not self.norms:
            return self.passed(call)
        return self.divided(call)

    def divided(self, call: Call) -> Any:
        origins = [self.origin(x) for x in call.inputs]
        if call.kind == "sum" and len(origins) == 1 and origins[0].pixels:  # the picture less its mean
            return self.passed(call)
        with torch.no_grad():
            value = call.run(*call.inputs)
        out = ruled(self, Proportional(call, self.epsilon, self.positive), value, *call.inputs)
        exact = call.name in ("mean", "sum") or "avg_pool" in call.name or call.name == "add"
        constant = call.kind == "sum" and len(origins) == 1
        self.origins[out] = Origin(signed=not exact or constant or any(origin.signed for origin in origins))
        return out

    def passed(self, call: Call) -> Tensor:
        with torch.no_grad():
            value = call.run(*call.inputs)
        origin = self.origin(call.inputs[0])
        out = ruled(self, Pass(call if self.twice else None), value, *call.inputs)
        pixels = origin.pixels and call.kind != "activation"
        self.origins[out] = Origin(signed=call.name not in _UNSIGNED, pixels=pixels)
        return out

    def picked(self, call: Call) -> Any:
        out = plainly(call)
        self.note(out, Origin(signed=any(self.origin(x).signed for x in call.inputs)))
        return out


_UNKNOWN = Origin()


class Start(Step):
    """At the outputs relevance is the gradient there times the outputs: of a logit, the logit itself."""

    keeps_value = True

    def run(self, *tensors: Tensor) -> Tensor:
        return tensors[0]

    def back(self, sent: Tensor, value: Tensor | None, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        assert value is not None
        return (sent * value,)


def started(score: Score, rules: Rules, start: Step) -> Score:
    """The score whose passes run by ``rules`` and send back, from the outputs, what ``start`` makes of the gradient."""

    def begin(out: Any) -> Any:
        return ruled(rules, start, out, out) if isinstance(out, Tensor) and out.requires_grad else out

    def number(rows: Rows, outputs: Any, copy: Tensor, row: Tensor) -> Tensor:
        return rows.values(tree_map(begin, outputs), copy, row)

    return score.within(lambda: rules).reading(number)


REASONS: Mapping[Kind, str] = {
    "product": "multiplies two things that both depend on the picture",
    "difference": "takes one thing from another",
    "normalisation": "divides by a statistic of its own input",
    "softmax": "divides by a sum over its own input",
    "attention": "is attention",
}


def refuse(name: str, layers: Layers, kinds: Collection[Kind], instead: str) -> None:
    """Refuse a network that does what a method has no rule for.

    Raises:
        ModelError: which module does what.
    """
    for operation in layers.operations:
        if operation.kind not in kinds:
            why = REASONS.get(operation.kind, "is not known here")
            raise ModelError(f"{name}: {operation}, which {why}, and it has no rule for that; {instead}")
