"""One forward pass over a batch, recorded once for the choice of targets and for every method of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xcli.errors import ModelError
from xcli.execution import Execution
from xcli.hooks import recording


class Forward:
    """One forward pass over a batch, with the outputs of ``layers`` kept and the graph starting at the first.

    It serves the choice of targets and every gradient method of the run: with targets known, each costs one backward
    pass of the tail. ``graph=False`` keeps the outputs alone.
    """

    def __init__(
        self, module: nn.Module, x: Tensor, layers: Sequence[str], execution: Execution, *, graph: bool
    ) -> None:
        self.x, self.layers, self.graph = x, tuple(layers), graph
        self.outputs: list[Any] = []
        self.acts: list[dict[str, Tensor]] = []
        self.bounds = [0]

        def run(part: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad(), recording(module, self.layers, graph=graph) as kept:
                self.outputs.append(execution.run(module, part))
            self.acts.append(require_all(kept, self.layers))
            self.bounds.append(self.bounds[-1] + len(part))
            return (part[:0],)

        execution.each(run, x)

    def covers(self, x: Tensor, layers: Sequence[str], *, graph: bool) -> bool:
        """Whether this pass, still held, ran on ``x`` and kept what is asked."""
        held = bool(self.acts) and x is self.x
        return held and bool(layers) and set(layers) <= set(self.layers) and (self.graph or not graph)

    def drop(self) -> None:
        """Let the kept graph go."""
        self.outputs.clear()
        self.acts.clear()


def require_all(kept: dict[str, Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
    """``kept``, once every layer is in it."""
    missing = [name for name in layers if name not in kept]
    if missing:
        raise ModelError(f"layer {missing[0]!r} does not run in a forward pass; name another layer")
    return kept
