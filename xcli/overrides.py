"""What the command line changes in a config before it is checked, and where each part of the result came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from xcli.complaints import Issue, dotted, shown
from xcli.errors import ConfigError
from xcli.registry import nearest
from xcli.yamlfile import Document, KeyPath, Place, read_yaml

Order = tuple[int, int, int]


@dataclass(frozen=True)
class Origins:
    """Where the parts of a config came from: positions in a file, and options of the command line.

    Attributes:
        given: key path -> the option that set it, in the order given.
        moved: entries of ``methods`` that stand elsewhere in the file: path now -> path there.
    """

    file: str
    positions: dict[KeyPath, Place]
    given: dict[KeyPath, str] = field(default_factory=dict)
    moved: dict[KeyPath, KeyPath] = field(default_factory=dict)

    def line(self, issue: Issue) -> tuple[Order, str]:
        """An issue as one line that starts with its place, and its place in the order of lines.

        ``file:line:column: key path: text``, or ``--set key: text`` for what an option set.
        """
        path = issue.path
        for depth in range(len(path), -1, -1):
            prefix = path[:depth]
            if prefix in self.given:
                more = f"{dotted(path)}: " if depth < len(path) else ""
                return (1, list(self.given).index(prefix), 0), f"{self.given[prefix]}: {more}{issue.text}"
            there = self._in_file(prefix)
            if there in self.positions:
                place = self.positions[there]
                at = place.key if issue.at_key or depth < len(path) else place.value
                name = f"{dotted(self._in_file(path))}: " if path else ""
                return (0, *at), f"{self.file}:{at.line}:{at.column}: {name}{issue.text}"
        return (0, 1, 1), f"{self.file}:1:1: {issue.text}"

    def lines(self, issues: Iterable[Issue]) -> list[str]:
        """All issues, sorted by place, none twice."""
        return list(dict.fromkeys(text for _, text in sorted(self.line(issue) for issue in issues)))

    def _in_file(self, path: KeyPath) -> KeyPath:
        return (*self.moved[path[:2]], *path[2:]) if path[:2] in self.moved else path


@dataclass
class Draft:
    """A config that is being put together; ``issues`` are the faults of the file and of the options so far."""

    data: dict[str, Any]
    origins: Origins
    issues: list[Issue] = field(default_factory=list)
    bad_options: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, document: Document, file: str) -> Draft:
        """Raises ConfigError where the document is not a mapping at all."""
        if document.data is None and not document.faults:
            raise ConfigError(f"{file}: the config is empty; `xai init` writes one to start from")
        if not isinstance(document.data, dict) and not document.faults:
            raise ConfigError(f"{file}:1:1: expected keys such as model: and images:; got {shown(document.data)}")
        data = document.data if isinstance(document.data, dict) else {}
        draft = cls(data, Origins(file, document.positions))
        for fault in document.faults:
            name = f"{dotted(fault.path)}: " if fault.path else ""
            draft.bad_lines.append(((0, *fault.mark), f"{file}:{fault.mark.line}:{fault.mark.column}: {name}{fault.text}"))
            draft.bad_paths.add(fault.path)
        return draft
