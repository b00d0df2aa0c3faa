"""Noisy linear imputation without the noise: what the neighbours of removed pixels suggest they were."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import repeat
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import splu
from torch import Tensor

from xcli import multigrid

Solver = Literal["auto", "exact", "multigrid"]
Grid = NDArray[Any]

TOLERANCE = 1e-6
"""Error that the multigrid solver stops at, as a share of an image's range."""

WEIGHTS = tuple(1.0 if i and j else 2.0 for i, j in multigrid.OFFSETS)
"""Those of a pixel's neighbours, in twelfths."""

LEAF = 4
"""Side of the blocks of pixels that nested dissection divides no more."""


def impute(x: Tensor, removed: Tensor, solver: Solver = "auto") -> tuple[Tensor, Tensor]:
    r"""Replace every removed pixel by the weighted mean of its neighbours, those that are removed too included.

    .. math:: y_i = \sum_{j \sim i} w_{ij} y_j \Big/ \sum_{j \sim i} w_{ij}

    over the up to eight neighbours j inside the image, w = 1/6 for the four nearest and 1/12 for the diagonal ones;
    pixels that are not removed are kept. One sparse, symmetric, positive definite system an image, shared by its
    channels. Where all of an image is removed, nothing determines it: it becomes its mean colour. Solvers: ``exact``,
    a sparse factorisation on the CPU; ``multigrid``, iterations on the device of ``x``, to an error of ``TOLERANCE``;
    ``auto``, the first for images on the CPU and the second for others.

    Args:
        x: images (m, C, H, W), float.
        removed: (m, H, W), bool.

    Returns:
        the images (m, C, H, W); and for each (m,) an estimate of the largest error of a pixel, as a share of the range
        of the image's values: the size of the solver's last correction.
    Source: Rong et al. 2022, arXiv:2202.00449, section 4.2.
    """
    if not len(x):
        return x, x.new_zeros(0)
    emptied = removed.flatten(1).all(1)[:, None, None]  # (m, 1, 1)
    unknown = (removed & ~emptied)[:, None]  # (m, 1, H, W)
    wide = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
    middle = torch.where(unknown, 0, wide).sum((2, 3), keepdim=True) / (~unknown).sum((2, 3), keepdim=True)
    b = suggested(torch.where(unknown, 0, wide - middle)) * unknown
    extent = wide.amax((1, 2, 3)) - wide.amin((1, 2, 3))
    extent = torch.where(extent > 0, extent, 1)
    exact = solver == "exact" or (solver == "auto" and x.device.type == "cpu")
    y, error = factorised(unknown, b) if exact else iterated(unknown, b, TOLERANCE * extent)
    filled = torch.where(unknown, (y + middle).to(x.dtype), x)
    filled = torch.where(emptied[:, None], x.mean((2, 3), keepdim=True), filled)
    return filled, (error / extent).to(x.dtype)


def suggested(y: Tensor) -> Tensor:
    """The weighted sum of each pixel's neighbours, zeros outside, in twelfths: (..., H, W).

    In twelfths the weights are whole numbers, (1, 2, 1) x (1, 2, 1) without the middle, and exact in any precision.
    """
    h, w = y.shape[-2:]
    padded = F.pad(y, (1, 1, 1, 1))
    rows = padded[..., :h, :] + 2 * padded[..., 1 : 1 + h, :] + padded[..., 2:, :]
    return rows[..., :w] + 2 * rows[..., 1 : 1 + w] + rows[..., 2:] - 4 * y


# ---- iterated ---------------------------------------------------------------------------------------------------


def iterated(unknown: Tensor, b: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Solve for the ``unknown`` pixels (m, 1, H, W) by multigrid: (m, C, H, W) and an error an image (m,)."""
    there = unknown.to(b.dtype)
    h, w = b.shape[2:]
    padded = F.pad(there, (1, 1, 1, 1))
    around = [padded[:, 0, 1 + i : 1 + i + h, 1 + j : 1 + j + w] for i, j in multigrid.OFFSETS]
    weight = there.new_tensor(WEIGHTS)[:, None, None]
    stencil = -weight * torch.stack(around, 1)
    stencil[:, 4] = suggested(torch.ones_like(b[0, 0]))
    return multigrid.solve(stencil * there, b, goal)


# ---- factorised -------------------------------------------------------------------------------------------------


def factorised(unknown: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Solve for the ``unknown`` pixels (m, 1, H, W) by sparse factorisations, one a thread at a time."""
    masks, sides = unknown[:, 0].cpu().numpy(), b.cpu().double().numpy()
    total = suggested(torch.ones(b.shape[2:], dtype=torch.float64)).numpy()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = list(pool.map(solved, masks, sides, repeat(total)))
    y = torch.from_numpy(np.stack([y for y, _ in found]))
    error = torch.tensor([error for _, error in found], dtype=b.dtype)
    return y.to(b), error.to(b.device)


def solved(unknown: Grid, b: Grid, total: Grid) -> tuple[Grid, float]:
    """Solve for the ``unknown`` pixels (H, W) given b (C, H, W): y (C, H, W) and the size of its last correction."""
    y = np.zeros_like(b)
    order = dissected(*unknown.shape)
    pixel = order[unknown.ravel()[order]]  # (n,)
    if not len(pixel):
        return y, 0.0
    matrix = system(unknown, pixel, total)
    side = b.reshape(len(b), -1)[:, pixel].T  # (n, C)
    factors = splu(
        matrix, permc_spec="NATURAL", diag_pivot_thresh=0.0, panel_size=4, options={"SymmetricMode": True}
    )  # panels this narrow are the fastest here
    first = factors.solve(side)
    correction = factors.solve(side - matrix @ first)
    y.reshape(len(b), -1)[:, pixel] = (first + correction).T
    return y, float(np.abs(correction).max())


def system(unknown: Grid, pixel: Grid, total: Grid) -> csc_matrix:
    """The matrix (n, n) of the unknown pixels in the order of ``pixel`` (n,), the sums of their weights ``total`` on
    its diagonal and the negative weights beside it; symmetric, so that its rows are its columns."""
    count, width = len(pixel), unknown.shape[1] + 2
    number = np.full((unknown.shape[0] + 2, width), -1, dtype=np.int32)
    at = pixel // unknown.shape[1] * width + pixel % unknown.shape[1] + width + 1  # places on the padded grid
    number.ravel()[at] = np.arange(count, dtype=np.int32)
    steps = np.array([i * width + j for i, j in multigrid.OFFSETS])
    entries = number.ravel()[at[:, None] + steps]  # (n, 9), -1 for no unknown
    weights = np.broadcast_to(np.negative(WEIGHTS), (count, 9)).copy()
    weights[:, 4] = total.ravel()[pixel]
    there = entries >= 0
    starts = np.concatenate([[0], there.sum(1).cumsum()]).astype(np.int32)
    return csc_matrix((weights[there], entries[there], starts), shape=(count, count))


@cache
def dissected(height: int, width: int) -> Grid:
    """All pixels of a grid (HW,) in the order of nested dissection: two halves, then the line between them.

    Eliminated in this order, the pixels of any mask fill the factors little.
    """

    def order(grid: Grid) -> list[Grid]:
        if grid.shape[0] < grid.shape[1]:
            grid = grid.T
        if grid.shape[0] <= LEAF:
            return [grid.ravel()]
        middle = len(grid) // 2
        return [*order(grid[:middle]), *order(grid[middle + 1 :]), grid[middle]]

    return np.concatenate(order(np.arange(height * width).reshape(height, width)))
