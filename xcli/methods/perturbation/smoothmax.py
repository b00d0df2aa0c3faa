"""Masks that are smooth by construction: at each pixel the soft maximum of a few numbers around it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pooling = Literal["softmax", "sum", "sigmoid"]

TEMPERATURE = 20.0
LEVEL = 3.0
"""What is subtracted under the logistic function of the pooling ``sigmoid``."""

CACHED = 2**23
"""Bytes of a piece of the table on a CPU, so that what is made of it stays in the last cache."""

TABLE = 2**28
"""Bytes that the table of the masks that are made together may have."""


class Pooled(NamedTuple):
    """Masks, and what their derivative needs.

    Attributes:
        mask: (M, H', W'), with the margin, in [0, 1].
        raw: the same before it was brought to [0, 1], as columns (H'W', m), for m masks at a time.
        total: with ``softmax`` its denominator, likewise.
    """

    mask: Tensor
    raw: Sequence[Tensor]
    total: Sequence[Tensor]


@dataclass(frozen=True)
class SmoothMask:
    r"""Masks of a picture from numbers p in [0, 1] on a coarse grid.

    .. math::
        m_u = \frac{\sum_i v_{ui}\, e^{20 v_{ui}}}{\sum_i e^{20 v_{ui}}}, \qquad
        v_{ui} = k\big(\|u - u_i\| / \sigma\big)\, p_i, \qquad k(z) = e^{-2 \max(0,\ z - 1/2)^2}

    over the (2 r + 1)^2 points u_i of the grid around the pixel u, r = 1 + ceil(``sigma`` / ``step``); points outside
    of the grid count with v = 0. ``pooling: sum`` is the sum of the v_ui, ``sigmoid`` the logistic function of
    20 times that sum less 3; all are brought to [0, 1]. Points are ``step`` pixels apart, ceil(H / step) x
    ceil(W / step) of them; a mask has a margin of ``sigma`` pixels (rounded) above and to the left of the picture, and
    about as much below and to the right, as the code of the authors has it (never less than the picture needs).

    How far a pixel is from a point depends on the pixel's place within its cell and on which neighbour the point is,
    so there are few different distances, about 500 by default: v and its exponential are computed once for each
    distance and point, and every pixel sums its own entries of that table.

    Attributes:
        size: (H, W) of the picture.
        step, sigma: pixels.
        device: where the masks are made.

    Source: Fong, Patrick and Vedaldi 2019, arXiv:1910.08485, section 3.2; kernel and temperature of their code.
    """

    size: tuple[int, int]
    step: int
    sigma: float
    pooling: Pooling
    device: torch.device

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers p along each side, (h, w)."""
        return (math.ceil(self.size[0] / self.step), math.ceil(self.size[1] / self.step))

    @property
    def outer(self) -> tuple[int, int]:
        """(H', W') of a mask with its margin."""
        return self.tables.outer

    @property
    def tables(self) -> Tables:
        """What depends on the geometry alone."""
        return tables(self.size, self.step, float(self.sigma), self.device)

    def cropped(self, masks: Tensor) -> Tensor:
        """Masks (M, H', W') without the margin: a view (M, H, W)."""
        margin, (height, width) = round(self.sigma), self.size
        return masks[:, margin : margin + height, margin : margin + width]

    def padded(self, grad: Tensor) -> Tensor:
        """The transpose of ``cropped``: (M, H, W) with zeros in the margin, (M, H', W')."""
        margin, (height, width) = round(self.sigma), self.size
        right, below = self.outer[1] - margin - width, self.outer[0] - margin - height
        return F.pad(grad, (margin, right, margin, below))

    # ---- the table --------------------------------------------------------------------------------------------

    def masks(self, p: Tensor) -> Pooled:
        """The masks of numbers p (M, h, w)."""
        raw: list[Tensor] = []
        totals: list[Tensor] = []
        for columns in self.columns(p):
            sums = self.sums(columns)
            if self.pooling == "softmax":
                total, weighed = sums
                totals.append(total)
                raw.append(weighed.div_(total))
            elif self.pooling == "sum":
                raw.append(sums[0])
            else:
                raw.append(sums[0].mul_(TEMPERATURE).sub_(LEVEL).sigmoid_())
        flat = torch.cat([part.T for part in raw]).clamp(0, 1)
        return Pooled(flat.unflatten(1, self.outer), raw, totals)

    def sums(self, p: Tensor) -> list[Tensor]:
        """Of each pixel, over the points around it, for p (hw, m): the sum of e^(20 v) and that of v e^(20 v), or that
        of v alone; (H'W', m) each."""
        known, soft = self.tables, self.pooling == "softmax"
        entries, points = len(known.kernel) * len(p), len(p)
        values = p.new_empty(entries + 1, p.shape[1])
        powers = torch.empty_like(values) if soft else values
        powers[-1], values[-1] = 1, 0  # of all points outside
        for first, last in self.pieces(p):
            value, power = (
                table[first * points : last * points].view(last - first, points, -1)
                for table in (values, powers)
            )
            torch.mul(known.kernel[first:last, None, None].to(p), p, out=value)
            if soft:
                torch.mul(value, TEMPERATURE, out=power).exp_()
                value.mul_(power)
        wanted = (powers, values) if soft else (values,)
        return [F.embedding_bag(known.reads, table, mode="sum") for table in wanted]

    def pull_back(self, p: Tensor, pooled: Pooled, grad: Tensor) -> Tensor:
        r"""The gradient at p (M, h, w) of what has the gradient ``grad`` (M, H', W') at the masks ``pooled`` of p.

        With g the gradient at the soft maximum, m its value and D its denominator,

        .. math::
            \frac{\partial}{\partial p_i} = \sum_q k_q\, e^{20 v_{qi}}
            \Big((1 + 20 v_{qi}) \sum_u \frac{g_u}{D_u} - 20 \sum_u \frac{g_u m_u}{D_u}\Big)

        over the distances q, and over the pixels u that have the point i at that distance. Where a mask was brought to
        [0, 1] it does not depend on p; at 0 and 1 themselves it does, as ``torch.clamp`` had it when the paper was
        written (where it ends there, a mask that is 0 can never rise again).
        """
        found, first = [], 0
        for number, (columns, raw) in enumerate(zip(self.columns(p), pooled.raw, strict=True)):
            count = columns.shape[1]
            own = grad[first : first + count].flatten(1).T
            own = own * ((raw >= 0) & (raw <= 1))
            if self.pooling == "softmax":
                own = own / pooled.total[number]
                own = torch.cat([own, own * raw], 1)
            elif self.pooling == "sigmoid":
                own = own * (TEMPERATURE * raw * (1 - raw))
            found.append(self.spread(columns, own.contiguous()).T)
            first += count
        whole: Tensor = torch.cat(found).unflatten(1, self.grid)
        return whole

    def spread(self, p: Tensor, weights: Tensor) -> Tensor:
        """The transpose of ``sums`` for p (hw, m): weights (H'W', 2m), or (H'W', m), brought to p, (hw, m)."""
        known, points = self.tables, len(p)
        total = torch.zeros_like(p)
        for first, last in self.pieces(p):
            start, end = known.bounds[first], known.bounds[last]
            offsets = known.starts[first * points : last * points] - start
            sums = F.embedding_bag(known.readers[start:end], weights, offsets, mode="sum")
            sums = sums.view(last - first, points, -1)
            kernel = known.kernel[first:last, None, None].to(p)
            if self.pooling == "softmax":
                plain, pulled = sums.chunk(2, 2)
                value = kernel * p * TEMPERATURE
                power = value.exp()
                sums = value.add_(1).mul_(plain).sub_(pulled, alpha=TEMPERATURE).mul_(power)
            total += sums.mul_(kernel).sum(0)
        return total

    def columns(self, p: Tensor) -> list[Tensor]:
        """p (M, h, w) as columns (hw, m), for as many masks at a time as have room in the table."""
        entry = 2 * len(self.tables.kernel) * math.prod(self.grid) * p.element_size()
        return [part.T.contiguous() for part in p.flatten(1).split(max(1, TABLE // entry))]

    def pieces(self, p: Tensor) -> Iterator[tuple[int, int]]:
        """Ranges of distances whose part of the table, for p (hw, m), is made at once."""
        count = len(self.tables.kernel)
        size = count if p.device.type != "cpu" else max(1, CACHED // (p.numel() * p.element_size()))
        for first in range(0, count, size):
            yield first, min(first + size, count)


# ---- what depends on the geometry alone --------------------------------------------------------------------------


class Tables(NamedTuple):
    """Entry ``q * hw + i`` of a table is that of distance q and point i; one more stands for points outside.

    Attributes:
        outer: (H', W') of a mask with its margin.
        kernel: (Q,) k of each distance, float64.
        reads: (H'W', (2 r + 1)^2) the entries that each pixel sums, int32.
        readers: the pixels that read each entry, one entry after the other, int32.
        starts: (Q hw,) where those of each entry start, int32.
        bounds: where those of each distance start, and the end.
    """

    outer: tuple[int, int]
    kernel: Tensor
    reads: Tensor
    readers: Tensor
    starts: Tensor
    bounds: Sequence[int]


@lru_cache(maxsize=4)
def tables(size: tuple[int, int], step: int, sigma: float, device: torch.device) -> Tables:
    """The tables for pictures of a size (H, W)."""
    radius, padding = 1 + math.ceil(sigma / step), 1 + math.ceil(2 * sigma / step)
    grid = [math.ceil(side / step) for side in size]
    cells = [
        # The picture and the margin before it have to fit, which a sigma below a step does not see to.
        max(points + 2 * (padding - radius), -(-(round(sigma) + side - 1) // step) + 1)
        for points, side in zip(grid, size, strict=True)
    ]
    outer = (step * (cells[0] - 1) + 1, step * (cells[1] - 1) + 1)
    near = torch.arange(2 * radius + 1) - padding  # points around a pixel, counted from the one of its cell
    away = torch.arange(step).double()[:, None] - sigma - step * near  # (step, 2 r + 1), pixels
    square = away[:, None, :, None].square() + away[None, :, None, :].square()
    square, which = square.unique(return_inverse=True)  # (Q,), (step, step, 2 r + 1, 2 r + 1)
    kernel = torch.exp(-2 * (square.sqrt() / sigma - 0.5).clamp_min(0).square())
    (top, rows), (left, columns) = (
        (torch.arange(side) % step, torch.arange(side)[:, None] // step + near) for side in outer
    )
    entry = which[top][:, left] * math.prod(grid)  # (H', W', 2 r + 1, 2 r + 1)
    entry += rows[:, None, :, None] * grid[1] + columns[None, :, None, :]
    inside = ((rows >= 0) & (rows < grid[0]))[:, None, :, None] & ((columns >= 0) & (columns < grid[1]))[
        None, :, None, :
    ]
    count = len(square) * math.prod(grid)
    reads = torch.where(inside, entry, count).flatten(2).flatten(0, 1)  # (H'W', (2 r + 1)^2)
    own = reads.flatten()
    order = own.argsort(stable=True)[: int(inside.sum())]
    starts = torch.bincount(own, minlength=count + 1)[:count].cumsum(0)
    starts = torch.cat([starts.new_zeros(1), starts])
    readers = (order // reads.shape[1]).int()
    return Tables(
        outer,
        kernel.to(device),
        reads.int().to(device),
        readers.to(device),
        starts[:-1].int().to(device),
        starts[:: math.prod(grid)].tolist(),
    )
