"""The tables of methods and metrics, filled by one decorator line in each family file.

A class under ``@method("name")`` becomes a frozen, keyword-only, validated dataclass: its fields are its YAML
keys, their types and bounds are checked whenever one is built, and the listing, the JSON Schema and the contract
tests come from the same table. The files are found by walking the package, so adding a method edits no list.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from xcli.errors import ConfigError

if TYPE_CHECKING:
    from xcli.methods.base import Method
    from xcli.metrics.base import Metric

_Class = TypeVar("_Class", bound=type)
_METHODS: dict[str, type[Method]] = {}
_METRICS: dict[str, type[Metric]] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def options(cls: _Class) -> _Class:
    """Make ``cls`` a frozen dataclass whose annotated fields are its validated options."""
    return dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", validate_default=True))(cls)  # type: ignore[return-value]


def _register(table: dict[str, _Class], name: str) -> Callable[[_Class], _Class]:
    def enter(cls: _Class) -> _Class:
        if name in table:
            raise ValueError(
                f"two classes are registered as {name!r}: {table[name].__module__}, {cls.__module__}"
            )
        cls.name = name  # type: ignore[attr-defined]
        table[name] = options(cls)
        return table[name]

    return enter


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def method(name: str) -> Callable[[_Class], _Class]:
    """Register the class below as the explanation method ``name``."""
    return _register(_METHODS, name)  # type: ignore[return-value]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def metric(name: str) -> Callable[[_Class], _Class]:
    """Register the class below as the metric ``name``; it consumes what the parameters of its ``measure`` name."""

    def enter(cls: _Class) -> _Class:
        cls.consumes = tuple(inspect.signature(cls.measure).parameters)[1:]  # type: ignore[attr-defined]
        return _register(_METRICS, name)(cls)  # type: ignore[return-value]

    return enter


@cache
def _fill(package: str) -> None:
    home = importlib.import_module(package)
    for found in pkgutil.walk_packages(home.__path__, prefix=f"{package}."):
        importlib.import_module(found.name)


def methods() -> Mapping[str, type[Method]]:
    """Every method by its YAML name, sorted; the first call imports the family files (and torch)."""
    _fill("xcli.methods")
    return dict(sorted(_METHODS.items()))


def metrics() -> Mapping[str, type[Metric]]:
    """Every metric by its YAML name, sorted; the first call imports the family files (and torch)."""
    _fill("xcli.metrics")
    return dict(sorted(_METRICS.items()))


def nearest(name: str, known: Mapping[str, object] | list[str] | tuple[str, ...]) -> str:
    """``"; did you mean 'gradcam'?"`` for the closest known name, or an empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def build(spec: str | Mapping[str, object]) -> Method:
    """The method a name or a mapping ``{"name": ..., "preset": ..., option: value}`` asks for.

    A preset sets defaults; explicit options win.

    Raises:
        ConfigError: unknown name, preset or option, or a value out of range; all problems at once.
    """
    return _built(spec, methods(), "method")


def build_metric(spec: str | Mapping[str, object]) -> Metric:
    """The metric that a name or a mapping asks for; as ``build``."""
    return _built(spec, metrics(), "metric")


_Built = TypeVar("_Built")


def _built(spec: str | Mapping[str, object], table: Mapping[str, type[_Built]], kind: str) -> _Built:
    wanted = {"name": spec} if isinstance(spec, str) else dict(spec)
    name, preset = str(wanted.pop("name", "")), str(wanted.pop("preset", "paper"))
    if name not in table:
        raise ConfigError(f"there is no {kind} {name!r}{nearest(name, list(table))}; xai {kind}s lists them")
    cls: Any = table[name]
    if preset != "paper" and preset not in cls.presets:
        raise ConfigError(f"{name} has no preset {preset!r}; known: {', '.join(['paper', *cls.presets])}")
    try:
        options = json.dumps({**cls.presets.get(preset, {}), **wanted})
        made: _Built = TypeAdapter(cls).validate_json(options, strict=True)
        return made
    except TypeError as error:  # not a value of YAML
        raise ConfigError(
            f"{name}: {error}; options are numbers, texts, true or false, and lists of these"
        ) from None
    except ValidationError as error:
        problems = [_problem(name, cls, found["loc"], found["msg"]) for found in error.errors()]
        raise ConfigError("\n".join(problems)) from None


def _problem(name: str, cls: type[Any], where: tuple[int | str, ...], message: str) -> str:
    known = [field.name for field in fields(cls)]
    option = str(where[0]) if where else ""
    if option not in known:
        return f"{name} has no option {option!r}{nearest(option, known)}; it takes {', '.join(known)}"
    return f"{name}: {option}: {message}"
