"""Correlations along the last dimension, batched over all others."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of (..., M) and (..., M) -> (...); NaN where one of them is constant or not finite."""
    a, b = (centred(values) for values in (a, b))
    scale = a.square().sum(-1).sqrt() * b.square().sum(-1).sqrt()
    return torch.where(scale > 0, (a * b).sum(-1) / scale, torch.nan).clamp(-1, 1)


def centred(values: Tensor) -> Tensor:
    """Values less their mean, at most 1 in size, so that their squares are within range: (..., M)."""
    if not values.shape[-1]:
        return values
    values = values - values.mean(-1, keepdim=True)
    largest = values.abs().amax(-1, keepdim=True)
    return values / torch.where(largest > 0, largest, 1)


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension (..., M); equal values share the mean of their places; NaN with one."""
    values = values.contiguous()
    ordered = values.sort(-1).values
    first = torch.searchsorted(ordered, values)
    last = torch.searchsorted(ordered, values, right=True)
    unknown = values.isnan().any(-1, keepdim=True)
    return torch.where(unknown, torch.nan, (first + last + 1).to(values.dtype) / 2)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of (..., M) and (..., M) -> (...); NaN where one of them is constant."""
    return pearson(ranks(a), ranks(b))
