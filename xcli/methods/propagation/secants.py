"""Differences in place of derivatives: how operations that are not linear share the difference of what they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xcli.linear import Linear
from xcli.operations import Call, Step, apart
from xcli.precision import full

EXACT = frozenset(("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"))
"""Activations that round nothing, so that no difference is too small to divide by."""


class Secant:
    r"""The slope of an activation f between two places, :math:`\frac{f(q) - f(p)}{q - p}`.

    Where they are so close that rounding spoils the quotient, it is the derivative at q: as far apart as the square
    root of the precision, of what is larger, q or f(q); there both are about as wrong, and the sum of a map is by
    less than that times the unit's own share. ``EXACT`` activations need it only where p and q are the same.
    """

    def __init__(self, call: Call, twice: bool) -> None:
        self.call, self.twice = call, twice

    def __call__(self, p: Tensor, q: Tensor, at_p: Tensor, at_q: Tensor) -> Tensor:
        way, rise = full(q) - full(p), full(at_q) - full(at_p)
        if self.call.name in EXACT:
            close = way == 0
        else:
            close = way.abs() <= torch.finfo(q.dtype).eps ** 0.5 * torch.maximum(q.abs(), at_q.abs())
        slope = at_q.sign() if self.call.name == "relu" else self.slope(q)
        if self.twice:  # 0 / 0 has no derivative that could be left out
            way = torch.where(close, 1.0, way)
        return torch.where(close, slope, rise / way if self.twice else rise.div_(way))

    def slope(self, x: Tensor) -> Tensor:
        """The derivative at ``x``."""
        with torch.enable_grad():
            at = x.view_as(x) if self.twice else x.detach().requires_grad_()
            value = self.call.run(at)
            (found,) = torch.autograd.grad(value, at, torch.ones_like(value), create_graph=self.twice)
        return found


class Sending(Step):
    """A step that reads what its operation has worked out for it. Where maps are to be differentiated in their turn,
    the value, by the network's own way to it, is the last of its tensors."""

    keeps_tensors, reads_from = True, 1

    def run(self, *tensors: Tensor) -> Tensor:
        return tensors[-1]


