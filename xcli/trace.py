"""One forward pass of a network, call by call: what the survey of its layers listens to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xcli.errors import ModelError
from xcli.grids import Grid, infer_grid
from xcli.models import find_logits

_POOLING = (nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Attention:
    """One attention of a network: the module that calls for it, its probabilities' shape of one picture (H, T, S), in
    how many windows, and the tokens (of T) whose means the answer depends on."""

    module: str
    shape: tuple[int, int, int]
    windows: int
    read: tuple[int, ...]


@dataclass
class Alive:
    """Share of the cells of one tensor that received a gradient; ``None`` where no gradient came by."""

    share: Tensor | None = None


@dataclass
class Call:
    """One finished module call."""

    name: str
    module: nn.Module
    shape: tuple[int, ...] | None
    grid: Grid | None
    plain: bool  # the output is a tensor, not a container of one
    passes: bool  # the output is the input, or a view of it
    node: Any  # where the output was made in the autograd graph
    entry: Tensor | None  # what a module with own parameters and without sub-calls read
    alive: Alive = field(default_factory=Alive)

    def may_be_default(self) -> bool:
        if (
            self.grid is None
            or not self.name
            or not self.plain
            or self.passes
            or isinstance(self.module, _POOLING)
        ):
            return False
        return self.grid.layout == "NCHW" or not isinstance(self.module, nn.Linear)


@dataclass
class _Open:
    """A module call that has begun: its tensors, their versions, and whether other modules were called within."""

    module: nn.Module
    inputs: list[Tensor]
    versions: list[int]
    inner: bool = False


class Trace:
    """Hooks on every module of ``root`` for one forward pass; a context manager that removes them."""

    def __init__(self, root: nn.Module, x: Tensor) -> None:
        self.names = {part: name for name, part in root.named_modules()}
        self.batch, self.size = x.shape[0], (x.shape[-2], x.shape[-1])
        self.calls: list[Call] = []
        self.stack: list[_Open] = []
        self.patches: list[tuple[int, int]] = []
        self.lengths: set[int] = set()
        self.alive: dict[tuple[Any, int], Alive] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        try:
            for part in self.names:
                if isinstance(part, torch.jit.ScriptModule):
                    raise ModelError("TorchScript modules take no hooks, so their layers cannot be used")
                self.handles.append(part.register_forward_pre_hook(self.begin, with_kwargs=True))
                self.handles.append(part.register_forward_hook(self.end, prepend=False))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def running(self) -> str:
        """The name of the module that runs now, "" for the network itself."""
        return self.names[self.stack[-1].module] if self.stack else ""

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if self.stack:
            self.stack[-1].inner = True
        self.stack.append(_Open(module, inputs, [t._version for t in inputs]))

    def end(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        opened = self.stack.pop()
        while opened.module is not module:  # a call within it failed, and its parent went on
            opened = self.stack.pop()
        entry = None
        if not opened.inner and next(module.parameters(recurse=False), None) is not None:
            entry = next((t for t in opened.inputs if t.requires_grad), None)
        t = _first_tensor(output)
        if t is None:
            self.calls.append(Call(self.names[module], module, None, None, False, False, None, entry))
            return
        call = Call(
            name=self.names[module],
            module=module,
            shape=tuple(t.shape[1:]),
            grid=self.grid(t),
            plain=t is output,
            passes=_passes(opened, t),
            node=t.grad_fn,
            entry=entry,
        )
        self.calls.append(call)
        if call.may_be_default() and t.grad_fn is not None:
            call.alive = self.watched(t, call.grid)

    def grid(self, t: Tensor) -> Grid | None:
        if t.dim() < 3 or t.shape[0] != self.batch:
            return None
        grid = infer_grid(tuple(t.shape[1:]), self.size, self.patches, self.lengths)
        if grid is None:
            return None
        if grid.layout == "tokens":
            self.lengths.add(t.shape[1])
        elif (grid.h, grid.w) not in self.patches[-1:]:
            self.patches.append((grid.h, grid.w))
        return grid

    def watched(self, t: Tensor, grid: Grid | None) -> Alive:
        """Listen to the gradient of ``t`` as it is now (a later in-place operation does not matter)."""
        key = (t.grad_fn, t.output_nr)
        if key not in self.alive and grid is not None:
            alive = self.alive[key] = Alive()

            def listen(gradient: Tensor) -> None:
                touched = (grid.maps(gradient) != 0).any(1).any(0)  # (h, w)
                alive.share = touched.float().mean()

            t.register_hook(listen)
        return self.alive[key]

    def differentiate(self, outputs: Any, output: str | None, pixels: Tensor) -> Call | None:
        """Send a random gradient back from the head's input to the pixels; the head, if there is one."""
        try:
            answers = [find_logits(outputs, output)]
        except ModelError:
            answers = _tensors(outputs)
        answers = [t for t in answers if t.requires_grad and t.grad_fn is not None]
        heads = _heads(self.calls, answers)
        starts = [call.entry for call in heads if call.entry is not None] or answers
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(t.shape, generator=generator).to(t) for t in starts]
        if any(t.grad_fn is not None for t in starts):
            torch.autograd.grad(starts, pixels, noise, allow_unused=True)
        return heads[-1] if heads else None


class Heeded:
    """The attention of a pass: what ``attention.Attended`` shows, by the module that runs."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.seen: list[tuple[str, torch.Size, list[Tensor]]] = []

    def see(self, probabilities: Tensor) -> None:
        """Note one, and listen for which of its rows a gradient comes by."""
        rows: list[Tensor] = []
        self.seen.append((self.trace.running(), probabilities.shape, rows))
        if probabilities.requires_grad:
            probabilities.register_hook(lambda grad: rows.append((grad != 0).any(3).any(1).any(0)))

    def attention(self) -> Iterator[Attention]:
        """All of them, as they ran; to be asked after the backward pass."""
        for name, (count, heads, tokens, keys), rows in self.seen:
            read = tuple(rows[0].nonzero()[:, 0].tolist()) if rows else ()
            yield Attention(name, (heads, tokens, keys), count // self.trace.batch, read)


def _behind(answers: Sequence[Tensor]) -> set[Any]:
    """What ``answers`` were computed from, in the autograd graph."""
    nodes, waiting = set(), [t.grad_fn for t in answers]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [before for before, _ in node.next_functions]
    return nodes


def _heads(calls: Sequence[Call], answers: Sequence[Tensor]) -> list[Call]:
    """The last module with parameters on the way to the answer, if it has one channel for each logit, and others there
    like it, whose answers are averaged: one a token of a distilled network."""
    nodes = _behind(answers)
    there = [call for call in calls if call.entry is not None and call.node in nodes]
    labels = answers[0].shape[-1] if len(answers) == 1 and answers[0].dim() == 2 else None
    if not there or not there[-1].shape:
        return []
    head, shape = there[-1], there[-1].shape
    if labels is not None and labels not in (shape[0], shape[-1]):
        return []
    alike = [call for call in there[:-1] if type(call.module) is type(head.module) and call.shape == shape]
    return [*alike, head]


def _passes(opened: _Open, t: Tensor) -> bool:
    storage = t.untyped_storage().data_ptr()
    return any(
        storage == own.untyped_storage().data_ptr() and own._version == version
        for own, version in zip(opened.inputs, opened.versions, strict=True)
    )


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    inner = (
        outputs.values()
        if isinstance(outputs, dict)
        else outputs
        if isinstance(outputs, tuple | list)
        else ()
    )
    return [t for part in inner for t in _tensors(part)]
