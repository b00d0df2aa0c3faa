"""Multipliers: what flows back through a network that has seen two pictures, in place of the gradient.

A multiplier is how much the score differs for each unit that an entry differs from what it is on the other picture, the
reference. The network runs on the reference first, without a graph, and leaves what its non-linear operations read;
then on the picture, where each of them takes what it read there. So a reference that all pictures share runs once, by
itself, and nothing of it is differentiated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from xcli.errors import ModelError
from xcli.linear import Linear
from xcli.methods.propagation.rules import by_statistics, joins
from xcli.methods.propagation.secants import (
    POOLS,
    Largest,
    Layer,
    Pooled,
    Product,
    Revealed,
    Scaled,
    Secant,
    Source,
    Total,
    revealed,
)
from xcli.operations import Call, Handler, Kind, Rules, Step, plainly, ruled
from xcli.targets import Rows

Rule = Literal["rescale", "reveal-cancel", "mixed"]

_SAME = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "clone", "contiguous"))
"""What leaves its input as it is, in eval mode."""


class Unlike(ModelError):
    """The network does something else on the reference than on the picture."""


class Seen(NamedTuple):
    """What an operation read on the reference, where that came from, and whether it gave more than a tensor."""

    name: str
    inputs: tuple[Tensor, ...]
    source: Source | None
    several: bool


class Multipliers(Rules):
    """Sends multipliers back through what runs in the block, from the gradient at the outputs on.

    Linear operations pass on what their derivative does. ``rule`` says what activations do: ``rescale``,
    ``reveal-cancel`` behind convolutions, linear layers and sums, or, ``mixed``, behind linear layers alone. Of a
    maximum, the largest entry has all, on the picture or on the reference, wherever it is larger; of a product, each
    factor has the mean of the other one.
    """

    HANDLED: ClassVar[Mapping[Kind, str]] = {
        **dict.fromkeys(("rearrangement", "weighted", "average", "sum", "difference", "scaling"), "plain"),
        "batch-norm": "normalised",
        "product": "multiplied",
        "maximum": "picked",
        "activation": "activated",
    }
    """What there are rules for, and which of the methods here they are."""

    def __init__(self, rule: Rule, *, name: str = "deeplift", twice: bool = False) -> None:
        own = {kind: partial(self.handled, getattr(self, of)) for kind, of in self.HANDLED.items()}
        super().__init__(own, twice=twice)
        self.name, self.rule, self.noting = name, rule, False
        self.record: deque[Seen] = deque()
        self.sources = WeakIdKeyDictionary()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """What runs inside this block is the network on the reference; the picture is next."""
        self.record.clear()
        self.noting = True
        try:
            with self:
                yield
        finally:
            self.noting = False

    def forget(self) -> None:
        super().forget()
        self.sources.clear()

    def handled(self, own: Handler, call: Call) -> Any:
        """What a call answers; where that comes from is noted. On the reference it has no graph, but flows on."""
        apart, flowing = self.noting and not self.twice, torch.is_grad_enabled()
        with torch.set_grad_enabled(flowing and not apart):
            out = own(call)
        if apart and flowing:
            out = tree_map(_leaf, out)
        source = None if self.rule == "rescale" else self.source(call)
        if source is not None:
            self.sources[out] = source
        return out

    def source(self, call: Call) -> Source | None:
        """The linear operation that a call is, or stands for."""
        before: Source | None = self.sources.get(call.inputs[0])
        if call.name in _SAME:
            return before
        if call.kind == "weighted" and (self.rule == "reveal-cancel" or call.name == "linear"):
            linear, x, weight, bias = Linear.of(call)
            return Source(Layer(linear), (x,), (weight,) if bias is None else (weight, bias))
        if call.kind == "batch-norm" and before is not None and isinstance(before.how, Layer):
            x, *norm = by_statistics(call)
            if not joins(x, before.how.linear):
                return None
            weight, bias = before.weights[0], before.weights[1] if len(before.weights) > 1 else None
            folded = before.how.linear.folded(weight, bias, *norm)
            return Source(before.how, before.inputs, folded)
        if call.name in ("add", "sub") and self.rule == "reveal-cancel":
            shapes = {one.shape for one in call.inputs}
            if len(call.inputs) == len(call.leaves) == 2 and len(shapes) == 1:  # no other number
                return Source(Total(-1 if call.name == "sub" else 1), call.inputs)
        return None

    def noted(self, call: Call) -> Any:
        """On the reference: what a call reads is kept for the picture."""
        out, source = plainly(call), self.sources.get(call.inputs[0])
        self.record.append(Seen(call.name, call.inputs, source, not isinstance(out, Tensor)))
        return out

    def seen(self, call: Call) -> Seen:
        """What a call read on the reference."""
        known = self.record.popleft() if self.record else None
        if known is None or known.name != call.name or not _fit(known.inputs, call.inputs):
            raise Unlike(
                f"{self.name}: the network does {call.name} on the picture and {known.name if known else 'no more'} on "
                "the one that it is compared with: what it computes hangs on what it sees; use integrated-gradients"
            )
        return known

    def sent(self, step: Step, value: Tensor, *tensors: Tensor) -> Tensor:
        """``value``, with what ``step`` sends back."""
        return ruled(self, step, value, *tensors, *((value,) if self.twice else ()))

    def plain(self, call: Call) -> Any:
        """Its derivative."""
        return plainly(call)

    def normalised(self, call: Call) -> Any:
        x, scale, _ = by_statistics(call)
        if self.noting:
            return plainly(call)
        with torch.set_grad_enabled(self.twice):
            value = call.run(*call.inputs)
        return self.sent(Scaled(), value, x, scale.view(-1, *(1,) * (x.ndim - 2)))

    def activated(self, call: Call) -> Any:
        if self.noting:
            return self.noted(call)
        (x,), seen = call.inputs, self.seen(call)
        (start,), source = seen.inputs, self.sources.get(x)
        secant = Secant(call, self.twice)
        with torch.set_grad_enabled(self.twice):
            value = call.run(x)
            if source is None or seen.source is None:
                step: Step = Scaled()
                tensors: tuple[Tensor, ...] = (x, secant(start, x, call.run(start), value))
            else:
                step = Revealed(source)
                tensors = (*source.inputs, *source.weights, *revealed(secant, start, x, source, seen.source))
        return self.sent(step, value, *tensors)

    def multiplied(self, call: Call) -> Any:
        if len(call.inputs) > 2:
            raise ModelError(
                f"{self.name}: there is no rule for {call.name} of three things that depend on the picture; use "
                "integrated-gradients"
            )
        if self.noting:
            return self.noted(call)
        with torch.set_grad_enabled(self.twice):
            value, starts = call.run(*call.inputs), self.seen(call).inputs
            means = [(x + start) / 2 for x, start in zip(call.inputs, starts, strict=True)]
        return self.sent(Product(call), value, *call.inputs, *means)

    def picked(self, call: Call) -> Any:
        if self.noting:
            return self.noted(call)
        xs, (_, starts, _, several) = call.inputs, self.seen(call)
        with torch.set_grad_enabled(self.twice):
            if call.name in POOLS:
                pooled = Pooled(call)
                out, *kept = pooled.chosen(xs[0], starts[0])
                step: Step = pooled
            else:
                step, out = Largest(call), call.run(*xs)
                kept = [start.expand_as(x) for start, x in zip(starts, xs, strict=True)]
        (value, *places), spec = tree_flatten(out)
        value = self.sent(step, value, *xs, *kept)
        return tree_unflatten([value, *places], spec) if several else value


def _leaf(t: Any) -> Any:
    return t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t


def _fit(starts: Sequence[Tensor], xs: Sequence[Tensor]) -> bool:
    """Whether what was read on the reference is of the shapes of what is read now, or of those for one picture."""
    return len(starts) == len(xs) and all(
        start.ndim == x.ndim and all(a in (1, b) for a, b in zip(start.shape, x.shape, strict=True))
        for start, x in zip(starts, xs, strict=True)
    )


# ---- the network on both -----------------------------------------------------------------------------------------


class Both(NamedTuple):
    """What a network answers on pictures, and on their references or, ``shared``, on the one of them all."""

    outputs: Any
    others: Any
    shared: bool


class Paired(nn.Module):
    """A network that runs on a reference before it runs on pictures, which send multipliers back.

    Args:
        start: the reference of all pictures, (1, C, H, W); where there is none, inputs are pictures and their own
            references, (m, 2, C, H, W).
    """

    def __init__(self, module: nn.Module, rules: Multipliers, start: Tensor | None) -> None:
        super().__init__()
        self.module, self.rules, self.start = module, rules, start

    def forward(self, given: Tensor) -> Both:
        x, start = given.unbind(1) if self.start is None else (given, self.start)
        try:
            return self.both(x, start)
        except Unlike:
            if len(start) == len(x):
                raise
            return self.both(x, start.expand_as(x))  # some networks mix pictures with other dimensions
        finally:
            self.rules.record.clear()

    def both(self, x: Tensor, start: Tensor) -> Both:
        """The network on ``start``, then on ``x``."""
        if not (self.rules.twice and start.requires_grad):
            start = start.detach().requires_grad_()
        with self.rules.reference():
            others = self.rules.settled(self.module(start))
        with self.rules:
            outputs = self.rules.settled(self.module(x))
        if self.rules.record:
            raise Unlike(
                f"{self.rules.name}: the network does {self.rules.record[0].name} on the picture that others are "
                "compared with and not on those: what it computes hangs on what it sees; use integrated-gradients"
            )
        return Both(outputs, others, len(start) < len(x))


def differences(rows: Rows, both: Both, copy: Tensor, row: Tensor) -> Tensor:
    """The number of each row on the picture less that on its reference."""
    start = torch.zeros_like(copy) if both.shared else copy
    return rows.values(both.outputs, copy, row) - rows.values(both.others, start, row)
