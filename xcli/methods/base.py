"""What every explanation method shares: options, the declaration of its needs, and the finish of its maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from xcli.layers import Layer, Layers
from xcli.methods.steps import Step, applied
from xcli.methods.steps import resized as resized
from xcli.registry import options
from xcli.score import Score
from xcli.targets import Scale

Need = Literal["gradients", "pixels", "layer", "attention", "rectifiers", "structure"]
Reduce = Literal["none", "sum", "mean", "max", "l2"]

OK, FLAT, NOT_FINITE, FAILED = range(4)


@dataclass(frozen=True)
class Attribution:
    """A raw map, (N, h, w) or (N, C, H, W), and what the method adds for each row: name -> (N,)."""

    map: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Tensor | Attribution) -> Attribution:
        """What ``Method.attribute`` gave, in the long form."""
        return cls(found) if isinstance(found, Tensor) else found


@options
class Method(ABC):
    """One way to say which pixels a score depends on; its fields are its options.

    Class attributes say what the pipeline has to know before a run: ``scale``, the number that the paper explains;
    ``needs``, what must be there (``gradients``, those at the ``pixels`` of the images themselves, a ``layer`` with a
    map, ``attention``, a network of ``rectifiers``, the ``structure`` as written: no batch norm folded away); ``cost``
    in passes an image; ``source``, the paper; ``presets``, the named definitions of other implementations as option
    defaults; ``small``, options at which the method runs in milliseconds.
    """

    name: ClassVar[str]
    scale: ClassVar[Scale] = "logit"
    needs: ClassVar[frozenset[Need]] = frozenset()
    cost: ClassVar[str]
    source: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    small: ClassVar[Mapping[str, object]] = {}

    reduce: Annotated[
        Reduce,
        Field(
            description="how a map with colour channels becomes one number a pixel; other maps stay as they are"
        ),
    ] = "sum"
    upsampling: Annotated[
        Literal["bilinear", "bicubic", "nearest"],
        Field(description="how a map smaller than the input is brought to its size"),
    ] = "bilinear"
    post_process: Annotated[
        tuple[Step, ...],
        Field(
            description="what becomes of the map after reduce, step by step: absolute, positive, "
            "{smooth: pixels}, {low_pass: cycles}, {resize: mode}"
        ),
    ] = ()

    def looks_at(self, layers: Layers) -> tuple[Layer, ...]:
        """The layers whose outputs the method uses; many use none.

        Raises:
            ModelError: the network has no such layer, or the method cannot be computed on it.
        """
        return ()

    def draws_from(self) -> tuple[str, ...]:
        """Names of the folders of further images that the method explains with, "" for one that is still to be named;
        most use none."""
        return ()

    def pinned(self, layers: Layers, names: Sequence[str] = ()) -> Self:
        """The same method with its layers by name: those that were chosen before, else as found in this network."""
        return self

    @abstractmethod
    def attribute(self, score: Score, x: Tensor) -> Tensor | Attribution:
        """Explain every row of ``score`` on the images ``x``, (B, C, H, W): maps of N >= B rows.

        Returns (N, h, w) or (N, C, H, W), raw: signed where the method is, never normalised.
        """

    def explain(self, score: Score, x: Tensor, size: tuple[int, int] | None = None) -> Attribution:
        """``attribute``, then channels reduced, the steps of ``post_process``, and the map brought to ``size`` (H, W);
        ``None`` keeps its grid."""
        found = Attribution.of(self.attribute(score, x))
        maps = reduced(found.map, self.reduce)
        maps = applied(self.post_process, maps, (x.shape[-2], x.shape[-1]), self.upsampling)
        return Attribution(resized(maps, size, self.upsampling), found.extras)


def reduced(maps: Tensor, how: Reduce) -> Tensor:
    """Colour channels of (N, C, H, W) brought to one number a pixel (N, H, W); ``max`` is of absolute values."""
    if maps.ndim == 3 or how == "none":
        return maps
    match how:
        case "sum":
            return maps.sum(1)
        case "mean":
            return maps.mean(1)
        case "max":
            return maps.abs().amax(1)
        case "l2":
            norm: Tensor = torch.linalg.vector_norm(maps, dim=1)  # has a derivative at 0
            return norm


def map_status(maps: Tensor) -> Tensor:
    """One code a row: 0 usable, 1 flat (all pixels equal, so it points nowhere), 2 not finite. (N,) uint8."""
    rows = maps.flatten(1)
    flat = rows.amax(1) == rows.amin(1)
    finite = torch.isfinite(rows).all(1)
    return torch.where(finite, torch.where(flat, FLAT, OK), NOT_FINITE).to(torch.uint8)
