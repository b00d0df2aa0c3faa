"""Excitation backpropagation: the probability of being the winner, handed down from the explained output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from xcli.errors import ModelError
from xcli.layers import Layer, Layers
from xcli.methods.base import Attribution, Need
from xcli.methods.gradient.base import INPUT, LayerMethod
from xcli.methods.propagation.base import Relevance, refuse
from xcli.methods.propagation.rules import Proportional, Rule, Share, Weighted
from xcli.operations import Kind
from xcli.registry import method, options
from xcli.score import Score
from xcli.targets import Rows

EXCITATION = Share((("positive", "positive"),), bias=None)
INHIBITION = Share((("positive", "minus negative"),), bias=None)
"""What excitation is under the weights with their sign turned."""

RULED: tuple[Kind, ...] = tuple(kind for kind in Relevance.HANDLED if kind != "difference")


@options
class Excitation(LayerMethod):
    """Probability sent down to a layer: what plain and contrastive excitation share."""

    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    cost: ClassVar[str] = "2 forwards + 1 backward, down to the layer"
    source: ClassVar[str] = "Zhang et al. 2016, arXiv:1608.00507"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "torchray": {"norms": "passed", "shares": "signed"}
    }

    layer: Annotated[
        str,
        Field(
            description="auto:2 (one grid finer than auto), auto, input, or the name of a module with a map",
            min_length=1,
        ),
    ] = "auto:2"
    norms: Annotated[
        Literal["joined", "passed"],
        Field(description="a batch norm becomes part of the layer before it, or passes probability on"),
    ] = "joined"
    shares: Annotated[
        Literal["positive", "signed"],
        Field(description="probability is divided in proportion to positive parts, or to inputs as they are"),
    ] = "positive"

    def __post_init__(self) -> None:
        own: dict[Need, bool] = {"layer": self.layer != INPUT, "structure": self.norms == "passed"}
        object.__setattr__(self, "needs", self.needs | {need for need, wanted in own.items() if wanted})

    def looks_at(self, layers: Layers) -> tuple[Layer, ...]:
        refuse(
            self.name,
            layers,
            RULED,
            "attnlrp has rules for attention and products; integrated-gradients takes any network",
        )
        if not self.layer.startswith("auto:"):
            return super().looks_at(layers)
        first = layers.find(self.layer)[0]
        first.require_map()
        return (first,)

    def winning(self, score: Score, x: Tensor) -> Tensor:
        """The probability that arrives at each cell, (N, h, w)."""
        plain = self.rule(EXCITATION)
        rules = Relevance(
            lambda *_: plain,
            name=self.name,
            epsilon=0,
            positive=self.shares == "positive",
            constants=score.module.buffers(),
            fold=self.norms == "joined",
            from_pixels=self.layer == INPUT or score.create_graph,
            twice=score.create_graph,
        )
        _, arrived = self.acts_and_grads(score.within(lambda: rules), x)
        rules.over = True
        return arrived.sum(1)

    def rule(self, *shares: Share) -> Rule:
        """How layers divide probability: by ``shares``, of the inputs that the option asks for."""
        if self.shares == "signed":
            shares = tuple(replace(s, terms=tuple(("all", of) for _, of in s.terms)) for s in shares)
        return Rule(shares, epsilon=0)


@method("excitation-backprop")
class ExcitationBackprop(Excitation):
    r"""Where the winner comes from when each winning unit passes its place on to one of the inputs that excite it.

    .. math:: p_i = x^+_i \sum_j W^+_{ji} \frac{p_j}{(W^+ x^+)_j}

    for convolutions and linear layers, biases off, from p = 1 at the explained output down to ``layer``; the map is
    the sum over its channels, (N, h, w). Sums and average pooling divide p in proportion to the positive parts of what
    they add, a maximum hands it to the largest, and activations, multiples and added constants pass it on. A batch norm
    by its running statistics becomes part of the layer before it, which matters where it turns a channel's sign; one
    that follows no layer passes p on.

    Unit: probability. The paper takes activations for non-negative, as behind ReLU; there, this is its definition, and
    p sums to 1 at every layer that all paths lead through, but for units that a bias alone makes positive: what has
    nothing to be divided among is lost. Negative activations (the picture itself, the branch of a residual block before
    its ReLU) get nothing. ``extras``: ``probability``, the sum of the map, 1 where nothing was lost on the way.

    It says nothing about how high the score is. p is linear in where it starts: under another ``score`` than the logit
    that is the gradient of that score at the logits, so that of ``contrast`` gives the map of the class less that of
    its strongest rival, which is no probability.

    ``layer: auto:2`` is the last layer on the grid before the last one, as TorchRay chooses for ResNet50 (layer3, 14x14
    at 224 pixels); ``auto:3`` one grid finer, ``input`` the pixels. Networks with products, attention, layer norm,
    differences or squeeze-excitation have no rules here and are refused by the name of the module.

    Source: Zhang et al. 2016, arXiv:1608.00507, equations 6 and 8. ``preset: torchray``: batch norms pass p on, and p
    is divided by inputs as they are, so that the map is signed where activations are; no stabiliser of 1e-20.
    """

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        arrived = self.winning(score, x)
        return Attribution(arrived, {"probability": arrived.flatten(1).sum(1).detach()})


@method("contrastive-excitation-backprop")
class ContrastiveExcitationBackprop(Excitation):
    r"""Where a class wins more of its excitation than a class against it would.

    .. math:: \mathrm{ReLU}\Bigl(\sum_k p_k(W_c) - p_k(-W_c)\Bigr)

    with p as in ``excitation-backprop``, once from the weights W of the classifier and once from these with their sign
    turned. The classifier is the last layer with weights on the way to the logits. Below it p is linear in what it
    starts from, so it makes no difference at which layer the second is taken from the first: there is no option for the
    paper's contrast layer, and one pass does both. The map is (N, h, w), in units of probability; at most 1 in all.

    Layers, rules, other scores and refused networks are those of ``excitation-backprop``. A network whose last layer
    with weights is not behind ``layer``, or is a product with bare constants, is refused when it runs.

    Source: Zhang et al. 2016, arXiv:1608.00507, section 3.3. ``preset: torchray`` as there.
    """

    def attribute(self, score: Score, x: Tensor) -> Tensor:
        contrast = self.rule(EXCITATION, replace(INHIBITION, factor=-1.0))

        def number(rows: Rows, outputs: Any, copy: Tensor, row: Tensor) -> Tensor:
            values = rows.values(outputs, copy, row)
            for step in self.classifiers(values):
                step.rule = contrast
            return values

        return self.winning(score.reading(number), x).relu()

    def classifiers(self, values: Tensor) -> tuple[Weighted, ...]:
        """The layers that ``values`` (P,) depend on through no other layer.

        Raises:
            ModelError: there is none, or a product with constants is in its place.
        """
        found = tuple(_last(values))
        if values.requires_grad and not found:
            raise ModelError(
                f"{self.name}: no layer with weights comes between {self.layer!r} and the logits; name an earlier layer"
            )
        if any(isinstance(step, Proportional) for step in found):
            raise ModelError(
                f"{self.name}: the logits are a product with constants, not the output of a layer whose weights have "
                "an opposite; use excitation-backprop"
            )
        return tuple(step for step in found if isinstance(step, Weighted))


def _last(values: Tensor) -> Iterator[Weighted | Proportional]:
    """The first steps with weights or constants that a way back from ``values`` meets."""
    nodes: list[Any] = [values.grad_fn]
    seen: set[Any] = {None}
    while nodes:
        if (node := nodes.pop()) in seen:
            continue
        seen.add(node)
        step = getattr(node, "step", None)
        if isinstance(step, Weighted) or (isinstance(step, Proportional) and step.call.name in _PRODUCTS):
            yield step
        else:
            nodes.extend(before for before, _ in node.next_functions)


_PRODUCTS = ("matmul", "bmm", "mm", "einsum")
