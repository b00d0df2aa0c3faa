"""Linear systems on the pixels of images by multigrid: batched, on whatever device the numbers are.

A matrix is a *stencil* (m, 9, h, w): what each pixel of image i has to do with the pixels around it, row by row, itself
in the middle (place 4). It is symmetric and positive definite on the *unknown* pixels, those whose middle is not zero,
and all other entries are zero; the channels of an image share it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

OFFSETS = tuple((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1))
"""Where the nine neighbours of a stencil lie."""

DIRECT = 64
"""Pixels of the coarsest grid, at most, where the system is solved directly."""

SHIFT = 1e-5
"""By how much of itself the diagonal of the coarsest grid is raised before it is inverted."""

FINEST, COARSER = (0.9,), (0.7, 1.0, 1.3)
"""Weights of the Jacobi steps before and, in reverse, after the correction from the next grid. Both sequences shrink
every error, for eigenvalues in (0, 2]; coarser grids cost little and take more steps."""


def solve(stencil: Tensor, b: Tensor, goal: Tensor, rounds: int = 40) -> tuple[Tensor, Tensor]:
    """Solve A y = b for each channel by conjugate gradients, preconditioned by a V-cycle.

    The cycle runs in float32, everything around it in the type of ``b``. It approximates the inverse of A, so what it
    makes of a residual approximates the error; an image in which that is within ``goal`` changes no more, whatever the
    others of the batch still need.

    Args:
        stencil: A, (m, 9, H, W).
        b: (m, C, H, W), zero where a pixel is not unknown.
        goal: (m,), the error to stop at.
        rounds: after so many the search ends in any case.

    Returns:
        y (m, C, H, W), zero where not unknown; and the size (m,) of the last correction, which estimates the error
        before it and, since a cycle removes more than half of an error, bounds the one after it.
    """
    grids = coarsened(stencil.float())
    unknown = stencil[:, 4:5] != 0

    def corrected(r: Tensor) -> Tensor:
        return cycle(grids, r.float()).to(r.dtype) * unknown

    y, r, p, before = torch.zeros_like(b), b, torch.zeros_like(b), torch.ones_like(b[:, :, :1, :1])
    z = corrected(r)
    for _ in range(rounds):
        unfinished = (size(z) > goal)[:, None, None, None]
        if not unfinished.any():
            break
        now = dot(r, z)
        p = z + ratio(now, before) * p
        q = applied(stencil, p)
        step = torch.where(unfinished, ratio(now, dot(p, q)), 0)
        y, r, before = y + step * p, r - step * q, now
        z = torch.where(unfinished, corrected(r), z)
    z = corrected(b - applied(stencil, y))  # of the true residual, not the updated one
    return y + z, size(z)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of (m, C, h, w) over the pixels, (m, C, 1, 1)."""
    return (a * b).sum((2, 3), keepdim=True)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0, as in a channel that is solved exactly."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))


def size(z: Tensor) -> Tensor:
    """The largest magnitude in each image, (m, C, h, w) -> (m,)."""
    return z.abs().amax((1, 2, 3))


def applied(stencil: Tensor, y: Tensor) -> Tensor:
    """A y, (m, C, h, w)."""
    h, w = y.shape[2:]
    padded = F.pad(y, (1, 1, 1, 1))
    found = stencil[:, 4:5] * y
    for place, (i, j) in enumerate(OFFSETS):
        if place != 4:
            found.addcmul_(padded[..., 1 + i : 1 + i + h, 1 + j : 1 + j + w], stencil[:, place : place + 1])
    return found


# ---- from grid to grid: every other pixel of a grid, and one more beyond an even border -----------------------------


