"""A config: YAML and the command line's changes to it, checked as a whole and typed.

``load_config`` reports everything that is wrong at once, each with its place. Nothing is run or loaded, and torch is
imported only to look up the methods that a config names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from xcli.complaints import InvalidConfigError, Issue, issues_of
from xcli.crosschecks import across, gate_issues, unfed, unnamed, worded
from xcli.entries import MethodSpec, MetricSpec, method_specs, metric_specs
from xcli.errors import ConfigError
from xcli.modelsection import ModelSection
from xcli.overrides import Changes, Draft, Origins, drafted
from xcli.registry import nearest
from xcli.sections import (
    ClassTarget,
    ImagesSection,
    OutputSection,
    RuntimeSection,
    ScoreChoice,
    Sections,
    TargetItem,
    TopTarget,
    keys_at,
)
from xcli.visible import shown
from xcli.yamlfile import LARGEST_FILE, KeyPath, read_yaml, write_yaml

if TYPE_CHECKING:
    from xcli.models import ModelSpec
    from xcli.targets import Target

DEFAULT_NAME = "quickstart"
DEFAULT = """\
model: {source: demo, name: shapes-cnn}
images: {path: sample_images/scenes}
target: {top: 2, above: 0.005}
methods: [gradcam, hirescam, layercam, eigencam, random]
output: {png: [overlay, panel]}
"""
"""What is explained where no config is named; the same as configs/quickstart.yaml."""

EVALUATION = ("metrics", "baselines", "gates", "against", "images.truth", "model.checkpoints")
"""Keys that only say how maps are scored: they may change over a run that is finished."""

ANYWHERE = ("runtime.workers", "runtime.device", "output.path")
"""Keys that change no number."""


@dataclass(frozen=True)
class Config:
    """A checked config. Its sections are those of the YAML, with every default filled in.

    Attributes:
        target: one entry a target; class names are looked up by ``resolve_targets``.
        methods, metrics: built.
        gates: checked, as they were written.
        origins: where each key came from, for errors that show later.
    """

    model: ModelSection
    images: ImagesSection
    target: tuple[TargetItem, ...]
    score: ScoreChoice
    methods: tuple[MethodSpec, ...]
    metrics: tuple[MetricSpec, ...]
    baselines: bool
    gates: tuple[str, ...]
    against: str | None
    runtime: RuntimeSection
    output: OutputSection
    origins: Origins = field(default_factory=Origins, compare=False, repr=False)

    @property
    def needs_labels(self) -> bool:
        """Whether the run cannot do without true classes."""
        return self.images.only in ("wrong", "correct") or "label" in self.target

    def plain(self) -> dict[str, Any]:
        """The whole config as plain data, every key written out."""
        fields = {name: getattr(self, name) for name in Sections.model_fields}
        written = Sections.model_construct(**fields).model_dump(mode="json", by_alias=True)
        head = {key: written.pop(key) for key in ("model", "images", "target", "score")}
        if len(head["target"]) == 1:
            head["target"] = head["target"][0]
        lists = {key: [spec.plain() for spec in getattr(self, key)] for key in ("methods", "metrics")}
        return {**head, **lists, **written}

    def text(self) -> str:
        """The whole config as YAML; it loads back as an equal one."""
        return write_yaml(self.plain())

    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of everything that changes a map or a picture; not of what scores them
        (``EVALUATION``), of workers, device, output path."""
        plain = self.plain()
        for key in (*EVALUATION, *ANYWHERE):
            section, _, name = key.rpartition(".")
            (plain[section] if section else plain).pop(name, None)
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def model_spec(self, checkpoint: str | None = None) -> ModelSpec:
        """The model section as ``xcli.models`` wants it; with the weights of ``checkpoint`` where one is given."""
        from xcli.models import ModelSpec
        from xcli.preprocess import Preprocess

        section = self.model
        preprocess = section.preprocess
        weights = "DEFAULT" if section.source == "exported" else section.weights or "none"
        return ModelSpec(
            source=section.source,
            name=section.path if section.source == "exported" else section.name,
            weights=checkpoint or weights,
            preprocess="auto" if preprocess == "auto" else Preprocess(**preprocess.options()),
            categories=section.categories,
            output=section.output,
            args=section.args if section.source in ("torchvision", "timm", "factory") else {},
        )

    def error(self, key: KeyPath, text: str) -> ConfigError:
        """An error about ``key`` that was found after the config was read, with the key's place."""
        return InvalidConfigError([self.origins.line(Issue(key, text))[1]])


