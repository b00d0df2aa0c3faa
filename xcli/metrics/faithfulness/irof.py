"""IROF: the share of the score that is lost while whole segments of the image are removed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xcli.baselines import Removal, Substrate
from xcli.errors import ConfigError
from xcli.metrics.base import Direction, Measured, Metric, Watched
from xcli.metrics.curves import scores_without, where_finite
from xcli.metrics.order import places
from xcli.registry import metric
from xcli.score import Score
from xcli.segments import consecutive


@metric("irof")
class IROF(Removal, Metric):
    r"""How much of the score is lost while segments of the image are removed by descending mean of the map, in area.

    .. math:: 1 - \int_0^1 \frac{f(x \text{ without its most relevant fraction } q \text{ of segments})}{f(x)}\, dq

    Segments are SLIC superpixels of the normalised image; they differ in number from image to image (``segments`` of
    each row is kept), so there is no common curve. Without unit; 0 where nothing is lost, 1 where everything is at
    once, higher is better. NaN where a map is not finite or f(x) is not positive; and, unless ``rows: all``, where
    another class than the explained one is predicted: the paper divides by the score of the predicted class, and one
    near zero makes the ratio as large as any number. Needs scikit-image. Source: Rieger
    and Hansen 2020, arXiv:2003.08747. Departs: the area is over the fraction of segments, not their number.
    ``preset: quantus`` counts segments and leaves the untouched image out, so that a score that never falls gives 1;
    Quantus itself takes the mean colour of what is left after each step, over all channels, where ours is the image's.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (None, None)
    cost: ClassVar[str] = (
        "segments - 1 passes; and one an image for each substrate (one a batch for a constant), shared between metrics"
    )
    source: ClassVar[str] = "Rieger and Hansen 2020, arXiv:2003.08747"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {"quantus": {"area": "sum", "rows": "all"}}
    small: ClassVar[Mapping[str, object]] = {"segments": 6}

    score: Watched = "probability"
    substrate: Substrate = "mean"
    segments: Annotated[int, Field(description="superpixels that are asked for", ge=2)] = 100
    compactness: Annotated[float, Field(description="how square they are, against how alike", gt=0)] = 10.0
    area: Annotated[
        Literal["fraction", "sum"],
        Field(description="in steps that add up to 1; or in steps of 1, without the untouched image"),
    ] = "fraction"

    rows: Annotated[
        Literal["predicted", "all"], Field(description="only rows that explain the predicted class, or all")
    ] = "predicted"

    def __post_init__(self) -> None:
        if find_spec("skimage") is None:
            raise ConfigError("irof needs scikit-image: pip install 'xcli[segments]'")

    def measure(self, map: Tensor, x: Tensor, score: Score) -> Measured:
        watched = score.scaled(self.score)
        key = (x, "superpixels", self.segments, self.compactness)  # a tensor is a key by identity
        segment = score.once(key, lambda: superpixels(x, self.segments, self.compactness))
        place, total = segment_places(map, segment[score.image])
        shares = self.shares(watched, x, place, total)
        last = shares.gather(1, total[:, None].to(shares.device))[:, 0]
        area = shares.sum(1) - (shares[:, 0] + last) / 2  # trapezoids of width 1
        number = total.to(area)
        first = (shares[:, 0] + shares[:, 1]) / 2
        loss = number - (area - first) if self.area == "sum" else 1 - area / number
        return Measured(where_finite(map, loss), extras={"segments": number})

    def shares(self, score: Score, x: Tensor, place: Tensor, total: Tensor) -> Tensor:
        """f(x without its first k segments) / f(x): (N, most segments + 1), zero beyond a row's own number."""
        row = torch.arange(len(total)).repeat_interleave(total - 1)
        count = torch.arange(1, len(row) + 1) - ((total - 1).cumsum(0) - (total - 1))[row]
        clean = score.clean(x)  # (N,)
        curve = clean.new_zeros(len(total), int(total.max()) + 1)
        curve[row, count] = scores_without(score, self.remover(score, x), place, row, count).to(curve)
        curve[:, 0] = clean
        curve[torch.arange(len(total)), total] = self.emptied(score, x)
        known = clean > 0
        if self.rows == "predicted":
            known &= score.scaled("contrast").clean(x).to(clean) >= 0
        return curve / torch.where(known, clean, torch.nan)[:, None]


def superpixels(x: Tensor, segments: int, compactness: float) -> Tensor:
    """SLIC labels (B, H, W) of images (B, C, H, W), on the CPU; those of an image are 0 to their number less one."""
    from skimage.segmentation import slic

    found = [
        slic(image, n_segments=segments, compactness=compactness, start_label=0, channel_axis=-1)
        for image in x.permute(0, 2, 3, 1).cpu().double().numpy()
    ]
    return torch.stack([consecutive(own) for own in found])


def segment_places(maps: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each pixel's segment, 0 for the highest mean of the map, (N, H, W); and how many there are, (N,)."""
    label, values = segment.flatten(1), maps.flatten(1).cpu().double()
    total = label.amax(1) + 1
    empty = values.new_zeros(len(maps), int(total.max()))
    size = empty.scatter_add(1, label, torch.ones_like(values))
    mean = torch.where(size > 0, empty.scatter_add(1, label, values) / size, -torch.inf)
    return places(mean).gather(1, label).view(maps.shape).to(maps.device), total
