"""A CAM whose channel weights are searched for: those whose map, as a mask, lets the highest score through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from xcli.errors import ModelError
from xcli.layers import Layer
from xcli.methods.base import Need
from xcli.methods.cam.base import WeightedCAM
from xcli.registry import method
from xcli.score import Score

_MEAN, _SQUARE, _TINY = 0.9, 0.999, 1e-8
"""Adam's usual decay rates and the number that keeps it from dividing by zero."""

_LOOKS = 10
"""How often ``stop`` looks at a row."""


@method("opti-cam")
class OptiCAM(WeightedCAM):
    r"""The mean of a layer's channels that keeps the score of the image highest when it masks the input.

    .. math:: \sum_k w_k A_k, \qquad w = \mathrm{softmax}(u^*), \qquad
        u^* = \arg\max_u f\Big(x \odot n\big(\mathrm{up}(\textstyle\sum_k \mathrm{softmax}(u)_k A_k)\big)\Big)

    with up bilinear to the size of the input and n to [0, 1] by the smallest and the largest value; ``steps`` of Adam
    at the learning rate ``rate`` from equal weights. Each row has a search of its own, and all of a batch run side by
    side. Unit: that of the activations; the weights of a row sum to one.

    The mask is the same if a channel gains a constant or all weights a factor, so the zero of the map means nothing
    and ``relu`` is off. A channel that is constant does not move the mask, and keeps its u. Where the mean of all is
    constant, as after a layer norm without weights, there is no mask to begin with, and the map is flat.

    ``objective: difference`` searches for the score of the whole image instead, :math:`-|f(x) - f(x \odot n)|`.
    ``rectified`` takes the positive part of the channels first. ``stop`` looks at a row every tenth of the steps and
    ends its search where the objective is lower than at the last look, with the weights of that moment.

    Source: Zhang et al. 2024, Opti-CAM, CVIU, arXiv:2301.07002. ``preset: original`` is the program that the
    authors published, which stops where the sum over the whole batch falls; here each row by itself, as theirs does
    with one image. Departs: masks multiply the network's input; the authors' network holds its own normalisation, so
    that theirs fade to black, and these to the mean colour. A search enlarges differences of rounding: in float32,
    maps of 100 steps can differ by a tenth of their peak between devices or micro-batches, in float64 they do not.
    """

    source: ClassVar[str] = "Zhang et al. 2024 (Opti-CAM), arXiv:2301.07002"
    needs: ClassVar[frozenset[Need]] = frozenset({"layer", "gradients"})
    cost: ClassVar[str] = "1 forward + steps x (1 forward + 1 backward), the latter for every row"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "original": {"steps": 50, "rectified": True, "stop": True}
    }
    small: ClassVar[Mapping[str, object]] = {"steps": 3}

    relu: Annotated[bool, Field(description="keep the positive part only; false gives the signed map")] = (
        False
    )
    steps: Annotated[int, Field(ge=1, description="steps of the search for the weights")] = 100
    rate: Annotated[float, Field(gt=0, description="Adam's learning rate", allow_inf_nan=False)] = 0.1
    objective: Annotated[
        Literal["score", "difference"],
        Field(
            description="what is searched for: the highest score of the masked image, or the one nearest to the "
            "score of the image"
        ),
    ] = "score"
    rectified: Annotated[bool, Field(description="take the positive part of the channels first")] = False
    stop: Annotated[
        bool, Field(description="end the search of a row that has got worse over a tenth of the steps")
    ] = False

    def channels(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        if score.create_graph:
            raise ModelError(
                "opti-cam gives no maps that can be trained through: they are the end of a search"
            )
        image = score.image.to(x.device)
        for layer, acts in zip(layers, score.activations(x, at=layers), strict=True):
            own = layer.maps(acts)[image]  # (N, K, h, w)
            own = own.relu() if self.rectified else own
            planes = own - own.amin((2, 3), keepdim=True)  # from 0 up: a constant channel is exactly zero
            u = self.search(score, x, planes)
            weighted = u.softmax(1)[:, :, None, None] * own
            lost = mask(u, planes, (own.shape[-2], own.shape[-1])).amax((1, 2, 3)) == 0
            yield torch.where(lost[:, None, None, None], weighted.mean((2, 3), keepdim=True), weighted)

    def search(self, score: Score, x: Tensor, planes: Tensor) -> Tensor:
        """The u (N, K) at the end, for the planes (N, K, h, w) of each row."""
        before = score.clean(x) if self.objective == "difference" else None
        row = torch.arange(len(planes))  # those that still move
        end = u = mean = square = planes.new_zeros(planes.shape[:2])
        last = planes.new_full((len(planes),), float("-inf"))
        for step in range(self.steps):
            slope, value = self.slope(score, x, planes, u, row, before)
            if self.stop and step % max(1, self.steps // _LOOKS) == 0:
                on = ~(value < last)
                row, last, planes = row[on.cpu()], value[on], planes[on]
                u, mean, square, slope = u[on], mean[on], square[on], slope[on]
                if not len(row):
                    break
            mean = _MEAN * mean + (1 - _MEAN) * slope
            square = _SQUARE * square + (1 - _SQUARE) * slope.square()
            spread = (square / (1 - _SQUARE ** (step + 1))).sqrt() + _TINY
            u = u + self.rate * mean / (1 - _MEAN ** (step + 1)) / spread
            end = end.index_copy(0, row.to(u.device), u)
        return end

    def slope(
        self, score: Score, x: Tensor, planes: Tensor, u: Tensor, row: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Derivatives (m, K) of the objective by the u (m, K) of the rows ``row`` (m,), and the objective (m,).

        The graph of the network lives for a micro-batch; that of the masks is for all, and small.
        """
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            masked = x[score.image[row].to(x.device)] * mask(u, planes, (x.shape[-2], x.shape[-1]))
        _, (grad,), value = score.gradients(masked.detach(), row=row)
        if before is not None:
            lack = before[row.to(x.device)] - value
            grad, value = lack.sign()[:, None, None, None] * grad, -lack.abs()
        (slope,) = torch.autograd.grad(masked, u, grad)
        return slope, value


def mask(u: Tensor, planes: Tensor, size: tuple[int, int]) -> Tensor:
    """The sum of planes (m, K, h, w), each exp(u_k) strong, as a mask (m, 1, H, W) from 0 to 1; of a sum that is
    constant but for rounding, a mask of zeros.

    The softmax of u gives the same mask, and its denominator the slope of a constant channel nothing but noise, of
    which Adam would make a step.
    """
    weights = (u - u.detach().amax(1, keepdim=True)).exp()
    low_res = torch.einsum("mk,mkhw->mhw", weights, planes)
    down, across = (stretch(n, to, planes) for n, to in zip(planes.shape[-2:], size, strict=True))
    up = down.mT @ low_res @ across  # (m, H, W)
    high, low = up.amax((1, 2), keepdim=True), up.amin((1, 2), keepdim=True)
    varies = high - low > planes.shape[1] * torch.finfo(up.dtype).eps * high
    span = torch.where(varies, high - low, 1)
    return torch.where(varies, (up - low) / span, 0)[:, None]


def stretch(cells: int, pixels: int, like: Tensor) -> Tensor:
    """Linear up-sampling as a matrix (cells, pixels): products have a deterministic gradient on every device."""
    own = torch.eye(cells, dtype=like.dtype, device=like.device)
    return F.interpolate(own[None], size=pixels, mode="linear", align_corners=False)[0]
