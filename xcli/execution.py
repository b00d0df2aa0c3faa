"""How passes run: in micro-batches that are halved where memory runs out, in the precision that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xcli.errors import MemoryExhausted


@dataclass
class Execution:
    """How forward passes run: at most ``micro_batch`` inputs at once, optionally in a lower ``precision``.

    Shared by all scores of a run: a micro-batch that did not fit is halved once and for all, and where the graphs of
    a whole batch did not fit together, none is kept any more (``keep_graphs``).
    """

    micro_batch: int = 64
    precision: torch.dtype | None = None
    keep_graphs: bool = True
    parts: dict[int, Execution] = field(default_factory=dict, repr=False)

    def part(self, inputs: Tensor) -> Execution:
        """How passes of a part of the network run, which takes ``inputs`` (B, ...): remembered by their size.

        A pass of a part costs less than one of the whole, so more go at once, until a call's own cost no longer
        counts: 16 MB of them on the CPU, whose caches are small (and glibc hands buffers above 32 MB back), else 512.
        """
        size = max(1, inputs[0].numel() * inputs.element_size())
        budget = 2**24 if inputs.device.type == "cpu" else 2**29
        more = max(self.micro_batch, budget // size)
        return self.parts.setdefault(size, replace(self, micro_batch=more, parts={}))

    def run(self, module: Callable[..., Any], *inputs: Tensor) -> Any:
        """``module(*inputs)``, under autocast where a precision is set."""
        if self.precision is None:
            return module(*inputs)
        with torch.autocast(inputs[0].device.type, dtype=self.precision):
            return module(*inputs)

    def each(self, fn: Callable[..., tuple[Tensor, ...]], *batched: Tensor) -> tuple[Tensor, ...]:
        """``fn`` over micro-batches of ``batched`` (split along dimension 0), its tensors concatenated.

        Where memory runs out, forward or backward, the micro-batch is halved and that piece runs again; ``fn`` must
        draw no random numbers, so a retry changes nothing.

        Raises:
            MemoryExhausted: a single input does not fit.
        """
        joined: list[_Joined] = []
        start, total = 0, len(batched[0])
        while start < total:
            size = min(self.micro_batch, total - start)
            pieces = [tensor[start : start + size] for tensor in batched]
            done = self.attempt(partial(fn, *pieces))
            if done is None:
                self.halve(size)
            else:
                joined = joined or [_Joined(-(-total // size)) for _ in done]
                for one, tensor in zip(joined, done, strict=True):
                    one.add(tensor)
                start += size
        return tuple(one.whole() for one in joined)

    def attempt(self, fn: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...] | None:
        """``fn()``, or ``None`` where memory ran out; by then the tensors of the failed pass are free again."""
        try:
            return fn()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        return None

    def halve(self, size: int) -> None:
        """Remember that ``size`` inputs at once were too many."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size <= 1:
            raise MemoryExhausted(
                "out of memory with a single input; use a smaller input size or another device"
            )
        self.micro_batch = max(1, size // 2)


class _Joined:
    """Tensors put together along dimension 0. Bare numbers are written into one buffer as they come: small tensors
    kept from each of many passes lie between the large ones of these, whose memory then cannot be used again."""

    def __init__(self, expected: int) -> None:
        self.expected, self.parts, self.length = expected, list[Tensor](), 0

    def add(self, part: Tensor) -> None:
        if part.ndim != 1 or part.requires_grad:
            self.parts.append(part)
            return
        end = self.length + len(part)
        if not self.parts or end > len(self.parts[0]):
            room = part.new_empty(max(end, self.expected * len(part), 2 * self.length))
            room[: self.length] = self.parts[0][: self.length] if self.parts else part[:0]
            self.parts = [room]
        self.parts[0][self.length : end] = part
        self.length = end

    def whole(self) -> Tensor:
        return self.parts[0][: self.length] if self.length else torch.cat(self.parts)


_REFUSALS = (
    "not enough memory",
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "_ALLOC_FAILED",
)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether ``error`` is an allocator saying no, on any device."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(sign in said for sign in _REFUSALS)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
