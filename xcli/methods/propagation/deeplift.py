"""DeepLIFT: the difference in score to another picture, handed back layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from xcli.baselines import Removal
from xcli.layers import Layer, Layers
from xcli.methods.base import Attribution
from xcli.methods.gradient.base import PixelMethod, beside
from xcli.methods.propagation.base import refuse
from xcli.methods.propagation.multipliers import Multipliers, Paired, Rule, differences
from xcli.registry import method, options
from xcli.score import Score


@options
class DifferenceMethod(PixelMethod):
    """What ``deeplift`` and ``deeplift-shap`` share: the map of a picture beside another."""

    rule: Annotated[
        Rule,
        Field(
            description="of activations: rescale; reveal-cancel; mixed, which is reveal-cancel behind linear layers"
        ),
    ] = "rescale"

    def looks_at(self, layers: Layers) -> tuple[Layer, ...]:
        refuse(self.name, layers, Multipliers.HANDLED, "integrated-gradients takes any network")
        return ()

    def compared(self, score: Score, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The map of each row (N, C, H, W) and its difference in score (N,), from ``start``: (1, C, H, W) for all, or
        (B, C, H, W)."""
        self.looks_at(score.layers)
        rules, shared = Multipliers(self.rule, name=self.name, twice=score.create_graph), len(start) == 1
        paired = Paired(score.module, rules, start if shared else None)
        given = x if shared else torch.stack([x, start], 1)
        found = score.using(paired).reading(differences).gradients(given)
        rules.over = True
        multipliers = found.grads[0] if shared else found.grads[0][:, 0]
        return multipliers * (x - start)[score.image.to(x.device)], found.values


@method("deeplift")
class DeepLIFT(DifferenceMethod, Removal):
    r"""The difference in score to a picture without content, handed back layer by layer: one backward pass.

    .. math:: \sum_c m_c \odot (x_c - x'_c)

    with x' the picture with every pixel removed, as ``substrate`` says: by default 0, the mean colour of the
    preprocessing. The multiplier m is the gradient of the number explained at the network's outputs, and on from there
    what each operation makes of it: a linear one (convolutions, linear layers, batch norms, sums, averages) what its
    derivative does, and of the others, with D the difference of a value from what it is on x',

    - an activation t = f(a): by ``rule``. ``rescale``: :math:`m_a = m_t \frac{Dt}{Da}`. ``reveal-cancel``: of the a of
      a convolution or linear layer, batch norm and all, or of a sum of two, what adds to Da and what takes from it have
      a multiplier each, :math:`Da_\pm = \sum_i (w_i Dx_i)^\pm`,

      .. math:: m_\pm = \frac{m_t}{2 Da_\pm} \big[f(a' + Da_\pm) - f(a') + f(a) - f(a' + Da_\mp)\big]

      and what reads x_i sends it :math:`w_i m_+` or :math:`w_i m_-`, by the sign of w_i Dx_i, their mean where that is
      0; behind anything else it is the same as ``rescale``. ``mixed``: that behind linear layers alone, elsewhere
      ``rescale``. Where there is no difference to divide by, the derivative;
    - max pooling: the entry that is the largest in x, or in x' where that is larger, has all;
    - a product, such as the gate of squeeze-and-excitation: each factor has the mean of the other's two values, the
      mean over both orders of changing them.

    The map sums to y(x) - y(x') where y is a logit; ``extras`` have what is missing, ``delta``, that sum less the
    difference. In another unit, the last step from logits to the number is its derivative at x, and ``delta`` says
    what that costs. Signed. Unit: that of the score. Networks with attention, softmax, layer norm or a division by
    what they see have no rules here and are refused by the name of the module.

    Source: Shrikumar et al. 2017, arXiv:1704.02685, sections 3.5.2 and 3.5.3. Departs: the rules for products, which
    the paper has none for, and max pooling, as in captum but that windows may overlap. Presets: ``captum`` leaves the
    colours apart; ``original`` is ``mixed``, what the authors' code takes where it is not told.
    """

    cost: ClassVar[str] = "1 forward + 1 backward; another forward where images have a substrate of their own"
    source: ClassVar[str] = "Shrikumar et al. 2017, arXiv:1704.02685"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "original": {"rule": "mixed"},
        "captum": {"reduce": "none"},
    }

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        start = self.whole(score, x)
        found, gap = self.compared(score, x, start[:1] if self.substrate == "constant" else start)
        return Attribution(found, {"delta": found.sum((1, 2, 3)) - gap})


@method("deeplift-shap")
class DeepLIFTSHAP(DifferenceMethod):
    r"""The difference in score to other pictures, handed back layer by layer: the mean of ``deeplift`` over them.

    .. math:: \frac{1}{R} \sum_r \sum_c m^r_c \odot (x_c - x^r_c)

    with the R pictures of the folder ``baselines`` in place of one without content; multipliers and rules are those of
    ``deeplift``. With ``rescale`` this is Deep SHAP. Of a folder of more than 128 pictures so many are taken, spread
    evenly over its sorted list. Signed. Unit: that of the score. ``extras``: ``delta``, the sum of the map less y(x)
    and the mean of y over the pictures. Source: Lundberg and Lee 2017, arXiv:1705.07874, section 4.2.
    ``preset: captum`` leaves the colours apart.

    Raises:
        ConfigError: the pictures of ``baselines`` are not there, or of another size than the images.
    """

    cost: ClassVar[str] = "1 forward + 1 backward for each picture of the folder"
    source: ClassVar[str] = "Lundberg and Lee 2017, arXiv:1705.07874"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"captum": {"reduce": "none"}}
    small: ClassVar[Mapping[str, object]] = {"baselines": "sample_images/photos"}

    baselines: Annotated[
        str, Field(description="folder (or list, glob) of the pictures to compare with; has to be named")
    ] = ""

    def draws_from(self) -> tuple[str, ...]:
        return (self.baselines,)

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        given = beside(self, score, self.baselines, x)
        total, gap = x.new_zeros(()), x.new_zeros(())
        for start in given.split(1):
            own, difference = self.compared(score, x, start)
            total, gap = total + own / len(given), gap + difference / len(given)
        return Attribution(total, {"delta": total.sum((1, 2, 3)) - gap})
