"""Run a network from the output of one layer on, whatever its graph: what came before is answered from memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from xcli.errors import MemoryExhausted, ModelError
from xcli.execution import Execution
from xcli.hooks import first_tensor, swapped, unfused, with_tensor


@dataclass
class _Call:
    """One finished call of a module outside of which no other finished call lies."""

    module: nn.Module
    depth: int
    output: Any


@dataclass(frozen=True)
class _Kept:
    """A stored tensor: the same for all images, or with an entry an image; one that is never read has a first only."""

    tensor: Tensor
    entries: Literal["none", "each", "first"]

    def of(self, image: Tensor) -> Tensor:
        """What it is for copies of the images ``image`` (M,)."""
        match self.entries:
            case "none":
                return self.tensor.clone()  # what runs again may change it in place
            case "each":
                return entries(self.tensor, image)
            case _:
                return self.tensor.expand(len(image), *self.tensor.shape[1:])


class _Watch(TorchDispatchMode):
    """Note which stored tensors are read by operations that a replay will run again, and whether one of these
    changes the layer's output in place.

    A replay skips whole module calls, but the functional code of the layer's parents (an addition, a
    concatenation) and everything after the layer runs again. What only skipped calls read is never looked at, so
    the replay keeps one image's value of it and hands out a view of that.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder
        self.read: set[int] = set()
        self.overwritten = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.recorder.runs_again:
            touched = {*map(_storage, _tensors((args, kwargs)))}
            self.read |= touched | self.recorder.copied(touched)  # as now: it may be changed in place later
            if func._schema.is_mutable and touched & {*map(_storage, _tensors(self.recorder.given))}:
                self.overwritten = True
        return func(*args, **(kwargs or {}))


