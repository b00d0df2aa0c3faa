"""One forward pass over a batch, recorded once for the choice of targets and for every method of the run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from xcli.errors import ModelError
from xcli.execution import Execution
from xcli.hooks import recording


class Forward:
    """One forward pass over a batch, with the outputs of ``layers`` kept and the graph starting at ``leaves``, or with
    ``pixels`` at the images.

    It serves the choice of targets and every gradient method of the run: with targets known, each costs one backward
    pass of what follows. Where memory does not suffice for the graphs of the whole batch, the outputs alone are kept.
    """

    def __init__(
        self,
        module: nn.Module,
        x: Tensor,
        layers: Sequence[str],
        execution: Execution,
        *,
        leaves: Collection[str] = (),
        pixels: bool = False,
    ) -> None:
        self.x, self.layers = x, tuple(layers)
        self.leaves: frozenset[str] = frozenset()
        self.pixels = False
        self.inputs: list[Tensor] = []
        self.outputs: list[Any] = []
        self.acts: list[dict[str, Tensor]] = []
        self.bounds = [0]

        def run(leaves: Collection[str], pixels: bool, part: Tensor) -> tuple[Tensor, ...]:
            own = part.detach().requires_grad_(pixels)
            with torch.set_grad_enabled(pixels), recording(module, self.layers, leaves=leaves) as kept:
                outputs = execution.run(module, own.clone() if pixels else own)  # it may be changed in place
            self.inputs.append(own)
            self.acts.append(require_all(kept, self.layers))
            self.outputs.append(outputs)
            self.bounds.append(self.bounds[-1] + len(part))
            return (part[:0],)

        if (leaves or pixels) and execution.keep_graphs:
            parts = x.split(execution.micro_batch)
            if all(execution.attempt(partial(run, leaves, pixels, part)) is not None for part in parts):
                self.leaves, self.pixels = frozenset(leaves), pixels
                return
            self.drop()
            execution.keep_graphs = False
        execution.each(partial(run, (), False), x)

    def covers(self, x: Tensor, layers: Sequence[str], *, graph: bool) -> bool:
        """Whether this pass, still held, ran on ``x`` and kept what is asked; the graph of no layer is the images'."""
        held = bool(self.acts) and x is self.x and (bool(layers) or self.pixels or not graph)
        return held and set(layers) <= (self.leaves if graph else set(self.layers))

    def settle(self) -> None:
        """Let the graph go, keep activations and outputs."""
        self.outputs = [tree_map(detached, outputs) for outputs in self.outputs]
        self.acts = [tree_map(detached, acts) for acts in self.acts]
        self.leaves, self.pixels = frozenset(), False
        self.inputs.clear()

    def drop(self) -> None:
        """Let the kept graph go."""
        self.outputs.clear()
        self.acts.clear()
        self.inputs.clear()
        del self.bounds[1:]


def detached(value: Any) -> Any:
    """A tensor without its graph; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def require_all(kept: dict[str, Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
    """``kept``, once every layer is in it."""
    missing = [name for name in layers if name not in kept]
    if missing:
        raise ModelError(f"layer {missing[0]!r} does not run in a forward pass; name another layer")
    return kept
