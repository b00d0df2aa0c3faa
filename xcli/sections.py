"""The sections of a config: their keys, types, bounds, defaults and descriptions. Nothing here imports torch."""

from __future__ import annotations

import datetime
import re
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Discriminator, Field, Tag

from xcli.modelsection import Byte, Fraction, ModelSection, Positive, Section, Sides, Text

ScoreChoice = Literal["auto", "logit", "probability", "log-probability", "contrast"]
Picture = Literal["heatmap", "overlay", "panel"]


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda|cuda:(0|[1-9]\d{0,3})|mps", value):
        raise ValueError(f"expected auto, cpu, cuda, cuda:N or mps; got {value!r}")
    return value


def _output_path(value: str) -> str:
    strange = [found for found in re.findall(r"\{[^}]*\}?|\}", value) if found != "{date}"]
    if strange:
        raise ValueError(f"the only placeholder is {{date}}; got {strange[0]!r}")
    return value


def _one_or_many(schema: dict[str, Any]) -> None:
    """In the JSON Schema of a list, take a single entry too."""
    many = {key: schema.pop(key) for key in ("type", "items", "minItems") if key in schema}
    schema["anyOf"] = [many["items"], many]


class BelowSection(Section):
    """Images of which the model is not sure."""

    probability_below: Fraction = Field(description="only images whose highest probability is below this")


class TruthSection(Section):
    """Where the objects are, for metrics of localisation."""

    path: Text = Field(
        description="a folder of PNG masks or VOC XML files that mirrors the images, a COCO .json, or a .csv"
    )
    format: Literal["auto", "masks", "voc", "coco", "manifest"] = Field(
        default="auto", description="what lies there; auto: by its files"
    )
    values: Literal["class-plus-one", "class", "object"] = Field(
        default="class-plus-one",
        description="what a mask's pixel says: 1 + the class, the class (255: ignored), or not 0 on any object",
    )
    difficult: Literal["with-others", "count", "leave-out"] = Field(
        default="with-others",
        description="what VOC's difficult objects are worth; with-others: as all, where their class has another",
    )


class ImagesSection(Section):
    """What is explained."""

    path: Text | Annotated[tuple[Text, ...], Field(min_length=1)] = Field(
        description="a folder, a file, a glob, a .txt or .csv manifest, '-' (standard input), or a list of these"
    )
    labels: Literal["none", "folder", "manifest"] = Field(
        default="none", description="where the true classes come from"
    )
    truth: Text | TruthSection | None = Field(
        default=None,
        description="where the objects are: a folder of PNG masks or VOC XML, a COCO .json, a .csv, or its keys",
    )
    only: Literal["all", "wrong", "correct"] | BelowSection = Field(
        default="all",
        description="which images: all, wrong or correct (both need labels), or {probability_below: 0.5}",
    )
    size: Sides | None = Field(
        default=None, description="[height, width] of the input where the preprocessing leaves it open"
    )
    max_pixels: Positive = Field(default=89_478_485, description="an image of more pixels fails unread")
    background: Literal["white"] | tuple[Byte, Byte, Byte] = Field(
        default="white", description="what shows through transparent pixels: white or [R, G, B]"
    )
    draft: bool = Field(
        default=True,
        description="decode large JPEGs at a lower resolution, much faster, levels off by 0.2 in the mean",
    )

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def truth_section(self) -> TruthSection | None:
        """Where the objects are, all keys filled in."""
        return TruthSection(path=self.truth) if isinstance(self.truth, str) else self.truth

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
    above: Fraction = Field(
        default=0.0, description="only those of at least this probability; the first always"
    )


def _target_kind(value: Any) -> str:
    if isinstance(value, (ClassTarget, TopTarget)):
        return value.kind
    if not isinstance(value, dict):
        return "word"
    return (
        "ClassTarget"
        if any(get_close_matches(str(key), ["class", "classes"], 1) for key in value)
        else "TopTarget"
    )


TargetItem = Annotated[
    Annotated[Literal["predicted", "label"], Tag("word")]
    | Annotated[ClassTarget, Tag("ClassTarget")]
    | Annotated[TopTarget, Tag("TopTarget")],
    Discriminator(_target_kind),
]


