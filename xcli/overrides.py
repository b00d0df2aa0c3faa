"""What the command line changes in a config before it is checked, and where each part of the result came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from xcli import visible
from xcli.complaints import Issue, dotted, shown
from xcli.errors import ConfigError
from xcli.yamlfile import Document, KeyPath, Mark, Place, is_text, read_yaml

Order = tuple[int, int, int]
"""Sorts lines: those of the file by position, then those of options as they were given."""


@dataclass(frozen=True)
class Origins:
    """Where the parts of a config came from: positions in a file, and options of the command line.

    Attributes:
        given: key path -> the option that set it, in the order given.
        moved: entries that ``--methods`` or ``--metrics`` chose: path now -> path as the file and ``--set`` have it.
    """

    file: str = "config"
    positions: dict[KeyPath, Place] = field(default_factory=dict)
    given: dict[KeyPath, str] = field(default_factory=dict)
    moved: dict[KeyPath, KeyPath] = field(default_factory=dict)

    def line(self, issue: Issue) -> tuple[Order, str]:
        """An issue as ``file:line:column: key path: text``, or ``--set key: text`` where an option set the value."""
        path = issue.path
        for depth in range(len(path), -1, -1):
            prefix, inside = self._before(path[:depth]), depth < len(path)
            if prefix in self.given:
                more = f"{dotted(self._before(path))}: " if inside else ""
                return (1, list(self.given).index(prefix), 0), f"{self.given[prefix]}: {more}{issue.text}"
            if prefix in self.positions:
                place = self.positions[prefix]
                mark = place.key if issue.at_key or inside else place.value
                return (0, *mark), self.at(mark, self._before(path), issue.text)
        return (0, 1, 1), self.at(Mark(1, 1), path, issue.text)

    def at(self, mark: Mark, path: KeyPath, text: str) -> str:
        name = f"{dotted(path)}: " if path else ""
        return f"{self.file}:{mark.line}:{mark.column}: {name}{text}"

    def _before(self, path: KeyPath) -> KeyPath:
        return (*self.moved[path[:2]], *path[2:]) if path[:2] in self.moved else path


@dataclass
class Draft:
    """A config that is being put together.

    Attributes:
        data: plain data, changed in place by the functions of this file.
        found: lines about what is wrong already: faults of the file and of options.
        unread: key paths whose value could not be taken; whatever else is wrong there follows from that.
    """

    data: dict[str, Any]
    origins: Origins
    found: list[tuple[Order, str]] = field(default_factory=list)
    unread: set[KeyPath] = field(default_factory=set)

    def lines(self, issues: Iterable[Issue]) -> list[str]:
        """Everything that is wrong, sorted by place, nothing twice."""
        new = [self.origins.line(issue) for issue in issues if issue.at_key or issue.path not in self.unread]
        return list(dict.fromkeys(text for _, text in sorted(self.found + new)))

    def refuse(self, option: str, text: str) -> None:
        """Note that an option of the command line cannot be followed."""
        self.found.append(((1, len(self.origins.given), 0), f"{option}: {text}"))

    def place(self, path: KeyPath, option: str) -> None:
        """Note that ``option`` has set ``path`` and all below it."""
        for known in (self.origins.positions, self.origins.given):
            for old in [key for key in known if key[: len(path)] == path]:
                del known[old]
        self.unread -= {old for old in self.unread if old[: len(path)] == path}
        self.origins.given[path] = option


def drafted(document: Document, file: str) -> Draft:
    """The content of a file as a draft.

    Raises:
        ConfigError: the file is empty or holds no keys.
    """
    data = document.data
    if not isinstance(data, dict) and not document.faults:
        if data is None:
            raise ConfigError(f"{file}: the config is empty; `xai init` writes one to start from")
        raise ConfigError(f"{file}:1:1: expected keys such as model: and images:; got {shown(data)}")
    draft = Draft(data if isinstance(data, dict) else {}, Origins(file, dict(document.positions)))
    for path, mark, text, _ in document.faults:
        draft.found.append(((0, *mark), draft.origins.at(mark, path, text)))
    draft.unread = {fault.path for fault in document.faults if fault.lost}
    return draft


def put(draft: Draft, key: str, value: Any, option: str) -> None:
    """Give the key path ``key``, dotted, a new value in the name of a command line option."""
    if not is_text(value):
        draft.refuse(option, f"{shown(value)} is not UTF-8, so a config cannot hold it")
        return
    path: list[str | int] = []
    here: Any = draft.data
    steps = key.split(".")
    try:
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            path.append(_step(here, step, tuple(path)))
            if following is not None:
                here = _entered(here, path[-1], following, tuple(path))
    except ConfigError as error:
        draft.refuse(option, str(error))
        return
    if isinstance(here, list) and path[-1] == len(here):
        here.append(value)
    else:
        here[path[-1]] = value
    draft.place(tuple(path), option)


def set_value(draft: Draft, text: str) -> None:
    """Follow ``--set a.b.0.c=value``: the value is YAML, numbers index lists, missing keys are made."""
    key, equals, value = text.partition("=")
    key = re.sub(r"\[(\d+)\]", r".\1", key.strip())
    option = f"--set {visible.shown(key)}"
    if not equals or not all(key.split(".")):
        draft.refuse(
            f"--set {visible.shown(text)}",
            "expected key=value, such as runtime.seed=1 or methods.0.layer=layer3",
        )
        return
    try:
        document = read_yaml(value, option)
    except ConfigError as error:
        draft.refuse(option, str(error).removeprefix(f"{option}:"))
        return
    for fault in document.faults:
        draft.refuse(option, fault.text)
    if not document.faults:
        put(draft, key, document.data, option)


def choose(draft: Draft, key: Literal["methods", "metrics"], text: str) -> None:
    """Follow ``--methods a,b`` or ``--metrics a,b``: what the config lists under that result or class name stays as it
    is there, in the order asked for; others are added with their defaults."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        draft.refuse(f"--{key}", f"expected names separated by commas; see `xai {key}`")
        return
    listed = draft.data.get(key)
    entries = listed if isinstance(listed, list) else []
    chosen: list[Any] = []
    for name in dict.fromkeys(names):
        matching = _matching(entries, name)
        for index in matching:
            draft.origins.moved[key, len(chosen)] = (key, index)
            chosen.append(entries[index])
        if not matching:
            draft.origins.moved[key, len(chosen)] = (key, name)
            draft.origins.given[key, name] = f"--{key}"
            chosen.append(name)
    draft.data[key] = chosen