class Scaled(Sending):
    """What arrives, times numbers. Tensors: input, those."""

    def back(self, sent: Tensor, value: Tensor | None, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return (sent * tensors[0],)


# ---- reveal-cancel -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer; its weights are those and, if any, the bias."""

    linear: Linear

    def spread(self, ways: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """The sum of the sizes of what differences of its inputs add to that of its output."""
        return self.linear(ways[0].abs(), weights[0].abs())

    def back(
        self, same: Tensor, other: Tensor, signs: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """What arrives for the difference of the output and for ``spread``, sent back to each input."""
        (sign,), weight = signs, full(weights[0])
        return (self.linear.back(same, weight, sign) + sign * self.linear.back(other, weight.abs(), sign),)


@dataclass(frozen=True)
class Total:
    """A sum of two tensors of one shape, or with a ``factor`` of -1 the first less the second."""

    factor: int

    def spread(self, ways: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        return ways[0].abs() + ways[1].abs()

    def back(
        self, same: Tensor, other: Tensor, signs: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        return same + signs[0] * other, self.factor * same + signs[1] * other


@dataclass(frozen=True)
class Source:
    """The linear operation that a tensor comes from, and what it read."""

    how: Layer | Total
    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] = ()


class Revealed(Sending):
    r"""An activation f joined with the linear operation y = W x + b before it, whose contributions w_i Dx_i add up to
    Dy+ where they are positive and to Dy- where they are negative. These have multipliers of their own,

    .. math:: 2 m_+ = s(y_0, y_0 + Dy_+) + s(y_0 + Dy_-, y), \quad 2 m_- = s(y_0, y_0 + Dy_-) + s(y_0 + Dy_+, y)

    with s the secant of f. As :math:`Dy_\pm = (Dy \pm |W| |Dx|) / 2`, input i, which gets m+ or m- by the sign of
    what it adds, has :math:`\frac12 W^\top (m_+ + m_-) + \frac12 \mathrm{sign}(Dx_i) |W|^\top (m_+ - m_-)`, times
    what arrives. Tensors: inputs, weights, the two halves, signs of the differences of the inputs.
    """

    def __init__(self, source: Source) -> None:
        self.how, self.reads_from, self.count = source.how, len(source.inputs), len(source.weights)

    def back(self, sent: Tensor, value: Tensor | None, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        weights, (half, rest, *signs) = tensors[: self.count], tensors[self.count :]
        return self.how.back(sent * half, sent * rest, signs[: self.reads_from], weights)


def revealed(secant: Secant, start: Tensor, y: Tensor, source: Source, before: Source) -> tuple[Tensor, ...]:
    """The two halves and the signs that ``Revealed`` reads, where y is ``start`` on the reference."""
    run = secant.call.run
    ways = [x - x0 for x, x0 in zip(source.inputs, before.inputs, strict=True)]
    spread = source.how.spread(ways, source.weights)
    risen = start + ((y - start + spread) / 2).clamp(min=0)
    fallen = start + ((y - start - spread) / 2).clamp(max=0)
    at_start, at_risen, at_fallen, at_y = run(start), run(risen), run(fallen), run(y)
    up = secant(start, risen, at_start, at_risen) + secant(fallen, y, at_fallen, at_y)
    down = secant(start, fallen, at_start, at_fallen) + secant(risen, y, at_risen, at_y)
    return (up + down) / 4, (up - down) / 4, *(full(way.sign()) for way in ways)


# ---- products and maxima -----------------------------------------------------------------------------------------


def bare(call: Call) -> Call:
    """The call without its inputs, for a step that runs it with others."""
    leaves = list(call.leaves)
    for place in call.places:
        leaves[place] = leaves[place].new_empty(0)
    return Call(call.func, leaves, call.spec, call.places)


class Product(Sending):
    """A product of two tensors: each gets its derivative where the other one is the mean of picture and reference,
    which is the mean over both orders in which the two can change. Tensors: the factors, their means."""

    reads_from = 2

    def __init__(self, call: Call) -> None:
        self.call = bare(call)

    def back(self, sent: Tensor, value: Tensor | None, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            at = _places(tensors[:2], again)
            return torch.autograd.grad(self.call.run(*at), at, sent, create_graph=again)


POOLS = frozenset(
    f"{kind}max_pool{dims}d{more}"
    for kind in ("", "adaptive_")
    for dims in (1, 2, 3)
    for more in ("", "_with_indices")
)


class Pooled(Sending):
    """Max pooling: of each window, the entry that is the largest on the picture, or on the reference where that largest
    is larger, has all: its multiplier is the difference of what the window gives by its own, between 0 and 1.
    Tensors: input, the place of that entry, its multiplier."""

    def __init__(self, call: Call) -> None:
        self.call, self.shape = bare(call), call.inputs[0].shape
        self.name = call.name.removesuffix("_with_indices")
        self.axes = int(self.name[-2])
        args, kwargs = call.arguments
        self.args = args[1 : 2 if self.name.startswith("adaptive") else 6]
        self.kwargs = {key: kwargs[key] for key in kwargs if key in _WINDOWS}

    def indexed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The largest entries and their places."""
        pool: Callable[..., tuple[Tensor, Tensor]] = getattr(F, self.name)
        return pool(x, *self.args, **self.kwargs, return_indices=True)

    def chosen(self, x: Tensor, start: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """The largest entries and their places, and the places and multipliers of the entries that have all."""
        (out, index), (other, before) = self.indexed(x), self.indexed(start)
        place = torch.where(out >= other, index, before)
        flat = place.flatten(-self.axes)
        own, others = (one.expand_as(x).flatten(-self.axes).gather(-1, flat) for one in (x, start))
        way = (own - others).view_as(out)
        ratio = torch.where(way == 0, 1.0, (out - other) / torch.where(way == 0, 1.0, way))
        return (out, index), place, ratio

    def back(self, sent: Tensor, value: Tensor | None, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        place, ratio = (one.flatten(-self.axes) for one in tensors[:2])
        empty = sent.new_zeros(self.shape).flatten(-self.axes)
        return (empty.scatter_add(-1, place, sent.flatten(-self.axes) * ratio).view(self.shape),)


_WINDOWS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "output_size")


class Largest(Sending):
    """Any other maximum, by the rule of ``Pooled``; entries that are equally large share. Tensors: the inputs, the same
    on the reference."""

    reads_from = 0

    def __init__(self, call: Call) -> None:
        self.call = bare(call)

    def back(self, sent: Tensor, value: Tensor | None, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        again, count = torch.is_grad_enabled(), len(self.call.places)
        with torch.enable_grad():
            at = _places(tensors[: 2 * count], again)
            xs, starts = at[:count], at[count:]
            out, other = self.largest(*xs), self.largest(*starts)
            way = out - other

            def shared(value: Tensor, among: Sequence[Tensor], what: Tensor) -> Sequence[Tensor]:
                return torch.autograd.grad(value, among, what, retain_graph=True, create_graph=again)

            plain = shared(out, xs, sent)
            more = shared(out, xs, sent * way.clamp(min=0))
            less = shared(other, starts, sent * way.clamp(max=0))
            return [
                torch.where(x == start, same, (up + down) / torch.where(x == start, 1.0, x - start))
                for x, start, same, up, down in zip(xs, starts, plain, more, less, strict=True)
            ]

    def largest(self, *inputs: Tensor) -> Tensor:
        """The values alone."""
        out = self.call.run(*inputs)
        values: Tensor = out if isinstance(out, Tensor) else out[0]
        return values


def _places(tensors: Sequence[Tensor], again: bool) -> list[Tensor]:
    """The tensors as places to differentiate at; ``again``: so that what is found can be differentiated too."""
    at = apart(tensors if again else [one.detach() for one in tensors])
    return [one if one.requires_grad else one.requires_grad_() for one in at]
