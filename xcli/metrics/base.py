"""What every metric shares: what it may consume, what it gives, in which direction it is good."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from xcli.methods.base import Need
from xcli.registry import options
from xcli.score import Score
from xcli.targets import Scale

Direction = Literal["higher", "lower"]
Consumed = Literal["map", "x", "score", "truth", "method", "module", "models"]
Floats = NDArray[np.floating[Any]]

Explain = Callable[[Score, Tensor], Tensor]
"""A method as a metric sees it: the maps (N, H, W) of the rows of a score, in the unit that the method explains, on
images (B, C, H, W). The images may be others than those of the run, the score may be ``retarget`` or ``using``."""

Watched = Annotated[Scale, Field(description="the number that is watched while the input changes")]


@dataclass(frozen=True)
class Truth:
    """Where the explained object really is, on the grid of the input.

    Attributes:
        mask: (N, H, W), bool: the pixels that show what row i explains.
        known: (N,), bool: whether its image has annotations of it; where not, a metric is NaN.
        pixel: (N, 2), float: height and width of an input pixel in pixels of the original image.
    """

    mask: Tensor
    known: Tensor
    pixel: Tensor


@dataclass(frozen=True)
class Measured:
    """What a metric gives for N rows.

    Attributes:
        values: (N,), NaN where the metric is not defined; ``None`` for one that is a single number a run.
        curve: (N, S + 1), the steps behind each value, or whatever ``Metric.summary`` needs of each row.
        fraction: (S + 1,), the abscissa of ``curve``, the same for every row and batch.
        extras: name -> (N,), further numbers of each row.
    """

    values: Tensor | None
    curve: Tensor | None = None
    fraction: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@options
class Metric:
    """One way to say how good a map is; its fields are its options.

    A metric is a function ``measure`` whose parameters say what it consumes, and it is given nothing else:

    - ``map`` (N, H, W): the raw maps, one a row, at the input's size;
    - ``x`` (B, C, H, W): the normalised images; row i is about ``x[score.image[i]]``;
    - ``score``: the function explained, bound to B images and N >= B rows (``xcli.score.Score``);
    - ``truth``: where the object is (``Truth``);
    - ``method``: the method that made the maps (``Explain``), to explain other inputs with;
    - ``module``: the network, to make changed copies of for ``score.using``; never to be changed itself;
    - ``models``: further scores, the same rows seen by other checkpoints of the network.

    A row's value depends on that row alone: not on its batch, its company, or the order.

    Class attributes: ``direction``, which way is better; ``bounds``, the range of its values (None: open); ``cost``
    in passes a row; ``source``, the paper; ``presets``, the definitions of other implementations as option defaults;
    ``needs``, as for methods (``structure``: no batch norm folded away); ``small``, options at which it takes
    milliseconds on an image of 64 x 64.
    """

    name: ClassVar[str]
    consumes: ClassVar[tuple[Consumed, ...]]
    direction: ClassVar[Direction]
    bounds: ClassVar[tuple[float | None, float | None]]
    cost: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    small: ClassVar[Mapping[str, object]] = {}

    measure: ClassVar[Callable[..., Measured]]

    def summary(self, values: Floats | None, curve: Floats | None, target: NDArray[Any]) -> float | None:
        """The one number of a run, from all its rows: values (rows,), curve (rows, S + 1), class (rows,).

        ``None`` where the mean of the values says it all.
        """
        return None
