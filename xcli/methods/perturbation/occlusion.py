"""What the score loses without a part of the picture: patches that slide over it, or features that are named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.baselines import Removal
from xcli.methods.base import Attribution
from xcli.methods.perturbation.base import BlackBox, asked, numbered
from xcli.registry import method
from xcli.score import Score
from xcli.segments import Segments, segmented
from xcli.targets import Scale

AUTO = 7
"""Patches that fit side by side along the shorter side where their size is left open."""


@method("occlusion")
class Occlusion(Removal, BlackBox):
    r"""What the score loses while a patch covers a place, for patches that slide over the picture.

    .. math:: map_u = \frac{1}{|\{P \ni u\}|} \sum_{P \ni u} \big(f(x) - f(x \text{ without } P)\big)

    over square patches P of ``patch`` pixels, ``stride`` apart; those of the last row and column end at the border.
    Covered pixels show the ``substrate``, all colours at once. Unit: that of the score. Where patches do not overlap,
    the map of a linear model is, patch by patch, the exact sum of its terms. ``extras/forwards``: the patches.

    Source: Zeiler and Fergus 2014, arXiv:1311.2901, who fix neither number. Left open, ``patch`` is a seventh of the
    shorter side and ``stride`` half of that. Preset ``captum``: patch and stride 3; its mean over overlaps is the
    default here, but it explains the logit, ``score: logit``. Preset ``xplique``: sums over overlaps, patch and stride
    3, and only patches that lie inside the picture as a whole, so that a margin may stay 0 (a patch that is larger
    than the picture is cut to it).
    """

    scale: ClassVar[Scale] = "probability"
    cost: ClassVar[str] = "1 forward a patch, 169 at 224 x 224 pixels; and 1 of the image"
    source: ClassVar[str] = "Zeiler and Fergus 2014, arXiv:1311.2901"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "captum": {"patch": 3, "stride": 3},
        "xplique": {"patch": 3, "stride": 3, "overlaps": "sum", "border": "inside"},
    }
    small: ClassVar[Mapping[str, object]] = {"patch": 64, "stride": 48}

    patch: Annotated[
        int | None, Field(ge=1, description="side of a patch, pixels; null: a seventh of the shorter side")
    ] = None
    stride: Annotated[
        int | None, Field(ge=1, description="pixels from patch to patch; null: half a patch")
    ] = None
    overlaps: Annotated[
        Literal["mean", "sum"], Field(description="what a pixel under several patches gets of their losses")
    ] = "mean"
    border: Annotated[
        Literal["clipped", "inside"],
        Field(description="patches at the border are cut off there, or left out"),
    ] = "clipped"

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        size = (x.shape[-2], x.shape[-1])
        side = self.patch or max(1, round(min(size) / AUTO))
        stride = self.stride or max(1, side // 2)
        down, right = (self.covers(length, side, stride).to(x.device) for length in size)  # (patches, pixels)
        remover, across = self.remover(score, x), len(right)

        def covered(image: Tensor, sample: Tensor) -> Tensor:
            place = sample.to(x.device)
            return remover(image, down[place // across, :, None] & right[place % across, None, :])

        own = score.image.unique()
        count = torch.full((len(x),), len(down) * across)
        table = asked(score, x, *numbered(count, own), covered)  # (N, patches)
        loss = (score.clean(x)[:, None] - table).unflatten(1, (len(down), across))
        rows, columns = down.to(x.dtype), right.to(x.dtype)
        maps = rows.T @ loss @ columns  # (N, H, W): each patch's loss on all its pixels
        if self.overlaps == "mean":
            maps = maps / (rows.sum(0)[:, None] * columns.sum(0)).clamp_min(1)
        return Attribution(maps, {"forwards": count[score.image].to(maps)})

    def covers(self, length: int, side: int, stride: int) -> Tensor:
        """Which of ``length`` pixels each of the patches along one side covers, (patches, length), bool."""
        room = max(0, length - side)
        number = (math.ceil(room / stride) if self.border == "clipped" else room // stride) + 1
        start, pixel = torch.arange(number)[:, None] * stride, torch.arange(length)
        return (pixel >= start) & (pixel < start + side)


@method("feature-ablation")
class FeatureAblation(Removal, BlackBox):
    r"""What the score loses without each of the features that the picture is cut into.

    .. math:: map_u = f(x) - f(x \text{ without the feature that } u \text{ belongs to})

    Features are the cells of a grid, superpixels, or those of a label map (``segments``); each is taken out by itself,
    all colours at once, and shows the ``substrate``. Unit: that of the score. ``extras/forwards``: the features.
    Source: captum's FeatureAblation with a feature mask; Zeiler and Fergus 2014, arXiv:1311.2901.
    """

    cost: ClassVar[str] = "1 forward a feature; and 1 of the image"
    source: ClassVar[str] = "Zeiler and Fergus 2014, arXiv:1311.2901; captum"
    small: ClassVar[Mapping[str, object]] = {"segments": "grid:3"}

    segments: Segments = "grid:7"

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        label, count = segmented(score, x, self.segments)
        remover = self.remover(score, x)

        def ablated(image: Tensor, sample: Tensor) -> Tensor:
            return remover(image, label[image.to(x.device)] == sample.to(x.device)[:, None, None])

        table = asked(score, x, *numbered(count, score.image.unique()), ablated)  # (N, most features)
        loss = score.clean(x)[:, None] - table
        return Attribution(painted(loss, label, score), {"forwards": count[score.image].to(loss)})


def painted(values: Tensor, label: Tensor, score: Score) -> Tensor:
    """Numbers of features (N, F) on the pixels of each: (N, H, W), by labels (B, H, W)."""
    own = label[score.image.to(label.device)]
    return values.gather(1, own.flatten(1)).view(own.shape)
