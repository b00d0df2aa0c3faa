"""How pixels become a model's input - resize, crop or letterbox, normalise - and how maps find the way back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
from PIL import Image

from xcli.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import torch
    from torch import Tensor

Size = tuple[int, int]  # always (height, width), except in Pillow's own calls
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Preset(Protocol):
    """What `weights.transforms()` of a torchvision classifier shows of itself."""

    @property
    def resize_size(self) -> Sequence[int]: ...
    @property
    def crop_size(self) -> Sequence[int]: ...
    @property
    def mean(self) -> Sequence[float]: ...
    @property
    def std(self) -> Sequence[float]: ...
    @property
    def interpolation(self) -> Any: ...


@dataclass(frozen=True)
class Geometry:
    """The affine map between a model's input and the original image, in continuous pixel coordinates.

    Pixel i covers [i, i + 1); ``y_original = scale_y * y_input + offset_y``, the same for x.
    """

    scale_y: float
    scale_x: float
    offset_y: float
    offset_x: float
    original: Size  # (H, W)
    input: Size  # (H, W)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The region of the original that the model saw: (top, left, bottom, right) in original pixels."""
        (height, width), (rows, columns) = self.original, self.input
        return (
            max(0.0, self.offset_y),
            max(0.0, self.offset_x),
            min(float(height), self.offset_y + self.scale_y * rows),
            min(float(width), self.offset_x + self.scale_x * columns),
        )

    def to_original(self, map: Tensor) -> Tensor:
        """Bring a map of the input to the size of the original image.

        Args:
            map: float, (..., h, w); its cells spread evenly over the input, so a 7x7 CAM needs no resizing first.
        Returns: (..., H, W), bilinear between cell centres; 0 where the model did not see the original.
        """
        (height, width), (rows, columns) = self.original, self.input
        tall = _sample(map, -2, height, self.scale_y, self.offset_y, rows)  # (..., H, w)
        return _sample(tall, -1, width, self.scale_x, self.offset_x, columns)  # (..., H, W)


def _sample(values: Tensor, dim: int, count: int, scale: float, offset: float, extent: int) -> Tensor:
    """One axis of ``values``, spread over ``extent`` input pixels, read at ``count`` original pixel centres."""
    import torch

    cells = values.shape[dim]
    position = (torch.arange(count, dtype=torch.float64) + 0.5 - offset) / scale  # input pixels
    cell = (position * (cells / extent) - 0.5).clamp(0, cells - 1)
    low = cell.floor().long()
    shape = (count, 1) if dim == -2 else (count,)
    weight = (cell - low).to(values.device, values.dtype).reshape(shape)
    seen = ((position >= 0) & (position <= extent)).to(values.device).reshape(shape)
    below = values.index_select(dim, low.to(values.device))
    above = values.index_select(dim, (low + 1).clamp(max=cells - 1).to(values.device))
    return torch.where(seen, below + (above - below) * weight, below.new_zeros(()))


