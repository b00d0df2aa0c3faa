"""Relevance: what flows back through a network when each operation divides what it gets among its inputs.

How rules reach operations, and why that way, ``operations`` says; what they are, ``rules``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from xcli.errors import ModelError
from xcli.layers import Layers
from xcli.linear import Linear
from xcli.methods.propagation.rules import BY_BATCH, Pass, Proportional, Rule, Weighted, by_statistics, joins
from xcli.operations import Call, Kind, Rules, Step, plainly, ruled
from xcli.score import Score
from xcli.targets import Rows


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from: the linear map that gave it, if one did, and whether it can be negative.

    ``pixels``: the picture itself, but for where its numbers stand and what multiples of them; ``box``: the lowest and
    the highest that those can be, where that is asked for.
    """

    made_by: tuple[Linear, Tensor, Tensor, Tensor | None] | None = None
    signed: bool = True
    pixels: bool = False
    box: tuple[Tensor, Tensor] | None = None


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
        name: of the method, for what it refuses.
        epsilon: stabilises what divides in proportion, see ``stabilised``.
        positive: sums and averages divide among positive parts alone.
        constants: the buffers of a network in which constants that are added (these, parameters, what was made of
            them, numbers) get nothing; left out, they have their share, which is lost. What else has no graph belongs
            to the picture and comes from before the layer at which the graph begins.
        fold: join batch norms with the layer before them.
        from_pixels: the first tensor that is seen is the picture, not the output of some layer.
        box: the lowest and the highest that pixels can be, (1, C or 1, 1, 1) each, for rules that ask.
    """

    HANDLED: ClassVar[Mapping[Kind, str]] = {
        "rearrangement": "moved",
        "weighted": "weighted",
        "batch-norm": "normalised",
        "average": "divided",
        "sum": "divided",
        "difference": "divided",
        "scaling": "passed",
        "maximum": "picked",
        "activation": "passed",
    }
    """What there are rules for, and which of the methods here they are."""

    def __init__(
        self,
        rule: Chosen,
        *,
        name: str,
        epsilon: float = 1e-6,
        positive: bool = False,
        constants: Iterable[Tensor] | None = None,
        fold: bool = True,
        norms: bool = False,
        from_pixels: bool = True,
        box: tuple[Tensor, Tensor] | None = None,
        twice: bool = False,
    ) -> None:
        own = {kind: getattr(self, of) for kind, of in self.HANDLED.items()}
        if positive:  # what is taken away has no positive part
            own.pop("difference")
        super().__init__(own, twice=twice)
        self.name = name
        self.rule, self.epsilon, self.positive, self.norms = rule, epsilon, positive, norms
        self.fold, self.from_pixels, self.box = fold, from_pixels, box
        self.buffers = None if constants is None else tuple(constants)
        self.constants = WeakIdKeyDictionary()
        self.origins = WeakIdKeyDictionary()
        self.joined: set[int] = set()  # by the id of their weights: layers that a batch norm was joined with

    def __enter__(self) -> Self:
        self.begun = False
        self.hold(self.buffers)
        return super().__enter__()

    def forget(self) -> None:
        super().forget()
        self.origins.clear()
        self.constants.clear()

    def hold(self, found: Any) -> None:
        """Remember tensors that are constants."""
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.constants[leaf] = True

    def constant(self, leaf: Any) -> bool:
        """Whether an argument is the same for every picture."""
        return not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter) or leaf in self.constants

    def aside(self, call: Call) -> Any:
        known = self.buffers is not None and all(map(self.constant, call.leaves))
        out = super().aside(call)
        if known:
            self.hold(out)
        return out

    def called(self, call: Call) -> Any:
        if not self.begun:
            self.begun = True
            self.origins[call.inputs[0]] = self.first(call.inputs[0])
        return super().called(call)

    def first(self, x: Tensor) -> Origin:
        """What is known of the first tensor."""
        if not self.from_pixels or self.box is None:
            return Origin(pixels=self.from_pixels)
        low, high = (bound.to(x).expand_as(x).contiguous() for bound in self.box)
        return Origin(pixels=True, box=(low, high))

    def origin(self, x: Tensor) -> Origin:
        found: Origin = self.origins.get(x, _UNKNOWN)
        return found

    def moved(self, call: Call) -> Any:
        out, origins = plainly(call), [self.origin(x) for x in call.inputs]
        if any(out is x for x in call.inputs):  # dropout, contiguous
            return out
        signed = any(origin.signed for origin in origins) or _brings_negative(call)
        pixels = all(origin.pixels for origin in origins)
        self.note(out, Origin(signed=signed, pixels=pixels), self.bounds(call))
        return out

    def note(self, out: Any, origin: Origin, box: tuple[Any, Any] | None = None) -> None:
        """Remember where what a call gave comes from; ``box``: what it would give for the ends of the picture's."""
        ends = None if box is None else list(zip(*map(tree_leaves, box), strict=True))
        for place, tensor in enumerate(tree_leaves(out)):
            if isinstance(tensor, Tensor):
                own = None if ends is None else (torch.minimum(*ends[place]), torch.maximum(*ends[place]))
                self.origins[tensor] = replace(origin, box=own)

    def bounds(self, call: Call) -> tuple[Any, Any] | None:
        """What a call that moves, scales or shifts pixels gives for the lowest and the highest ones."""
        boxes = [self.origin(x).box for x in call.inputs]
        known = [box for box in boxes if box is not None]
        if len(known) < len(boxes):
            return None
        with torch.no_grad():
            return call.run(*(low for low, _ in known)), call.run(*(high for _, high in known))

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
                f"{self.name}: rules: pass is for layers that keep the shape of their input, which {rule.layer!r} does "
                "not; give it another rule"
            )
        if rule.boxed:
            if origin.box is None:
                raise ModelError(
                    f"{self.name}: rules: z-box is for layers that read the picture, which {rule.layer!r} does not; "
                    "give it another rule"
                )
            rule = replace(rule, low=origin.box[0], high=origin.box[1])
        step = self.step(linear, rule, origin.signed)
        out = ruled(self, step, value, x, weight, *(() if bias is None else (bias,)))
        self.origins[out] = Origin(made_by=(linear, x, weight, bias))
        return out

    def step(self, linear: Linear, rule: Rule, signed: bool) -> Step:
        """How a layer sends back what arrives at its output."""
        return Weighted(linear, rule, signed=signed)

    def normalised(self, call: Call) -> Any:
        x, scale, shift = by_statistics(call)
        before = self.origin(x).made_by if self.fold else None
        if before is not None and joins(x, before[0]):
            with torch.no_grad():
                value = call.run(*call.inputs)
            linear, own, weight, bias = before
            self.joined.add(id(weight))
            return self.by_rule(linear, value, own, *linear.folded(weight, bias, scale, shift), weight)
        if self.origin(x).pixels or not self.norms:
            return self.passed(call)
        return self.divided(call)

    def divided(self, call: Call) -> Any:
        origins = [self.origin(x) for x in call.inputs]
        constant = call.kind == "sum" and len(origins) == 1
        if constant and (origins[0].pixels or self.shifted(call)):  # pixels: the picture less its mean
            return self.passed(call)
        with torch.no_grad():
            value = call.run(*call.inputs)
        out = ruled(self, Proportional(call, self.epsilon, self.positive), value, *call.inputs)
        exact = call.name in ("mean", "sum") or "avg_pool" in call.name
        exact = exact or (call.name == "add" and "alpha" not in call.arguments[1])
        self.origins[out] = Origin(signed=not exact or constant or any(origin.signed for origin in origins))
        return out

    def shifted(self, call: Call) -> bool:
        """Whether what is added to the one input is a constant that gets nothing."""
        others = (leaf for place, leaf in enumerate(call.leaves) if place not in call.places)
        return self.buffers is not None and all(map(self.constant, others))

    def passed(self, call: Call) -> Tensor:
        with torch.no_grad():
            value = call.run(*call.inputs)
        pixels = self.origin(call.inputs[0]).pixels and call.kind != "activation"
        out = ruled(self, Pass(call if self.twice else None), value, *call.inputs)
        origin = Origin(signed=call.name not in _UNSIGNED, pixels=pixels)
        self.note(out, origin, self.bounds(call) if pixels else None)
        return out

    def picked(self, call: Call) -> Any:
        out = plainly(call)
        self.note(out, Origin(signed=any(self.origin(x).signed for x in call.inputs)))
        return out


