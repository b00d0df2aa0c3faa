"""The commented config that ``xai init`` writes, made from the sections' fields: it cannot fall behind them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from xcli import registry
from xcli.errors import ConfigError
from xcli.modelsection import DemoModel, FactoryModel, Section, TimmModel, TorchvisionModel
from xcli.sections import ImagesSection, OutputSection, RuntimeSection, Sections
from xcli.yamlfile import write_inline

WIDTH = 100
HINT = (
    "Every key is here; one that keeps its default can be left out. "
    "Paths are relative to the current directory."
)


@dataclass(frozen=True)
class _Preset:
    """What a preset is for, the class of its model section, and the values that are not defaults."""

    about: str
    model: type[Section]
    values: Mapping[str, Mapping[str, Any]]
    target: Any = "predicted"
    methods: tuple[str, ...] = ("gradcam",)


PRESETS: Mapping[str, _Preset] = {
    "quickstart": _Preset(
        "Explain the sample scenes with the embedded network; nothing is downloaded.",
        DemoModel,
        {
            "model": {"source": "demo"},
            "images": {"path": "sample_images/scenes"},
            "output": {"path": "results/quickstart", "png": ["overlay", "panel"]},
        },
        target={"top": 2, "above": 0.005},
        methods=("gradcam", "hirescam", "layercam", "eigencam", "random"),
    ),
    "torchvision": _Preset(
        "Explain a classifier of torchvision; its weights are downloaded once.",
        TorchvisionModel,
        {
            "model": {"source": "torchvision", "name": "resnet50"},
            "images": {"path": "sample_images/photos"},
            "output": {"path": "results/resnet50"},
        },
        methods=("gradcam", "layercam"),
    ),
    "timm": _Preset(
        "Explain a classifier of timm (pip install 'xcli[timm]'); its weights are downloaded once.",
        TimmModel,
        {
            "model": {"source": "timm", "name": "resnet50.a1_in1k"},
            "images": {"path": "sample_images/photos"},
            "output": {"path": "results/timm"},
        },
        methods=("gradcam", "layercam"),
    ),
    "own-model": _Preset(
        "Explain your own network: a callable that returns a torch.nn.Module, or a function of pictures.",
        FactoryModel,
        {
            "model": {
                "source": "factory",
                "name": "my_model.py:build",
                "preprocess": {
                    "resize": 256, "crop": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
                },
            },
            "images": {"path": "path/to/images"},
            "output": {"path": "results/own-model"},
        },
    ),
}  # fmt: skip


def init_text(preset: str | None = None) -> str:
    """A config with every key, its default and what it means; None gives the quick start.

    Raises:
        ConfigError: there is no such preset.
    """
    name = preset or "quickstart"
    if name not in PRESETS:
        near = registry.nearest(name, list(PRESETS))
        raise ConfigError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}{near}")
    chosen = PRESETS[name]
    sections: dict[str, type[Section]] = {
        "model": chosen.model, "images": ImagesSection, "runtime": RuntimeSection, "output": OutputSection,
    }  # fmt: skip
    lines = [f"# {chosen.about}", "#", "#     xai explain THIS-FILE.yaml", "#"]
    lines += _comment(HINT, "")
    for key, field in Sections.model_fields.items():
        if key in sections:
            lines += ["", f"{key}:  # {field.description}"]
            lines += _section(sections[key], chosen.values.get(key, {}), "  ")
        elif key == "target":
            lines += ["", *_entry(key, field, chosen.target, "")]
        else:
            lines += ["", *_entry(key, field, field.default, "")]
        if key == "score":
            lines += ["", *_methods(chosen.methods), "", *_metrics()]
    return "\n".join(lines) + "\n"


def _section(section: type[Section], values: Mapping[str, Any], indent: str) -> list[str]:
    """Every field of a section, with its value in ``values`` or its default."""
    lines = []
    for name, field in section.model_fields.items():
        key = field.alias or name
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            lines += _comment(field.description or "", indent)
            lines += [f"{indent}{key}:", *_section(inner, values.get(key, {}), f"{indent}  ")]
        else:
            lines += _entry(key, field, values.get(key, field.default), indent)
    return lines


def _entry(key: str, field: FieldInfo, value: Any, indent: str) -> list[str]:
    choices = " | ".join(_choices(field.annotation))
    comment = f"{field.description} ({choices})" if choices else field.description or ""
    return [*_comment(comment, indent), f"{indent}{key}: {write_inline(_plain(value))}"]


def _methods(names: tuple[str, ...]) -> list[str]:
    known = ", ".join(registry.methods())
    example = "{name: gradcam, as: deep, layer: layer4}"
    text = f"how it is explained: {known}. An entry with options: {example}; see `xai methods NAME`"
    return [*_comment(text, ""), "methods:", *(f"  - {name}" for name in names)]


def _metrics() -> list[str]:
    known = ", ".join(registry.metrics())
    example = "{name: deletion, steps: 32, as: deletion-32}"
    text = f"how the maps are scored: {known}. An entry with options: {example}; see `xai metrics NAME`"
    return [*_comment(text, ""), "metrics: []"]


def _choices(annotation: Any) -> list[str]:
    """The values of a field that takes one of a few words; of others none."""
    if annotation is bool:
        return ["true", "false"]
    values = get_args(annotation) if get_origin(annotation) is Literal else ()
    return [str(value) for value in values] if len(values) > 1 else []


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True)
    return list(value) if isinstance(value, tuple) else value


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False)
