"""How sure a number over rows is: statistics, their bootstrap intervals, and paired tests of two methods.

The rows of one image are not independent (its classes share pixels and network), so what is drawn again is images,
never rows: the cluster bootstrap. A resample gives every image a weight, 0, 1, 2, ..., and a statistic of it is the
statistic of the rows repeated as often as their image's weight. Rows that are NaN are left out everywhere.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xcli.errors import ConfigError

Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.integer[Any]]

MEAN = "mean"
LEVEL, RESAMPLES, SEED = 0.95, 1000, 0
CELLS = 2_000_000
"""How many weights are in memory at once."""

_SHARES = {"min": 0.0, "median": 0.5, "max": 1.0}
_EXTREMES = (0.0, 1.0)


@dataclass(frozen=True)
class Estimate:
    """A statistic of some rows with its 95 % interval.

    Attributes:
        value: NaN where no row is defined.
        low, high: NaN where fewer than two images are defined, and for ``min`` and ``max``: a resample has no value
            beyond the sample's own extremes, so that the bootstrap says nothing about them.
        n: the rows that are defined.
        images: the images they belong to.
    """

    statistic: str
    value: float
    low: float
    high: float
    n: int
    images: int


@dataclass(frozen=True)
class Paired:
    """How much one method differs from another over the same rows.

    Attributes:
        difference: the mean of the first minus the second, over the rows where both are defined.
        p: of Wilcoxon's signed-rank test on the differences averaged an image; NaN where there is none.
    """

    difference: Estimate
    p: float


def check_statistic(name: str) -> None:
    """Raise ``ConfigError`` where ``name`` is no statistic."""
    if name != MEAN and _share(name) is None:
        raise ConfigError(f"{name!r} is no statistic; there are mean, median, min, max, and p1 to p99")


def statistic(values: Floats, name: str = MEAN) -> float:
    """The statistic of the defined ``values``; NaN where there is none. Percentiles interpolate, as numpy's do."""
    check_statistic(name)
    defined = np.asarray(values, np.float64)
    defined = defined[~np.isnan(defined)]
    if not defined.size:
        return float("nan")
    share = _share(name)
    with np.errstate(invalid="ignore"):  # between infinite values
        return float(defined.mean() if share is None else np.quantile(defined, share))


def estimate(values: Floats, image: Indices, name: str = MEAN) -> Estimate:
    """The statistic of ``values`` (rows,) with its interval; ``image`` (rows,) says which rows belong together."""
    return estimates([values], image, name)[0]


def estimates(columns: Sequence[Floats], image: Indices, name: str = MEAN) -> list[Estimate]:
    """As ``estimate``, for many columns over the same rows: those defined in the same rows share the resamples."""
    check_statistic(name)
    groups: dict[bytes, list[int]] = {}
    masks = [~np.isnan(column) for column in columns]
    for place, mask in enumerate(masks):
        groups.setdefault(np.packbits(mask).tobytes(), []).append(place)
    found: dict[int, Estimate] = {}
    for places in groups.values():
        defined = masks[places[0]]
        values = np.stack([np.asarray(columns[place][defined], np.float64) for place in places])  # (K, n)
        images, owner = np.unique(image[defined], return_inverse=True)
        with np.errstate(invalid="ignore"):  # an infinite value leaves no interval
            ends = _ends(values, owner, len(images), name)
        for place, row, (low, high) in zip(places, values, ends, strict=True):
            value = statistic(row, name)
            found[place] = Estimate(name, value, float(low), float(high), values.shape[1], len(images))
    return [found[place] for place in range(len(columns))]


def paired(mine: Floats, other: Floats, image: Indices) -> Paired:
    """Compare two methods over the same rows; see ``Paired``."""
    difference = np.asarray(mine, np.float64) - np.asarray(other, np.float64)
    return Paired(estimate(difference, image), signed_rank(difference, image))


