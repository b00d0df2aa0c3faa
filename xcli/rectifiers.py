"""Activations however a network calls them, and rectifiers with another backward pass.

A rule for ReLU has to reach ``nn.ReLU`` modules, those used several times, ``F.relu``, ``torch.relu``, ``x.relu_()``
and the operations of an exported program alike. What they have in common is that PyTorch asks a ``TorchFunctionMode``
before it runs them; only functions compiled by ``torch.jit.script`` are out of its sight, and a ReLU written as a
clamp or a maximum is not recognised. Module hooks see none of the functions and cannot tell the calls of a shared
module apart; ``torch.fx`` has to trace the network first, which many do not allow.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from xcli.kinds import name_of

ACTIVATIONS = frozenset(
    (
        *("relu", "relu6", "hardtanh", "leaky_relu", "rrelu", "prelu", "threshold", "elu", "selu", "celu"),
        *("gelu", "silu", "mish", "hardswish", "softplus"),
    )
)
"""What stands between the layers of a network, by the names of the functions that compute it."""

RECTIFIERS = ("relu", "relu6")

Rule = Callable[[Tensor, Tensor, float], Tensor]
"""(gradient at the output, the output, where it saturates) -> gradient at the input, all of one shape."""


class Activations(TorchFunctionMode):
    """Counts the activations that run inside the block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := _name(func, args, kwargs or {})) in ACTIVATIONS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Rectified(TorchFunctionMode):
    """Gives every ReLU and ReLU6 that runs inside the block the backward pass of ``rule``.

    Values stay what they are; what a network changes in place, it changes in place. Once ``over`` is set, backward
    passes through what ran in the block follow the derivative: a loss over maps depends on the values behind them.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule, self.over = rule, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func, args, kwargs)
        if name not in RECTIFIERS:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input" if "input" in kwargs else "self"]
        top = 6.0 if name == "relu6" else math.inf
        if func.__name__.startswith("hardtanh"):
            top = _argument(args, kwargs, 2, "max_val", 1.0)
        return _Ruled.apply(x, top, self, _in_place(func, args, kwargs))


class _Ruled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float, mode: Rectified, in_place: bool) -> Tensor:
        out = x.relu_() if in_place else x.relu()
        if top != math.inf:
            out.clamp_(max=top)
        if in_place:
            ctx.mark_dirty(x)
        # One tensor, as PyTorch's own rectifiers: a checkpoint runs those, outside the block, in place of these. Its
        # ReLU6 keeps the input, so that the network may change the output in place.
        ctx.save_for_backward(out if top == math.inf else out.clone())
        ctx.mode, ctx.top = mode, top
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (out,) = ctx.saved_tensors
        rule = derivative if ctx.mode.over else ctx.mode.rule
        return rule(grad, out, ctx.top), None, None, None


def derivative(grad: Tensor, out: Tensor, top: float) -> Tensor:
    """The gradient where the unit is neither silent nor saturated."""
    own: Tensor = torch.ops.aten.threshold_backward(grad, out, 0)
    return own if top == math.inf else own * (out < top)


def _name(func: Any, args: Any, kwargs: Any) -> str:
    """``relu`` of ``F.relu``, ``torch.relu_``, ``Tensor.relu``, ``torch.ops.aten.relu.default``; a hard tanh that
    starts at 0 is a ReLU6."""
    name = name_of(func)
    if name == "hardtanh" and _argument(args, kwargs, 1, "min_val", -1.0) == 0:
        return "relu6"
    return name


def _argument(args: Any, kwargs: Any, place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _in_place(func: Any, args: Any, kwargs: Any) -> bool:
    if func.__name__.split(".")[0].endswith("_"):
        return True
    place = 3 if func.__name__.startswith("hardtanh") else 1
    return bool(_argument(args, kwargs, place, "inplace", False))
