"""The engine of the perturbation family: what a network makes of thousands of altered copies of many pictures."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.methods.base import Attribution, Method, Need
from xcli.registry import options
from xcli.score import Score

Altered = Callable[[Tensor, Tensor], Tensor]
"""Copies (m, C, H, W) of the images ``image`` (m,), each altered as its number ``sample`` (m,) says; a pure function,
since a copy is made when its pass runs, and again where memory ran out."""

LOOK, UNITS = 128, 16
"""Passes and units of an image that have run when its map is first looked at; later a quarter more each time."""

ROUNDING = 16
"""Units of rounding of a map's largest number that no standard error is held to."""


def asked(score: Score, x: Tensor, image: Tensor, sample: Tensor, altered: Altered) -> Tensor:
    """The scores of altered copies: a table (N, S), S the largest of ``sample`` plus one; 0 where nothing was asked.

    Copies of all images share micro-batches of as many as are worth while, which nothing but memory bounds; only those
    of one micro-batch exist at once, and each is run once for all rows of its image.

    Args:
        x: the images (B, C, H, W).
        image, sample: (M,) which copies, those of an image together, images in order.
    """
    if not len(image):
        return x.new_zeros(len(score.image), 0)
    score = replace(score, execution=score.execution.part(x))
    values, copy, row = score.on(lambda index: altered(image[index], sample[index]), image)
    table = values.new_zeros(len(score.image), int(sample.max()) + 1)
    return table.index_put((row.to(values.device), sample[copy].to(values.device)), values)


def numbered(count: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """(image, sample) of ``count[i]`` samples of each of the images ``image`` (k,): (M,) each."""
    own = count[image]
    first = (own.cumsum(0) - own).repeat_interleave(own)
    return image.repeat_interleave(own), torch.arange(int(own.sum())) - first


def blended(x: Tensor, other: Tensor | None, image: Tensor, mask: Tensor) -> Tensor:
    """Copies (m, C, H, W) of the images ``image`` (m,), seen where ``mask`` (m, H, W) is 1, ``other`` where it is 0.

    ``other``: (B, C, H, W), or with sides of 1; ``None`` is zeros.
    """
    image = image.to(x.device)
    if other is None:
        return x[image] * mask[:, None]
    return torch.lerp(other[image], x[image], mask[:, None])


def by_image(image: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each image among those of the rows, ``image`` (n,), and which rows are its own, on the CPU. Images may differ in
    features and samples, and hold large matrices: they are estimated one after the other, all rows of one at once."""
    for one in image.unique_consecutive().tolist():
        yield one, (image == one).nonzero()[:, 0]


@options
class BlackBox(Method):
    """A method that asks the network for nothing but scores of pictures: any function of them will do."""

    needs: ClassVar[frozenset[Need]] = frozenset()


@dataclass(frozen=True)
class Estimate:
    """Maps (n, ...) of some rows, and for each the standard error (n,): the root of the mean over the map's cells, or
    features, of the squared standard errors, in the map's unit; and what the method adds, (n,) each."""

    map: Tensor
    error: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class Design(ABC):
    """The random copies of the images of one batch: how each is drawn, and what the scores say.

    Attributes:
        count: (B,) most passes of each image, on the CPU.
        unit: passes that belong together, such as the points of a design.
    """

    count: Tensor
    unit: int = 1

    @abstractmethod
    def altered(self, image: Tensor, sample: Tensor) -> Tensor:
        """See ``Altered``."""

    @abstractmethod
    def estimate(self, row: Tensor, scores: Tensor) -> Estimate:
        """The maps of rows (n,) from the scores (n, S) of their first S copies (of fewer, where ``count`` ends)."""


Until = Annotated[
    dict[Literal["stable"], Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]],
    Field(min_length=1),
]
"""When an image needs no more samples: the standard error of its map, as a share of its range, that is enough."""


@options
class Sampling(BlackBox):
    """A method that estimates its map from random copies, drawn for each image from the run's seed and its key.

    ``extras`` have for each row ``forwards``, the copies of its image that were run, and ``standard_error``: how far,
    by the scatter of the samples, the map lies from that of endless sampling, as the root of the mean square over its
    cells or features, in the map's unit. ``until: {stable: 0.05}`` stops for an image when the standard error of each
    of its rows is at most 0.05 of the range of the map, that is, when drawing on would hardly move it; what the method
    is told to draw is then the most. Looks at a running estimate favour a lucky one a little, the less the more samples
    run. The error falls with the root of their number: 0.01 takes 25 times as many as 0.05.
    """

    until: Annotated[
        Until | None,
        Field(
            description="{stable: 0.05}: stop for an image when its map's standard error is at most this share of the "
            "map's range; null: draw all"
        ),
    ] = None

    @abstractmethod
    def design(self, score: Score, x: Tensor) -> Design:
        """The copies of the images ``x`` and what is to be made of their scores."""

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        design, stable = self.design(score, x), self.until["stable"] if self.until else None
        device, rows = x.device, len(score.image)
        maps, extras = x.new_zeros(rows, *x.shape[2:]), dict[str, Tensor]()
        forwards = torch.zeros(rows)
        left, done, table = score.image.unique(), 0, x.new_zeros(rows, 0)
        while len(left):
            end = int(design.count.max()) if stable is None else next_look(done, design.unit)
            count = design.count.clamp(max=end)
            image, sample = numbered((count - done).clamp_min(0), left)
            new = asked(score, x, image, sample, partial(later, design, done))
            table, done = torch.cat([table, new], 1), end
            row = torch.isin(score.image, left).nonzero()[:, 0]
            own = row.to(device)
            found = design.estimate(row, table[own])
            whole = found.map.to(x.dtype)
            maps = whole if len(row) == rows else maps.index_copy(0, own, whole)
            for name, values in {"standard_error": found.error, **found.extras}.items():
                before = extras.get(name, x.new_zeros(rows))
                extras[name] = before.index_copy(0, own, values.to(x.dtype))
            forwards[row] = count[score.image[row]].to(forwards)
            spent = done >= design.count[left]
            left = left[
                ~(spent if stable is None else spent | settled(found, stable, score.image[row], left))
            ]
        return Attribution(maps, {"forwards": forwards.to(device), **extras})


def later(design: Design, done: int, image: Tensor, sample: Tensor) -> Tensor:
    """The copies after the first ``done`` of each image."""
    return design.altered(image, sample + done)


def next_look(done: int, unit: int) -> int:
    """How many passes an image has run when it is looked at next, in whole units."""
    more = done // 4 if done else UNITS * unit
    return done + unit * math.ceil(max(LOOK, more) / unit)


def settled(found: Estimate, stable: float, image: Tensor, left: Tensor) -> Tensor:
    """Of the images ``left`` (k,), whether the maps of all rows, which are of images ``image`` (n,), stand still."""
    low, high = found.map.flatten(1).aminmax(dim=1)
    rounding = ROUNDING * torch.finfo(low.dtype).eps * torch.maximum(high, -low)  # all that a flat map has
    still = found.error <= stable * (high - low) + rounding  # (n,), False for NaN
    moving = image[~still.cpu()]  # what runs next depends on it: a GPU has to wait here, once a look
    return ~torch.isin(left, moving)
