"""What an explanation should satisfy by right: it adds up, says nothing of what does not matter, and sees no shift."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from xcli.baselines import Removal, Substrate
from xcli.metrics.base import Direction, Explain, Measured, Metric, Watched
from xcli.metrics.faithfulness.subsets import cells
from xcli.registry import metric
from xcli.score import Score

SLACK = 0.01
"""How far a logit may move, in units of 1 + its size, in a network that is meant to be the same function."""


@metric("completeness")
class Completeness(Removal, Metric):
    r"""How far the map is from adding up to what the score owes to the whole image.

    .. math:: \Big|\sum_i map_i - \big(f(x) - f(x_0)\big)\Big|

    with x_0 the emptied image: all 0, the mean colour of the preprocessing, unless ``substrate`` says otherwise; take
    the baseline of the method. Unit: that of ``score``, which should be the one the method explains; with ``relative``,
    shares of abs(f(x) - f(x_0)), and NaN where that is 0. Lower is better; 0 for a method that satisfies the axiom.
    Of a method that does not claim to add up, such as a CAM, it says nothing.

    Source: Sundararajan et al. 2017, arXiv:1703.01365, proposition 1. ``preset: quantus`` empties an image to its
    lowest number. Departs: Quantus divides the maps of a batch by the largest of them all and tells whether the two
    numbers are the same to the last bit.
    """

    direction: ClassVar[Direction] = "lower"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, None)
    cost: ClassVar[str] = "one pass an image for each substrate, shared between metrics"
    source: ClassVar[str] = "Sundararajan et al. 2017, arXiv:1703.01365"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"quantus": {"substrate": "minimum"}}

    score: Watched = "logit"
    relative: Annotated[bool, Field(description="divide by the difference of the scores")] = False

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        watched = score.scaled(self.score)
        owed = watched.clean(x) - self.emptied(watched, x)
        error = (map.flatten(1).sum(1) - owed).abs()
        return Measured(torch.where(owed != 0, error / owed.abs(), torch.nan) if self.relative else error)


@metric("non-sensitivity")
class NonSensitivity(Removal, Metric):
    r"""How many cells the map calls irrelevant though the score depends on them, or relevant though it does not.

    .. math:: \big|\{i : map_i = 0\} \,\triangle\, \{i : f(x) = f(x \text{ with cell } i \text{ redrawn})\}\big|

    A cell of the map is zero where all its pixels are below ``epsilon``, as a share of the largest absolute value; the
    score is the same where it moves by less than ``epsilon``. Each cell is changed once, by default to noise with the
    mean and deviation of the image. Unit: cells of ``grid``; lower is better. NaN where the map is not finite.

    Source: Nguyen and Rodríguez Martínez 2020, arXiv:2007.07584. Departs: cells instead of pixels, since each takes a
    pass; ``grid: null`` takes pixels; one draw of a cell instead of a mean over several, which would find the same
    cells. ``preset: quantus``: pixels, painted in the image's lowest number. Departs: a pixel is changed with all its
    colours, in Quantus one by one; and Quantus fails for ``features_in_step`` above 1.
    """

    direction: ClassVar[Direction] = "lower"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, None)
    cost: ClassVar[str] = "grid * grid passes an image"
    source: ClassVar[str] = "Nguyen and Rodríguez Martínez 2020, arXiv:2007.07584"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "quantus": {"grid": None, "substrate": "minimum", "score": "probability"}
    }
    small: ClassVar[Mapping[str, object]] = {"grid": 3, "epsilon": 0.05}

    score: Watched = "logit"
    substrate: Substrate = "gaussian"
    grid: Annotated[int | None, Field(description="cells a side; null: every pixel for itself", ge=1)] = 14
    epsilon: Annotated[float, Field(description="what counts as zero", gt=0)] = 1e-5

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        watched = score.scaled(self.score)
        cell = cells((map.shape[1], map.shape[2]), self.grid).to(x.device)  # (H, W)
        changed = watched.once((x, self), lambda: self.changed(watched, x, cell))  # whatever the map
        moved = (changed - watched.clean(x)[:, None]).abs()  # (N, F)
        size = map.abs().flatten(1)
        highest = size.new_zeros(moved.shape).scatter_reduce_(
            1, cell.flatten().expand(size.shape), size, "amax"
        )
        zero = highest <= self.epsilon * size.amax(1, keepdim=True)
        wrong = (zero ^ (moved < self.epsilon)).sum(1).to(map.dtype)
        known = size.isfinite().all(1) & moved.isfinite().all(1)
        return Measured(torch.where(known, wrong, torch.nan))

    def changed(self, watched: Score, x: Tensor, cell: Tensor) -> Tensor:
        """The score (N, F) of each row with each cell changed; one pass serves all rows of an image."""
        count, remove = int(cell.max()) + 1, self.remover(watched, x)
        image = watched.image.unique().repeat_interleave(count)

        def make(index: Tensor) -> Tensor:
            return remove(image[index], cell == (index % count).to(cell.device)[:, None, None])

        values, copy, row = watched.on(make, image)
        scores = values.new_empty(len(watched.image), count)
        scores[row.to(values.device), (copy % count).to(values.device)] = values
        return scores


@metric("input-invariance")
class InputInvariance(Metric):
    r"""How far the map moves when the image is shifted by a constant and the network undoes the shift.

    .. math:: \frac{\lVert e(f', x + m) - e(f, x) \rVert_2}{\lVert e(f, x) \rVert_2}, \quad f'(x + m) = f(x)
        \text{ for all } x

    with m the ``shift`` of every number of the image. f' is f with another bias in the first layer,
    b' = b - W m; where that layer pads with zeros, b' differs along the border, so that the two networks are the same
    function everywhere. Unit: lengths of the map; lower is better, 0 within rounding for a method that satisfies the
    axiom, as the gradient does and gradient times input does not. NaN for a map of zeros, and where the score moves all
    the same, as when the first layer is not the only one to see the image.

    Source: Kindermans et al. 2017, arXiv:1711.00867, where the shift is -1 too and maps are compared by eye. Departs:
    the number. Quantus tells whether maps are equal within 1e-4, has no preset for that, and shifts the bias by what
    the first layer answers in a corner, so that with padding its second network is another function.
    """

    direction: ClassVar[Direction] = "lower"
    bounds: ClassVar[tuple[float | None, float | None]] = (0, None)
    cost: ClassVar[str] = "one explanation and one pass; a copy of the network"
    source: ClassVar[str] = "Kindermans et al. 2017, arXiv:1711.00867"

    shift: Annotated[float, Field(description="in units of the normalised input", allow_inf_nan=False)] = -1.0

    def measure(self, map: Tensor, x: Tensor, score: Score, method: Explain, module: nn.Module) -> Measured:
        other, shifted = score.using(compensated(score, module, x[:1], self.shift)), x + self.shift
        before = score.scaled("logit").clean(x)
        after = other.scaled("logit").on(shifted, torch.arange(len(x)))[0]
        same = (after - before).abs() <= SLACK * (1 + before.abs())
        length = torch.linalg.vector_norm(map.flatten(1), dim=1)
        moved = torch.linalg.vector_norm((method(other, shifted) - map).flatten(1), dim=1)
        return Measured(torch.where(same & (length > 0), moved / length, torch.nan))


@torch.no_grad()
def compensated(score: Score, module: nn.Module, x: Tensor, shift: float) -> nn.Module:
    """A copy of the network that answers to x + ``shift`` as the network does to ``x`` (1, C, H, W).

    The first convolution or linear layer to run gets a new bias. What it answers to the shift alone is told by two
    images of one colour, so that a normalisation in front of it is seen through.
    """
    copy = deepcopy(module)
    still = first_layer(score, copy, torch.zeros_like(x))
    moved = first_layer(score, copy, torch.full_like(x, shift))
    if still is None or moved is None:
        return copy
    layer, answer = still[0], moved[0](moved[1]) - still[0](still[1])
    if isinstance(layer, nn.Conv2d):
        inner = answer[0, :, answer.shape[2] // 2, answer.shape[3] // 2]  # (K,), away from the border
        border = answer - inner[:, None, None]
    else:
        inner = answer.flatten(0, -2)[0]
        border = answer - inner
    bias = -inner if layer.bias is None else layer.bias - inner
    layer.bias = nn.Parameter(bias, requires_grad=False)
    layer.register_forward_hook(lambda _layer, _inputs, output: output - border)
    return copy


def first_layer(score: Score, module: nn.Module, x: Tensor) -> tuple[nn.Conv2d | nn.Linear, Tensor] | None:
    """The first convolution or linear layer to run, and what it is given."""
    seen: list[tuple[nn.Conv2d | nn.Linear, Tensor]] = []

    def note(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append((layer, inputs[0]))

    layers = [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        score.execution.run(module, x)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0] if seen else None