@dataclass(frozen=True)
class Preprocess:
    """Resize, then crop (or letterbox), then normalise: torchvision's evaluation presets, on Pillow images.

    Args:
        resize: the short side, or exactly (H, W); None keeps the size.
        crop: side of a centred square, or (H, W); where larger than the image, the rest is ``fill``; None: all.
        interpolation: Pillow's antialiased filter of that name.
        mean, std: of the colours in [0, 1]; one number, or three for R, G, B.
        letterbox: show the whole image: scale it to fit into ``crop`` (else ``resize``), centred, the rest is ``fill``.
        fill: colour of padded pixels, RGB in 0..255.
    Raises:
        ConfigError: a size below 1, an unknown interpolation, a standard deviation that is not positive.
    """

    resize: int | Size | None = None
    crop: int | Size | None = None
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    letterbox: bool = False
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            size = getattr(self, name)
            if size is not None and min(_pair(size)) < 1:
                raise ConfigError(f"preprocess: {name} must be at least 1 pixel, not {size}")
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"preprocess: interpolation must be one of {', '.join(INTERPOLATIONS)}, not {self.interpolation!r}"
            )
        if len(self.mean) not in (1, 3) or len(self.std) not in (1, 3) or min(self.std) <= 0:
            raise ConfigError(
                f"preprocess: mean and std need 1 or 3 numbers, std above 0; got {self.mean}, {self.std}"
            )

    @classmethod
    def from_torchvision(cls, transforms: _Preset) -> Preprocess:
        """Read the preset of a torchvision classifier, ``weights.transforms()``.

        Raises:
            ModelError: it is not an ImageClassification preset, or its interpolation is not offered here.
        """
        try:
            sizes = [list(transforms.resize_size), list(transforms.crop_size)]
            mean, std, mode = (
                tuple(transforms.mean),
                tuple(transforms.std),
                str(transforms.interpolation.value),
            )
        except (AttributeError, TypeError) as error:
            raise ModelError(
                f"cannot read the preprocessing of {type(transforms).__name__}: {error}"
            ) from error
        name: Any = mode.removesuffix("-exact")  # Pillow has one nearest filter
        if name not in INTERPOLATIONS:
            raise ModelError(f"the model's preprocessing interpolates by {mode!r}; set preprocess: by hand")
        resize, crop = (size[0] if len(size) == 1 else (size[0], size[1]) for size in sizes)
        return cls(resize, crop, name, mean, std)

    @property
    def size(self) -> Size | None:
        """(H, W) of the input where it is the same for all images, else None."""
        if self.crop is not None:
            return _pair(self.crop)
        if self.resize is not None and (self.letterbox or not isinstance(self.resize, int)):
            return _pair(self.resize)
        return None

    def size_for(self, width: int, height: int) -> Size:
        """(H, W) of the input made from an image of that size."""
        return self.size or self.resized(width, height)

    def resized(self, width: int, height: int) -> Size:
        """(H, W) of an image of that size after the resize and before the crop or the padding."""
        if self.letterbox and self.size is not None:
            scale = min(self.size[0] / height, self.size[1] / width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        if self.resize is None:
            return height, width
        if not isinstance(self.resize, int):
            return self.resize
        short, long = sorted((width, height))
        grown = int(self.resize * long / short)  # torchvision truncates here
        return (grown, self.resize) if width <= height else (self.resize, grown)

    @property
    def draft_size(self) -> Size | None:
        """(H, W) that a JPEG decoded at lower resolution must keep (twice) to look the same once resized."""
        if self.letterbox and self.size is not None:
            return self.size
        return None if self.resize is None else _pair(self.resize)

    def with_size(self, size: Size) -> Preprocess:
        """The same preprocessing, made to give (H, W) for every image.

        Where the size varies from image to image, nothing is cropped, so the whole image is resized to ``size``.

        Raises:
            ConfigError: the preprocessing already gives another fixed size.
        """
        if self.size is None:
            return replace(self, resize=size, crop=None)
        if self.size != size:
            raise ConfigError(
                f"the input size {list(size)} contradicts the preprocessing, which gives {list(self.size)};"
                " change resize and crop of preprocess: instead"
            )
        return self

    def apply(
        self,
        image: Image.Image,
        *,
        original: Size | None = None,
        box: tuple[float, float, float, float] | None = None,
    ) -> tuple[npt.NDArray[np.uint8], Geometry]:
        """Make a model's input, not normalised yet, from an RGB image.

        Args:
            image: RGB, upright.
            original: (H, W) the image had before it was decoded at a lower resolution; None: it was not.
            box: Pillow's (left, upper, right, lower), the part of ``image`` that holds the picture; None: all.
        Returns: uint8 (H, W, 3), and the map back to the original's pixels.
        """
        height, width = original or (image.height, image.width)
        tall, wide = self.resized(width, height)
        if box is not None or image.size != (wide, tall):
            image = image.resize((wide, tall), Image.Resampling[self.interpolation.upper()], box)
        rows, columns = self.size_for(width, height)
        top, left = _offset(tall, rows), _offset(wide, columns)
        if (rows, columns) != (tall, wide):
            canvas = Image.new("RGB", (columns, rows), self.fill)
            canvas.paste(image, (-left, -top))
            image = canvas
        scale_y, scale_x = height / tall, width / wide
        geometry = Geometry(
            scale_y, scale_x, top * scale_y, left * scale_x, original=(height, width), input=(rows, columns)
        )
        return np.array(image, dtype=np.uint8), geometry

    def normalise(self, pixels: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """uint8 (B, 3, H, W) -> float (B, 3, H, W) on the same device; computed in float32 at least.

        ``dtype`` None means float32.
        """
        import torch

        dtype = dtype or torch.float32
        work = torch.promote_types(dtype, torch.float32)
        mean, std = self._moments(pixels, work)
        return pixels.to(work).div_(255).sub_(mean).div_(std).to(dtype)

    def span(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The lowest and the highest number of each colour, (3,) each, that any picture has once normalised."""
        import torch

        ends = torch.tensor([0, 255], dtype=torch.uint8, device=device).view(2, 1, 1, 1).expand(2, 3, 1, 1)
        both = self.normalise(ends, dtype)[:, :, 0, 0]
        return both.amin(0), both.amax(0)

    def denormalise(self, x: Tensor) -> Tensor:
        """Model input (..., 3, H, W) -> colours in [0, 1], clamped, for pictures."""
        mean, std = self._moments(x, x.dtype)
        return (x * std + mean).clamp(0, 1)

    def _moments(self, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        mean = like.new_tensor(self.mean, dtype=dtype).reshape(-1, 1, 1)  # (3, 1, 1)
        return mean, like.new_tensor(self.std, dtype=dtype).reshape(-1, 1, 1)

    def describe(self) -> dict[str, Any]:
        """The fields as plain JSON values; tuples become lists."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }


def _pair(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else size


def _offset(have: int, want: int) -> int:
    """Where a centred window of ``want`` starts in ``have`` pixels, rounded as torchvision does; below 0: padding."""
    return round((have - want) / 2) if have >= want else -((want - have) // 2)
