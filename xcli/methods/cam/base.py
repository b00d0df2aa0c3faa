"""What class activation maps share: their layer, their grid, and how several layers become one map."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from xcli.layers import Layer, Layers
from xcli.methods.base import Method, Need, resized
from xcli.registry import options
from xcli.score import Score


@options
class CAM(Method):
    """A map on the grid of one layer; on a transformer, of its patch tokens."""

    needs: ClassVar[frozenset[Need]] = frozenset({"layer"})

    layer: Annotated[
        str | tuple[str, ...],
        Field(
            description="auto (see xai layers), a module name, a list of them, or a wildcard such as layer*"
        ),
    ] = "auto"
    fusion: Annotated[
        Literal["mean", "max", "product"],
        Field(description="how the maps of several layers, each scaled to [0, 1], become one"),
    ] = "mean"

    def looks_at(self, layers: Layers) -> tuple[Layer, ...]:
        """The layers of ``layer``, each with a map.

        Raises:
            ModelError: one is unknown, runs more than once, or has no map.
        """
        found = layers.find(self.layer)
        for layer in found:
            layer.require_map()
        return found

    def pinned(self, layers: Layers, names: Sequence[str] = ()) -> Self:
        wanted = replace(self, layer=tuple(names)) if names else self
        return replace(self, layer=tuple(layer.name for layer in wanted.looks_at(layers)))


@options
class GradientCAM(CAM):
    """A map made from the activations A of a layer and the gradients G of the score there."""

    needs: ClassVar[frozenset[Need]] = frozenset({"layer", "gradients"})
    cost: ClassVar[str] = "1 forward + 1 backward of what follows the layer"

    relu: Annotated[
        bool, Field(description="keep what speaks for the class only; false gives the signed map")
    ] = True

    def attribute(self, score: Score, x: Tensor) -> Tensor:
        layers = self.looks_at(score.layers)
        acts, grads, _ = score.gradients(x, at=layers)
        pairs = zip(layers, acts, grads, strict=True)
        maps = [self.map(layer.maps(own), layer.maps(grad)) for layer, own, grad in pairs]
        return fused([one.relu() if self.relu else one for one in maps], self.fusion)

    @abstractmethod
    def map(self, acts: Tensor, grads: Tensor) -> Tensor:
        """The signed map (N, h, w) of activations and gradients (N, K, h, w)."""


def fused(maps: Sequence[Tensor], how: str) -> Tensor:
    """One map of several layers' (N, h, w): each divided by its largest absolute value, brought to the finest grid.

    A single map stays raw.
    """
    if len(maps) == 1:
        return maps[0]
    finest = max(((m.shape[-2], m.shape[-1]) for m in maps), key=lambda size: size[0] * size[1])
    scaled = [m / m.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(m.dtype).tiny) for m in maps]
    stack = torch.stack([resized(m, finest, "bilinear") for m in scaled])  # (layers, N, h, w)
    match how:
        case "mean":
            return stack.mean(0)
        case "max":
            return stack.amax(0)
        case _:
            return stack.prod(0)
