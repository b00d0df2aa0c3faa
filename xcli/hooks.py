"""What is changed in a model, and always undone: captured layers, frozen weights, swapped forwards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xcli.errors import ModelError
from xcli.precision import full


@contextmanager
def frozen(module: nn.Module, weights: bool = True) -> Iterator[nn.Module]:
    """Run ``module`` in eval mode with no parameter asking for a gradient, then put every flag back.

    With ``weights`` false, in eval mode only: parameters go on asking for gradients as they did.

    Each sub-module's own ``training`` flag and each parameter's own ``requires_grad`` are restored, also after an
    exception. The flags are set directly: a model whose ``eval`` does more than that is not called.
    """
    training = [(part, part.training) for part in module.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for part, _ in training:
            part.training = False
        for parameter, asks in wanted:
            parameter.requires_grad_(asks and not weights)
        yield module
    finally:
        for part, flag in training:
            part.training = flag
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


@contextmanager
def unfused() -> Iterator[None]:
    """Keep PyTorch's fused inference path for attention off: it skips the sub-modules that hooks listen to."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Elementary(TorchFunctionMode):
    """Compute from elementary operations, inside the block, what PyTorch cannot differentiate often enough: the third
    derivative of its layer norm is wrong (pytorch/pytorch#175754), and its hard sigmoid has no second one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        chosen: Callable[..., Any] = _ELEMENTARY.get(func, func)
        return chosen(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = full(input) - full(input).mean(axes, keepdim=True)
    out = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(input.dtype if weight is None else weight.dtype)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return (input / 6 + 0.5).clamp(0, 1)


_ELEMENTARY: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.hardsigmoid: _hardsigmoid,
}


def first_tensor(output: Any, layer: str) -> Tensor:
    """The tensor a layer yields: itself, or the first entry of the tuple it returns."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ModelError(f"layer {layer!r} returns {type(output).__name__}, not a tensor; name another layer")


def with_tensor(output: Any, tensor: Tensor) -> Any:
    """``output`` with its first tensor replaced, in the container it came in."""
    if isinstance(output, Tensor):
        return tensor
    if hasattr(output, "_make"):  # a named tuple
        return output._make((tensor, *output[1:]))
    return type(output)((tensor, *output[1:])) if type(output) in (tuple, list) else (tensor, *output[1:])


@contextmanager
def recording(
    module: nn.Module, layers: Sequence[str], *, leaves: Collection[str] = ()
) -> Iterator[dict[str, Tensor]]:
    """Keep the outputs of ``layers`` from the one forward pass inside the block.

    With ``leaves``, run that forward under ``torch.no_grad()``: whatever precedes the first of these layers costs
    plain inference, its output becomes a leaf, and recording goes on from there, so a backward pass covers the tail
    alone; one that runs in a parallel branch becomes a leaf too. The model goes on with a copy, so a later in-place
    ReLU cannot rewrite what was kept.

    Raises:
        ModelError: a layer ran twice in one forward (its maps would be ambiguous), or yields no tensor.
    """
    kept: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def keep(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
            if name in kept:
                raise ModelError(
                    f"layer {name!r} runs more than once in a forward pass; name a layer that runs once"
                )
            tensor = first_tensor(output, name)
            if name in leaves and not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
                torch.set_grad_enabled(True)
            kept[name] = tensor
            return with_tensor(output, tensor.clone())

        return keep

    with ExitStack() as undo:
        undo.enter_context(unfused())
        for name in layers:
            undo.callback(module.get_submodule(name).register_forward_hook(listen(name)).remove)
        yield kept


@contextmanager
def observed(part: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand the gradient at the output of each call of ``part`` inside the block to ``see``, once it is known there.

    An in-place operation on the output later on changes nothing: the gradient is that of the output as it was given.
    """

    with ExitStack() as undo:

        def listen(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and output.requires_grad:
                undo.callback(output.register_hook(see).remove)

        undo.callback(part.register_forward_hook(listen).remove)
        yield


class Gate:
    """Lets values through, and gradients only once it is ``open``."""

    def __init__(self) -> None:
        self.open = False

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = _Gated.apply(x, self)
        return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Gate) -> Tensor:
        ctx.gate = gate
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *sent: Tensor) -> tuple[Tensor | None, None]:
        return sent[0] if ctx.gate.open else None, None


@contextmanager
def gathered(
    module: nn.Module, layers: Sequence[str], join: Callable[[Sequence[Tensor]], Tensor], gate: Gate
) -> Iterator[None]:
    """Let the last of ``layers``, which run one after the other, answer with what ``join`` makes of the outputs of all
    of them, in the one forward pass inside the block. What each hands on to the next goes through ``gate``.

    Raises:
        ModelError: a layer does not read what the one before it gives, so that it is no chain.
    """
    kept: list[Tensor] = []
    handed: list[Tensor] = []

    def reads(name: str) -> Callable[..., None]:
        def check(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if handed and not any(own is handed[-1] for own in (*args, *kwargs.values())):
                raise ModelError(
                    f"module {name!r} does not read the output of {layers[len(handed) - 1]!r} as it is, so these are "
                    "no blocks of one chain; use another method"
                )

        return check

    def gives(name: str) -> Callable[..., Any]:
        def keep(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
            kept.append(first_tensor(output, name))
            handed.append(join(kept) if len(kept) == len(layers) else gate(kept[-1]))
            return with_tensor(output, handed[-1])

        return keep

    with ExitStack() as undo:
        for name in layers:
            part = module.get_submodule(name)
            undo.callback(part.register_forward_pre_hook(reads(name), with_kwargs=True).remove)
            undo.callback(part.register_forward_hook(gives(name)).remove)
        yield


@contextmanager
def swapped(part: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``part`` answer with ``forward`` instead of its own inside the block."""
    had, before = "forward" in vars(part), vars(part).get("forward")
    part.forward = forward
    try:
        yield
    finally:
        if had:
            part.forward = before  # type: ignore[assignment]
        else:
            del part.forward
