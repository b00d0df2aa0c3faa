"""What makes the same arithmetic faster: kept memory, channels-last layout, batch norms folded into convolutions.

Every step here is exact up to float rounding (1e-5); what trades accuracy is ``runtime.precision``.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from xcli.hooks import unfused

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next pass instead of handing every large buffer back to the kernel.

    A setting of the whole process, so for commands, not for a library. Returns whether this C library knows it.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_TRIM_THRESHOLD, 2**31 - 1), (_MMAP_MAX, 0))
    return all(mallopt(name, value) for name, value in settings)


@contextmanager
def channels_last(module: nn.Module) -> Iterator[None]:
    """Keep convolution weights in channels-last layout inside the block; values and shapes stay the same."""
    before = [(p, p.data) for p in module.parameters() if p.ndim == 4]
    try:
        for parameter, data in before:
            parameter.data = data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


@contextmanager
def folded(module: nn.Module, x: Tensor, keep: Collection[str] = ()) -> Iterator[int]:
    """Fold each batch norm that follows a convolution into it, inside the block; yields how many were folded.

    A pair is folded when the norm's input is the very output of a convolution that runs once, and the whole network
    still gives the same outputs on ``x`` (1e-5 of their range); otherwise nothing is. ``keep`` names layers whose
    output must stay what it is: a convolution among them is left alone.
    """
    kept = {module.get_submodule(name) for name in keep}
    pairs = _pairs(module, x, kept)
    homes = {child: (parent, name) for parent in module.modules() for name, child in parent.named_children()}
    with ExitStack() as undo:
        expected = _outputs(module, x)
        for conv, norm in pairs:
            undo.enter_context(_child(*homes[conv], fuse_conv_bn_eval(conv, norm)))
            undo.enter_context(_child(*homes[norm], nn.Identity()))
        found = _outputs(module, x)
        if not all(_close(a, b) for a, b in zip(expected, found, strict=True)):
            undo.close()
            pairs = []
        yield len(pairs)


def _pairs(
    module: nn.Module, x: Tensor, kept: Collection[nn.Module]
) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions whose very output a norm reads, both called once; not those whose output a kept layer yields."""
    made: dict[int, tuple[Tensor, nn.Conv2d]] = {}
    needed: set[int] = set()
    calls: dict[nn.Module, int] = {}
    found: list[tuple[int, nn.Conv2d, nn.BatchNorm2d]] = []

    def listen(part: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls[part] = calls.get(part, 0) + 1
        if part in kept:
            needed.add(id(output))
        if type(part) is nn.Conv2d and _is_plain(part):
            made[id(output)] = (output, part)  # holding the tensor keeps its id its own
        elif (
            type(part) is nn.BatchNorm2d
            and part.running_mean is not None
            and inputs
            and id(inputs[0]) in made
        ):
            found.append((id(inputs[0]), made[id(inputs[0])][1], part))

    with torch.no_grad(), ExitStack() as undo:
        for part in module.modules():
            if part in kept or isinstance(part, nn.Conv2d | nn.BatchNorm2d):
                undo.callback(part.register_forward_hook(listen).remove)
        module(x)
    return [
        (conv, norm) for key, conv, norm in found if calls[conv] == calls[norm] == 1 and key not in needed
    ]


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether its weight is a parameter of its own, not made anew at each call as weight norm does."""
    return "weight" in conv._parameters and not conv._forward_pre_hooks


@contextmanager
def _child(parent: nn.Module, name: str, child: nn.Module) -> Iterator[None]:
    before = getattr(parent, name)
    child.train(before.training)
    for parameter in child.parameters():
        parameter.requires_grad_(False)
    setattr(parent, name, child)
    try:
        yield
    finally:
        setattr(parent, name, before)


def _outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    with torch.no_grad(), unfused():
        return [leaf for leaf in tree_leaves(module(x)) if isinstance(leaf, Tensor)]


def _close(expected: Tensor, found: Tensor) -> bool:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return float((expected - found).abs().max() if expected.numel() else 0.0) <= 1e-5 * max(scale, 1e-12)


@contextmanager
def exact() -> Iterator[None]:
    """Full float32 on a GPU: no TF32, and algorithms that give the same bits twice."""
    switches = [
        (torch.backends.cudnn, "deterministic", True),
        _full_precision(torch.backends.cuda.matmul, torch.backends.cuda.matmul),
        _full_precision(torch.backends.cudnn, getattr(torch.backends.cudnn, "conv", None)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _full_precision(old: Any, new: Any) -> tuple[Any, str, object]:
    """The switch, name and value that turn TF32 off, in whichever of PyTorch's two ways the process has used."""
    try:
        _ = old.allow_tf32
    except RuntimeError:  # set by ``fp32_precision``; PyTorch refuses to mix them
        return new, "fp32_precision", "ieee"
    return old, "allow_tf32", False
