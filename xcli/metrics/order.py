"""The order in which a map names its pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def places(maps: Tensor) -> Tensor:
    """The place of each pixel, 0 for the highest: (N, H, W) -> (N, H * W), int64; equal ones in raster order."""
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)  # (N, HW)
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