_UNKNOWN = Origin()


def _brings_negative(call: Call) -> bool:
    """Whether a call that moves entries may add negative ones that do not depend on the picture."""
    args, kwargs = call.arguments
    match call.name:
        case "pad" | "constant_pad_nd":
            place = 3 if call.name == "pad" else 2
            return (kwargs.get("value", args[place] if len(args) > place else None) or 0) < 0
        case "setitem":
            whole, _, written = args
            constant = [part for part in (whole, written) if not any(part is x for x in call.inputs)]
            return any(isinstance(part, Tensor) or part < 0 for part in constant)
        case "cat" | "concat" | "concatenate" | "stack" | "hstack" | "vstack":
            tensors = (place for place, leaf in enumerate(call.leaves) if isinstance(leaf, Tensor))
            return any(place not in call.places for place in tensors)
    return False


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
        return rows.values(_changed(begin, outputs), copy, row)

    return score.within(lambda: rules).reading(number)


def _changed(change: Callable[[Any], Any], outputs: Any) -> Any:
    """What a model returns with its tensors changed, also in what is no tree to PyTorch."""

    def leaf(part: Any) -> Any:
        if isinstance(part, tuple | list):
            return tuple(map(change, part))
        if isinstance(part, MutableMapping):
            made = copy.copy(part)
            for key, value in part.items():
                made[key] = change(value)
            return made
        if isinstance(part, Mapping):
            return {key: change(value) for key, value in part.items()}
        names = (
            [field.name for field in fields(part)] if is_dataclass(part) else getattr(part, "__dict__", {})
        )
        own = {name: value for name in names if isinstance(value := getattr(part, name, None), Tensor)}
        if isinstance(part, Tensor) or not own:
            return change(part)
        made = copy.copy(part)
        for name, value in own.items():
            object.__setattr__(made, name, change(value))  # it may be frozen
        return made

    return tree_map(leaf, outputs)


REASONS: Mapping[Kind, str] = {
    "product": "multiplies two things that both depend on the picture",
    "difference": "takes one thing from another",
    "normalisation": "divides by a statistic of its own input or of the batch",
    "softmax": "divides by a sum over its own input",
    "attention": "is attention",
}


def refuse(name: str, layers: Layers, kinds: Collection[Kind], instead: str) -> None:
    """Refuse a network that does what a method has no rule for, or mixes the images of a batch.

    Raises:
        ModelError: which module does what.
    """
    for operation in layers.operations:
        if operation.name == "batch_norm" and operation.kind == "normalisation":
            raise ModelError(f"{name}: {operation}, which {BY_BATCH}; give it running statistics")
        if operation.kind not in kinds:
            why = REASONS.get(operation.kind, "is not known here")
            raise ModelError(f"{name}: {operation}, which {why}, and it has no rule for that; {instead}")
