"""How passes run: in micro-batches that are halved where memory runs out, in the precision that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
        parts: list[tuple[Tensor, ...]] = []
        start, total = 0, len(batched[0])
        while start < total:
            size = min(self.micro_batch, total - start)
            pieces = [tensor[start : start + size] for tensor in batched]
            done = self.attempt(partial(fn, *pieces))
            if done is None:
                self.halve(size)
            else:
                parts.append(done)
                start += size
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

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
