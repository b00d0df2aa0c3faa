"""What can become of any map: the steps of ``post_process``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NotRequired

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError
from torch import Tensor
from typing_extensions import TypedDict

from xcli.errors import ConfigError

Mode = Literal["bilinear", "bicubic", "nearest"]


class Smooth(TypedDict):
    """A Gaussian of ``smooth`` pixels of the input; borders are continued by their outermost pixels."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    smooth: Annotated[
        float, Field(gt=0, le=1000, description="standard deviation of a Gaussian, pixels of the input")
    ]


class LowPass(TypedDict):
    """FORGrad's filter (arXiv:2307.09591): frequencies beyond ``low_pass`` cycles go, the others stay as they are.

    The frequency of a wave is the number of its periods along the longer side of the map. ``auto``: the cut-off whose
    maps are most faithful on at most 128 images of ``calibration``, each explained by its predicted class; found when
    the run begins (``xcli.calibration``).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    low_pass: Annotated[
        Annotated[float, Field(gt=0)] | Literal["auto"],
        Field(description="highest frequency kept, periods along the longer side; auto finds the best"),
    ]
    calibration: NotRequired[
        Annotated[str, Field(min_length=1, description="for auto: images on which the best cut-off is found")]
    ]


class Resize(TypedDict):
    """The map brought to the input's size here, by ``resize``."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    resize: Annotated[Mode, Field(description="kernel by which the map is brought to the input's size")]


def _calibrated(step: LowPass) -> LowPass:
    if step["low_pass"] == "auto" and "calibration" not in step:
        raise PydanticCustomError(
            "step", "low_pass: auto is found on images; name them by calibration: folder"
        )
    if step["low_pass"] != "auto" and "calibration" in step:
        raise PydanticCustomError("step", "calibration goes with low_pass: auto; this cut-off is given")
    return step


KEYS = {"smooth": {"smooth"}, "low_pass": {"low_pass", "calibration"}, "resize": {"resize"}}


def _kind(step: Any) -> str | None:
    """The tag of a step; it is no key of one, so that the places of errors can be told from it."""
    if isinstance(step, str):
        return "a word" if step in ("absolute", "positive") else None
    given = set(step) if isinstance(step, dict) else set()
    return next((f"a {key}" for key, known in KEYS.items() if key in given and given <= known), None)


Step = Annotated[
    Annotated[Literal["absolute", "positive"], Tag("a word")]
    | Annotated[Smooth, Tag("a smooth")]
    | Annotated[LowPass, AfterValidator(_calibrated), Tag("a low_pass")]
    | Annotated[Resize, Tag("a resize")],
    Discriminator(
        _kind,
        custom_error_type="step",
        custom_error_message="expected one of absolute, positive, {smooth: pixels}, {low_pass: cycles}, {resize: mode}",
    ),
]


def applied(steps: Sequence[Any], maps: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Maps (N, h, w) or (N, C, h, w) after each of ``steps`` in turn.

    Steps that count in pixels work at ``size`` (H, W), that of the input: a smaller map is first brought there, by
    ``mode``.
    """
    for step in steps:
        match step:
            case "absolute":
                maps = maps.abs()
            case "positive":
                maps = maps.relu()
            case {"smooth": sigma}:
                maps = smoothed(resized(maps, size, mode), sigma)
            case {"low_pass": "auto"}:
                raise ConfigError("low_pass: auto is found when a run begins; name a cut-off here")
            case {"low_pass": cutoff}:
                maps = low_passed(resized(maps, size, mode), cutoff)
            case {"resize": kernel}:
                maps = resized(maps, size, kernel)
    return maps


def smoothed(maps: Tensor, sigma: float) -> Tensor:
    """Maps (..., H, W) through a Gaussian of ``sigma`` pixels, cut at four deviations."""
    down, right = (_gaussian(side, sigma).to(maps) for side in maps.shape[-2:])
    return down @ (maps @ right.T)


def _gaussian(side: int, sigma: float) -> Tensor:
    """The matrix that blurs a line of ``side`` pixels, made on the CPU: GPUs add up in any order."""
    reach = max(1, math.ceil(4 * sigma))
    place = torch.arange(-reach, reach + 1)
    weight = (-0.5 * (place.double() / sigma).square()).exp()
    seen = (torch.arange(side)[:, None] + place).clamp(0, side - 1)  # (side, taps)
    shares = (weight / weight.sum()).expand(seen.shape)
    return torch.zeros(side, side, dtype=torch.float64).scatter_add(1, seen, shares)


def low_passed(maps: Tensor, cutoff: float) -> Tensor:
    """Maps (..., H, W) without the waves of more than ``cutoff`` periods along the longer side.

    A wave of u periods down and v across has sqrt((u / H)^2 + (v / W)^2) max(H, W) of them.
    """
    height, width = maps.shape[-2:]
    down = torch.fft.fftfreq(height, device=maps.device, dtype=maps.dtype)[:, None]
    right = torch.fft.rfftfreq(width, device=maps.device, dtype=maps.dtype)
    kept = torch.hypot(down, right) * max(height, width) <= cutoff * (1 + 1e-6)  # rounding keeps the border
    found: Tensor = torch.fft.irfft2(torch.fft.rfft2(maps) * kept, s=(height, width))
    return found


def resized(maps: Tensor, size: tuple[int, int] | None, mode: str) -> Tensor:
    """Maps (N, h, w) or (N, C, h, w) brought to ``size``; corners are not aligned, as in ``F.interpolate``."""
    if size is None or maps.shape[-2:] == size:
        return maps
    stacked = maps if maps.ndim == 4 else maps[:, None]  # (N, 1, h, w)
    grown = F.interpolate(stacked, size=size, mode=mode, align_corners=None if mode == "nearest" else False)
    return grown if maps.ndim == 4 else grown[:, 0]
