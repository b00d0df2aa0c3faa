"""Recipro-CAM: what the network makes of a layer's output when one cell of it at a time is let through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from xcli.layers import Layer
from xcli.methods.cam.base import CAM
from xcli.methods.perturbation.base import asked, numbered
from xcli.registry import method
from xcli.replay import entries
from xcli.score import Score
from xcli.targets import Scale


@method("reciprocam")
class ReciproCAM(CAM):
    r"""The score of the network when only one cell of a layer's output is let through, for each cell.

    .. math:: map_n = f_{tail}(A \odot M^n)

    with A the layer's output and M^n 1 at cell n and 0 elsewhere, all channels at once; with ``gaussian``, 1/4 at the
    cell, 1/8 at its four neighbours and 1/16 at the diagonal ones. On tokens this is ViT-Recipro-CAM: class and
    register tokens stay as they are. No gradients: the network runs once up to the layer, and once a cell from there
    on, for all rows of an image together. Unit: that of the score. No ``create_graph``: the network runs in parts.

    Source: Byun and Lee 2022, arXiv:2209.14074, and ViT-ReciproCAM 2023, arXiv:2310.02588, whose layer, the first norm
    of the last block, is what ``layer: auto`` finds. Left open, ``gaussian`` is off on maps and on for tokens, as in
    OpenVINO's code. There the map is also brought to [0, 1] image by image; here it stays raw.
    """

    scale: ClassVar[Scale] = "probability"
    cost: ClassVar[str] = "1 forward + 1 forward a cell of what follows the layer"
    source: ClassVar[str] = "Byun and Lee 2022, arXiv:2209.14074; 2023, arXiv:2310.02588"

    gaussian: Annotated[
        bool | None,
        Field(description="let a cell's neighbours through in part; null: on tokens only"),
    ] = None

    def maps(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        return (self.of_layer(score.tail(x, layer), layer) for layer in layers)

    def of_layer(self, tail: Score, layer: Layer) -> Tensor:
        """The map (N, h, w) of a layer, by the score as a function of its output."""
        assert tail.prefix is not None
        acts, grid = tail.prefix.activations(), layer.require_map()  # (B, ...)
        gaussian = grid.layout == "tokens" if self.gaussian is None else self.gaussian
        masks = cell_masks(grid.h, grid.w, gaussian).to(acts)

        def one_cell(image: Tensor, sample: Tensor) -> Tensor:
            raw = entries(acts, image)
            return grid.tokens(grid.maps(raw) * masks[sample.to(raw.device)], raw)

        cells = torch.full((len(acts),), grid.h * grid.w)
        table = asked(tail, acts, *numbered(cells, tail.image.unique()), one_cell)  # (N, h w)
        return table.view(-1, grid.h, grid.w)


def cell_masks(h: int, w: int, gaussian: bool) -> Tensor:
    """What each of the cells of a grid lets through, row by row: (h w, 1, h, w)."""
    down, right = (
        (torch.arange(side)[:, None] - torch.arange(side)).abs() for side in (h, w)
    )  # how far two rows are apart
    near = torch.tensor([0.5, 0.25, 0.0] if gaussian else [1.0, 0.0, 0.0])
    rows, columns = near[down.clamp_max(2)], near[right.clamp_max(2)]
    return torch.einsum("ik,jl->ijkl", rows, columns).reshape(h * w, 1, h, w)
