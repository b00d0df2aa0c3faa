"""CAMs that weigh a channel by what the score makes of the image seen through it: one forward pass a mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from xcli.layers import Layer
from xcli.methods.cam.base import GRAD_CAM, TORCH_CAM, WeightedCAM
from xcli.registry import method, options
from xcli.score import Score


@options
class MaskCAM(WeightedCAM):
    r"""Channels A_k weighed by scores of x \odot H_k, where H_k is the channel as a mask on the input.

    .. math:: H_k = n(\mathrm{up}(A_k)), \qquad n(m) = \frac{m - \min m}{\max m - \min m}

    bilinear, to the size of the input. A channel that is constant gives a mask of zeros. A masked image is scored once
    for all rows of its image; masks of different images share micro-batches and exist only while these run.
    """

    small: ClassVar[Mapping[str, object]] = {"most": 4}

    scaled_at: Annotated[
        Literal["input", "layer"],
        Field(description="whether a channel is brought to [0, 1] after up-sampling or before"),
    ] = "input"
    align_corners: Annotated[bool, Field(description="up-sample with the corners of both grids aligned")] = (
        False
    )
    eps: Annotated[float, Field(ge=0, description="added to the range that a mask is divided by")] = 0.0
    most: Annotated[
        int | None,
        Field(
            ge=1,
            description="use only so many channels, those that vary most over the map (Faster-Score-CAM); null: all",
        ),
    ] = None

    def channels(self, score: Score, x: Tensor, layers: Sequence[Layer]) -> Iterable[Tensor]:
        image = score.image.to(x.device)
        for layer, acts in zip(layers, score.activations(x, at=layers), strict=True):
            maps = most_varied(layer.maps(acts), self.most)  # (B, K, h, w)
            own = maps[image]  # (N, K, h, w)
            yield self.weigh(self.scores(score, x, maps), own)[:, :, None, None] * own

    def scores(self, score: Score, x: Tensor, maps: Tensor) -> Tensor:
        """Of every row, on its image behind each of the K masks in each of S variations: (N, S, K)."""
        (images, channels), variations = maps.shape[:2], self.variations()
        copies = variations * channels
        image = torch.arange(images).repeat_interleave(copies)
        planes, size = self.planes(maps).flatten(0, 1)[:, None], (x.shape[-2], x.shape[-1])  # (B K, 1, h, w)

        def masked(index: Tensor) -> Tensor:
            own, which, turn = image[index], index % channels, index // channels % variations
            masks = self.masks(planes[(own * channels + which).to(x.device)], size)  # (m, 1, H, W)
            return x[own.to(x.device)] * self.varied(masks, score, own, turn).to(x.dtype)

        values, copy, row = score.on(masked, image)
        table = values.new_zeros(len(score.image), copies)
        place = (row.to(x.device), (copy % copies).to(x.device))
        found: Tensor = table.index_put(place, values).unflatten(1, (variations, channels))
        return found

    def planes(self, maps: Tensor) -> Tensor:
        """Channels (B, K, h, w) from 0 up, so that a constant one stays exactly zero when it is up-sampled."""
        planes = maps - maps.amin((2, 3), keepdim=True)
        if self.scaled_at == "input":
            return planes
        return self._divided(planes, planes.amax((2, 3), keepdim=True))

    def masks(self, planes: Tensor, size: tuple[int, int]) -> Tensor:
        """Planes (m, 1, h, w) as masks (m, 1, H, W)."""
        masks = F.interpolate(planes, size=size, mode="bilinear", align_corners=self.align_corners)
        if self.scaled_at == "layer":
            return masks
        low, high = masks.amin((2, 3), keepdim=True), masks.amax((2, 3), keepdim=True)
        return self._divided(masks - low, high - low)

    def _divided(self, planes: Tensor, span: Tensor) -> Tensor:
        scaled: Tensor = planes / (span + self.eps).clamp_min(torch.finfo(span.dtype).tiny)
        return scaled

    def variations(self) -> int:
        """How often each mask is scored."""
        return 1

    def varied(self, masks: Tensor, score: Score, image: Tensor, turn: Tensor) -> Tensor:
        """The masks (m, 1, H, W) of images (m,) as they are in each one's variation ``turn`` (m,)."""
        return masks

    def weigh(self, scores: Tensor, maps: Tensor) -> Tensor:
        """Weights (N, K) from the scores (N, S, K) of the channels (N, K, h, w)."""
        return scores.mean(1).softmax(1)


@method("scorecam")
class ScoreCAM(MaskCAM):
    r"""Which regions of a layer speak for the class, a channel weighing as much as the score it lets through.

    .. math:: \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \qquad w = \mathrm{softmax}_k\big(f(x \odot H_k) - f(x_b)\big)

    The score of the baseline image x_b is the same for every channel and cancels in the softmax, so no pass is spent
    on it. Unit: that of the activations; the weights of a row sum to one. With ``weights: probability`` they do not:
    w_k is the class's probability itself, and 0 for a channel that is constant.
    Source: Wang et al. 2020, Score-CAM, arXiv:1910.01279, algorithm 1; ``most``: Faster-Score-CAM of tabayashi0117.
    Presets: ``grad-cam`` aligns corners; ``torch-cam`` scales before up-sampling (its difference to the score of the
    image itself cancels too); ``original`` is the authors' code, up to its ReLU after up-sampling instead of before.
    Departs: masks multiply the network's input, as in every implementation, not the pixels before preprocessing.
    """

    source: ClassVar[str] = "Wang et al. 2020, arXiv:1910.01279"
    cost: ClassVar[str] = "1 forward + 1 forward a channel"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "grad-cam": {**GRAD_CAM, "align_corners": True, "eps": 1e-8},
        "torch-cam": {**TORCH_CAM, "scaled_at": "layer", "eps": 1e-8},
        "original": {"weights": "probability"},
    }

    weights: Annotated[
        Literal["softmax", "probability"],
        Field(
            description="softmax over the channels of their scores, or each masked image's probability of the class"
        ),
    ] = "softmax"

    def scores(self, score: Score, x: Tensor, maps: Tensor) -> Tensor:
        unit = score.scaled("probability") if self.weights == "probability" else score
        return super().scores(unit, x, maps)

    def weigh(self, scores: Tensor, maps: Tensor) -> Tensor:
        if self.weights == "softmax":
            return super().weigh(scores, maps)
        return torch.where(maps.amax((2, 3)) > maps.amin((2, 3)), scores[:, 0], 0.0)


