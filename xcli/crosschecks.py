"""What has to fit together across the keys of a config, checked on plain data so that no other error hides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xcli.complaints import Issue, near, shown
from xcli.errors import ConfigError
from xcli.yamlfile import KeyPath

if TYPE_CHECKING:
    from xcli.entries import MethodSpec, MetricSpec
    from xcli.sections import Sections

LATER_KEYS: frozenset[KeyPath] = frozenset({("engine",), ("runtime", "engine"), ("concepts",), ("report",)})
"""Keys of the design that this version does not have."""

LATER_SOURCES = ("huggingface",)

COMMON_COLORMAPS = (
    "jet",
    "turbo",
    "viridis",
    "magma",
    "inferno",
    "plasma",
    "hot",
    "gray",
    "coolwarm",
    "seismic",
)
"""Taken without asking matplotlib, which is slow to import."""


def across(data: Mapping[str, Any]) -> list[Issue]:
    """Everything that is wrong between keys; values of a wrong type are left to the sections."""
    return [*_labels_needed(data), *_colormap(data)]


def worded(issue: Issue, data: Mapping[str, Any]) -> Issue:
    """The same issue, or that it is about something planned."""
    if issue.at_key and issue.path in LATER_KEYS:
        return issue._replace(text="not in this version")
    if issue.path[:1] == ("target",) and issue.text.startswith(words := "expected one of predicted, label"):
        return issue._replace(text=issue.text.replace(words, f"{words}, {{class: ...}}, {{top: ...}}"))
    source = _under(data, "model").get("source")
    if issue.path == ("model", "source") and source in LATER_SOURCES:
        return issue._replace(text=f"{source} is not in this version; {issue.text.partition('; got')[0]}")
    return issue


def gate_issues(
    sections: Sections, methods: Sequence[MethodSpec], metrics: Sequence[MetricSpec]
) -> list[Issue]:
    """Gates that are not understood, or name what is not there."""
    if not sections.gates:
        return []
    from xcli.gates import parse, resolve
    from xcli.methods.baselines import BASELINES

    labels = [spec.label for spec in methods]
    taken = {label.casefold() for label in labels}
    beside = [name for name in BASELINES if sections.baselines and name not in taken]
    plain = {spec.label for spec in methods if spec.name in BASELINES} | set(beside)
    issues = []
    for i, text in enumerate(sections.gates):
        try:
            gate = parse(text)
            resolve(gate, [*labels, *beside], [spec.label for spec in metrics], plain)
            if gate.reference and sections.against is None:
                raise ConfigError(
                    "which run is the reference? name it by --against RUN, or against: in the config"
                )
        except ConfigError as error:
            issues.append(Issue(("gates", i), str(error)))
    return issues


def unfed(metrics: Sequence[MetricSpec], sections: Sections) -> list[Issue]:
    """Metrics that consume what the config does not offer."""
    needs: list[tuple[str, bool, str]] = [
        ("truth", sections.images.truth is not None, "where the objects are; set images.truth"),
        (
            "models",
            bool(getattr(sections.model, "checkpoints", ())),
            "further weights; set model.checkpoints",
        ),
    ]
    return [
        Issue(("metrics", i), f"{spec.name} needs {what}")
        for i, spec in enumerate(metrics)
        for consumed, there, what in needs
        if consumed in spec.metric.consumes and not there
    ]


def unnamed(methods: Sequence[MethodSpec]) -> list[Issue]:
    """Methods that compare with other pictures and are not told which."""
    return [
        Issue(("methods", i), f"{spec.name} compares with other pictures; name their folder by baselines:")
        for i, spec in enumerate(methods)
        if "" in spec.method.draws_from()
    ]


def _labels_needed(data: Mapping[str, Any]) -> list[Issue]:
    images, target = _under(data, "images"), data.get("target")
    if images.get("labels", "none") != "none":
        return []
    cure = "set images.labels to folder or manifest"
    issues = []
    if images.get("only") in ("wrong", "correct"):
        text = f"{shown(images['only'])} compares the prediction with the true class; {cure}"
        issues.append(Issue(("images", "only"), text))
    places: list[tuple[KeyPath, object]] = [(("target",), target)]
    if isinstance(target, list):
        places = [(("target", i), item) for i, item in enumerate(target)]
    issues += [
        Issue(path, f"'label' is the true class of each image; {cure}")
        for path, item in places
        if item == "label"
    ]
    return issues


def _colormap(data: Mapping[str, Any]) -> list[Issue]:
    name = _under(data, "output").get("colormap", "jet")
    if not isinstance(name, str) or name in COMMON_COLORMAPS:
        return []
    from matplotlib import colormaps

    if name in colormaps:
        return []
    some = ", ".join(COMMON_COLORMAPS)
    text = f"matplotlib has no colour map {shown(name)}; for example {some}{near(name, sorted(colormaps))}"
    return [Issue(("output", "colormap"), text)]


def _under(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = data.get(key)
    return section if isinstance(section, dict) else {}
