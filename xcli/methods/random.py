"""The baseline that every method has to beat."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from xcli.methods.base import Method
from xcli.registry import method
from xcli.score import Score


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
