"""Where the cells of a layer's output lie: maps by axes, or tokens in rows of patches."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, cat

from xcli.errors import ModelError

MAX_PREFIX = 16
"""At most so many class, distillation and register tokens stand before the patch tokens."""

_PREFIXES = (0, 1, 2, 5, *(n for n in range(MAX_PREFIX + 1) if n not in (0, 1, 2, 5)))


@dataclass(frozen=True)
class Grid:
    """How a raw output (N, ...) is a map of h x w cells: by its axes, or as tokens after ``prefix`` others."""

    layout: Literal["NCHW", "NHWC", "tokens"]
    h: int
    w: int
    prefix: int = 0

    def maps(self, t: Tensor) -> Tensor:
        """Raw output to maps (N, K, h, w); a view where that is possible, differentiable.

        Raises:
            ModelError: ``t`` has another shape than this grid (the input has another size than at the survey).
        """
        if self.layout == "tokens" and t.dim() == 3 and t.shape[1] == self.prefix + self.h * self.w:
            return t[:, self.prefix :].transpose(1, 2).reshape(t.shape[0], -1, self.h, self.w)  # (N, K, h, w)
        if t.dim() == 4 and self.layout != "tokens":
            maps = t if self.layout == "NCHW" else t.permute(0, 3, 1, 2)
            if maps.shape[-2:] == (self.h, self.w):
                return maps
        raise ModelError(f"an output of shape {tuple(t.shape)} is not on the grid {self}")

    def tokens(self, maps: Tensor, like: Tensor) -> Tensor:
        """Inverse of ``maps``: (N, K, h, w) back to a raw output; the prefix tokens are those of ``like``."""
        if self.layout == "NCHW":
            return maps
        if self.layout == "NHWC":
            return maps.permute(0, 2, 3, 1)
        return cat([like[:, : self.prefix], maps.flatten(2).transpose(1, 2)], 1)  # (N, prefix + h w, K)

    def __str__(self) -> str:
        prefix = f" after {self.prefix}" if self.prefix else ""
        return f"{self.h}x{self.w} {self.layout}{prefix}"


def infer_grid(
    shape: tuple[int, ...],
    size: tuple[int, int],
    patches: Sequence[tuple[int, int]] = (),
    lengths: Set[int] = frozenset(),
) -> Grid | None:
    """The grid of one picture's output, from shapes alone.

    Three axes: the two that shrink the picture's H x W by one stride, channels first where both readings fit. Two
    axes are tokens x channels: the tokens lie on a patch grid seen earlier, else on one of the picture's aspect.

    Args:
        shape: output for one picture, without the batch axis.
        size: (H, W) of the picture.
        patches: grids of the maps seen earlier in this forward pass, oldest first.
        lengths: token counts seen earlier; an axis of that length is not a side of a map (attention heads).
    Returns: ``None`` where there is no grid, or one of a single cell.
    """
    grid: Grid | None = None
    if len(shape) == 3:
        grid = _map_grid(shape, size, lengths)
    elif len(shape) == 2:
        grid = _token_grid(shape[0], size, patches)
    return grid if grid is not None and grid.h * grid.w > 1 else None


def _map_grid(shape: tuple[int, ...], size: tuple[int, int], lengths: Set[int]) -> Grid | None:
    readings = [Grid("NCHW", shape[1], shape[2]), Grid("NHWC", shape[0], shape[1])]
    readings = [grid for grid in readings if not lengths & {grid.h, grid.w}]
    fitting = [grid for grid in readings if _strides_agree(grid, size)]
    fitting += [grid for grid in readings if _almost_agree(grid, size)]
    return fitting[0] if fitting else None


def _token_grid(length: int, size: tuple[int, int], patches: Sequence[tuple[int, int]]) -> Grid | None:
    # the smallest prefix, among equal ones the grid seen last
    seen = [(length - h * w, -i, h, w) for i, (h, w) in enumerate(patches)]
    seen = [entry for entry in seen if 0 <= entry[0] <= min(MAX_PREFIX, entry[2] * entry[3])]
    if seen:
        prefix, _, h, w = min(seen)
        return Grid("tokens", h, w, prefix)
    for prefix in _PREFIXES:
        cells = length - prefix
        nearly = round(math.sqrt(max(cells, 0) * size[0] / size[1]))
        for h in range(max(2, nearly - 2), nearly + 3):
            grid = Grid("tokens", h, cells // h, prefix)
            if cells % h == 0 and grid.w > 1 and _strides_agree(grid, size):
                return grid
    return None


def _strides_agree(grid: Grid, size: tuple[int, int]) -> bool:
    """One stride takes H to h and W to w, both rounded down, or both rounded up."""
    (h, w), (H, W) = (grid.h, grid.w), size
    down = h * W < (w + 1) * H and w * H < (h + 1) * W
    up = (h - 1) * W < w * H and (w - 1) * H < h * W
    return h > 0 and w > 0 and (down or up)


def _almost_agree(grid: Grid, size: tuple[int, int]) -> bool:
    """The same up to one cell, as convolutions without padding leave it."""
    (h, w), (H, W) = (grid.h, grid.w), size
    return abs(h * W - w * H) <= H + W
