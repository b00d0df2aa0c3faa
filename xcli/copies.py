"""Copies of images: inputs that may be made when their pass runs, and which rows each serves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Copies = Tensor | Callable[[Tensor], Tensor]
"""Inputs (M, C, H, W), or a pure function that makes those of an index (m,): a retry calls it again."""


def taken(x: Copies, index: Tensor) -> Tensor:
    """The inputs of ``index`` (m,), made now or picked out."""
    return x(index) if callable(x) else x[index.to(x.device)]


def pairs(of_rows: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Every (copy, row) where the row is of the copy's image, sorted by copy: (P,) each.

    Args:
        of_rows: (N,) the image of each row, sorted.
        image: (M,) that of each copy.
    """
    start = torch.searchsorted(of_rows, image)
    count = torch.searchsorted(of_rows, image, right=True) - start
    copy = torch.repeat_interleave(torch.arange(len(image)), count)
    within = torch.arange(len(copy)) - (count.cumsum(0) - count)[copy]
    return copy, start[copy] + within
