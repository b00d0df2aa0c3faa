"""Layer-wise relevance propagation: the score divided among the pixels, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from xcli.errors import ConfigError, ModelError
from xcli.layers import Layer, Layers
from xcli.methods.base import Attribution, Need
from xcli.methods.gradient.base import INPUT, LayerMethod
from xcli.methods.propagation.base import Relevance, Start, refuse, started
from xcli.methods.propagation.rules import Rule, Share
from xcli.operations import Operation
from xcli.registry import method, nearest
from xcli.score import Score

RuleName = Literal["epsilon", "gamma", "alpha-beta", "z+", "z-box", "flat", "w2", "pass"]
Strength = Annotated[float, Field(ge=0, allow_inf_nan=False)]
RuleSpec = (
    RuleName
    | Annotated[dict[Literal["epsilon", "gamma", "alpha-beta"], Strength], Field(min_length=1, max_length=1)]
)
"""A rule by name, or with its number: {epsilon: 0.25}, {gamma: 0.1}, {alpha-beta: 2}, where beta is alpha - 1."""

Composite = Literal[
    "epsilon-plus-flat",
    "epsilon-plus",
    "epsilon-gamma-box",
    "epsilon-alpha2-beta1",
    "epsilon-alpha2-beta1-flat",
    "epsilon",
]

COMPOSITES: Mapping[str, Mapping[str, RuleSpec]] = {
    "epsilon-plus-flat": {"first": "flat", "convolution": "z+", "linear": "epsilon"},
    "epsilon-plus": {"convolution": "z+", "linear": "epsilon"},
    "epsilon-gamma-box": {"first": "z-box", "convolution": "gamma", "linear": "epsilon"},
    "epsilon-alpha2-beta1": {"convolution": "alpha-beta", "linear": "epsilon"},
    "epsilon-alpha2-beta1-flat": {"first": "flat", "convolution": "alpha-beta", "linear": "epsilon"},
    "epsilon": {"convolution": "epsilon", "linear": "epsilon"},
}
"""Rules by type of layer; ``first`` is for the layers that read the picture itself."""

TYPES = ("first", "convolution", "linear", "batch-norm")

POSITIVE = Share((("positive", "positive"), ("negative", "negative")), bias="positive")
NEGATIVE = Share((("positive", "negative"), ("negative", "positive")), bias="negative")
RAISED = Share((("positive", "raised"), ("negative", "lowered")), bias="raised", where="positive")
LOWERED = Share((("positive", "lowered"), ("negative", "raised")), bias="lowered", where="negative")
BOX = Share((("all", "all"), ("low", "minus positive"), ("high", "minus negative")), bias=None)

SHARES: Mapping[str, tuple[Share, ...]] = {
    "epsilon": (Share((("all", "all"),)),),
    "gamma": (RAISED, LOWERED),
    "z+": (POSITIVE,),
    "z-box": (BOX,),
    "flat": (Share((("one", "one"),), bias=None),),
    "w2": (Share((("one", "square"),), bias=None),),
}
"""What each rule divides by: METHODS in ``LRP``."""


@method("lrp")
class LRP(LayerMethod):
    r"""The score, divided among the pixels: each layer hands the relevance of its outputs on to its inputs.

    With x the inputs of a convolution or linear layer, W its weights, b its bias, z = W x + b, R the relevance of its
    outputs, v+ and v- positive and negative parts, and all divisions by d made safe as d + e sign(d), e 1e-6:

    - ``epsilon``: :math:`x \odot W^\top \frac{R}{z}`, with e its number, 1e-6 if none is given; 0 is LRP-0;
    - ``gamma``: that of W + g W+ where z > 0 and W + g W- where z < 0, with the parts of x that they are meant for;
      g 0.25; on positive inputs that of Montavon et al. 2019;
    - ``z+``: :math:`x^+ \odot W^{+\top} s + x^- \odot W^{-\top} s`, s = R / (W+ x+ + W- x- + b+);
    - ``alpha-beta``: alpha times z+ less beta = alpha - 1 times the same of the negative contributions; alpha 2;
    - ``z-box``: :math:`x \odot W^\top s - l \odot W^{+\top} s - h \odot W^{-\top} s`, s = R / (W x - W+ l - W- h),
      with l and h the lowest and the highest input there can be, see ``box``; for layers that read the picture;
    - ``flat``: every input of an output gets the same; ``w2``: in proportion to W squared;
    - ``pass``: relevance goes through, for the row ``batch-norm`` and for layers that keep their shape.

    ``rules`` names a composite, or is a table from ``first`` (layers that read the picture), ``convolution``,
    ``linear``, ``batch-norm`` (``pass`` or ``epsilon``), or the name of a module (* and ? are wildcards) to a rule; a
    name wins over ``first``, that over the type. A batch norm that follows a layer becomes part of it; the row
    ``batch-norm``, ``pass`` if there is none, is for the others. Sums, average pooling and constants that are added
    divide relevance in proportion; activations pass it on; a maximum gives it to the largest. Where branches of a sum
    nearly cancel each other, shares are large and of opposite signs: single cells that stand out. With ``layer``, the
    map is the relevance of that layer's output, channels apart before ``reduce``.

    Relevance starts as the score: a logit by itself, in another unit its gradient at the logits times these. Signed.
    Unit: that of the score; the map sums to it but for what biases, z+ on outputs without positive part and e take:
    ``extras`` has ``conservation``, the sum over the score. With ``conservation: layers`` also the relevance that
    passes each layer, as ``relevance at MODULE``.

    Networks with products, attention, layer norm or squeeze-excitation have no rules here and are refused by the name
    of the module; ``attnlrp`` is for transformers.

    Source: Bach et al. 2015, doi:10.1371/journal.pone.0130140; Montavon et al. 2017, arXiv:1512.02479 (z+, z-box,
    w2); Montavon et al. 2019, doi:10.1007/978-3-030-28954-6_10 (gamma, composites); Lapuschkin et al. 2019,
    arXiv:1902.10178 (flat). Zennit's definitions of rules and composites, but that w2 takes no bias and batch norms
    need no canonizer.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})
    cost: ClassVar[str] = "2 forwards + 1 backward with z+, 3 + 2 with gamma or alpha-beta"
    source: ClassVar[str] = "Bach et al. 2015, doi:10.1371/journal.pone.0130140"

    rules: Annotated[
        Composite | Annotated[dict[str, RuleSpec], Field(min_length=1)],
        Field(
            description="a composite by name, or a table: first, convolution, linear, batch-norm or the name of a "
            "module -> a rule"
        ),
    ] = "epsilon-plus-flat"
    box: Annotated[
        Literal["auto"] | tuple[float, float],
        Field(description="for z-box: the lowest and highest normalised input; auto: by the preprocessing"),
    ] = "auto"
    conservation: Annotated[
        Literal["total", "layers"],
        Field(description="what extras report: the map's sum over the score, or also the sum at each layer"),
    ] = "total"

    def __post_init__(self) -> None:
        if self.layer != INPUT:
            object.__setattr__(self, "needs", self.needs | {"layer"})
            if self.conservation == "layers":
                raise ConfigError(
                    "lrp: conservation: layers is measured on the way to the input; leave `layer` out"
                )
        if self.box != "auto" and not self.box[0] < self.box[1]:
            raise ConfigError(f"lrp: box: the lowest input, then the highest; got {list(self.box)}")
        norms = self.table.get("batch-norm", "pass")
        if norms not in ("pass", "epsilon"):
            raise ConfigError(f"lrp: rules: batch-norm takes pass or epsilon; got {norms}")
        for name, spec in self.table.items():
            if isinstance(spec, dict) and spec.get("alpha-beta", 1) < 1:
                raise ConfigError(
                    f"lrp: rules: {name}: alpha is at least 1, as beta is alpha - 1; got {spec}"
                )

    @cached_property
    def table(self) -> Mapping[str, RuleSpec]:
        """Rules by type of layer or module."""
        return COMPOSITES[self.rules] if isinstance(self.rules, str) else self.rules

    def looks_at(self, layers: Layers) -> tuple[Layer, ...]:
        refuse(
            self.name,
            layers,
            Relevance.HANDLED,
            "attnlrp has rules for attention and products; integrated-gradients takes any network",
        )
        weighted = named(layers)
        for key in self.table:
            if key not in TYPES and not any(fnmatchcase(name, key) for name in weighted):
                raise ModelError(f"{self.name}: rules: {missing(key, layers, weighted)}")
        return super().looks_at(layers)

    def span(self, score: Score, x: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and highest input, (1, C or 1, 1, 1) each."""
        if self.box != "auto":
            low, high = (x.new_full((1, 1, 1, 1), bound) for bound in self.box)
            return low, high
        if score.span is None:
            raise ConfigError(
                "lrp: z-box has to know the lowest and highest input, and the images came preprocessed: "
                "box: [low, high], in normalised units"
            )
        low, high = (bound.view(1, -1, 1, 1) for bound in score.span)
        return low, high

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        chosen = Choice(self, score)
        rules = Relevance(
            chosen,
            name=self.name,
            norms=self.table.get("batch-norm") == "epsilon",
            box=self.span(score, x) if "z-box" in self.table.values() else None,
            from_pixels=self.layer == INPUT or score.create_graph,
            twice=score.create_graph,
        )
        score = started(score, rules, Start())
        extras: dict[str, Tensor] = {}
        if self.conservation == "layers":
            names = list(dict.fromkeys(op.module for op in score.layers.operations if measured(op)))
            found = score.folded(x, names, Sums(len(names)))
            relevance, values = found.grads, found.values
            for place, name in enumerate(names):
                if name not in chosen.joined(rules):
                    extras[f"relevance at {name}"] = found.folds[0][:, place]
        else:
            layers = self.looks_at(score.layers)
            _, (relevance,), values = score.gradients(x, at=layers)
            relevance = layers[0].maps(relevance) if layers else relevance
        rules.over = True
        total = relevance.flatten(1).sum(1)
        return Attribution(relevance, {"conservation": (total / values).detach(), **extras})


def named(layers: Layers) -> list[str]:
    """The modules that a rule can be given by name: those that run a layer with weights, and, inside of these, those
    that only hold weights for them."""
    runs = dict.fromkeys(op.module for op in layers.operations if op.kind == "weighted")
    outer = {row.name.rpartition(".")[0] for row in layers.rows}
    idle = [row.name for row in layers.rows if not row.calls and row.name not in outer]
    held = (name for name in idle if any(not run or name.startswith(f"{run}.") for run in runs))
    return list(dict.fromkeys([*filter(None, runs), *held]))


def missing(key: str, layers: Layers, weighted: Sequence[str]) -> str:
    """Why a name is none that a rule can be given to."""
    if not any(fnmatchcase(row.name, key) for row in layers.rows):
        return f"no layer is called {key!r}{nearest(key, [*TYPES, *weighted])}"
    within = any(fnmatchcase(name, f"{key}.*") for name in weighted)
    return f"{key!r} is no layer with weights" + (f"; did you mean '{key}.*'" if within else "")


def measured(operation: Operation) -> bool:
    """Whether ``conservation: layers`` tells the relevance at what a module makes of it."""
    return operation.module != "" and operation.kind in ("weighted", "batch-norm")


class Choice:
    """The rule of each layer of a network, by the weights it runs with."""

    def __init__(self, method: LRP, score: Score) -> None:
        self.method, self.score = method, score
        modules = score.module.named_parameters(remove_duplicate=True)
        self.names = {id(weight): name.rpartition(".")[0] for name, weight in modules}
        for name, part in score.module.named_modules():
            if self.named(name) != self.named("") and _makes_weights(part):
                raise ModelError(
                    f"lrp: rules: {name!r} makes its weights anew each time it runs, so it cannot be told by its name; "
                    "give a rule for its type"
                )

    def __call__(self, weight: Tensor, function: str, pixels: bool) -> Rule:
        name, table = self.names.get(id(weight), ""), self.method.table
        kind = "linear" if function == "linear" else "convolution"
        spec = self.named(name)
        if spec is None and pixels:
            spec = table.get("first")
        if spec is None:
            spec = table.get(kind)
        if spec is None:
            raise ModelError(f"lrp: rules has none for {name!r}: name it, or give one for {kind}")
        return replace(made(spec), layer=name)

    def named(self, name: str) -> RuleSpec | None:
        """The rule that the table has for the name of a module."""
        rules = self.method.table.items()
        return next((rule for key, rule in rules if key not in TYPES and fnmatchcase(name, key)), None)

    def joined(self, rules: Relevance) -> set[str]:
        """Modules whose output relevance does not pass, as the batch norm behind them was made part of them."""
        return {self.names.get(key, "") for key in rules.joined}


def _makes_weights(part: nn.Module) -> bool:
    """Whether a layer's weights are no parameter, as with a weight norm."""
    weight = getattr(part, "weight", None)
    return isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter)


def made(spec: RuleSpec) -> Rule:
    """A rule from how the config names it."""
    name, number = (spec, None) if isinstance(spec, str) else next(iter(spec.items()))
    match name:
        case "pass":
            return Rule(())
        case "epsilon":
            return Rule(SHARES[name], epsilon=1e-6 if number is None else number)
        case "alpha-beta":
            alpha = 2.0 if number is None else number
            return Rule((replace(POSITIVE, factor=alpha), replace(NEGATIVE, factor=1 - alpha)))
    return Rule(SHARES[name], gamma=0.25 if number is None else number)


class Sums:
    """What ``Score.folded`` sums: the relevance at each module, a column (m, ``count``) each."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, number: int, relevance: Tensor, images: int) -> tuple[Tensor, ...]:
        sums = relevance.new_zeros(len(relevance), self.count)
        sums[:, number] = relevance.flatten(1).sum(1)
        return (sums,)