def _matching(entries: list[Any], name: str) -> list[int]:
    """The entry with this result name, else every entry of this method or metric."""
    heads = [entry if isinstance(entry, dict) else {"name": entry} for entry in entries]
    labelled = [i for i, head in enumerate(heads) if head.get("as", head.get("name")) == name]
    return labelled or [i for i, head in enumerate(heads) if head.get("name") == name]


def _step(here: Any, step: str, path: KeyPath) -> str | int:
    """``step`` as a key or an index of ``here``. Raises ConfigError saying what there is."""
    if isinstance(here, dict):
        return step
    there = f"{dotted(path)} has {len(here)} entries, numbered from 0"
    if not step.isdecimal():
        raise ConfigError(f"{there}; {step!r} is no number")
    if int(step) > len(here):
        raise ConfigError(f"{there}; there is no {step}, and the next new one is {len(here)}")
    return int(step)


def _entered(here: Any, step: str | int, following: str, path: KeyPath) -> Any:
    """The list or mapping at ``step``, made where nothing is."""
    new: Any = [] if following.isdecimal() and path in (("methods",), ("metrics",)) else {}
    if isinstance(here, list) and step == len(here):
        here.append(new)
    inside = here.get(step) if isinstance(here, dict) else here[step]
    if isinstance(inside, str) and len(path) == 2 and path[0] in ("methods", "metrics"):
        inside = {"name": inside}
    if inside is None:
        inside = new
    if not isinstance(inside, (dict, list)):
        raise ConfigError(f"{dotted(path)} is {shown(inside)}, which has no keys; set it whole")
    here[step] = inside
    return inside


@dataclass(frozen=True)
class Changes:
    """What the command line changes in a config.

    Attributes:
        overrides: ``--set``, each ``key=value``.
        methods, metrics: ``--methods`` and ``--metrics``, names separated by commas.
        inputs, output, device, against: ``--input`` and so on; they replace what the config says.
        gates: ``--gate``, added to those of the config.
        baselines: ``--baselines``.
    """

    overrides: Sequence[str] = ()
    methods: str | None = None
    metrics: str | None = None
    inputs: Sequence[str] = ()
    output: str | None = None
    device: str | None = None
    gates: Sequence[str] = ()
    against: str | None = None
    baselines: bool | None = None

    def made(self, draft: Draft, kept: Sequence[str] = ()) -> None:
        """Change ``draft``; ``metrics`` that are called as ``kept`` says stay, whichever are chosen."""
        for text in self.overrides:
            set_value(draft, text)
        if self.methods is not None:
            choose(draft, "methods", self.methods)
        if self.metrics is not None:
            choose(draft, "metrics", ",".join([self.metrics, *kept]) if self.metrics.strip(" ,") else "")
        if self.inputs:
            put(
                draft,
                "images.path",
                self.inputs[0] if len(self.inputs) == 1 else list(self.inputs),
                "--input",
            )
        listed = draft.data.get("gates")
        if self.gates and not isinstance(listed, list):
            put(draft, "gates", [], "--gate")
        for gate in self.gates:
            put(draft, f"gates.{len(draft.data['gates'])}", gate, "--gate")
        given = {
            "output.path": ("--output", self.output),
            "runtime.device": ("--device", self.device),
            "against": ("--against", self.against),
            "baselines": ("--baselines", self.baselines),
        }
        for key, (option, value) in given.items():
            if value is not None:
                put(draft, key, value, option)
