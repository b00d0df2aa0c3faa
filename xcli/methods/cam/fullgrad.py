"""FullGrad: what the pixels and the biases of a network contribute to a score, on one map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from xcli.errors import ModelError
from xcli.methods.base import Attribution, Need, resized
from xcli.methods.cam.base import Normalise, Viewed, scaled
from xcli.methods.cam.spectra import Sign, first_component
from xcli.precision import full
from xcli.registry import method
from xcli.score import Score

_LESS = 8
"""How many times smaller the maps are that ``eigen_smooth`` decomposes."""


class Bias(NamedTuple):
    """What a linear layer adds (K,), and the name of the module whose output is that of the layer."""

    name: str
    value: Tensor
    last: bool
    """Whether channels are the last axis of the output; else they are the first after the images."""


@method("fullgrad")
class FullGrad(Viewed):
    r"""Every pixel and every bias on the way to a score, weighed by how far they take part in it.

    .. math:: \sum_c \psi(x \odot \nabla_x y)_c + \sum_l \sum_k \psi(b_l \odot \nabla_{z_l} y)_k,
        \qquad \psi(t) = \frac{|t| - \min |t|}{\max |t| - \min |t| + \epsilon}

    over the convolutions and batch norms l with a bias b and maps z as output, each brought to the size of the input;
    the bias of a batch norm is beta - mean * gamma / sqrt(var + eps). No unit: the input and each layer reach 1,
    however little they take part.

    ``extras`` have ``delta``, in the unit of the score: the score less the sum of all x * gradient and b * gradient,
    those of linear layers too. It is 0 for ReLU networks, whose score is made up of these. Elsewhere it says how much
    of the score has no place here: activations that bend, attention, norms by the statistics of the input, parameters
    that no layer adds. It is NaN where a linear layer does not keep images apart along its first axis.

    Source: Srinivas and Fleuret 2019, arXiv:1905.00780; psi, aligned corners and ``eps`` as in the authors' code, which
    rescales a layer as a whole. ``preset: simple`` is their SimpleFullGrad. ``preset: grad-cam`` is that package's
    definition: psi of each channel by itself, in which a bias cancels out unless it is 0. Departs: each call of a
    layer counts with its own gradient, where both codes pair layers with gradients by order; transposed
    convolutions, subclasses and batch norms without weights count too.

    Raises:
        ModelError: a batch norm has no running statistics, or a layer sees its images in pieces.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"gradients", "structure"})
    cost: ClassVar[str] = "1 forward + 1 backward of the whole network"
    source: ClassVar[str] = "Srinivas and Fleuret 2019, arXiv:1905.00780"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "grad-cam": {"rescale": "channel", "eps": 1e-7, "align_corners": False},
        "simple": {"bias": False},
    }

    rescale: Annotated[
        Literal["layer", "channel"],
        Field(description="what is taken to [0, 1] by itself: the channels of a layer together, or each"),
    ] = "layer"
    eps: Annotated[float, Field(gt=0, description="added to the range that is divided by")] = 1e-6
    align_corners: Annotated[
        bool, Field(description="whether the corner cells of a layer come to lie on the corner pixels")
    ] = True
    bias: Annotated[
        bool, Field(description="weigh gradients by the biases; false takes the gradients alone")
    ] = True
    normalise: Normalise = "min-max"
    eigen_smooth: Annotated[
        bool,
        Field(
            description="the first principal component of the parts' maps, an eighth as large, not their sum"
        ),
    ] = False
    sign: Sign = "peak"

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        return self.over_views(score, x)

    def attribution(self, score: Score, x: Tensor) -> Attribution:
        biases, size = list(biases_of(score)), (x.shape[-2], x.shape[-1])
        shapes = {row.name: row.shape for row in score.layers.rows if row.calls == 1}
        places = x.shape[1] + len(biases)

        def fold(number: int, grad: Tensor, count: int) -> tuple[Tensor, Tensor]:
            name, value, last = biases[number]
            mixed = len(grad) != count or tuple(grad.shape[1:]) != shapes.get(name, tuple(grad.shape[1:]))
            if mixed and not last:
                raise ModelError(f"fullgrad: layer {name!r} sees images in pieces; choose another method")
            if mixed:  # which entry is of which image is not known
                return x.new_zeros(count, 1, 1, 1), x.new_full((count,), torch.nan)
            share = torch.einsum("m...k,k->m" if last else "mk...,k->m", grad, value)
            if last or grad.dim() != 4:
                return x.new_zeros(count, 1, 1, 1), share  # nowhere in the picture
            maps = self.summed(grad.abs(), value.abs() if self.bias else torch.ones_like(value))
            return self.placed(self.grown(maps, size), x.shape[1] + number, places), share

        found = score.folded(x, [bias.name for bias in biases], fold)
        shares = x[score.image.to(x.device)] * found.grads  # (N, C, H, W)
        maps, spoken = found.folds or (shares.new_zeros(1), shares.new_zeros(1))
        for number, part in enumerate(shares.abs().split(1 if self.eigen_smooth else len(shares[0]), dim=1)):
            maps = maps + self.placed(self.summed(part, part.new_ones(part.shape[1])), number, places)
        delta = found.values - shares.sum((1, 2, 3)) - spoken
        return Attribution(self.gathered(maps, size), {"delta": delta})

    def placed(self, maps: Tensor, number: int, places: int) -> Tensor:
        """Maps (m, H, W) of one part, to be added to those of the others: (m, 1, H, W), or small and apart from them,
        (m, places, h, w), where they are to be decomposed."""
        if not self.eigen_smooth:
            return maps[:, None]
        less = [max(1, side // _LESS) for side in maps.shape[1:]]
        small = F.interpolate(scaled(maps, "min-max")[:, None], less, mode="bilinear", align_corners=False)
        here = torch.arange(places, device=maps.device) == number
        return small * here[:, None, None].to(small.dtype)

    def gathered(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """The map (N, H, W) of what ``placed`` and its sum gave."""
        if not self.eigen_smooth:
            return maps[:, 0]
        return resized(first_component(maps, self.sign), size, "bilinear")

    def summed(self, sizes: Tensor, factor: Tensor) -> Tensor:
        """The sum over channels of psi of ``sizes`` (m, K, h, w) times ``factor`` (K,), neither negative: (m, h, w).

        Minima are taken off before anything is summed, so that a constant channel comes out as an exact zero.
        """
        least = sizes.amin((2, 3))  # (m, K)
        low, high = factor * least, factor * sizes.amax((2, 3))
        layer = self.rescale == "layer"
        bottom, top = (low.amin(1, keepdim=True), high.amax(1, keepdim=True)) if layer else (low, high)
        span = top - bottom + self.eps
        above = torch.einsum("mk,mkhw->mhw", factor / span, sizes - least[:, :, None, None])
        return above + ((low - bottom) / span).sum(1)[:, None, None]

    def grown(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps (m, h, w) at the size of the input."""
        corners = None if self.upsampling == "nearest" else self.align_corners
        return F.interpolate(maps[:, None], size=size, mode=self.upsampling, align_corners=corners)[:, 0]


def biases_of(score: Score) -> Iterator[Bias]:
    """The biases of the linear layers that run, batch norms in eval mode among them."""
    for name in score.layers.order:
        part = score.module.get_submodule(name)
        value = bias_of(name, part)
        if value is not None:
            yield Bias(seen_at(name, part), full(value), isinstance(part, nn.Linear))


def seen_at(name: str, part: nn.Module) -> str:
    """The module that yields what ``part`` adds to: timm's norms with an activation go on to ``drop``, then to it."""
    if isinstance(part, nn.Linear | _ConvNd) or not isinstance(getattr(part, "drop", None), nn.Module):
        return name
    return f"{name}.drop"


def bias_of(name: str, part: nn.Module) -> Tensor | None:
    """What ``part`` adds to a linear function of its input (K,); ``None`` where it adds nothing or is not linear.

    Raises:
        ModelError: a batch norm that depends on the batch.
    """
    if isinstance(part, nn.Linear | _ConvNd):
        return part.bias
    if not isinstance(part, _NormBase) and "FrozenBatchNorm" not in type(part).__name__:
        return None
    mean, variance = part.running_mean, part.running_var
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        if isinstance(part, _BatchNorm):
            raise ModelError(
                f"fullgrad: batch norm {name!r} has no running statistics, so that it has no bias of its own; "
                "choose another method, or a network that keeps them"
            )
        return None
    weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
    scale = (variance + getattr(part, "eps", 1e-5)).rsqrt()
    scale = scale if weight is None else scale * weight
    return -mean * scale if bias is None else bias - mean * scale
