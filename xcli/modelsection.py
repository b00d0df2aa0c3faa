"""The ``model:`` section of a config, one class a source, and what every section shares."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

Positive = Annotated[int, Field(ge=1)]
Byte = Annotated[int, Field(ge=0, le=255)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Above0 = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Sides = tuple[Positive, Positive]  # (H, W)


class Section(BaseModel):
    """Keys of a config. ``kind`` names a branch of a union, as pydantic's error locations do."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    kind: ClassVar[str] = ""


def _none(value: Any) -> Any:
    return None if value == "none" else value


def _callable(value: str) -> str:
    file = r".+\.py:[^\W\d]\w*"
    module = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"
    if not re.fullmatch(f"{file}|{module}", value):
        raise ValueError(f"expected 'package.module:callable' or 'path/to/file.py:callable'; got {value!r}")
    return value


Weights = Annotated[Text | None, BeforeValidator(_none)]


class PreprocessSection(Section):
    """How an image becomes an input, where the model does not say it itself."""

    resize: Positive | Sides | None = Field(
        default=None, description="pixels of the short side, or [height, width]; null: as it is"
    )
    crop: Positive | Sides | None = Field(
        default=None, description="side of a centred square, or [height, width]; null: all"
    )
    mean: float | tuple[float, float, float] = Field(
        default=(0.485, 0.456, 0.406),
        description="of the colours in [0, 1], one number or one for R, G and B",
    )
    std: Above0 | tuple[Above0, Above0, Above0] = Field(
        default=(0.229, 0.224, 0.225), description="as mean, above 0"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = Field(
        default="bilinear", description="filter of the resize"
    )
    letterbox: bool = Field(
        default=False, description="show the whole image, padded to the crop (or the resize)"
    )
    fill: tuple[Byte, Byte, Byte] = Field(default=(0, 0, 0), description="colour of padded pixels, [R, G, B]")

    def options(self) -> dict[str, Any]:
        """The arguments of ``xcli.preprocess.Preprocess``."""
        one = {key: (value,) for key in ("mean", "std") if isinstance(value := getattr(self, key), float)}
        return {**{key: getattr(self, key) for key in type(self).model_fields}, **one}


WHERE = "where the network comes from: demo | torchvision | timm | factory | exported"


class _Sourced(Section):
    """The first key of a model section."""

    source: str


class _Named(_Sourced):
    """A network that is built by name and then given weights."""

    name: str
    weights: Weights = None
    checkpoints: tuple[Text, ...] = Field(
        default=(),
        description="further weight files of the same network, for metrics across models (mege, reco)",
    )


class _Common(Section):
    """What every model section takes."""

    preprocess: Literal["auto"] | PreprocessSection = Field(
        default="auto",
        description="auto (the model's own) or its keys: resize, crop, mean, std, interpolation, letterbox, fill",
    )
    categories: Text | Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        default="auto",
        description="names of the classes: auto (the model's own), a text file with one a line, or a list",
    )
    output: Text | None = Field(
        default=None, description="which of the model's outputs holds the logits; null: found by itself"
    )


class DemoModel(_Common, _Named):
    """A small network inside the package, trained on generated scenes; it needs no download."""

    kind: ClassVar[str] = "demo"
    source: Literal["demo"] = Field(description=WHERE)
    name: Literal["shapes-cnn", "shapes-vit"] = Field(
        default="shapes-cnn", description="a convolutional network or a transformer"
    )
    weights: Weights = Field(
        default="DEFAULT", description="DEFAULT (shipped), a .safetensors, .pt or .pth file, or none"
    )


class TorchvisionModel(_Common, _Named):
    """A classifier of torchvision."""

    kind: ClassVar[str] = "torchvision"
    source: Literal["torchvision"] = Field(description=WHERE)
    name: Text = Field(description="the model's name in torchvision, such as resnet50")
    weights: Weights = Field(
        default="DEFAULT",
        description="DEFAULT, an entry such as IMAGENET1K_V2, a .safetensors, .pt or .pth file, or none",
    )
    args: dict[str, JsonValue] = Field(default={}, description="keyword arguments of the builder")


class TimmModel(_Common, _Named):
    """A classifier of timm, which has to be installed: pip install 'xcli[timm]'."""

    kind: ClassVar[str] = "timm"
    source: Literal["timm"] = Field(description=WHERE)
    name: Text = Field(description="the model's name in timm, such as resnet50.a1_in1k")
    weights: Weights = Field(
        default="DEFAULT", description="DEFAULT, a .safetensors, .pt or .pth file, or none"
    )
    args: dict[str, JsonValue] = Field(default={}, description="keyword arguments of timm.create_model")


class FactoryModel(_Common, _Named):
    """Your own network. The named callable is run."""

    kind: ClassVar[str] = "factory"
    source: Literal["factory"] = Field(description=WHERE)
    name: Annotated[str, AfterValidator(_callable)] = Field(
        description="what builds the network: package.module:callable or path/to/file.py:callable"
    )
    args: dict[str, JsonValue] = Field(default={}, description="keyword arguments of the callable")
    weights: Weights = Field(
        default=None, description="a .safetensors, .pt or .pth file with its weights; none: as it is built"
    )


class ExportedModel(_Common, _Sourced):
    """A program saved by torch.export."""

    kind: ClassVar[str] = "exported"
    source: Literal["exported"] = Field(description=WHERE)
    path: Text = Field(description="the .pt2 file")


ModelSection = Annotated[
    DemoModel | TorchvisionModel | TimmModel | FactoryModel | ExportedModel, Field(discriminator="source")
]
