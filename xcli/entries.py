"""The entries of ``methods:``: each names a method and sets its options; the registry says which there are."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from pydantic import TypeAdapter, ValidationError

from xcli import registry
from xcli.complaints import Issue, issues_of, not_one_of, shown
from xcli.errors import ConfigError
from xcli.sections import ScoreChoice

if TYPE_CHECKING:
    from xcli.methods.base import Method
    from xcli.targets import Scale

PAPER = "paper"
"""The preset of a method as its paper has it."""

COMMON = ("name", "as", "preset", "score")
"""The keys of an entry that are not the method's own."""

LABEL = r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}"
"""What names a result must be safe as a folder and in HDF5."""

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
        return {field.name: getattr(self.method, field.name) for field in dataclasses.fields(self.method)}

    @property
    def scale(self) -> Scale:
        """The number explained, never ``auto``."""
        return self.method.scale if self.score == "auto" else self.score

    def plain(self) -> dict[str, Any]:
        """The entry with every key written out."""
        head = {"name": self.name, "as": self.label, "preset": self.preset, "score": self.score}
        return {**head, **json.loads(json.dumps(self.params))}


def method_specs(entries: object, score: ScoreChoice = "auto") -> tuple[tuple[MethodSpec, ...], list[Issue]]:
    """Every usable entry built, and everything that is wrong with the others.

    Args:
        entries: what the config holds under ``methods``.
        score: for entries that set none.
    """
    if not isinstance(entries, list):
        example = f"; write [{entries}]" if isinstance(entries, str) else ""
        return (), [Issue(("methods",), f"expected a list of methods; got {shown(entries)}{example}")]
    if not entries:
        return (), [Issue(("methods",), "the list is empty; name at least one method, see `xai methods`")]
    specs, issues = [], []
    for i, entry in enumerate(entries):
        made = _spec({"name": entry} if isinstance(entry, str) else entry, score)
        if isinstance(made, MethodSpec):
            specs.append(made)
        else:
            issues += [Issue(_placed(i, entry, issue.path), issue.text, issue.at_key) for issue in made]
    return tuple(specs), issues + _same_labels(entries)


def known_keys(method: type[Method]) -> tuple[str, ...]:
    """The keys an entry of this method takes, its own first."""
    return (*(field.name for field in dataclasses.fields(method)), *COMMON[1:])


def _placed(index: int, entry: object, path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    return ("methods", index) if isinstance(entry, str) else ("methods", index, *path)


def _spec(entry: object, score: ScoreChoice) -> MethodSpec | list[Issue]:
    if not isinstance(entry, dict):
        return [Issue((), f"expected a method's name, or name: and its options; got {shown(entry)}")]
    if "name" not in entry:
        return [Issue((), "the key 'name' is missing; which method? see `xai methods`")]
    known, name = registry.methods(), entry["name"]
    if not isinstance(name, str) or name not in known:
        return [Issue(("name",), not_one_of(name, list(known), "unknown method; there are "))]
    issues = _common_issues(entry, known[name])
    own = {key: value for key, value in entry.items() if key not in COMMON}
    preset = entry.get("preset", PAPER)
    defaults = known[name].presets.get(preset, {}) if isinstance(preset, str) else {}
    method, more = _built(known[name], {**defaults, **own})
    if method is None or issues or more:
        return issues + more
    return MethodSpec(name, entry.get("as", name), preset, entry.get("score", score), method)


def _built(cls: type[Method], options: Mapping[str, Any]) -> tuple[Method | None, list[Issue]]:
    """The method with these options, as strict about their types as JSON is."""
    try:
        return TypeAdapter(cls).validate_json(json.dumps(options), strict=True), []
    except ValidationError as error:
        return None, issues_of(error, options, lambda _location: known_keys(cls), owner=cls.name)
    except ConfigError as error:  # from the method's own check of how its options go together
        return None, [Issue((), str(error))]


def _common_issues(entry: Mapping[str, Any], cls: type[Method]) -> list[Issue]:
    issues = []
    label, preset, score = entry.get("as"), entry.get("preset", PAPER), entry.get("score", "auto")
    if "as" in entry and not (isinstance(label, str) and re.fullmatch(LABEL, label)):
        issues.append(
            Issue(("as",), f"a result's name takes letters, digits, . _ + and -; got {shown(label)}")
        )
    if preset not in (presets := [PAPER, *cls.presets]):
        issues.append(Issue(("preset",), not_one_of(preset, presets, f"{cls.name} has the presets ")))
    if score not in SCORES:
        issues.append(Issue(("score",), not_one_of(score, SCORES)))
    return issues


def _same_labels(entries: Sequence[object]) -> list[Issue]:
    """Entries that would write to one place; file systems that ignore case count."""
    first: dict[str, int] = {}
    issues = []
    for i, entry in enumerate(entries):
        label = entry.get("as", entry.get("name")) if isinstance(entry, dict) else entry
        if not isinstance(label, str):
            continue
        if (earlier := first.setdefault(label.casefold(), i)) != i:
            named = isinstance(entry, dict) and "as" in entry
            text = f"methods[{earlier}] is called {shown(label)} too; give one another name with `as:`"
            issues.append(Issue(("methods", i, "as") if named else ("methods", i), text))
    return issues
