"""The sections of a config: their keys, types, bounds, defaults and descriptions. Nothing here imports torch."""

from __future__ import annotations

import datetime
import re
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
)

Source = Literal["demo", "torchvision", "timm", "factory", "exported"]
ScoreChoice = Literal["auto", "logit", "probability", "log-probability", "contrast"]
Picture = Literal["heatmap", "overlay", "panel"]

Positive = Annotated[int, Field(ge=1)]
Byte = Annotated[int, Field(ge=0, le=255)]
Fraction = Annotated[float, Field(ge=0, le=1)]
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


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda|cuda:(0|[1-9]\d{0,3})|mps", value):
        raise ValueError(f"expected auto, cpu, cuda, cuda:N or mps; got {value!r}")
    return value


def _output_path(value: str) -> str:
    strange = [found for found in re.findall(r"\{[^}]*\}?|\}", value) if found != "{date}"]
    if strange:
        raise ValueError(f"the only placeholder is {{date}}; got {strange[0]!r}")
    return value


def _later(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if value:
        raise ValueError("not in this version; leave it out or empty")
    return value


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


def _one_or_many(schema: dict[str, Any]) -> None:
    """In the JSON Schema of a list, take a single entry too."""
    many = {key: schema.pop(key) for key in ("type", "items", "minItems") if key in schema}
    schema["anyOf"] = [many["items"], many]


Weights = Annotated[str | None, BeforeValidator(_none)]


class PreprocessSection(Section):
    """How an image becomes an input, where the model does not say it itself."""

    resize: Positive | Sides | None = Field(None, description="pixels of the short side, or [height, width]; null: as it is")
    crop: Positive | Sides | None = Field(None, description="side of a centred square, or [height, width]; null: all")
    mean: float | tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), description="of the colours in [0, 1], one number or one for R, G and B"
    )
    std: Annotated[float, Field(gt=0)] | tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.229, 0.224, 0.225), description="as mean, above 0"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = Field("bilinear", description="filter of the resize")
    letterbox: bool = Field(False, description="show the whole image, padded to the crop (or the resize)")
    fill: tuple[Byte, Byte, Byte] = Field((0, 0, 0), description="colour of padded pixels, [R, G, B]")


class _Model(Section):
    """What the model sections share."""

    preprocess: Literal["auto"] | PreprocessSection = Field(
        "auto", description="auto (the model's own) or its keys: resize, crop, mean, std, interpolation, letterbox, fill"
    )
    categories: Text | Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        "auto", description="names of the classes: auto (the model's own), a text file with one a line, or a list"
    )
    output: Text | None = Field(None, description="which of the model's outputs holds the logits; null: found by itself")


class DemoModel(_Model):
    """A small network inside the package, trained on generated scenes; it needs no download."""

    kind: ClassVar[str] = "demo"
    source: Literal["demo"] = Field(description="where the network comes from")
    name: Literal["shapes-cnn", "shapes-vit"] = Field("shapes-cnn", description="a convolutional network or a transformer")
    weights: Weights = Field("DEFAULT", description="DEFAULT (shipped), a .safetensors, .pt or .pth file, or none")


class TorchvisionModel(_Model):
    """A classifier of torchvision."""

    kind: ClassVar[str] = "torchvision"
    source: Literal["torchvision"] = Field(description="where the network comes from")
    name: Text = Field(description="the model's name in torchvision, such as resnet50")
    weights: Weights = Field(
        "DEFAULT", description="DEFAULT, an entry such as IMAGENET1K_V2, a .safetensors, .pt or .pth file, or none"
    )
    args: dict[str, JsonValue] = Field({}, description="keyword arguments of the builder")


class TimmModel(_Model):
    """A classifier of timm, which has to be installed: pip install 'xcli[timm]'."""

    kind: ClassVar[str] = "timm"
    source: Literal["timm"] = Field(description="where the network comes from")
    name: Text = Field(description="the model's name in timm, such as resnet50.a1_in1k")
    weights: Weights = Field("DEFAULT", description="DEFAULT, a .safetensors, .pt or .pth file, or none")
    args: dict[str, JsonValue] = Field({}, description="keyword arguments of timm.create_model")


class FactoryModel(_Model):
    """Your own network. The named callable is run."""

    kind: ClassVar[str] = "factory"
    source: Literal["factory"] = Field(description="where the network comes from")
    name: Annotated[str, AfterValidator(_callable)] = Field(
        description="what builds the network: package.module:callable or path/to/file.py:callable"
    )
    args: dict[str, JsonValue] = Field({}, description="keyword arguments of the callable")
    weights: Weights = Field(None, description="a .safetensors, .pt or .pth file with its weights; none: as it is built")


class ExportedModel(_Model):
    """A program saved by torch.export."""

    kind: ClassVar[str] = "exported"
    source: Literal["exported"] = Field(description="where the network comes from")
    path: Text = Field(description="the .pt2 file")


ModelSection = Annotated[
    DemoModel | TorchvisionModel | TimmModel | FactoryModel | ExportedModel, Field(discriminator="source")
]


class BelowSection(Section):
    """Images of which the model is not sure."""

    probability_below: Fraction = Field(description="only images whose highest probability is below this")


