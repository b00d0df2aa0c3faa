"""LeGrad: to which patches attention would have to turn for the score that each layer already has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.backward import Blocks
from xcli.layers import Layer, Layers, Row
from xcli.methods.transformer.base import AttentionMethod
from xcli.registry import method
from xcli.score import Score


@method("legrad")
class LeGrad(AttentionMethod):
    r"""To which patches more attention would raise the score, asked of each layer by itself.

    .. math:: M = \frac{1}{L} \sum_l \frac{1}{H T} \sum_{h, i}
        \mathrm{ReLU}\left(\frac{\partial s^l}{\partial A_{l,h,i,\cdot}}\right)

    where s^l is what the network would answer if its tokens Z^l after block l were the last: what follows the blocks
    (norm, pooling, head) applied to them. Columns of class, distillation and register tokens are left out. (N, h, w),
    not negative. Unit: that of the score per unit of attention.

    ``pooled: mean`` puts the mean of all tokens in the place of each before what follows reads them, so that a class
    token answers with that mean: what the authors' code does for networks with a class token, whose class token means
    little in early layers. ``own``: the network reads Z^l as it reads its last tokens. ``layers``: all blocks, or the
    last n (the authors' code: 2 unless told otherwise).

    One forward pass; a block is the outermost module with a single attention. Blocks have to hand tokens (B, T, C) on,
    each to the next as they are; others are refused.

    Source: Bousselham et al. 2024, arXiv:2404.03214, with the definition of their code, but that maps are not brought
    to [0, 1]. ``preset: torchcam`` is the same, on the blocks that it is given.
    """

    cost: ClassVar[str] = "1 forward + 1 backward through half of each block"
    source: ClassVar[str] = "Bousselham et al. 2024, arXiv:2404.03214"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"torchcam": {"pooled": "mean", "layers": "all"}}

    layers: Annotated[
        Literal["all"] | Annotated[int, Field(ge=1)],
        Field(description="all blocks with attention, or the last so many"),
    ] = "all"
    pooled: Annotated[
        Literal["mean", "own"],
        Field(
            description="what is read of the tokens of each layer: their mean, or what the network itself reads"
        ),
    ] = "mean"

    def looks_at(self, layers: Layers) -> tuple[Layer, ...]:
        super().looks_at(layers)
        self.blocks(layers)
        return ()

    def blocks(self, layers: Layers) -> tuple[str, ...]:
        """The modules whose tokens are read, as they run.

        Raises:
            ModelError: the network has no such modules.
        """
        places = [one.module for one in layers.attention]
        if self.layers != "all" and self.layers > len(places):
            self.refuse(f"layers: {self.layers} is more than the {len(places)} blocks of this network")
        rows = {row.name: row for row in layers.rows}
        chosen = places if self.layers == "all" else places[-self.layers :]
        return tuple(self.block(place, places, rows) for place in chosen)

    def block(self, place: str, places: Sequence[str], rows: Mapping[str, Row]) -> str:
        """The outermost module with the attention of ``place`` and no other."""
        steps = place.split(".")
        outer = [".".join(steps[:depth]) for depth in range(1, len(steps))]
        alone = [name for name in outer if sum(other.startswith(f"{name}.") for other in places) == 1]
        if not alone:
            self.refuse(
                f"no module holds the attention of module {place!r} and no other, so blocks are no modules"
            )
        row = rows[alone[0]]
        if row.calls != 1 or row.grid is None or row.grid.layout != "tokens":
            told = f"of shape {row.shape}" if row.calls == 1 else f"in {row.calls} calls"
            self.refuse(f"module {row.name!r}, a block, gives outputs {told}, not tokens (B, T, C) once")
        return row.name

    def attribute(self, score: Score, x: Tensor) -> Tensor:
        tokens, blocks = self.tokens(score.layers), Blocks(self.blocks(score.layers), self.read)

        def fold(_: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
            found = torch.stack([grad.relu().mean((1, 2)) for grad in grads]).mean(0)  # (m, T)
            return (tokens.maps(found),)

        (maps,) = score.attended(x, fold, blocks=blocks)
        return maps

    def read(self, tokens: Tensor) -> Tensor:
        """What the network reads of the tokens (m, T, C) of a layer, in their place."""
        return tokens if self.pooled == "own" else tokens.mean(1, keepdim=True).expand_as(tokens)
