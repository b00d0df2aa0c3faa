"""Run a network from the output of one layer on, whatever its graph: what came before is answered from memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from xcli.errors import ModelError
from xcli.execution import Execution
from xcli.hooks import first_tensor, swapped, unfused, with_tensor


@dataclass
class _Call:
    """One finished call of a module outside of which no other finished call lies."""

    module: nn.Module
    depth: int
    output: Any


class _Watch(TorchDispatchMode):
    """Note which stored tensors are read by operations that a replay will run again.

    A replay skips whole module calls, but the functional code of the layer's parents (an addition, a
    concatenation) and everything after the layer runs again. What only skipped calls read is never looked at, so
    the replay hands out a view of one image there instead of copying one image's value for every copy.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder
        self.read: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.recorder.runs_again:
            touched = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
            self.read |= touched | self.recorder.copied(
                touched
            )  # as it is now: it may be changed in place later
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
            self.reached, self.output = True, _mapped(torch.clone, output)
        else:
            self.calls.append(_Call(module, depth, output))

    def copied(self, storages: set[int]) -> set[int]:
        """Replace what is kept in ``storages`` by copies; returns where the copies are stored."""
        copies: set[int] = set()

        def copy(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in storages:
                return tensor
            twin = tensor.clone()
            copies.add(twin.untyped_storage().data_ptr())
            return twin

        for call in self.calls:
            call.output = _mapped(copy, call.output)
        return copies


def _recorded(module: nn.Module, layer: str, x: Tensor, execution: Execution) -> tuple[_Recorder, set[int]]:
    """One forward pass: what was called before the layer, and where the tensors are stored that are read again."""
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
    return recorder, watch.read


class Replay:
    """``module`` as a function of the output of ``layer``: ``replay(acts, image)`` equals the whole forward pass.

    Built from one forward pass on ``x`` (B, C, H, W). ``acts`` (M, ...) stands in for the layer's output of
    copies of the images ``image`` (M,), an index into the batch. A skip connection around the layer sees each
    copy's own image. Costs the part of the network after the layer only.

    Args:
        tails: for each layer, which of the stored tensors hold an entry an image, in the order in which they were
            stored; what is not there is found out, and checked, by two further passes and noted.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: str,
        x: Tensor,
        execution: Execution | None = None,
        tails: dict[str, tuple[bool, ...]] | None = None,
    ) -> None:
        self.module, self.layer, self.x = module, layer, x
        execution, tails = execution or Execution(), {} if tails is None else tails
        recorder, self.read = _recorded(module, layer, x, execution)
        self.calls, self.output = recorder.calls, recorder.output
        kept = [*_tensors([call.output for call in self.calls])]
        known = len(tails.get(layer, ())) == len(kept) and layer in tails
        if not known:
            tails[layer] = self._entry_an_image(kept, execution)
        own = (tensor for tensor, grows in zip(kept, tails[layer], strict=True) if grows)
        self.an_image_each = {id(x), *map(id, own)}
        if not known:
            try:
                self._verify(recorder.answer, execution)
            except ModelError:
                del tails[layer]
                raise

    def _entry_an_image(self, kept: list[Tensor], execution: Execution) -> tuple[bool, ...]:
        """Which stored tensors grow with the batch, seen in a second pass over another number of images."""
        other = self.x[:1] if len(self.x) > 1 else torch.cat([self.x, self.x])
        twin, _ = _recorded(self.module, self.layer, other, execution)
        changed = [*_tensors([call.output for call in twin.calls])]
        return tuple(
            tensor.ndim > 0 and len(tensor) == len(self.x) and len(less) == len(other)
            for tensor, less in zip(kept, changed, strict=True)
        )

    def _verify(self, expected: Any, execution: Execution) -> None:
        """Replay the batch in reverse order once: what cannot be told apart while recording shows here.

        Raises:
            ModelError: the rest of the network depends on what came before in a way that cannot be kept.
        """
        turned = torch.arange(len(self.x)).flip(0)
        acts = self.activations()
        with torch.no_grad():
            found = execution.run(lambda turn: self(turn, turned), acts[turned.to(acts.device)])
        for before, now in zip(_tensors(expected), _tensors(found), strict=True):
            if before.ndim and before.shape == now.shape and len(before) == len(self.x):
                near = (
                    2e-2 if before.dtype in (torch.float16, torch.bfloat16) or execution.precision else 1e-4
                )
                bound = near * float(before.abs().max()) + 1e-12
                if not torch.allclose(
                    before[turned.to(before.device)], now, rtol=near, atol=bound, equal_nan=True
                ):
                    raise ModelError(
                        f"the network cannot be run from layer {self.layer!r} on: its parts do not keep images apart "
                        "or change each other's outputs; name another layer"
                    )

    def __call__(self, acts: Tensor, image: Tensor) -> Any:
        given = with_tensor(self.output, acts.clone())  # what follows may change it in place
        with unfused(), ExitStack() as undo:
            for part, outputs in self._answers():
                undo.enter_context(swapped(part, self._answer(part, outputs, image)))
            undo.enter_context(swapped(self.module.get_submodule(self.layer), lambda *_a, **_k: given))
            return self.module(self._for(image, self.x))

    def activations(self) -> Tensor:
        """The layer's own output on ``x``, (B, ...)."""
        return first_tensor(self.output, self.layer)

    def _answers(self) -> Iterator[tuple[nn.Module, list[Any]]]:
        grouped: dict[nn.Module, list[Any]] = {}
        for call in self.calls:
            grouped.setdefault(call.module, []).append(call.output)
        yield from grouped.items()

    def _answer(self, part: nn.Module, outputs: list[Any], image: Tensor) -> Callable[..., Any]:
        own, left = part.forward, iter(outputs)

        def forward(*args: Any, **named: Any) -> Any:
            for output in left:
                return _mapped(lambda tensor: self._for(image, tensor), output)
            return own(*args, **named)  # called again after the layer

        return forward

    def _for(self, image: Tensor, stored: Tensor) -> Tensor:
        if id(stored) not in self.an_image_each:
            return stored
        if stored.untyped_storage().data_ptr() in self.read:
            return stored[image.to(stored.device)]
        return stored[:1].expand(len(image), *stored.shape[1:])


class Prefix:
    """The replays of a batch, one a micro-batch: ``prefix(acts, image)`` for copies of any images of the batch.

    Raises:
        ModelError: as for ``Replay``.
        MemoryExhausted: a single image does not fit.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: str,
        x: Tensor,
        execution: Execution,
        tails: dict[str, tuple[bool, ...]],
    ) -> None:
        self.replays: list[Replay] = []
        self.starts: list[int] = []

        def record(part: Tensor, index: Tensor) -> tuple[Tensor, ...]:
            replay = Replay(module, layer, part, execution, tails)
            self.replays.append(replay)
            self.starts.append(int(index[0]))
            return (replay.activations(),)

        (self.acts,) = execution.each(record, x, torch.arange(len(x)))

    def activations(self) -> Tensor:
        """The layer's own output on the batch, (B, ...)."""
        return self.acts

    def __call__(self, acts: Tensor, image: Tensor) -> Any:
        owner = torch.searchsorted(torch.tensor(self.starts), image, right=True) - 1  # (M,)
        present = owner.unique().tolist()
        if len(present) == 1:
            return self.replays[present[0]](acts, image - self.starts[present[0]])
        places = [(owner == number).nonzero()[:, 0] for number in present]
        answers = [
            self.replays[number](acts[place.to(acts.device)], image[place] - self.starts[number])
            for number, place in zip(present, places, strict=True)
        ]
        back = torch.cat(places).argsort()
        return tree_map(lambda *parts: _joined(parts, back), *answers)


def _joined(parts: tuple[Any, ...], back: Tensor) -> Any:
    if not isinstance(parts[0], Tensor) or not parts[0].ndim:
        return parts[0]
    return torch.cat(parts)[back.to(parts[0].device)]


def _mapped(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, dict):
        return {key: _mapped(fn, entry) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(fn, entry) for entry in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _tensors(entry)
