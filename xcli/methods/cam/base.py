"""What class activation maps share: their layers and grids, views of the picture, and how several maps become one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from xcli.layers import Layer, Layers
from xcli.methods.base import Attribution, Method, Need, resized
from xcli.methods.cam.spectra import Sign, first_component
from xcli.registry import options
from xcli.score import Score

Fusion = Annotated[
    Literal["mean", "max", "product"], Field(description="how the maps of several layers become one")
]
Normalise = Annotated[
    Literal["peak", "min-max", "tanh", "min-max-tanh", "none"],
    Field(
        description="how each map is scaled before it is combined with others: divided by its largest absolute value, "
        "taken to [0, 1], tanh of twice the first or the second, or not at all"
    ),
]

VIEWS = tuple(product((False, True), (0.9, 1.0, 1.1)))
"""Mirrored left to right or not, and the factor on the network's input: the views of ``aug_smooth``."""

GRAD_CAM: dict[str, object] = {"relu": True, "fusion": "mean", "normalise": "min-max", "fused_at": "input"}
"""How the grad-cam package finishes every map: rectified, min-max scaled, brought to the input's size, averaged."""

TORCH_CAM: dict[str, object] = {"relu": True, "fusion": "max", "normalise": "min-max", "fused_at": "finest"}
"""How torch-cam fuses: the largest of the min-max scaled maps, on the finest grid."""


@options
class Viewed(Method):
    """A method whose map can be averaged over views of the picture, each view's scaled as ``normalise`` says."""

    normalise: Normalise = "peak"
    aug_smooth: Annotated[
        bool, Field(description="mean over six views: mirrored or not, the input times 0.9, 1 and 1.1")
    ] = False

    def over_views(self, score: Score, x: Tensor) -> Attribution:
        """``attribution``, or its mean over six views where ``aug_smooth`` is set."""
        if not self.aug_smooth:
            return self.attribution(score, x)
        score, row = score.copies(torch.arange(len(x)).repeat_interleave(len(VIEWS)))
        found = self.attribution(score, torch.stack([seen(x, *view) for view in VIEWS], 1).flatten(0, 1))
        maps = scaled(resized(found.map, self.meeting(x), "bilinear"), self.normalise)
        mirrored = torch.tensor([mirror for mirror, _ in VIEWS])[score.image % len(VIEWS)].to(x.device)
        maps = torch.where(mirrored[:, None, None], maps.flip(2), maps)
        order = row.argsort(stable=True)

        def mean(values: Tensor) -> Tensor:
            averaged: Tensor = values[order.to(values.device)].unflatten(0, (-1, len(VIEWS))).mean(1)
            return averaged

        return Attribution(mean(maps), {name: mean(values) for name, values in found.extras.items()})

    @abstractmethod
    def attribution(self, score: Score, x: Tensor) -> Attribution:
        """The raw map of every row of ``score`` on the images ``x`` as they are, and what the method adds."""

    def meeting(self, x: Tensor) -> tuple[int, int] | None:
        """The size at which maps are combined; ``None``: as they are."""
        return None


@options
class CAM(Viewed):
    """A map on the grid of one layer; on a transformer, of its patch tokens.

    The map of one layer stays raw. Maps that are combined, of several layers or of the views of ``aug_smooth``, are
    first scaled as ``normalise`` says.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"layer"})

    layer: Annotated[
        str | tuple[str, ...],
        Field(
            description="auto (see xai layers), auto:3 (with those before it on finer grids), a module name, a list of "
            "them, or a wildcard such as layer*"
        ),
    ] = "auto"
    relu: Annotated[
        bool, Field(description="keep the positive part of each layer's map; false gives the signed map")
    ] = True
    fusion: Fusion = "mean"
    fused_at: Annotated[
        Literal["finest", "input"], Field(description="the grid on which the maps of several layers meet")
    ] = "finest"

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

    def attribute(self, score: Score, x: Tensor) -> Tensor:
        return self.over_views(score, x).map

    def attribution(self, score: Score, x: Tensor) -> Attribution:
        maps = self.maps(score, x, self.looks_at(score.layers))
        positive = [one.relu() if self.relu else one for one in maps]
        return Attribution(fused(positive, self.fusion, self.normalise, self.meeting(x)))

    def meeting(self, x: Tensor) -> tuple[int, int] | None:
        return (x.shape[-2], x.shape[-1]) if self.fused_at == "input" else None

    @abstractmethod
    def maps(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        """The raw signed map (N, h, w) of each layer, h x w its grid."""


@options
class WeightedCAM(CAM):
    """A map that sums weighted channels."""

    eigen_smooth: Annotated[
        bool,
        Field(description="the first principal component of the weighted channels instead of their sum"),
    ] = False
    sign: Sign = "peak"

    def maps(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        for channels in self.channels(score, x, layers):
            yield first_component(channels, self.sign) if self.eigen_smooth else channels.sum(1)

    @abstractmethod
    def channels(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        """The weighted channels (N, K, h, w) of each layer."""


@options
class GradientCAM(WeightedCAM):
    """Channels weighed by what the activations A of a layer and the gradients G of the score there say."""

    needs: ClassVar[frozenset[Need]] = frozenset({"layer", "gradients"})
    cost: ClassVar[str] = "1 forward + 1 backward of what follows the layer"

    def channels(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        acts, grads, _ = score.gradients(x, at=layers)
        for layer, own, grad in zip(layers, acts, grads, strict=True):
            yield self.weighted(layer.maps(own), layer.maps(grad))

    @abstractmethod
    def weighted(self, acts: Tensor, grads: Tensor) -> Tensor:
        """The channels A, weighed by the gradients: (N, K, h, w), as both of these are."""


def seen(x: Tensor, mirror: bool, factor: float) -> Tensor:
    """A view of the images: mirrored left to right or not, and multiplied."""
    return (x.flip(3) if mirror else x) * factor


def scaled(maps: Tensor, how: str) -> Tensor:
    """Maps (N, h, w), each brought to a range of its own; a map of zeros stays one."""
    tiny = torch.finfo(maps.dtype).tiny
    if how == "none":
        return maps
    if how.startswith("min-max"):
        maps = maps - maps.amin((1, 2), keepdim=True)
    peak = maps / maps.abs().amax((1, 2), keepdim=True).clamp_min(tiny)
    return (2 * peak).tanh() if how.endswith("tanh") else peak


def fused(
    maps: Sequence[Tensor], how: str, normalise: str = "peak", size: tuple[int, int] | None = None
) -> Tensor:
    """One map of several layers' (N, h, w): each scaled on its own grid, then brought to ``size``, the finest grid
    where it is ``None``. A single map stays raw."""
    if len(maps) == 1:
        return maps[0]
    finest = max(((m.shape[-2], m.shape[-1]) for m in maps), key=lambda grid: grid[0] * grid[1])
    stack = torch.stack([resized(scaled(m, normalise), size or finest, "bilinear") for m in maps])
    match how:
        case "mean":
            return stack.mean(0)
        case "max":
            return stack.amax(0)
        case _:
            return stack.prod(0)
