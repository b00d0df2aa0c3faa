"""How much of each patch reaches the token that the answer is read from, through the attention of all layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, cat

from xcli.layers import Layers
from xcli.methods.base import Need
from xcli.methods.transformer.base import AttentionMethod, Tokens
from xcli.registry import method, options
from xcli.score import Score

Discard = Annotated[
    float,
    Field(ge=0, lt=1, description="share of the entries of each layer's fused matrix, the lowest, set to 0"),
]


@options
class Rolled(AttentionMethod):
    """The row of the result in a product of a matrix (T, T) a layer, carried from the last layer to the first: no two
    matrices are multiplied.

    The result is the token that the answer is read from, the mean of their rows where it is read from several (a
    distilled network, averaged patches); columns of class, distillation and register tokens are left out at the end.
    """

    by_gradients: ClassVar[bool] = True

    def tokens(self, layers: Layers) -> Tokens:
        found = super().tokens(layers)
        if not found.read:
            self.refuse(
                f"the answer does not depend on the attention of module {layers.attention[-1].module!r}"
            )
        return found

    def attribute(self, score: Score, x: Tensor) -> Tensor:
        tokens = self.tokens(score.layers)

        def fold(attention: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
            row = tokens.result(attention[0]).expand(len(attention[0]), -1)
            layers = zip(attention, grads, strict=True) if grads else ((one, one) for one in attention)
            for own, grad in reversed(list(layers)):
                row = self.back(row, self.fused(own, grad))
            return (tokens.maps(row),)

        (maps,) = score.attended(x, fold, gradients=self.by_gradients)
        return maps

    @abstractmethod
    def fused(self, attention: Tensor, grad: Tensor) -> Tensor:
        """What becomes of the heads of one layer: (m, H, T, T) to (m, T, T)."""

    @abstractmethod
    def back(self, row: Tensor, fused: Tensor) -> Tensor:
        """The row (m, T) times the matrix of one layer."""


def times(row: Tensor, matrix: Tensor) -> Tensor:
    """Rows (m, T) times matrices (m, T, T)."""
    return (row[:, None] @ matrix)[:, 0]


def with_identity(row: Tensor, fused: Tensor) -> Tensor:
    """The row times A + I, whose rows were divided by their sums."""
    row = row / (fused.sum(-1) + 1)
    return times(row, fused) + row


def without_lowest(fused: Tensor, share: float) -> Tensor:
    """The ``share`` of the entries (m, T, T) of each matrix that is the lowest at 0; of equal ones, the first go."""
    flat = fused.flatten(1)
    lowest = flat.argsort(dim=1, stable=True)[:, : int(flat.shape[1] * share)]
    return flat.scatter(1, lowest, 0).view_as(fused)


@method("attention-rollout")
class AttentionRollout(Rolled):
    r"""How much of each patch is in the token that the answer is read from, if attention mixes tokens and nothing else
    does.

    .. math:: \tilde{A}_L \cdots \tilde{A}_1, \qquad \tilde{A}_l = \frac{A_l + I}{\text{its row sums}}

    the row of the result, A_l the heads of layer l fused: their mean, or at each entry the largest or smallest. (N, h,
    w), not negative; with the columns of class and register tokens each row sums to 1. Unit: a share. The same for
    every class: no gradients are taken. ``discard`` sets the lowest entries of each A_l to 0 before I is added, but
    never the attention of the first token to itself.

    Source: Abnar and Zuidema 2020, arXiv:2005.00928, who discard nothing. ``preset: vit-explain`` is what
    jacobgil/vit-explain defines: nine tenths discarded. Its code then divides column j by the
    sum of row j, which makes a difference as soon as these sums differ, and discards for the first image of a batch
    alone; here rows are divided by their own sums, for every image.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"attention"})
    cost: ClassVar[str] = "1 forward"
    source: ClassVar[str] = "Abnar and Zuidema 2020, arXiv:2005.00928"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"vit-explain": {"discard": 0.9}}
    by_gradients: ClassVar[bool] = False

    fusion: Annotated[
        Literal["mean", "max", "min"], Field(description="how the heads of a layer become one matrix")
    ] = "mean"
    discard: Discard = 0.0

    def fused(self, attention: Tensor, grad: Tensor) -> Tensor:
        match self.fusion:
            case "mean":
                fused = attention.mean(1)
            case "max":
                fused = attention.amax(1)
            case "min":
                fused = attention.amin(1)
        if not self.discard:
            return fused
        left = without_lowest(fused, self.discard).flatten(1)
        return cat([fused[:, 0, :1], left[:, 1:]], 1).view_as(fused)

    def back(self, row: Tensor, fused: Tensor) -> Tensor:
        return with_identity(row, fused)


@method("gradient-rollout")
class GradientRollout(Rolled):
    r"""How much of each patch is in the token that the answer is read from, by the attention that raises the score.

    .. math:: \tilde{A}_L \cdots \tilde{A}_1, \qquad \tilde{A}_l = \frac{F_l + I}{\text{its row sums}},
        \qquad F_l = \mathrm{ReLU}\left(\tfrac{1}{H} \sum_h A_{l,h} \odot \frac{\partial s}{\partial A_{l,h}}\right)

    the row of the result; ``discard`` sets the lowest entries of each F_l to 0. (N, h, w), not negative; with the
    columns of class and register tokens each row sums to 1. Unit: a share, but of what depends on the unit of the
    score: where gradients are small, I outweighs them.

    Source: jacobgil/vit-explain, 2020, whose share to discard is the default. Its code pairs the attention of the
    first layer with the gradients of the last, and so on, and divides column j by the sum of row j; here each layer has
    its own gradients, and each row its own sum.
    """

    cost: ClassVar[str] = "1 forward + 1 backward"
    source: ClassVar[str] = "jacobgil/vit-explain, 2020"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"vit-explain": {"discard": 0.9}}

    discard: Discard = 0.9

    def fused(self, attention: Tensor, grad: Tensor) -> Tensor:
        fused = (attention * grad).mean(1).relu()
        return without_lowest(fused, self.discard) if self.discard else fused

    def back(self, row: Tensor, fused: Tensor) -> Tensor:
        return with_identity(row, fused)


@method("chefer")
class Chefer(Rolled):
    r"""How relevant each patch is to the token that the answer is read from, by the attention that raises the score.

    .. math:: R \leftarrow R + \bar{A}_l R, \qquad R_0 = I, \qquad
        \bar{A}_l = \frac{1}{H} \sum_h \left(\frac{\partial s}{\partial A_{l,h}} \odot A_{l,h}\right)^+

    from the first layer to the last: the row of the result of R. (N, h, w), not negative. Unit: that of the score to
    the first power, and higher ones for paths through several layers. Where the answer is read from the patches
    themselves, the identity adds the same to each.

    Source: Chefer et al. 2021, arXiv:2103.15679, the rules for self-attention, without LRP.
    """

    cost: ClassVar[str] = "1 forward + 1 backward"
    source: ClassVar[str] = "Chefer et al. 2021, arXiv:2103.15679"

    def fused(self, attention: Tensor, grad: Tensor) -> Tensor:
        return (grad * attention).relu().mean(1)

    def back(self, row: Tensor, fused: Tensor) -> Tensor:
        return row + times(row, fused)