def load_config(
    path: Path | str | None,
    changes: Changes | None = None,
    *,
    metrics: Sequence[str] = (),
) -> Config:
    """Read a config, change it as the command line says, and check it.

    Args:
        path: the file; None stands for the built-in default.
        metrics: those of a config that names none.
    Raises:
        ConfigError: the file cannot be read.
        InvalidConfigError: every problem of the config and of the options.
    """
    file = "the built-in config" if path is None else shown(path)
    content = DEFAULT if path is None else _content(Path(path))
    draft = drafted(read_yaml(content, file), file)
    draft.data.setdefault("methods", ["gradcam"])
    _finish(draft, changes or Changes(), metrics)
    return checked(draft, DEFAULT_NAME if path is None else Path(path).stem)


def _finish(draft: Draft, changes: Changes, metrics: Sequence[str], kept: Sequence[str] = ()) -> None:
    """Make the changes, and fill in the metrics where nobody names any; ``kept`` stay beside those chosen."""
    if metrics and not draft.data.get("metrics"):
        draft.data["metrics"] = list(metrics)
    changes.made(draft, kept)


def recorded_config(
    text: str,
    file: str,
    changes: Changes | None = None,
    *,
    metrics: Sequence[str] = (),
    kept: Sequence[str] = (),
) -> Config:
    """The config that a run wrote down, changed as the command line says; ``file`` names it in messages.

    Raises:
        InvalidConfigError: as ``load_config``; or something changes that the maps of the run depend on.
    """
    draft = drafted(read_yaml(text, file), file)
    before = checked(drafted(read_yaml(text, file), file), "run")
    _finish(draft, changes or Changes(), metrics, kept)
    config = checked(draft, "run")
    if config.fingerprint() != before.fingerprint():
        raise ConfigError(
            f"--set changes what the maps of {file} depend on; only {', '.join(EVALUATION)} can change over a "
            "finished run; explain again with another --output"
        )
    return config


def checked(draft: Draft, name: str) -> Config:
    """The typed config of a draft; ``name`` is the output folder under ``results`` where none is set.

    Raises:
        InvalidConfigError: with everything that is wrong.
    """
    lists = ("methods", "metrics")
    empty = {key for key in (*Sections.model_fields, *lists) if draft.data.get(key, "") is None}
    given = {
        key: value for key, value in draft.data.items() if key not in empty
    }  # an empty section is left out
    data = {key: value for key, value in given.items() if key not in lists}
    where = data.get("output", {})
    if isinstance(where, dict) and "path" not in where:
        data["output"] = {"path": f"results/{name.replace('{', '').replace('}', '') or 'run'}", **where}
    score = data.get("score", "auto")
    specs, issues = method_specs(given.get("methods", ["gradcam"]), score)
    metrics, more = metric_specs(given.get("metrics", []))
    issues += [*more, *across(data), *unnamed(specs)]
    target = data.get("target", "predicted")
    listed = {**data, "target": target if isinstance(target, list) else [target]}
    try:
        sections = Sections.model_validate_json(json.dumps(listed), strict=True)
    except ValidationError as error:
        issues += issues_of(error, data, keys_at)
    else:
        if not issues:
            issues += gate_issues(sections, specs, metrics)
            issues += unfed(metrics, sections)
    lines = draft.lines(worded(issue, data) for issue in issues)
    if lines:
        raise InvalidConfigError(lines)
    parts = {key: getattr(sections, key) for key in Sections.model_fields}
    return Config(**parts, methods=specs, metrics=metrics, origins=draft.origins)