class ImagesSection(Section):
    """What is explained."""

    path: Text | Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        description="a folder, a file, a glob, a .txt or .csv manifest, '-' (standard input), or a list of these"
    )
    labels: Literal["none", "folder", "manifest"] = Field("none", description="where the true classes come from")
    only: Literal["all", "wrong", "correct"] | BelowSection = Field(
        "all", description="which images: all, wrong or correct (both need labels), or {probability_below: 0.5}"
    )
    size: Sides | None = Field(None, description="[height, width] of the input where the preprocessing leaves it open")
    max_pixels: Positive = Field(89_478_485, description="an image of more pixels fails unread")
    background: Literal["white"] | tuple[Byte, Byte, Byte] = Field(
        "white", description="what shows through transparent pixels: white or [R, G, B]"
    )
    draft: bool = Field(True, description="decode large JPEGs at a lower resolution, much faster, levels off by 0.2 in the mean")

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        return (255, 255, 255) if self.background == "white" else self.background


class ClassTarget(Section):
    """The same classes for every image."""

    kind: ClassVar[str] = "ClassTarget"
    classes: int | Text | Annotated[tuple[int | Text, ...], Field(min_length=1)] = Field(
        alias="class", description="a class name, an index from 0, or a list of these"
    )

    @property
    def wanted(self) -> tuple[int | str, ...]:
        return self.classes if isinstance(self.classes, tuple) else (self.classes,)


class TopTarget(Section):
    """The most probable classes of each image."""

    kind: ClassVar[str] = "TopTarget"
    top: Positive = Field(description="how many classes")
    above: Fraction = Field(0.0, description="only those of at least this probability; the first always")


def _target_kind(value: Any) -> str:
    if isinstance(value, (ClassTarget, TopTarget)):
        return value.kind
    if not isinstance(value, dict):
        return "word"
    return "ClassTarget" if any(get_close_matches(str(key), ["class", "classes"], 1) for key in value) else "TopTarget"


TargetItem = Annotated[
    Annotated[Literal["predicted", "label"], Tag("word")]
    | Annotated[ClassTarget, Tag("ClassTarget")]
    | Annotated[TopTarget, Tag("TopTarget")],
    Discriminator(_target_kind),
]


class RuntimeSection(Section):
    """How it is computed; nothing here changes what is explained."""

    device: Annotated[str, AfterValidator(_device)] = Field("auto", description="auto | cpu | cuda | cuda:N | mps")
    batch_size: Literal["auto"] | Positive = Field("auto", description="images at once; auto: from the first batch")
    precision: Literal["float32", "float64", "bfloat16", "float16"] = Field("float32", description="of the network")
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = Field("auto", description="processes that decode images")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of every random number")
    fold: bool = Field(True, description="fold batch norm into convolutions where a method allows it")
    channels_last: Literal["auto"] | bool = Field("auto", description="memory layout of the images; auto: by device")


class HeatmapSection(Section):
    """How heatmaps are stored."""

    dtype: Literal["float32", "float16"] = Field("float32", description="float16 halves the file; netCDF readers crash on it")
    size: Literal["input", "native"] = Field("input", description="native keeps a 7x7 CAM 7x7")


class OutputSection(Section):
    """What is written, and where."""

    path: Annotated[Text, AfterValidator(_output_path)] = Field(
        "results/run", description="output folder; {date} becomes YYYY-MM-DD. Left out: results/ and the config's name"
    )
    heatmap: HeatmapSection = Field(HeatmapSection(), description="how heatmaps are stored in results.h5")
    png: tuple[Picture, ...] = Field(("overlay",), description="pictures: any of heatmap, overlay, panel; [] for none")
    colormap: Text = Field("jet", description="a colour map of matplotlib, such as jet, turbo, viridis, magma, coolwarm")
    alpha: Fraction = Field(0.5, description="weight of the colour in an overlay")
    overlay_on: Literal["input", "original"] = Field("input", description="lay the map over what the model saw or over the whole image")
    layout: Literal["merged", "parts"] = Field("merged", description="one results.h5, or an index over the parts")
    compression: Literal["gzip", "lzf", "none"] = Field("gzip", description="of the heatmaps in results.h5")

    def folder(self, today: datetime.date) -> str:
        """The output folder of a run started ``today``."""
        return self.path.replace("{date}", today.isoformat())


class Sections(Section):
    """A whole config but its methods, whose keys depend on the method."""

    model: ModelSection = Field(description="the network")
    images: ImagesSection = Field(description="what is explained")
    target: Annotated[tuple[TargetItem, ...], Field(min_length=1), BeforeValidator(_listed)] = Field(
        ("predicted",),
        description="which class: predicted | label | {class: [tabby, 281]} | {top: 3, above: 0.1} | a list of these",
        json_schema_extra=_one_or_many,
    )
    score: ScoreChoice = Field("auto", description="the number explained; auto: each method's own")
    metrics: Annotated[tuple[Any, ...], AfterValidator(_later)] = Field((), description="not in this version")
    gates: Annotated[tuple[Any, ...], AfterValidator(_later)] = Field((), description="not in this version")
    runtime: RuntimeSection = Field(RuntimeSection(), description="how it is computed")
    output: OutputSection = Field(OutputSection(), description="what is written, and where")
