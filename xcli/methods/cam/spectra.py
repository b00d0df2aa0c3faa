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


def first_component(channels: Tensor, sign: Sign = "peak", centre: bool = True) -> Tensor:
    """Projection (B, h, w) of channels (B, K, h, w) at each place on their first right singular vector.

    The mean of each channel over the places is taken off first, unless ``centre`` is false. The singular vectors come
    from the smaller of the two Gram matrices, hw x hw or K x K, in one batched decomposition; in float64, since
    squaring the matrix squares its condition number. An image whose channels are not finite gets a map of NaN.
    """
    rows = channels.flatten(2).transpose(1, 2).double()  # (B, hw, K)
    finite = rows.isfinite().all(2).all(1)[:, None]  # (B, 1); a decomposition of the rest would fail for all
    rows = torch.where(finite[..., None], rows - rows.mean(1, keepdim=True) if centre else rows, 0.0)
    if rows.shape[1] <= rows.shape[2]:
        power, left = torch.linalg.eigh(rows @ rows.transpose(1, 2))  # ascending
        maps = left[:, :, -1] * power[:, -1:].clamp_min(0).sqrt()  # (B, hw) = u_1 s_1
    else:
        _, right = torch.linalg.eigh(rows.transpose(1, 2) @ rows)
        maps = (rows @ right[:, :, -1:])[..., 0]
    maps = torch.where(finite, signed(maps, rows.sum(2), sign), torch.nan)
    return maps.reshape(len(channels), *channels.shape[2:]).to(channels.dtype)


def signed(maps: Tensor, channels: Tensor, rule: Sign) -> Tensor:
    """Maps (B, hw) with the sign that ``rule`` gives them; ``channels`` (B, hw) is what they are to agree with."""
    if rule == "peak":
        guide = maps.gather(1, maps.abs().argmax(1, keepdim=True))
    else:
        guide = (maps * (channels - channels.mean(1, keepdim=True))).sum(1, keepdim=True)
    return torch.where(guide < 0, -maps, maps)
