"""A config: YAML and the command line's changes to it, checked as a whole and typed.

``load_config`` reports everything that is wrong at once, each with its place. Nothing is run or loaded, and torch is
imported only to look up the methods that a config names.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from xcli.complaints import BadConfig, Issue, dotted, issues_of, near, not_one_of, shown
from xcli.entries import MethodSpec, method_specs
from xcli.errors import ConfigError
from xcli.overrides import Draft, Origins, choose_methods, drafted, put, set_value
from xcli.registry import nearest
from xcli.sections import (
    ClassTarget,
    ImagesSection,
    ModelSection,
    OutputSection,
    RuntimeSection,
    ScoreChoice,
    Sections,
    TargetItem,
    TopTarget,
    keys_at,
)
from xcli.yamlfile import LARGEST_FILE, KeyPath, read_yaml, write_yaml

if TYPE_CHECKING:
    from xcli.models import ModelSpec
    from xcli.targets import Target

DEFAULT_NAME = "quickstart"
DEFAULT = """\
model: {source: demo, name: shapes-cnn}
images: {path: sample_images/scenes}
target: {top: 3, above: 0.2}
methods: [gradcam, hirescam, layercam, eigencam, random]
output: {png: [overlay, panel]}
"""
"""What is explained where no config is named; the same as configs/quickstart.yaml."""

COMMON_COLORMAPS = ("jet", "turbo", "viridis", "magma", "inferno", "plasma", "hot", "gray", "coolwarm", "bwr", "seismic")


@dataclass(frozen=True)
class Config:
    """A checked config. Its sections are those of the YAML, with every default filled in.

    Attributes:
        target: one entry a target; class names are looked up by ``resolve_targets``.
        methods: built.
        origins: where each key came from, for errors that show later.
    """

    model: ModelSection
    images: ImagesSection
    target: tuple[TargetItem, ...]
    score: ScoreChoice
    methods: tuple[MethodSpec, ...]
    metrics: tuple[str, ...]
    gates: tuple[str, ...]
    runtime: RuntimeSection
    output: OutputSection
    origins: Origins = field(default_factory=Origins, compare=False, repr=False)

    @property
    def needs_labels(self) -> bool:
        """Whether the run cannot do without true classes."""
        return self.images.only in ("wrong", "correct") or "label" in self.target

    def plain(self) -> dict[str, Any]:
        """The whole config as plain data, every key written out."""
        sections = Sections.model_construct(
            **{name: getattr(self, name) for name in Sections.model_fields if name != "methods"}
        )
        written = sections.model_dump(mode="json", by_alias=True)
        head = {key: written.pop(key) for key in ("model", "images", "target", "score")}
        return {**head, "methods": [spec.plain() for spec in self.methods], **written}

    def text(self) -> str:
        """The whole config as YAML; it loads back as an equal one."""
        return write_yaml(self.plain())

    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of everything that changes a number or a file; not of workers, device, output path."""
        plain = self.plain()
        for section, key in (("runtime", "workers"), ("runtime", "device"), ("output", "path")):
            del plain[section][key]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def model_spec(self) -> ModelSpec:
        """The model section as ``xcli.models`` wants it."""
        from xcli.models import ModelSpec
        from xcli.preprocess import Preprocess

        section = self.model
        preprocess = section.preprocess
        weights = "DEFAULT" if section.source == "exported" else section.weights or "none"
        return ModelSpec(
            source=section.source,
            name=section.path if section.source == "exported" else section.name,
            weights=weights,
            preprocess="auto" if preprocess == "auto" else Preprocess(**preprocess.options()),
            categories=section.categories,
            output=section.output,
            args=section.args if section.source in ("torchvision", "timm", "factory") else {},
        )

    def error(self, key: KeyPath, text: str) -> ConfigError:
        """An error about ``key`` that was found after the config was read, with the key's place."""
        return BadConfig([self.origins.line(Issue(key, text))[1]])


def load_config(
    path: Path | str | None,
    *,
    overrides: Sequence[str] = (),
    methods: str | None = None,
    inputs: Sequence[str] = (),
    output: str | None = None,
    device: str | None = None,
) -> Config:
    """Read a config, change it as the command line says, and check it.

    Args:
        path: the file; None stands for the built-in default.
        overrides: ``--set``, each ``key=value``.
        methods: ``--methods``, names separated by commas.
        inputs, output, device: ``--input``, ``--output``, ``--device``; they replace what the config says.
    Raises:
        ConfigError: the file cannot be read, or ``BadConfig`` with every problem of the config and of the options.
    """
    file = "the built-in config" if path is None else str(path)
    draft = drafted(read_yaml(DEFAULT if path is None else _content(Path(path)), file), file)
    draft.data.setdefault("methods", ["gradcam"])
    for text in overrides:
        set_value(draft, text)
    if methods is not None:
        choose_methods(draft, methods)
    if inputs:
        put(draft, "images.path", inputs[0] if len(inputs) == 1 else list(inputs), "--input")
    for option, key, value in (("--output", "output.path", output), ("--device", "runtime.device", device)):
        if value is not None:
            put(draft, key, value, option)
    return checked(draft, DEFAULT_NAME if path is None else Path(path).stem)


def checked(draft: Draft, name: str) -> Config:
    """The typed config of a draft; ``name`` is the output folder under ``results`` where none is set.

    Raises:
        BadConfig: with everything that is wrong.
    """
    data = {key: value for key, value in draft.data.items() if key != "methods"}
    where = data.get("output", {})
    if isinstance(where, dict) and "path" not in where:
        data["output"] = {"path": f"results/{name.replace('{', '').replace('}', '') or 'run'}", **where}
    score = data.get("score", "auto")
    specs, issues = method_specs(draft.data.get("methods", ["gradcam"]), score)
    issues += _across(data)
    try:
        sections = Sections.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        issues += issues_of(error, data, keys_at)
    lines = draft.lines(issues)
    if lines:
        raise BadConfig(lines)
    parts = {key: getattr(sections, key) for key in Sections.model_fields}
    return Config(**parts, methods=specs, origins=draft.origins)


def resolve_targets(config: Config, categories: Sequence[str], labels: int | None = None) -> tuple[Target, ...]:
    """The config's targets with class names looked up.

    Args:
        categories: names of the model's classes in order; empty where they are unknown.
        labels: how many classes the model has; None: as many as there are names, unchecked where there are none.
    Raises:
        BadConfig: a class is not among the model's; every such class is named, with its place.
    """
    from xcli import targets

    count = labels if labels is not None else len(categories) or None
    issues: list[Issue] = []
    found: list[Target] = []
    for i, item in enumerate(config.target):
        if isinstance(item, ClassTarget):
            path = ("target", i, "class")
            indices = [
                _class_index(wanted, (*path, j) if isinstance(item.classes, tuple) else path, categories, count, issues)
                for j, wanted in enumerate(item.wanted)
            ]
            found.append(targets.Classes(tuple(dict.fromkeys(indices))))
        elif isinstance(item, TopTarget):
            found.append(targets.Top(item.top, item.above))
        else:
            found.append(targets.Label() if item == "label" else targets.Predicted())
    if issues:
        raise BadConfig([text for _, text in sorted(config.origins.line(issue) for issue in issues)])
    return tuple(found)
