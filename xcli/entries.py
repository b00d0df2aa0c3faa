"""The entries of ``methods:`` and ``metrics:``: each names one and sets its options; the registry has the table."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from pydantic import TypeAdapter, ValidationError

from xcli import registry
from xcli.complaints import Issue, issues_of, not_one_of, shown
from xcli.errors import ConfigError
from xcli.sections import ScoreChoice

if TYPE_CHECKING:
    from xcli.methods.base import Method
    from xcli.metrics.base import Metric
    from xcli.targets import Scale

PAPER = "paper"
"""The preset of a method or metric as its paper has it."""

LABEL = r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}"
"""What names a result must be safe as a folder and in HDF5."""

METRIC_LABEL = r"[A-Za-z0-9_][A-Za-z0-9_+-]{0,99}"
"""Without a dot, which in results.h5 sets a metric's further columns apart."""

SCORES: tuple[str, ...] = get_args(ScoreChoice)


@dataclass(frozen=True)
class MethodSpec:
    """One entry of ``methods:``, resolved.

    Attributes:
        name: the method's.
        label: the result's, ``as:`` in the config; no two entries share one.
        preset: whose definition; ``paper`` where none was named.
        score: the number explained, ``auto`` for the method's own.
        method: built with the preset's options and, over them, the entry's.
    """

    name: str
    label: str
    preset: str
    score: ScoreChoice
    method: Method

    @property
    def params(self) -> dict[str, Any]:
        """Every option of the method with its value."""
        return options_of(self.method)

    @property
    def scale(self) -> Scale:
        """The number explained, never ``auto``."""
        return self.method.scale if self.score == "auto" else self.score

    def plain(self) -> dict[str, Any]:
        """The entry with every key written out."""
        head = {"name": self.name, "as": self.label, "preset": self.preset, "score": self.score}
        return {**head, **json.loads(json.dumps(self.params))}


@dataclass(frozen=True)
class MetricSpec:
    """One entry of ``metrics:``, resolved; the attributes are those of ``MethodSpec``."""

    name: str
    label: str
    preset: str
    metric: Metric

    @property
    def params(self) -> dict[str, Any]:
        """Every option of the metric with its value."""
        return options_of(self.metric)

    def plain(self) -> dict[str, Any]:
        """The entry with every key written out."""
        head = {"name": self.name, "as": self.label, "preset": self.preset}
        return {**head, **json.loads(json.dumps(self.params))}


def options_of(made: Any) -> dict[str, Any]:
    """The fields of a method or metric with their values."""
    return {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}


class Kind(NamedTuple):
    """What a list of entries is about: its key, its table, and the keys of an entry that are not the class's own."""

    key: str
    word: str
    table: Callable[[], Mapping[str, type[Any]]]
    common: tuple[str, ...]
    label: str
    letters: str


METHODS = Kind(
    "methods",
    "method",
    registry.methods,
    ("name", "as", "preset", "score"),
    LABEL,
    "letters, digits, . _ + and -",
)
METRICS = Kind(
    "metrics",
    "metric",
    registry.metrics,
    ("name", "as", "preset"),
    METRIC_LABEL,
    "letters, digits, _ + and -",
)


class _Entry(NamedTuple):
    """One entry that is right: what it names, and the class built with its options."""

    plain: Mapping[str, Any]
    preset: str
    made: Any

    @property
    def label(self) -> str:
        return str(self.plain.get("as", self.plain["name"]))


def method_specs(entries: object, score: ScoreChoice = "auto") -> tuple[tuple[MethodSpec, ...], list[Issue]]:
    """Every usable entry built, and everything that is wrong with the others.

    Args:
        entries: what the config holds under ``methods``.
        score: for entries that set none.
    """
    if entries == []:
        return (), [Issue(("methods",), "the list is empty; name at least one method, see `xai methods`")]
    found, issues = _entries(entries, METHODS)
    specs = [
        MethodSpec(e.plain["name"], e.label, e.preset, e.plain.get("score", score), e.made) for e in found
    ]
    return tuple(specs), issues