def resolve_targets(
    config: Config, categories: Sequence[str], labels: int | None = None
) -> tuple[Target, ...]:
    """The config's targets with class names looked up.

    Args:
        categories: names of the model's classes in order; empty where they are unknown.
        labels: how many classes the model has; None: as many as there are names, unchecked where there are none.
    Raises:
        InvalidConfigError: a class is not among the model's; every such class is named, with its place.
    """
    from xcli import targets

    count = labels if labels is not None else len(categories) or None
    root: KeyPath = ("target",)
    alone = (*root, 0) not in config.origins.positions  # written without a list
    issues: list[Issue] = []
    found: list[Target] = []
    for i, item in enumerate(config.target):
        if isinstance(item, ClassTarget):
            path = (*root, "class") if alone else (*root, i, "class")
            indices = [
                _class_index(
                    wanted, (*path, j) if isinstance(item.classes, tuple) else path, categories, count, issues
                )
                for j, wanted in enumerate(item.wanted)
            ]
            found.append(targets.Classes(tuple(dict.fromkeys(indices))))
        elif isinstance(item, TopTarget):
            found.append(targets.Top(item.top, item.above))
        else:
            found.append(targets.Label() if item == "label" else targets.Predicted())
    if issues:
        raise InvalidConfigError([text for _, text in sorted(config.origins.line(issue) for issue in issues)])
    return tuple(found)


def _class_index(
    wanted: int | str, path: KeyPath, categories: Sequence[str], count: int | None, issues: list[Issue]
) -> int:
    """The index of a class given by name or index; -1, and an issue, where the model has no such class."""
    if isinstance(wanted, int):
        if wanted < 0 or (count is not None and wanted >= count):
            most = (
                f"; the model has {count} classes, numbered from 0"
                if count is not None
                else "; indices start at 0"
            )
            issues.append(Issue(path, f"there is no class {wanted}{most}"))
        return wanted
    indices = [i for i, name in enumerate(categories) if name == wanted]
    if not categories:
        cure = f"give an index instead of {wanted!r}, or name the classes by model.categories"
        issues.append(Issue(path, f"the model's class names are unknown; {cure}"))
    elif not indices:
        few = f"; the classes are {', '.join(categories)}" if len(categories) <= 20 else ""
        issues.append(
            Issue(path, f"the model has no class {wanted!r}{few}{nearest(wanted, list(categories))}")
        )
    elif len(indices) > 1:
        which = ", ".join(map(str, indices))
        issues.append(
            Issue(path, f"{len(indices)} classes are called {wanted!r}; give the index of one: {which}")
        )
    return indices[0] if indices else -1


def _content(path: Path) -> bytes:
    """The bytes of a config file. Raises ConfigError saying what else there is."""
    if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
        raise ConfigError(
            f"{shown(path)} is an image; images are given by --input: xai explain CONFIG --input {shown(path)}"
        )
    if path.is_dir():
        raise ConfigError(
            f"{shown(path)} is a folder; name one of its configs: {_configs_in(path) or 'it has none'}"
        )
    if not path.exists():
        folder = path.parent
        close = nearest(path.name, [shown(found.name) for found in _yaml_files(folder)])
        others = _configs_in(folder)
        there = f"; {shown(folder)} has {others}" if others else ""
        raise ConfigError(f"there is no config {shown(path)}{there}{close}")
    if not path.is_file():
        raise ConfigError(f"{shown(path)} is not a regular file")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"{shown(path)}: larger than {LARGEST_FILE >> 20} MiB; this is not a config")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{shown(path)} cannot be read: {error.strerror}") from error


def _yaml_files(folder: Path) -> list[Path]:
    try:
        return sorted(found for found in folder.iterdir() if found.suffix in (".yaml", ".yml"))
    except OSError:
        return []


def _configs_in(folder: Path) -> str:
    names = [shown(found.name) for found in _yaml_files(folder)]
    return ", ".join(map(shown, names[:10])) + (", ..." if len(names) > 10 else "")
