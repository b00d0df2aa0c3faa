"""What the gradient family shares: maps at the pixels with their colours apart, and sums over many copies of a
picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from xcli.errors import ConfigError, ModelError
from xcli.layers import Layer, Layers
from xcli.methods.base import Method, Need, Reduce
from xcli.registry import options
from xcli.score import Score

INPUT = "input"

LayerName = Annotated[
    str,
    Field(description="input, auto (see xai layers), or the name of a module that has a map", min_length=1),
]

Reduced = Annotated[
    Reduce, Field(description="how the colours of a pixel become one number; max is of absolute values")
]


@options
class PixelMethod(Method):
    """A method with a number for each colour of each pixel, (N, C, H, W), before ``reduce``; or, where its ``layer`` is
    not the input, for each channel of each cell there."""

    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})

    def pinned(self, layers: Layers, names: Sequence[str] = ()) -> Self:
        self.looks_at(layers)
        return self


@options
class LayerMethod(PixelMethod):
    """A pixel method that can look at the output of a layer in place of the input."""

    cost: ClassVar[str] = "1 forward + 1 backward, to the input or the layer"

    layer: LayerName = INPUT

    def __post_init__(self) -> None:
        own = "pixels" if self.layer == INPUT else "layer"
        object.__setattr__(self, "needs", self.needs | {own})

    def looks_at(self, layers: Layers) -> tuple[Layer, ...]:
        if self.layer == INPUT:
            return ()
        found = layers.find(self.layer)
        if len(found) != 1:
            raise ModelError(f"{self.name} looks at one layer; {self.layer!r} names {len(found)}")
        found[0].require_map()
        return found

    def pinned(self, layers: Layers, names: Sequence[str] = ()) -> Self:
        wanted = replace(self, layer=names[0]) if names else self
        return replace(wanted, layer=next((layer.name for layer in wanted.looks_at(layers)), INPUT))

    def acts_and_grads(self, score: Score, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the method looks at and the gradient of the score there, (N, C, H, W) or (N, K, h, w) each."""
        layers = self.looks_at(score.layers)
        (acts,), (grads,), _ = score.gradients(x, at=layers)
        return (layers[0].maps(acts), layers[0].maps(grads)) if layers else (acts, grads)


def beside(method: Method, score: Score, folder: str, x: Tensor) -> Tensor:
    """The pictures (R, C, H, W) of ``folder``, which the images ``x`` are compared with.

    Raises:
        ConfigError: they are not there, or of another size than the images.
    """
    given = score.picture(folder)
    if given.shape[1:] != x.shape[1:]:
        raise ConfigError(
            f"{method.name}: the pictures to compare with are {tuple(given.shape[1:])}, the images "
            f"{tuple(x.shape[1:])}; they have to be of one size"
        )
    return given.to(x)


@dataclass(frozen=True)
class Round:
    """Some copies of every image that a score has a row about, in the order of the images.

    Attributes:
        score: explains the copies, each for every row of its image.
        image, sample: (M,) the image of each copy, and its number among the copies of that image.
        order: (P,) the rows of ``score``, sorted by the row of the whole score that they stand for, then by sample.
    """

    score: Score
    image: Tensor
    sample: Tensor
    order: Tensor
    count: int

    def of_rows(self, values: Tensor) -> Tensor:
        """What belongs to the rows of ``score`` (P, ...), for each row of the whole one: (N, count, ...)."""
        ordered: Tensor = values[self.order.to(values.device)].unflatten(0, (-1, self.count))
        return ordered


def rounds(score: Score, total: int) -> Iterator[Round]:
    """``total`` copies of each image, as many at once as a micro-batch holds: memory does not grow with ``total``."""
    own = score.image.unique()
    first = 0
    while first < total and len(own):
        count = min(total - first, max(1, score.execution.micro_batch // len(own)))
        image = own.repeat_interleave(count)
        copies, row = score.copies(image)
        sample = torch.arange(first, first + count).repeat(len(own))
        yield Round(copies, image, sample, row.argsort(stable=True), count)
        first += count