@method("ss-cam")
class SSCAM(MaskCAM):
    r"""Score-CAM with the score of each mask averaged over noise.

    .. math:: w = \mathrm{softmax}_k\Big(\frac{1}{S} \sum_s f\big(x \odot (H_k + \delta_s)\big)\Big),
        \qquad \delta_s \sim N(0, \sigma^2)

    with one field of noise a pixel of the input and sample, and the map of Score-CAM. Unit: that of the activations.
    Source: Wang et al. 2020, SS-CAM, arXiv:2006.14255. Departs: the channels of an image share its S fields, where
    torch-cam draws anew for each; every mean is the same in expectation, and their differences, which are all that
    the softmax sees, vary less. The paper's other variant, noise on the masked image, is left out.
    ``preset: torch-cam`` scales before up-sampling.
    """

    source: ClassVar[str] = "Wang et al. 2020, arXiv:2006.14255"
    cost: ClassVar[str] = "1 forward + samples forwards a channel"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "torch-cam": {**TORCH_CAM, "scaled_at": "layer", "eps": 1e-8}
    }
    small: ClassVar[Mapping[str, object]] = {"most": 3, "samples": 2}

    samples: Annotated[int, Field(ge=1, description="noisy copies of each mask")] = 35
    std: Annotated[float, Field(ge=0, description="standard deviation of the noise; masks lie in [0, 1]")] = (
        2.0
    )

    def variations(self) -> int:
        return self.samples

    def varied(self, masks: Tensor, score: Score, image: Tensor, turn: Tensor) -> Tensor:
        drawn, place = torch.stack([image, turn], 1).unique(dim=0, return_inverse=True)
        fields = [self._noise(score, int(one), int(sample), masks) for one, sample in drawn]
        return masks + self.std * torch.stack(fields)[place.to(masks.device)]

    def _noise(self, score: Score, image: int, sample: int, like: Tensor) -> Tensor:
        """One field (1, H, W), kept while copies of its image and sample come one after the other."""
        key = ("ss-cam", image, sample, like.shape[1:], like.dtype)
        if key not in score.memo:
            for old in [k for k in score.memo if isinstance(k, tuple) and k[:1] == key[:1] and k[1] < image]:
                del score.memo[old]
            first = int(torch.searchsorted(score.image, image))
            generator = score.generator(first, f"ss-cam {sample}")
            score.memo[key] = torch.randn(like.shape[1:], generator=generator).to(like)
        field: Tensor = score.memo[key]
        return field


@method("is-cam")
class ISCAM(MaskCAM):
    r"""Score-CAM with the score of each mask integrated from the blank image to the mask.

    .. math:: w = \mathrm{softmax}_k\Big(\frac{1}{S} \sum_{s=1}^{S} f(c_s\, x \odot H_k)\Big), \qquad c_s = s / S

    and the map of Score-CAM. Unit: that of the activations.
    Source: Naidu et al. 2020, IS-CAM, arXiv:2010.03023. ``path: cumulative`` adds the steps up as torch-cam does,
    c_s = (1 + ... + s) / S, so that the last copies are up to (S + 1) / 2 times as bright as the image;
    ``preset: torch-cam`` sets it and scales before up-sampling.
    """

    source: ClassVar[str] = "Naidu et al. 2020, arXiv:2010.03023"
    cost: ClassVar[str] = "1 forward + samples forwards a channel"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "torch-cam": {**TORCH_CAM, "path": "cumulative", "scaled_at": "layer", "eps": 1e-8}
    }
    small: ClassVar[Mapping[str, object]] = {"most": 3, "samples": 2}

    samples: Annotated[int, Field(ge=1, description="steps from the blank image to the mask")] = 10
    path: Annotated[
        Literal["linear", "cumulative"],
        Field(description="step s scales the mask by s / samples, or by the sum of these up to s"),
    ] = "linear"

    def variations(self) -> int:
        return self.samples

    def varied(self, masks: Tensor, score: Score, image: Tensor, turn: Tensor) -> Tensor:
        steps = turn + 1
        steps = steps if self.path == "linear" else steps * (steps + 1) // 2
        return masks * (steps.to(masks) / self.samples)[:, None, None, None]


def most_varied(maps: Tensor, count: int | None) -> Tensor:
    """The ``count`` channels of (B, K, h, w) with the largest variance over the map, image by image, as ordered."""
    if count is None or count >= maps.shape[1]:
        return maps
    chosen = maps.var((2, 3), correction=0).topk(count, dim=1).indices.sort(dim=1).values
    return maps.take_along_dim(chosen[:, :, None, None], dim=1)  # (B, count, h, w)
