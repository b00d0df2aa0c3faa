"""What is wrong with a config, in plain words: where, what, what is allowed, and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from xcli.errors import ConfigError
from xcli.registry import nearest
from xcli.yamlfile import KeyPath

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys with values",
    "model_type": "keys with values",
    "model_attributes_type": "keys with values",
    "dataclass_type": "keys with values",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
    "multiple_of": ("a multiple of", "multiple_of"),
}
_UNKNOWN_KEY = {"extra_forbidden", "unexpected_keyword_argument"}


class InvalidConfigError(ConfigError):
    """Everything that is wrong with a config.

    Attributes:
        problems: one line each, ``file:line:column: key path: what is wrong``, in the order of the file.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class Issue(NamedTuple):
    """One problem at a key path; ``at_key`` where the key is wrong, not its value."""

    path: KeyPath
    text: str
    at_key: bool = False


class _Finding(NamedTuple):
    """One error of the validation; a union gives one for each of its branches."""

    kind: str
    error: Mapping[str, Any]


def dotted(path: KeyPath) -> str:
    """``("methods", 0, "layer")`` as ``methods[0].layer``; keys that are no plain words are quoted."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif re.fullmatch(r"[\w+-]+", step):
            text += f".{step}" if text else step
        else:
            text += f"[{shown(step)}]"
    return text


def shown(value: object) -> str:
    """A value as a message shows it: short, on one line, without control characters."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case list() | tuple():
            return "a list"
        case Mapping():
            return "keys with values"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def unknown_key(key: object, known: Sequence[str], owner: str = "") -> str:
    """That a key is not known, with those that are; ``owner`` is the method whose parameter it would be."""
    what = f"{owner} has no parameter {shown(key)}" if owner else f"unknown key {shown(key)}"
    return f"{what}; known here: {', '.join(known) or 'none'}{nearest(str(key), list(known))}"


def not_one_of(value: object, choices: Sequence[str], what: str = "expected one of ") -> str:
    """That a value is none of ``choices``, with the nearest."""
    return f"{what}{', '.join(choices)}; got {shown(value)}{near(value, choices)}"


def near(value: object, choices: Sequence[str]) -> str:
    return nearest(value, list(choices)) if isinstance(value, str) else ""


def issues_of(
    error: ValidationError, data: object, keys_at: Callable[[KeyPath], Sequence[str]], owner: str = ""
) -> list[Issue]:
    """The errors of one validation in plain words.

    Of a union only the branch that was meant is reported: the one in which the validation came deepest, then the one
    whose type was right.

    Args:
        error: from pydantic, validating ``data``.
        data: the input; it tells the keys in pydantic's error locations from the names of union branches.
        keys_at: the keys known at a location of pydantic's, for unknown keys.
        owner: see ``unknown_key``.
    """
    found: dict[KeyPath, list[_Finding]] = {}
    for one in error.errors(include_url=False):
        path = _in_data(one["loc"], data, missing=one["type"] == "missing")
        if one["type"] == "union_tag_invalid":
            path = (*path, one["ctx"]["discriminator"].strip("'"))
        if one["type"] == "missing" and isinstance(path[-1], int):
            path, one = path[:-1], {**one, "type": "ended"}  # a list that is too short
        found.setdefault(path, []).append(_Finding(_kind(one["type"]), one))
    return [
        _issue(path, findings, keys_at, owner)
        for path, findings in found.items()
        if not _superseded(path, findings, found)
    ]


def _kind(type_: str) -> str:
    if type_ in _UNKNOWN_KEY:
        return "unknown"
    return "expected" if type_ in _EXPECTED or type_ == "literal_error" else "other"


def _superseded(path: KeyPath, findings: list[_Finding], found: Mapping[KeyPath, object]) -> bool:
    """Whether all is about the type or the length, while errors further in say that the type was right.

    Pydantic counts only the valid entries of a list, so one bad entry alone makes it too short.
    """
    deeper = any(len(other) > len(path) and other[: len(path)] == path for other in found)
    return deeper and all(one.kind == "expected" or one.error["type"] == "too_short" for one in findings)


def _in_data(location: KeyPath, data: object, missing: bool) -> KeyPath:
    """Pydantic's location without the names of union branches, which are not in the data."""
    path: KeyPath = ()
    for i, step in enumerate(location):
        inside = (
            data if isinstance(data, Mapping) else dict(enumerate(data)) if isinstance(data, list) else {}
        )
        if step in inside:
            data = inside[step]
        elif not (missing and i == len(location) - 1):
            continue
        path = (*path, step)
    return path


def _issue(
    path: KeyPath, findings: list[_Finding], keys_at: Callable[[KeyPath], Sequence[str]], owner: str
) -> Issue:
    # a list of which no entry is valid is too short for pydantic; what is wrong with the entries says more
    findings = [f for f in findings if not (f.error["type"] == "too_short" and f.error["input"])] or findings
    unknown = [finding.error for finding in findings if finding.kind == "unknown"]
    if unknown:
        return Issue(path, unknown_key(path[-1], keys_at(tuple(unknown[0]["loc"][:-1])), owner), at_key=True)
    meant = [finding.error for finding in findings if finding.kind == "other"]
    if meant:
        return Issue(path, _words(meant[0], path))
    return Issue(path, _expected([finding.error for finding in findings]))


def _words(error: Mapping[str, Any], path: KeyPath) -> str:
    """An error that is not about the type alone."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return f"the key {path[-1]!r} is missing"
    if kind == "ended":
        return f"the list is too short; got {len(value)} {'entry' if len(value) == 1 else 'entries'}"
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"must be {words} {context[key]:g}; got {shown(value)}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind == "too_long":
        return f"takes {context['max_length']} entries; got {context['actual_length']}"
    if kind == "union_tag_not_found":
        return f"the key {context['discriminator']} is missing"
    if kind == "value_error":
        return str(context["error"])
    if kind == "union_tag_invalid":
        return not_one_of(context["tag"], _quoted(context["expected_tags"]))
    return str(error["msg"])


def _expected(errors: list[Mapping[str, Any]]) -> str:
    """What any branch of a union would have taken."""
    value = errors[0]["input"]
    choices = [c for e in errors if e["type"] == "literal_error" for c in _quoted(e["ctx"]["expected"])]
    types = list(dict.fromkeys(_EXPECTED[e["type"]] for e in errors if e["type"] in _EXPECTED))
    if not types:
        return (
            not_one_of(value, choices) if len(choices) > 1 else f"expected {choices[0]}; got {shown(value)}"
        )
    quote = types == ["text"] and isinstance(value, (bool, int, float))
    hint = f"; quote it: '{shown(value)}'" if quote else near(value, choices)
    return f"expected {' or '.join([*choices, *types])}; got {shown(value)}{hint}"


def _quoted(expected: str) -> list[str]:
    """The choices in pydantic's wording, ``'a', 'b' or 'c'``."""
    return re.findall(r"'([^']*)'", expected)