def metric_specs(entries: object) -> tuple[tuple[MetricSpec, ...], list[Issue]]:
    """As ``method_specs``, of what the config holds under ``metrics``."""
    found, issues = _entries(entries, METRICS)
    return tuple(MetricSpec(e.plain["name"], e.label, e.preset, e.made) for e in found), issues


def _entries(entries: object, kind: Kind) -> tuple[list[_Entry], list[Issue]]:
    if not isinstance(entries, list):
        example = f"; write [{entries}]" if isinstance(entries, str) else ""
        return [], [Issue((kind.key,), f"expected a list of {kind.key}; got {shown(entries)}{example}")]
    made, issues = [], []
    for i, entry in enumerate(entries):
        one = _entry({"name": entry} if isinstance(entry, str) else entry, kind)
        if isinstance(one, _Entry):
            made.append(one)
        else:
            issues += [Issue(_placed(kind, i, entry, issue.path), issue.text, issue.at_key) for issue in one]
    return made, issues + _same_labels(entries, kind)


def known_keys(cls: type[Any], kind: Kind = METHODS) -> tuple[str, ...]:
    """The keys an entry of this class takes, its own first."""
    return (*(field.name for field in dataclasses.fields(cls)), *kind.common[1:])


def _placed(kind: Kind, index: int, entry: object, path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    return (kind.key, index) if isinstance(entry, str) else (kind.key, index, *path)


def _entry(entry: object, kind: Kind) -> _Entry | list[Issue]:
    if not isinstance(entry, dict):
        return [Issue((), f"expected a {kind.word}'s name, or name: and its options; got {shown(entry)}")]
    if "name" not in entry:
        return [Issue((), f"the key 'name' is missing; which {kind.word}? see `xai {kind.key}`")]
    known, name = kind.table(), entry["name"]
    if not isinstance(name, str) or name not in known:
        return [Issue(("name",), not_one_of(name, list(known), f"unknown {kind.word}; there are "))]
    issues = _common_issues(entry, known[name], kind)
    own = {key: value for key, value in entry.items() if key not in kind.common}
    preset = entry.get("preset", PAPER)
    defaults = known[name].presets.get(preset, {}) if isinstance(preset, str) else {}
    made, more = _built(known[name], {**defaults, **own}, kind)
    return issues + more if made is None or issues or more else _Entry(entry, preset, made)


def _built(cls: type[Any], options: Mapping[str, Any], kind: Kind) -> tuple[Any, list[Issue]]:
    """The class with these options, as strict about their types as JSON is."""
    try:
        return TypeAdapter(cls).validate_json(json.dumps(options), strict=True), []
    except ValidationError as error:
        return None, issues_of(error, options, lambda _location: known_keys(cls, kind), owner=cls.name)
    except ConfigError as error:  # from the class's own check of how its options go together
        return None, [Issue((), str(error))]


def _common_issues(entry: Mapping[str, Any], cls: type[Any], kind: Kind) -> list[Issue]:
    issues = []
    label, preset, score = entry.get("as"), entry.get("preset", PAPER), entry.get("score", "auto")
    if "as" in entry and not (isinstance(label, str) and re.fullmatch(kind.label, label)):
        issues.append(Issue(("as",), f"a result's name takes {kind.letters}; got {shown(label)}"))
    if preset not in (presets := [PAPER, *cls.presets]):
        issues.append(Issue(("preset",), not_one_of(preset, presets, f"{cls.name} has the presets ")))
    if "score" in kind.common and score not in SCORES:
        issues.append(Issue(("score",), not_one_of(score, SCORES)))
    return issues


def _same_labels(entries: Sequence[object], kind: Kind) -> list[Issue]:
    """Entries that would write to one place; file systems that ignore case count."""
    first: dict[str, int] = {}
    issues = []
    for i, entry in enumerate(entries):
        label = entry.get("as", entry.get("name")) if isinstance(entry, dict) else entry
        if not isinstance(label, str):
            continue
        if (earlier := first.setdefault(label.casefold(), i)) != i:
            named = isinstance(entry, dict) and "as" in entry
            text = f"{kind.key}[{earlier}] is called {shown(label)} too; give one another name with `as:`"
            issues.append(Issue((kind.key, i, "as") if named else (kind.key, i), text))
    return issues
