"""How passes run: in micro-batches that are halved where memory runs out, in the precision that was asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    a whole batch did not fit together, none is kept any more (``keep_graphs``). ``cuts`` has the number of inputs after
    each that was too many, ``refusal`` what the allocator said last.
    """

    micro_batch: int = 64
    precision: torch.dtype | None = None
    keep_graphs: bool = True
    cuts: dict[int, int] = field(default_factory=dict, repr=False)
    refusal: str = ""
    parts: dict[int, Execution] = field(default_factory=dict, repr=False)

    def part(self, inputs: Tensor) -> Execution:
        """How passes of a part of the network run, which takes ``inputs`` (B, ...): remembered by their size.

        A pass of a part costs less than one of the whole, so more go at once, until a call's own cost no longer
        counts: 16 MB of them on the CPU, whose caches are small (and glibc hands buffers above 32 MB back), else 512.
        """
        size = max(1, inputs[0].numel() * inputs.element_size())
        budget = 2**24 if inputs.device.type == "cpu" else 2**29
        more = max(self.micro_batch, budget // size)
        return self.parts.setdefault(size, replace(self, micro_batch=more, cuts={}, parts={}))

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
            self.refusal = numbers_of(error)
        return None

    def halve(self, size: int) -> None:
        """Remember that ``size`` inputs at once were too many."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size <= 1:
            raise MemoryExhausted(
                f"out of memory with a single input{self.refusal}; use a smaller input size or another device"
            )
        self.cut(size, size // 2)

    def cut(self, size: int, to: int) -> None:
        """Go on with at most ``to`` inputs at once, as ``size`` were too many."""
        self.micro_batch = self.cuts[size] = to

    @property
    def halved(self) -> tuple[int, int] | None:
        """How many inputs at once were too many at first, and how many are not; of a part, where the whole fits."""
        if self.cuts:
            return max(self.cuts), min(self.cuts.values())
        return max((part.halved for part in self.parts.values() if part.halved is not None), default=None)


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


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """Name ``what`` where memory runs out inside the block. Raises ``MemoryExhausted``."""
    try:
        yield
    except MemoryExhausted as error:
        raise MemoryExhausted(f"{what}: {error}") from None
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise MemoryExhausted(
            f"{what}: out of memory{numbers_of(error)}; use a smaller input size or another device"
        ) from None


_AMOUNTS = (
    (r"[Tt]ried to allocate ([\d.]+) ?([KMGT]i?B|bytes)", "{} more were asked for"),
    (r"of which ([\d.]+) ([KMGT]i?B|bytes) is free", "{} are free"),
    (r"total capacity of ([\d.]+) ([KMGT]i?B|bytes)", "of {} in all"),
)
_UNITS = {"bytes": 1e-6, "KiB": 1024e-6, "MiB": 1.048576, "GiB": 1073.741824, "TiB": 1099511.627776}


def numbers_of(error: RuntimeError) -> str:
    """`` (2147 MB more were asked for, 61 MB are free, of 8000 MB in all)``, as far as ``error`` says."""
    said = []
    for pattern, text in _AMOUNTS:
        if found := re.search(pattern, str(error)):
            said.append(text.format(f"{float(found[1]) * _UNITS.get(found[2], 1.0):.0f} MB"))
    return f" ({', '.join(said)})" if said else ""


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
