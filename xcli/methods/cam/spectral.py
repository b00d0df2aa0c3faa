"""CAMs from the main directions of a layer's activations; no gradient, and the class plays no part."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from xcli.methods.cam.base import CAM, fused
from xcli.registry import method
from xcli.score import Score


@method("eigencam")
class EigenCAM(CAM):
    r"""What stands out in a layer: its activations projected on their first principal component.

    .. math:: (A - \bar A)\, v_1, \qquad A \in R^{hw \times K}

    with the mean of each channel over the places taken off, and v_1 the first right singular vector of the rest.
    Not class specific: rows of one image get one map.
    Unit: that of the activations; signed.
    The sign of a singular vector is arbitrary; here it is the one in which the map's largest absolute value is
    positive. Source: Muhammad and Yeasin 2020, arXiv:2008.00299. Departs: the paper does not take the mean off; the
    grad-cam package does, and so does this.
    """

    source: ClassVar[str] = "Muhammad and Yeasin 2020, arXiv:2008.00299"
    cost: ClassVar[str] = "1 forward + 1 eigendecomposition of hw x hw"

    def attribute(self, score: Score, x: Tensor) -> Tensor:
        layers = self.looks_at(score.layers)
        acts = score.activations(x, at=layers)
        maps = [first_component(layer.maps(own)) for layer, own in zip(layers, acts, strict=True)]
        return fused(maps, self.fusion)[score.image.to(x.device)]


def first_component(acts: Tensor) -> Tensor:
    """Projection (B, h, w) of centred activations (B, K, h, w) on their first right singular vector.

    The singular vectors come from the smaller of the two Gram matrices, hw x hw or K x K, in one batched
    decomposition; in float64, since squaring the matrix squares its condition number. An image whose activations are
    not finite gets a map of NaN.
    """
    rows = acts.flatten(2).transpose(1, 2).double()  # (B, hw, K)
    finite = rows.isfinite().all(2).all(1)[:, None]  # (B, 1); a decomposition of the rest would fail for all
    rows = torch.where(finite[..., None], rows - rows.mean(1, keepdim=True), 0.0)
    if rows.shape[1] <= rows.shape[2]:
        power, left = torch.linalg.eigh(rows @ rows.transpose(1, 2))  # ascending
        maps = left[:, :, -1] * power[:, -1:].clamp_min(0).sqrt()  # (B, hw) = u_1 s_1
    else:
        _, right = torch.linalg.eigh(rows.transpose(1, 2) @ rows)
        maps = (rows @ right[:, :, -1:])[..., 0]
    maps = torch.where(finite, towards_positive(maps), torch.nan)
    return maps.reshape(len(acts), *acts.shape[2:]).to(acts.dtype)


def towards_positive(maps: Tensor) -> Tensor:
    """Maps (B, hw) with the sign in which their largest absolute value is positive."""
    peak = maps.gather(1, maps.abs().argmax(1, keepdim=True))
    return torch.where(peak < 0, -maps, maps)
