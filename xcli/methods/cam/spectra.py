"""Principal components of the channels of a layer, batched over images, with a sign that is fixed by rule."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

Sign = Annotated[
    Literal["peak", "channels"],
    Field(
        description="a component's sign is arbitrary; peak: its largest absolute value is positive, channels: it goes "
        "up with the sum of the channels"
    ),
]
Kernel = Literal["sigmoid", "rbf", "polynomial", "cosine", "linear"]

_EPS = torch.finfo(torch.float64).eps
_TIE = 1e-9
"""A peak and a trough that differ by less than this share of either are as high as each other."""


def first_component(channels: Tensor, sign: Sign = "peak", centre: bool = True) -> Tensor:
    """Projection (B, h, w) of channels (B, K, h, w) at each place on their first right singular vector.

    The mean of each channel over the places is taken off first, unless ``centre`` is false. The singular vectors come
    from the smaller of the two Gram matrices, hw x hw or K x K, in one batched decomposition; in float64, since
    squaring the matrix squares its condition number. An image whose channels are not finite gets a map of NaN, one
    whose channels are constant a map of zeros.
    """
    rows, finite, noise = places(channels, centre)
    few = rows.shape[1] <= rows.shape[2]
    maps = projected(rows @ rows.mT) if few else (rows @ leading(rows.mT @ rows))[..., 0]
    maps = torch.where(maps.abs().amax(1, keepdim=True) > noise, maps, 0.0)
    return finished(maps, rows, finite, sign, channels)


def first_kernel_component(
    channels: Tensor, kernel: Kernel, gamma: float | None, degree: int, sign: Sign = "peak"
) -> Tensor:
    """The first component (B, h, w) of kernel PCA of the places of channels (B, K, h, w), each centred first.

    The map is sqrt(lambda) v, of the algebraically largest eigenvalue of the centred kernel. That is never negative,
    even if the kernel is not positive, since constants have the eigenvalue 0; where it is 0, the map is.
    """
    rows, finite, noise = places(channels, centre=True)
    gamma = 1 / rows.shape[2] if gamma is None else gamma
    gram = kernel_of(rows, kernel, gamma, degree, noise)  # (B, hw, hw)
    means = gram.mean(1, keepdim=True)
    centred = gram - means - means.mT + means.mean(2, keepdim=True)
    maps = projected(centred, least=16 * _EPS * rows.shape[1] * gram.detach().abs().amax((1, 2)))
    return finished(maps, rows, finite, sign, channels)


def kernel_of(rows: Tensor, kernel: Kernel, gamma: float, degree: int, noise: Tensor) -> Tensor:
    """The kernel (B, n, n) of every two rows (B, n, K), of which those no longer than ``noise`` (B, 1) are zeros."""
    inner = rows @ rows.mT
    squares = inner.diagonal(dim1=1, dim2=2)[:, :, None]  # (B, n, 1)
    match kernel:
        case "linear":
            return inner
        case "polynomial":
            return (gamma * inner + 1) ** degree
        case "sigmoid":
            return (gamma * inner + 1).tanh()
        case "rbf":
            return (-gamma * (squares + squares.mT - 2 * inner).clamp_min(0)).exp()
        case "cosine":
            longer = squares > noise[..., None].square()
            lengths = torch.where(longer, squares, 1.0).sqrt()  # a row of zeros points nowhere
            return inner / lengths / lengths.mT


def places(channels: Tensor, centre: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Channels (B, K, h, w) as rows (B, hw, K) in float64, zeros where an image is not finite.

    Returns the rows, which images are finite (B, 1), and how long a row can be by rounding alone (B, 1).
    """
    rows = channels.flatten(2).mT.double()
    means = rows.mean(1, keepdim=True)  # (B, 1, K)
    finite = means.isfinite().all(2)  # a decomposition of anything else would fail for the whole batch
    rows = torch.where(finite[..., None], rows - means if centre else rows, 0.0)
    largest = torch.linalg.vector_norm(channels.detach().flatten(1), torch.inf, 1, keepdim=True).double()
    return rows, finite, _EPS * rows.shape[1] * rows.shape[2] ** 0.5 * largest


def leading(gram: Tensor) -> Tensor:
    """The eigenvector (B, n, 1) of the algebraically largest eigenvalue of symmetric matrices (B, n, n).

    Its derivative asks only for that eigenvalue to be simple; that of ``eigh`` is NaN where any two are equal, as
    those of dead channels are.
    """
    powers, vectors = torch.linalg.eigh(gram.detach())  # ascending
    top = vectors[:, :, -1:]
    gap = powers[:, -1:] - powers
    steep = gap > _EPS * powers.abs().amax(1, keepdim=True)
    inverse = torch.where(steep, 1 / gap, 0.0)[..., None]  # (B, n, 1)
    moved = inverse * (vectors.mT @ ((gram - gram.detach()) @ top))  # 0, but not its derivative
    turned: Tensor = top + vectors @ moved
    return turned


def projected(gram: Tensor, least: Tensor | None = None) -> Tensor:
    """sqrt(lambda) v (B, n) of the largest eigenvalue of ``gram`` (B, n, n); zeros where that is below ``least``."""
    vector = leading(gram)
    held = vector.detach()
    power = (held.mT @ gram @ held)[..., 0].clamp_min(0)  # (B, 1)
    if least is not None:
        power = torch.where(power > least[:, None], power, 0.0)
    return vector[..., 0] * power * power.clamp_min(torch.finfo(power.dtype).tiny).rsqrt()


def finished(maps: Tensor, rows: Tensor, finite: Tensor, sign: Sign, like: Tensor) -> Tensor:
    """Maps (B, hw) of rows (B, hw, K) with their sign, NaN where an image is not finite, on the grid of ``like``."""
    maps = torch.where(finite, signed(maps, rows.sum(2), sign), torch.nan)
    return maps.reshape(len(like), *like.shape[2:]).to(like.dtype)


def signed(maps: Tensor, channels: Tensor, rule: Sign) -> Tensor:
    """Maps (B, hw) with the sign that ``rule`` gives them; ``channels`` (B, hw) is what they are to agree with.

    A peak as high as the trough is deep, as on a map of two cells, leaves the sign to the channels.
    """
    guide = (maps * (channels - channels.mean(1, keepdim=True))).sum(1, keepdim=True)
    if rule == "peak":
        high, low = maps.amax(1, keepdim=True), -maps.amin(1, keepdim=True)
        tie = (high - low).abs() <= _TIE * torch.maximum(high, low)
        guide = torch.where(tie, guide, high - low)
    return torch.where(guide < 0, -maps, maps)