class _Recorder:
    """Follow one forward pass up to ``layer`` and keep the outermost calls that finished before it."""

    def __init__(self, root: nn.Module, layer: str) -> None:
        self.names = {part: name for name, part in root.named_modules()}
        self.layer = root.get_submodule(layer)
        self.ancestors = {
            root,
            *(root.get_submodule(layer.rsplit(".", k)[0]) for k in range(1, layer.count(".") + 1)),
        }
        self.stack: list[nn.Module] = []
        self.calls: list[_Call] = []
        self.reached = False
        self.output: Any = None
        self.given: Any = None  # what the network went on with: held, so that its memory is not used again
        self.answer: Any = None

    @property
    def runs_again(self) -> bool:
        return self.reached or (bool(self.stack) and self.stack[-1] in self.ancestors)

    def enter(self, module: nn.Module, _inputs: tuple[Any, ...]) -> None:
        self.stack.append(module)

    def leave(self, module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        self.stack.pop()
        if self.reached:
            return
        depth = len(self.stack)
        self.calls = [call for call in self.calls if call.depth <= depth]  # its inner calls need no memory
        if module is self.layer:
            self.reached, self.output, self.given = True, _mapped(torch.clone, output), output
        else:
            self.calls.append(_Call(module, depth, output))

    def copied(self, storages: set[int]) -> set[int]:
        """Replace what is kept in ``storages`` by copies; returns where the copies are stored."""
        copies: set[int] = set()

        def apart(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in storages:
                return tensor
            twin = tensor.clone()
            copies.add(_storage(twin))
            return twin

        for call in self.calls:
            call.output = _mapped(apart, call.output)
        return copies


def _recorded(module: nn.Module, layer: str, x: Tensor, execution: Execution) -> tuple[_Recorder, _Watch]:
    """One forward pass: what was called before the layer, and what is done with it after."""
    recorder = _Recorder(module, layer)
    watch = _Watch(recorder)
    with torch.no_grad(), unfused(), ExitStack() as undo:
        for part in module.modules():
            undo.callback(part.register_forward_pre_hook(recorder.enter).remove)
            undo.callback(part.register_forward_hook(recorder.leave).remove)
        with watch:
            recorder.answer = execution.run(module, x)
    if not recorder.reached:
        raise ModelError(f"layer {layer!r} does not run in a forward pass")
    return recorder, watch


class Replay:
    """``module`` as a function of the output of ``layer``: ``replay(acts, image)`` equals the whole forward pass.

    Built from one forward pass on ``x`` (B, C, H, W). ``acts`` (M, ...) stands in for the layer's output of
    copies of the images ``image`` (M,), an index into the batch. A skip connection around the layer sees each
    copy's own image. Costs the part of the network after the layer only.

    Args:
        grows: which of the tensors stored on the way hold an entry an image, as ``studied`` found; ``None`` studies.
    Raises:
        ModelError: as ``studied``, or another number of tensors is stored than was then.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: str,
        x: Tensor,
        execution: Execution | None = None,
        grows: tuple[bool, ...] | None = None,
    ) -> None:
        execution = execution or Execution()
        grows = studied(module, layer, x, execution) if grows is None else grows
        self.module, self.layer, self.x = module, layer, x
        recorder, watch = _recorded(module, layer, x, execution)
        self.output, self.overwritten = recorder.output, watch.overwritten
        stored = [*_tensors([call.output for call in recorder.calls])]
        if len(stored) != len(grows):
            raise ModelError(_apart(layer))
        entry = {id(x): True} | dict(zip(map(id, stored), grows, strict=True))

        def keep(tensor: Tensor) -> _Kept:
            if not entry[id(tensor)]:
                return _Kept(tensor, "none")
            read = _storage(tensor) in watch.read
            return _Kept(tensor, "each") if read else _Kept(tensor[:1].clone(), "first")

        self.input = keep(x)
        self.answers: dict[nn.Module, list[Any]] = {}
        for call in recorder.calls:
            self.answers.setdefault(call.module, []).append(_mapped(keep, call.output))

    def __call__(self, acts: Tensor, image: Tensor) -> Any:
        given = with_tensor(self.output, acts.clone() if self.overwritten else acts)
        with unfused(), ExitStack() as undo:
            for part, outputs in self.answers.items():
                undo.enter_context(swapped(part, _answer(part.forward, outputs, image)))
            undo.enter_context(swapped(self.module.get_submodule(self.layer), lambda *_a, **_k: given))
            return self.module(self.input.of(image))

    def activations(self) -> Tensor:
        """The layer's own output on ``x``, (B, ...)."""
        return first_tensor(self.output, self.layer)


def _answer(own: Callable[..., Any], outputs: list[Any], image: Tensor) -> Callable[..., Any]:
    """A forward that gives what is stored, call by call, and then is ``own``, called again after the layer."""
    left = iter(outputs)

    def forward(*args: Any, **named: Any) -> Any:
        for output in left:
            return _mapped(lambda kept: kept.of(image), output, _Kept)
        return own(*args, **named)

    return forward


def studied(module: nn.Module, layer: str, x: Tensor, execution: Execution) -> tuple[bool, ...]:
    """Which of the tensors that a replay from ``layer`` stores hold an entry an image, in the order of storing.

    Seen in passes over one image and over two that differ, and checked by replaying the two in reverse order: what
    cannot be told apart while recording shows there.

    Raises:
        ModelError: the rest of the network depends on what came before in a way that cannot be kept.
        MemoryExhausted: two images do not fit at once.
    """
    ramp = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype, device=x.device)
    pair = torch.cat([x[:1], x[:1].flip(2, 3) / 2 + ramp])

    def study() -> tuple[Tensor, ...]:
        one, two = (_recorded(module, layer, part, execution)[0] for part in (pair[:1], pair))
        kept = [[*_tensors([call.output for call in own.calls])] for own in (one, two)]
        if len(kept[0]) != len(kept[1]):
            raise ModelError(_apart(layer))
        grows = [
            a.ndim > 0 and a.ndim == b.ndim and len(a) == 1 and len(b) == 2
            for a, b in zip(*kept, strict=True)
        ]
        replay = Replay(module, layer, pair, execution, tuple(grows))
        turned = torch.tensor([1, 0])
        with torch.no_grad():
            found = execution.run(lambda acts: replay(acts, turned), entries(replay.activations(), turned))
        before, now = [*_tensors(two.answer)], [*_tensors(found)]
        if len(before) != len(now) or not all(map(partial(_turned, execution), before, now)):
            raise ModelError(_apart(layer))
        return (torch.tensor(grows, dtype=torch.bool),)

    found = execution.attempt(study)
    if found is None:
        raise MemoryExhausted(
            f"running the network from layer {layer!r} on takes room for two inputs at once; use a smaller input size "
            "or another device"
        )
    return tuple(found[0].tolist())


def _turned(execution: Execution, before: Tensor, now: Tensor) -> bool:
    """Whether ``now`` is ``before`` with its two entries exchanged, or as it was where it has no entry an image."""
    if before.shape != now.shape:
        return False
    if not before.is_floating_point():
        return True
    expected = before.flip(0) if before.ndim and len(before) == 2 else before
    near = 1e-8 if before.dtype == torch.float64 else 1e-4
    near = 2e-2 if execution.precision or before.dtype in (torch.float16, torch.bfloat16) else near
    bound = near * float(before.nan_to_num(0, 0, 0).abs().max()) + 1e-12 if before.numel() else 0.0
    return torch.allclose(expected, now, rtol=near, atol=bound, equal_nan=True)


def _apart(layer: str) -> str:
    return (
        f"the network cannot be run from layer {layer!r} on: its parts do not keep images apart or change each other's "
        "outputs; name another layer"
    )


def entries(tensor: Tensor, index: Tensor) -> Tensor:
    """A copy of ``tensor[index]`` in its memory layout: whole entries at once where they lie in order, which is three
    times as quick as picking them by indices (and a hundred times slower where they do not)."""
    index = index.to(tensor.device)
    return tensor.index_select(0, index) if tensor.is_contiguous() else tensor[index]


def _mapped(fn: Callable[[Any], Any], value: Any, kind: type = Tensor) -> Any:
    if isinstance(value, kind):
        return fn(value)
    if isinstance(value, dict):
        twin = copy(value)  # of the same class, whose entries may be attributes too
        for key, entry in value.items():
            twin[key] = _mapped(fn, entry, kind)
        return twin
    if isinstance(value, tuple | list):
        entries = [_mapped(fn, entry, kind) for entry in value]
        return value._make(entries) if hasattr(value, "_make") else type(value)(entries)
    return value


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _tensors(entry)