def prolonged(y: Tensor, h: int, w: int) -> Tensor:
    """Linear interpolation P from the coarser grid: (m, C, h // 2 + 1, w // 2 + 1) -> (m, C, h, w)."""
    tall = y.new_empty(*y.shape[:2], h, y.shape[3])
    tall[:, :, ::2] = y[:, :, : (h + 1) // 2]
    tall[:, :, 1::2] = (y[:, :, : h // 2] + y[:, :, 1 : h // 2 + 1]) / 2
    wide = y.new_empty(*y.shape[:2], h, w)
    wide[..., ::2] = tall[..., : (w + 1) // 2]
    wide[..., 1::2] = (tall[..., : w // 2] + tall[..., 1 : w // 2 + 1]) / 2
    return wide


def restricted(y: Tensor) -> Tensor:
    """The transpose of P: (m, C, h, w) -> (m, C, h // 2 + 1, w // 2 + 1)."""
    h, w = y.shape[2:]
    y = F.pad(y, (1, 2 - w % 2, 1, 2 - h % 2))
    y = y[:, :, 1::2] + (y[:, :, :-1:2] + y[:, :, 2::2]) / 2
    return y[..., 1::2] + (y[..., :-1:2] + y[..., 2::2]) / 2


def galerkin(stencil: Tensor) -> Tensor:
    """The stencil of P' A P on the coarser grid.

    It is read off nine combs, grids of ones three pixels apart: of each comb exactly one tooth is a neighbour.
    """
    h, w = stencil.shape[2:]
    row, column = (torch.arange(n // 2 + 1, device=stencil.device) for n in (h, w))
    comb = F.one_hot(row[:, None] % 3 * 3 + column % 3, 9).permute(2, 0, 1)[None].to(stencil)
    seen = restricted(applied(stencil, prolonged(comb, h, w)))  # (m, 9, h // 2 + 1, w // 2 + 1)
    tooth = torch.stack([(row + i)[:, None] % 3 * 3 + (column + j) % 3 for i, j in OFFSETS])
    return seen.gather(1, tooth.expand(len(seen), -1, -1, -1))


def coarsened(stencil: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The stencil and the damping on each grid but the coarsest; and the inverse matrix there, (m, hw, hw)."""
    grids = []
    while stencil.shape[2] * stencil.shape[3] > DIRECT:
        grids.append((stencil, damping(stencil)))
        stencil = galerkin(stencil)
    h, w = stencil.shape[2:]
    unit = torch.eye(h * w, dtype=stencil.dtype, device=stencil.device)
    matrix = applied(stencil, unit.view(1, h * w, h, w)).flatten(2)  # (m, hw, hw)
    middle = stencil[:, 4].flatten(1)
    lifted = torch.where(
        middle == 0, 1, SHIFT * middle
    )  # two cells that reach the same pixels make it singular
    return grids, torch.linalg.inv_ex(matrix + torch.diag_embed(lifted))[0]


def damping(stencil: Tensor) -> Tensor:
    """1 / D for Jacobi steps (m, 1, h, w), zero where there is no unknown.

    D is the diagonal, or half a row's sum of magnitudes where that is more, as it is where several cells reach the same
    few pixels. So no eigenvalue of A / D is above 2.
    """
    scale = torch.maximum(stencil[:, 4:5], stencil.abs().sum(1, keepdim=True) / 2)
    return ratio(torch.ones_like(scale), scale)


def cycle(grids: tuple[list[tuple[Tensor, Tensor]], Tensor], r: Tensor, level: int = 0) -> Tensor:
    """An approximation of A^-1 r, linear, symmetric and positive definite in r: one V-cycle from zero."""
    levels, inverse = grids
    if level == len(levels):
        return (r.flatten(2) @ inverse.mT).view(r.shape)
    stencil, damped = levels[level]
    weights = COARSER if level else FINEST
    y = weights[0] * damped * r
    for weight in weights[1:]:
        y = y + weight * damped * (r - applied(stencil, y))
    below = cycle(grids, restricted(r - applied(stencil, y)), level + 1)
    y = y + prolonged(below, *r.shape[2:])
    for weight in reversed(weights):
        y = y + weight * damped * (r - applied(stencil, y))
    return y