class RuntimeSection(Section):
    """How it is computed; nothing here changes what is explained."""

    device: Annotated[str, AfterValidator(_device)] = Field(
        default="auto", description="auto | cpu | cuda | cuda:N | mps"
    )
    batch_size: Literal["auto"] | Positive = Field(
        default="auto", description="images at once; auto: from the first batch"
    )
    precision: Literal["float32", "float64", "bfloat16", "float16"] = Field(
        default="float32", description="of the network"
    )
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        default="auto", description="threads that decode images"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="of every random number")
    fold: bool = Field(default=True, description="fold batch norm into convolutions where a method allows it")
    channels_last: Literal["auto"] | bool = Field(
        default="auto", description="memory layout of the images; auto: by device"
    )


class HeatmapSection(Section):
    """How heatmaps are stored."""

    dtype: Literal["float32", "float16"] = Field(
        default="float32", description="float16 halves the file; netCDF readers crash on it"
    )
    size: Literal["input", "native"] = Field(default="input", description="native keeps a 7x7 CAM 7x7")


class OutputSection(Section):
    """What is written, and where."""

    path: Annotated[Text, AfterValidator(_output_path)] = Field(
        default="results/run",
        description="output folder; {date} becomes YYYY-MM-DD. Left out: results/ and the config's name",
    )
    heatmap: HeatmapSection = Field(
        default=HeatmapSection(), description="how heatmaps are stored in results.h5"
    )
    png: tuple[Picture, ...] = Field(
        default=("overlay",), description="pictures: any of heatmap, overlay, panel; [] for none"
    )
    colormap: Text = Field(
        default="jet", description="a colour map of matplotlib, such as jet, turbo, viridis, magma, coolwarm"
    )
    alpha: Fraction = Field(default=0.5, description="weight of the colour in an overlay")
    overlay_on: Literal["input", "original"] = Field(
        default="input", description="lay the map over what the model saw or over the whole image"
    )
    layout: Literal["merged", "parts"] = Field(
        default="merged", description="one results.h5, or an index over the parts"
    )
    compression: Literal["gzip", "lzf", "none"] = Field(
        default="gzip", description="of the heatmaps in results.h5"
    )

    def folder(self, today: datetime.date) -> str:
        """The output folder of a run started ``today``."""
        return self.path.replace("{date}", today.isoformat())


class Sections(Section):
    """A whole config but its methods and metrics, whose keys depend on which they are."""

    model: ModelSection = Field(description="the network")
    images: ImagesSection = Field(description="what is explained")
    target: Annotated[tuple[TargetItem, ...], Field(min_length=1)] = Field(
        default=("predicted",),
        description="which class: predicted | label | {class: [tabby, 281]} | {top: 3, above: 0.1} | a list of these",
        json_schema_extra=_one_or_many,
    )
    score: ScoreChoice = Field(default="auto", description="the number explained; auto: each method's own")
    baselines: bool = Field(default=False, description="score random, centre and sobel beside the methods")
    gates: tuple[Text, ...] = Field(
        default=(), description="what must hold, such as 'road>=0.05' or 'p10(gradcam.deletion)<=0.3'"
    )
    against: Text | None = Field(default=None, description="the run that 'reference' in a gate means")
    runtime: RuntimeSection = Field(default=RuntimeSection(), description="how it is computed")
    output: OutputSection = Field(default=OutputSection(), description="what is written, and where")


def keys_at(location: tuple[str | int, ...]) -> list[str]:
    """The keys that the section at one of pydantic's error locations knows.

    Such a location holds keys, indices and, where the type is a union, the name of the branch taken.
    """
    here: list[type[Section]] = [Sections]
    for step in location:
        branch = [section for section in here if step in (section.__name__, section.kind)]
        fields = [f for s in here for name, f in s.model_fields.items() if step == (f.alias or name)]
        if branch:
            here = branch
        elif fields:
            here = [section for found in fields for section in _sections_in(found.annotation)]
    known = [f.alias or name for section in here for name, f in section.model_fields.items()]
    if here == [Sections]:
        known[4:4] = ["methods", "metrics"]
    return list(dict.fromkeys(known))


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]
