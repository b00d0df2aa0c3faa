"""Convolutions and linear layers as linear maps of their input, with other weights, and transposed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xcli.operations import Call

_SPATIAL = {"1d": 1, "2d": 2, "3d": 3}


@dataclass(frozen=True)
class Linear:
    """The map x -> W x + b of a convolution (transposed ones too) or linear layer, for any weights of that shape."""

    name: str
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    output_padding: tuple[int, ...] = ()

    @classmethod
    def of(cls, call: Call) -> tuple[Linear, Tensor, Tensor, Tensor | None]:
        """The map that a call computes, its input, weights and bias."""
        args, kwargs = call.arguments
        order = (
            _TRANSPOSED if "transpose" in call.name else _CONVOLUTION
        )  # a linear layer has the first three
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        if call.name == "linear":
            return cls("linear"), x, weight, bias
        dims = _SPATIAL[call.name[-2:]]

        def each(key: str, default: int) -> Any:
            value = given.get(key, default)
            if isinstance(value, str):
                return value
            entries = tuple(value) if isinstance(value, list | tuple) else (value,)
            return entries * dims if len(entries) == 1 else entries

        stride, padding, dilation = each("stride", 1), each("padding", 0), each("dilation", 1)
        if padding == "valid":
            padding = (0,) * dims
        groups, extra = given.get("groups", 1), each("output_padding", 0)
        return cls(call.name, stride, padding, dilation, groups, extra), x, weight, bias

    @property
    def transposed(self) -> bool:
        return "transpose" in self.name

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + b, (m, ...)."""
        if self.name == "linear":
            return torch.nn.functional.linear(x, weight, bias)
        function: Callable[..., Tensor] = getattr(torch.nn.functional, self.name)
        if self.transposed:
            return function(
                x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        return function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def back(self, sent: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        """W^T ``sent``, of the shape of the input ``like``."""
        if self.name == "linear":
            return sent @ weight
        if isinstance(self.padding, str):  # "same", which may pad one side more than the other
            with torch.enable_grad():
                at = torch.zeros_like(like, requires_grad=True)
                again = sent.requires_grad or weight.requires_grad
                (found,) = torch.autograd.grad(self(at, weight), at, sent, create_graph=again)
            return found
        given, _, _ = torch.ops.aten.convolution_backward(
            sent,
            like,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            [True, False, False],
        )
        made: Tensor = given
        return made

    def folded(
        self, weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weights and bias of this map followed by y -> scale y + shift of each output channel."""
        if self.transposed:  # (in, out / groups, ...)
            by_group = scale.view(self.groups, 1, -1, *(1,) * (weight.ndim - 2))
            weight = (weight.unflatten(0, (self.groups, -1)) * by_group).flatten(0, 1)
        else:
            weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
        return weight, shift if bias is None else bias * scale + shift


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def normalising(call: Call) -> tuple[Tensor, Tensor, Tensor] | None:
    """Input, scale and shift (K,) of a batch norm by its running statistics; ``None`` where it takes others."""
    args, kwargs = call.arguments
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    if "functional" not in str(getattr(call.func, "__module__", "")):  # torch.batch_norm
        names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mean, var = given.get("running_mean"), given.get("running_var")
    if mean is None or var is None or given.get("training", False):
        return None
    scale = torch.rsqrt(var + given.get("eps", 1e-5))
    if given.get("weight") is not None:
        scale = scale * given["weight"]
    shift = -mean * scale
    return given["input"], scale, shift if given.get("bias") is None else shift + given["bias"]
