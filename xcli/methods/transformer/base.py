"""What the transformer family shares: where the tokens of a network lie, and which of them its answer is read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn, Self

from torch import Tensor

from xcli.errors import ModelError
from xcli.grids import Grid
from xcli.layers import Layer, Layers
from xcli.methods.base import Method, Need
from xcli.registry import options


@dataclass(frozen=True)
class Tokens:
    """The T tokens that attend to each other: the grid of those that stand for patches, after ``grid.prefix`` others,
    and those that the answer is read from, as the last attention gives them."""

    grid: Grid
    count: int
    read: tuple[int, ...]

    def result(self, like: Tensor) -> Tensor:
        """The tokens that are the result, in equal shares: (1, T)."""
        row = like.new_zeros(1, self.count)
        for place in self.read:
            row[:, place] = 1 / len(self.read)
        return row

    def maps(self, values: Tensor) -> Tensor:
        """A number a token (m, T) on the grid of the patches, (m, h, w)."""
        return values[:, self.grid.prefix :].reshape(-1, self.grid.h, self.grid.w)


@options
class AttentionMethod(Method):
    """A method on the attention probabilities A (H, T, T) of all layers, H heads and T tokens; its maps are on the grid
    of the patch tokens, (N, h, w), raw.

    Every token has to attend to every other, in all layers to the same ones; a network that attends within windows,
    pools its tokens on the way or by attention, or has no attention is refused by the name of the module.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"attention", "gradients"})

    def looks_at(self, layers: Layers) -> tuple[Layer, ...]:
        self.tokens(layers)
        return ()

    def pinned(self, layers: Layers, names: Sequence[str] = ()) -> Self:
        self.looks_at(layers)
        return self

    def tokens(self, layers: Layers) -> Tokens:
        """The tokens that attend.

        Raises:
            ModelError: the network attends in another way than this family can follow.
        """
        if not layers.attention:
            self.refuse(
                "this network has no attention (a softmax over tokens by which means are taken), and it explains "
                "attention"
            )
        known = {one.module for one in layers.attention}
        for operation in layers.operations:
            if operation.kind == "attention" and operation.module not in known:
                self.refuse(
                    f"module {operation.module!r} also attends to keys of its own, which stand for no token"
                )
        count = layers.attention[0].shape[1]
        for one in layers.attention:
            where = f"module {one.module!r}" if one.module else "the network itself"
            _, queries, keys = one.shape
            if one.windows != 1:
                self.refuse(
                    f"{where} attends within windows, so no matrix says how all tokens attend to each other"
                )
            if queries != keys:
                self.refuse(f"in {where}, {queries} tokens attend to {keys} others, not to each other")
            if queries != count:
                self.refuse(
                    f"in {where}, {queries} tokens attend to each other, in module "
                    f"{layers.attention[0].module!r} {count}"
                )
        grids = [row.grid for row in layers.rows if row.grid is not None and row.grid.layout == "tokens"]
        grid = next((grid for grid in grids if grid.prefix + grid.h * grid.w == count), None)
        if grid is None:
            self.refuse(
                f"no layer says how the {count} tokens of module {layers.attention[0].module!r} lie in the picture"
            )
        return Tokens(grid, count, layers.attention[-1].read)

    def refuse(self, why: str) -> NoReturn:
        """Refuse the network."""
        raise ModelError(
            f"{self.name}: {why}; gradcam takes any layer with a map, integrated-gradients any network"
        )
