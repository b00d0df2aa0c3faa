"""What comes before a layer, run once for a batch and kept: the rest of the network, for copies of its images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from xcli.execution import Execution
from xcli.hooks import with_tensor
from xcli.replay import Replay, entries, studied


class Prefix:
    """The replays of a batch, one a micro-batch: ``prefix(acts, image)`` for copies of any images of the batch.

    Args:
        tails: what ``studied`` found, by layer; what is missing is added.
    Raises:
        ModelError, MemoryExhausted: as for ``studied``.
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
        if layer not in tails:
            tails[layer] = studied(module, layer, x, execution)

        def record(part: Tensor, index: Tensor) -> tuple[Tensor, ...]:
            replay = Replay(module, layer, part, execution, tails[layer])
            self.replays.append(replay)
            self.starts.append(int(index[0]))
            return (replay.activations(),)

        (self.acts,) = execution.each(record, x, torch.arange(len(x)))
        for replay, start in zip(self.replays, self.starts, strict=True):  # one copy of the outputs is enough
            part = self.acts[start : start + len(replay.x)]
            replay.output = with_tensor(replay.output, part)

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
            self.replays[number](entries(acts, place), image[place] - self.starts[number])
            for number, place in zip(present, places, strict=True)
        ]
        back = torch.cat(places).argsort()
        return tree_map(lambda *parts: _joined(parts, back), *answers)


def _joined(parts: tuple[Any, ...], back: Tensor) -> Any:
    if not isinstance(parts[0], Tensor) or not parts[0].ndim:
        return parts[0]
    return torch.cat(parts)[back.to(parts[0].device)]