def signed_rank(difference: Floats, image: Indices) -> float:
    """The two-sided p of Wilcoxon's signed-rank test on the differences averaged an image; 1 where all are 0."""
    from scipy.stats import wilcoxon

    defined = ~np.isnan(difference)
    if not defined.any():
        return float("nan")
    _, owner = np.unique(image[defined], return_inverse=True)
    means = np.bincount(owner, difference[defined]) / np.bincount(owner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # older versions say when they approximate
        return float(wilcoxon(means).pvalue) if means.any() else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """The p-values of one family, corrected by Holm's step-down method; a NaN stays and does not count."""
    ordered = sorted((value, place) for place, value in enumerate(p) if value == value)
    corrected, largest = [float("nan")] * len(p), 0.0
    for rank, (value, place) in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * value))
        corrected[place] = largest
    return corrected


# --- as text -------------------------------------------------------------------------------------------------


def places(values: Iterable[float]) -> str:
    """How to format numbers of this size with three or four digits: ``z.3f`` and the like."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    power = math.floor(math.log10(largest)) if largest else 0
    if not -3 <= power <= 5:
        return ".2e"
    return f"z.{2 - power if power < 0 else max(0, 3 - power)}f"


def with_interval(value: float, low: float, high: float, places: str) -> str:
    """``0.123 [0.101, 0.145]``; the value alone where there is no interval."""
    text = f"{value:{places}}"
    return text if math.isnan(low) else f"{text} [{low:{places}}, {high:{places}}]"


# --- resampling ----------------------------------------------------------------------------------------------


def _share(name: str) -> float | None:
    """The share of rows below a percentile; ``None`` for what is none."""
    if match := re.fullmatch(r"p([1-9]\d?)", name):
        return int(match[1]) / 100
    return _SHARES.get(name)


def _ends(values: Floats, owner: Indices, images: int, name: str) -> Floats:
    """The interval of each of the K columns ``values`` (K, n): (K, 2)."""
    share = _share(name)
    if images < 2 or share in _EXTREMES:
        return np.full((len(values), 2), np.nan)
    if share is None:
        drawn = _means(values, owner, images)
    else:
        drawn = np.stack([_quantiles(row, owner, images, share) for row in values])  # (K, resamples)
    tail = (1 - LEVEL) / 2
    ends: Floats = np.quantile(drawn, [tail, 1 - tail], axis=1).T
    return ends


def _means(values: Floats, owner: Indices, images: int) -> Floats:
    """The means of every resample, (K, resamples)."""
    count = np.bincount(owner, minlength=images).astype(np.float64)  # (I,) rows an image
    total = np.stack([np.bincount(owner, row, minlength=images) for row in values], axis=1)  # (I, K)
    drawn = []
    for weights in _weights(images, images):
        weights = weights.astype(np.float64)
        drawn.append((weights @ total) / (weights @ count)[:, None])  # (b, K)
    return np.concatenate(drawn).T


def _quantiles(values: Floats, owner: Indices, images: int, share: float) -> Floats:
    """One quantile of every resample, (resamples,)."""
    order = np.argsort(values)
    ascending, owner = values[order], owner[order]
    drawn = []
    for weights in _weights(images, max(images, len(values))):
        upto = np.cumsum(weights[:, owner], axis=1)  # (b, n) rows of the resample up to each
        position = (upto[:, -1] - 1) * share  # counted from 0
        below = np.floor(position)
        low = ascending[(upto <= below[:, None]).sum(1)]
        high = ascending[(upto <= np.ceil(position)[:, None]).sum(1)]
        drawn.append(low + (position - below) * (high - low))
    return np.concatenate(drawn)


def _weights(images: int, width: int) -> Iterator[NDArray[np.int64]]:
    """The weights of all resamples, (b, images) at a time, so few that (b, width) fits; always the same ones."""
    random = np.random.default_rng(SEED)
    most = max(1, CELLS // width)
    for start in range(0, RESAMPLES, most):
        count = min(most, RESAMPLES - start)
        drawn = random.integers(0, images, (count, images)) + np.arange(count)[:, None] * images
        yield np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images)
