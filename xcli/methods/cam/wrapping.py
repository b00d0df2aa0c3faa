"""CAMs that work around another one: they change the number it explains, or what becomes of its maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.errors import ModelError
from xcli.layers import Layer, Layers
from xcli.methods.base import Need, resized
from xcli.methods.cam.base import CAM, GRAD_CAM, TORCH_CAM, scaled
from xcli.methods.nested import Around, Spec
from xcli.registry import method, options
from xcli.score import Score
from xcli.targets import ClassRows, Rows

BASE = Around(
    CAM,
    {
        "refinecam": "combines the maps of several layers, so it stands outermost: {name: refinecam, base: ...}",
        "finercam": "cannot be used around itself",
        "cam": "reads one class off the head, so there is nothing to compare; gradcam gives the same map",
    },
)
REFINED = Around(CAM, {"refinecam": "cannot be used around itself"})


@options
class CAMAround(CAM):
    """A CAM that has its maps made by another one, with layers, rectification, scaling and fusion of its own."""

    needs: ClassVar[frozenset[Need]] = frozenset({"layer", "gradients"})
    around: ClassVar[Around] = BASE

    base: Annotated[
        Spec,
        BASE,
        Field(
            description="the CAM that makes the maps: a name, or name: and its options",
            json_schema_extra=BASE.schema_default,
        ),
    ] = "gradcam"

    def __post_init__(self) -> None:
        # those of the class are of its default base
        object.__setattr__(self, "needs", self.inner.needs | {"layer"})
        object.__setattr__(self, "scale", self.inner.scale)

    @cached_property
    def inner(self) -> CAM:
        """The CAM that makes the maps."""
        made: CAM = self.around.method(self.base)
        return made

    def looks_at(self, layers: Layers) -> tuple[Layer, ...]:
        return replace(self.inner, layer=self.layer).looks_at(layers)


@method("finercam")
class FinerCAM(CAMAround):
    r"""What tells a class from those most like it: another CAM, of the difference between their logits.

    .. math:: \sum_t w_t\, (z_c - \alpha z_t), \qquad w_t = p_t / \sum_s p_s

    over the T ``references`` whose logits z_t are nearest to the class's own z_c, or the classes ``against``; p are
    the probabilities, differentiated through. They are chosen on the images that the CAM is made of, and stay the
    same when the inner CAM perturbs them. ``alpha: 0`` gives the inner CAM itself.

    Unit: that of the inner CAM, for a difference of what it explains, logits for most; in another unit it is that of
    the classes' values there, the references and their weights still chosen by the logits. A base that asks for no
    score, such as eigencam, is refused: there is nothing to compare. A row whose class is the only one of ``against``
    has a map that is not finite.

    Source: Zhang et al. 2025, arXiv:2501.11309; several references are weighed as in the authors' code, where torch-cam
    gives as the paper's formula the mean of the references times 0.6 (``preset: torch-cam``). Departs from the code:
    the weights are the softmax over the references alone, which is the same but for the 1e-9 that the code adds below
    (``eps``, ``preset: grad-cam``): where another class is almost certain, the probabilities of the references fall
    under that number, and the code then explains these probabilities; where another class has the same logit as the
    target, the code may explain that one.
    """

    source: ClassVar[str] = "Zhang et al. 2025, arXiv:2501.11309"
    cost: ClassVar[str] = "that of its base, once a class"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "grad-cam": {**GRAD_CAM, "eps": 1e-9},
        "torch-cam": {**TORCH_CAM, "alpha": 0.6, "weights": "mean"},
    }

    alpha: Annotated[float, Field(ge=0, description="how much of the references' logits is taken off")] = 1.0
    references: Annotated[
        int, Field(ge=1, description="how many of the most similar classes; at most all others")
    ] = 3
    against: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Field(description="classes to compare with by their indices, in place of the most similar ones"),
    ] = ()
    weights: Annotated[
        Literal["softmax", "mean"],
        Field(description="what each reference counts: as much as its probability, or all the same"),
    ] = "softmax"
    eps: Annotated[float, Field(ge=0, description="added to the sum of the references' probabilities")] = 0.0

    def maps(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        others, kept = self.compared(score, x)
        alone = ~kept.any(1, keepdim=True)  # (N, 1), rows with nothing to compare
        kept = kept | alone
        asked: list[int] = []

        def number(rows: Rows, outputs: Any, copy: Tensor, row: Tensor) -> Tensor:
            asked.append(len(row))
            own = rows.values(outputs, copy, row)  # (P,)
            rivals = [rows.retarget(other).values(outputs, copy, row) for other in others.unbind(1)]
            theirs = torch.stack(rivals, 1)  # (P, T)
            logits = rows.logits(outputs)[copy.to(others.device)]  # (P, L)
            return self.difference(
                own, theirs, logits, others[row.to(others.device)], kept[row.to(others.device)]
            )

        maps = list(self.inner.maps(score.reading(number), x, layers))
        if not asked and len(score.image):
            raise ModelError(
                f"finercam: {self.inner.name} looks at no class, so there are none to compare; use it by itself, or "
                "take another base"
            )
        return [one.masked_fill(alone[:, :, None], torch.nan) for one in maps]

    def compared(self, score: Score, x: Tensor) -> tuple[Tensor, Tensor]:
        """The classes with which each row is compared (N, T), and which of them count: its own does not."""
        if not isinstance(score.rows, ClassRows):
            raise ModelError(
                "finercam: it compares classes, and these explanations are of no class; use its base"
            )
        logits = score.logits(x)[score.image.to(x.device)]  # (N, L)
        target = score.rows.target.to(logits.device)[:, None]
        count = logits.shape[1]
        if count < 2:
            raise ModelError(
                "finercam: the model has a single logit, so there is no class to compare; use its base"
            )
        if not self.against:
            distance = (logits - logits.gather(1, target)).abs().scatter(1, target, torch.inf)
            others = distance.argsort(dim=1, stable=True)[:, : min(self.references, count - 1)]
            return others, torch.ones_like(others, dtype=torch.bool)
        if max(self.against) >= count:
            raise ModelError(
                f"finercam: against: there is no class {max(self.against)}; the model has {count}"
            )
        others = torch.tensor(tuple(dict.fromkeys(self.against)), device=logits.device).expand(
            len(logits), -1
        )
        return others, others != target

    def difference(self, own: Tensor, theirs: Tensor, logits: Tensor, others: Tensor, kept: Tensor) -> Tensor:
        """The values (P,) of pairs whose own class has the value ``own`` (P,) and whose references, ``others`` (P, T),
        have the values ``theirs`` (P, T), at logits (P, L); references that are not ``kept`` (P, T) do not count."""
        if self.weights == "mean":
            weights = kept.to(own.dtype) / kept.sum(1, keepdim=True)
        else:
            weights = logits.gather(1, others).masked_fill(~kept, -torch.inf).softmax(1)
        values = own - self.alpha * (weights * theirs).sum(1)
        if not self.eps:
            return values
        chance = (logits.softmax(1).gather(1, others) * kept).sum(1)
        return values * chance / (chance + self.eps)


@method("refinecam")
class RefineCAM(CAMAround):
    r"""Detail that several layers agree on: the product of another CAM's maps on coarse and on fine grids.

    .. math:: \prod_l \mathrm{up}\Big(n\big(\mathrm{ReLU}(M_l)\big)\Big)

    over the maps M_l of the layers, each taken to [0, 1] on its own grid by n and brought to the finest grid by up.
    Without unit. A layer in which nothing speaks for the class leaves nothing of the rest; where there is one layer,
    the map is that of the base, as it is.

    ``layer`` has to name several; ``auto:3`` is the default layer and what stands for it on the two next finer grids,
    in a vision transformer in the two blocks before. The number explained is that of the base.

    Source: Domeniconi et al. 2026, arXiv:2605.14641; n is min-max as in the authors' experiments, which multiply at
    the input's size (``preset: original``). ``normalise: peak`` divides by the largest value instead, so that the
    weakest place of a map that is positive everywhere does not count as nothing: that is what a loop in the grad-cam
    package sets out to do, but it throws its result away, and the package takes both ends to [0, 1] a second time
    after resizing (``rescale``, ``preset: grad-cam``; but for its last scaling). torch-cam is as the default.
    """

    source: ClassVar[str] = "Domeniconi et al. 2026, arXiv:2605.14641"
    cost: ClassVar[str] = "that of its base, for several layers"
    around: ClassVar[Around] = REFINED
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "original": {"fused_at": "input"},
        "grad-cam": {**GRAD_CAM, "fusion": "product", "rescale": True},
        "torch-cam": {**TORCH_CAM, "fusion": "product"},
    }

    base: Annotated[
        Spec,
        REFINED,
        Field(
            description="the CAM that makes the maps: a name, or name: and its options",
            json_schema_extra=REFINED.schema_default,
        ),
    ] = "gradcam++"
    layer: Annotated[
        str | tuple[str, ...],
        Field(
            description="several layers: auto:3 (the default one and those before it on finer grids), a list of names, "
            "or a wildcard such as layer*"
        ),
    ] = "auto:3"
    fusion: Annotated[
        Literal["mean", "max", "product"], Field(description="how the maps of several layers become one")
    ] = "product"
    normalise: Annotated[
        Literal["peak", "min-max", "tanh", "none"],
        Field(
            description="how each map is scaled before it is combined with others: divided by its largest absolute "
            "value, taken to [0, 1], tanh of twice the first, or not at all"
        ),
    ] = "min-max"
    rescale: Annotated[
        bool, Field(description="bring each map to the input's size first, and scale it there once more")
    ] = False

    def maps(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        again = self.rescale and len(layers) > 1
        for one in self.inner.maps(score, x, layers):
            yield self.enlarged(one, (x.shape[-2], x.shape[-1])) if again else one

    def enlarged(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps (N, h, w), rectified and scaled as one of several is, at ``size``."""
        return resized(scaled(maps.relu() if self.relu else maps, self.normalise), size, "bilinear")
