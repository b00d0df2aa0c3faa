"""The baselines that every method has to beat: they know nothing of the network."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from xcli.methods.base import Method
from xcli.registry import method
from xcli.score import Score

BASELINES = ("random", "centre", "sobel")
"""Scored beside the methods where ``baselines`` is set."""


@method("random")
class Random(Method):
    """Uniform noise in [0, 1), one number a pixel, drawn for each image from the run's seed and the image's path.

    Rows of one image get the same noise. Without unit; the floor for every metric.
    """

    source: ClassVar[str] = "baseline"
    cost: ClassVar[str] = "none"

    def attribute(self, score: Score, x: Tensor) -> Tensor:
        draw = [
            torch.rand(x.shape[2:], generator=score.generator(row, self.name))
            for row in range(len(score.image))
        ]
        return torch.stack(draw).to(x)  # (N, H, W)


@method("centre")
class Centre(Method):
    """How near a pixel is to the middle of the picture: objects tend to be there.

    1 - d / d_max, with d the distance of a pixel's centre from the picture's, d_max that of a corner. Without unit.
    """

    source: ClassVar[str] = "baseline"
    cost: ClassVar[str] = "none"

    def attribute(self, score: Score, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        down = torch.arange(height, dtype=x.dtype, device=x.device) + 0.5 - height / 2
        right = torch.arange(width, dtype=x.dtype, device=x.device) + 0.5 - width / 2
        distance = torch.hypot(down[:, None], right) / math.hypot(height / 2, width / 2)
        return (1 - distance).expand(len(score.image), -1, -1)  # (N, H, W)


@method("sobel")
class Sobel(Method):
    """The edges of the picture: the magnitude of the Sobel gradient of its mean over the colours.

    Borders are continued by their outermost pixels. In units of the normalised input a pixel. A map that looks like
    this one shows the picture rather than the network. Source: Adebayo et al. 2018, arXiv:1810.03292, who hold maps
    against an edge detector.
    """

    source: ClassVar[str] = "baseline; Adebayo et al. 2018, arXiv:1810.03292"
    cost: ClassVar[str] = "none"

    def attribute(self, score: Score, x: Tensor) -> Tensor:
        grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")  # (B, 1, H + 2, W + 2)
        down = torch.tensor([[-1.0, -2, -1], [0, 0, 0], [1, 2, 1]], dtype=x.dtype, device=x.device) / 8
        edges = F.conv2d(grey, torch.stack([down, down.T])[:, None])  # (B, 2, H, W)
        return edges.square().sum(1).sqrt()[score.image.to(x.device)]
