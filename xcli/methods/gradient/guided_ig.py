"""Integrated gradients along a path that the gradients themselves choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from xcli.baselines import Removal
from xcli.errors import ModelError
from xcli.methods.base import Attribution
from xcli.methods.gradient.base import PixelMethod
from xcli.registry import method
from xcli.score import Score


@method("guided-ig")
class GuidedIG(PixelMethod, Removal):
    r"""Integrated gradients that move first the pixels to which the score is least sensitive, so that the path keeps
    away from where gradients are large and say nothing about the picture.

    .. math:: \sum_{k} (g_{k+1} - g_k) \odot \nabla y\,(g_k)

    along a path from the emptied picture (``substrate``) to the picture, in ``steps`` steps that shorten its distance
    (sum of absolute differences) by the same amount each. In a step, numbers whose share of their way is more than
    ``distance`` behind the straight line catch up; then the share ``fraction`` of all numbers with the smallest
    absolute gradient move, as far as ``distance`` ahead of the line, then the next such share, until the step is
    made, the last share in proportion. Every number moves towards its end only. ``distance: 0`` is integrated
    gradients with left ends.

    Unit: that of the score. ``extras`` have ``delta``, the map's sum less y(x) - y(x'): the error of a sum of left
    ends, which falls with 1 / steps near the straight line, and more slowly the larger ``distance`` is. Each row has
    a path of its own. No graph is kept: the path is a choice.

    Source: Kapishnikov et al. 2021, arXiv:2106.09788, algorithm 1, with the defaults of the authors' code.

    Raises:
        ModelError: the maps are to be trained through.
    """

    cost: ClassVar[str] = "steps forwards + backwards for each target, and 2 forwards"
    source: ClassVar[str] = "Kapishnikov et al. 2021, arXiv:2106.09788"
    small: ClassVar[Mapping[str, object]] = {"steps": 3}

    steps: Annotated[int, Field(ge=1, description="steps of the path")] = 200
    fraction: Annotated[float, Field(gt=0, le=1, description="share of the numbers that move together")] = (
        0.25
    )
    distance: Annotated[
        float,
        Field(
            ge=0, le=1, description="how far a number may be from the straight line, as a share of its way"
        ),
    ] = 0.02

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        if score.create_graph:
            raise ModelError("guided-ig gives no maps that can be trained through: its path is a choice")
        own = score.apart()
        image = score.image.to(x.device)
        start, end = self.whole(score, x)[image], x[image]  # (N, C, H, W)
        here, total = start.clone(), (end - start) * 0  # what is not finite stays so
        for step in range(1, self.steps + 1):
            (grads,) = own.gradients(here).grads
            there = self.moved(here.flatten(1), grads.flatten(1), start.flatten(1), end.flatten(1), step)
            there = there.view_as(here)
            total += (there - here) * grads
            here = there
        gap = score.clean(x) - self.emptied(score, x)
        return Attribution(total, {"delta": total.sum((1, 2, 3)) - gap})

    def moved(self, here: Tensor, grads: Tensor, start: Tensor, end: Tensor, step: int) -> Tensor:
        """Where the path goes from ``here`` in its step ``step``; all are (N, D)."""
        way, place = end - start, step / self.steps
        behind, ahead = max(place - self.distance, 0.0), min(place + self.distance, 1.0)
        late = (here - start) * way.sign() < behind * way.abs()
        here = torch.where(late, start + behind * way, here)
        far = start + ahead * way
        room = torch.where((here - far) * way < 0, (far - here).abs(), 0)  # (N, D), how far each may still go
        left = (end - here).abs().sum(1) - way.abs().sum(1) * (
            1 - place
        )  # (N,), still to be gone in this step
        size = torch.where(room > 0, grads.abs(), torch.inf)
        ranked = size.sort(1).values
        share = int(self.fraction * (size.shape[1] - 1)) + 1
        taken = torch.zeros_like(room, dtype=torch.bool)
        for _ in range(
            -(-size.shape[1] // share)
        ):  # no more shares than these; a step that is made changes nothing
            done = taken.sum(1, keepdim=True)
            border = ranked.gather(1, (done + share - 1).clamp_max(size.shape[1] - 1))
            group = (size <= border) & ~taken & (size < torch.inf)
            reach = (room * group).sum(1)
            gain = (left / reach).nan_to_num(0, 0, 0).clamp(0, 1)  # (N,), the part of their room that they go
            here = torch.where(group, torch.lerp(here, far, gain[:, None].expand_as(here)), here)
            left = left - gain * reach
            taken |= group
        return here
