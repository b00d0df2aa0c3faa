"""Reads YAML as plain data with the position of every key and value, without the traps of YAML 1.1.

What is read differs from ``yaml.safe_load`` where that surprises: ``1e-3`` and ``1E5`` are numbers; only ``true`` and
``false`` are booleans, so a class called ``no`` keeps its name; ``12:30`` and dates stay text; a number with a leading
zero, a key given twice, a merge key, a foreign tag and a number that is not finite are refused.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

import yaml

from xcli.errors import ConfigError

KeyPath = tuple[str | int, ...]

LARGEST_FILE = 1 << 20
"""Bytes of a config; more is a mistake."""
DEEPEST = 40
MOST_VALUES = 200_000
"""Values after aliases are expanded; a list of 20 000 categories fits."""

_TAG = "tag:yaml.org,2002:"
_DECIMAL = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z"
_PLAIN = {  # the resolution of plain scalars, close to the core schema of YAML 1.2
    "null": r"(~|null|Null|NULL|)\Z",
    "bool": r"(true|True|TRUE|false|False|FALSE)\Z",
    "int": r"[-+]?[0-9]+\Z",
    "float": rf"{_DECIMAL}|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z",
}


class Mark(NamedTuple):
    """A position in a file, both counted from 1."""

    line: int
    column: int


class Place(NamedTuple):
    """Where a value and its key stand; an entry of a list has no key, there both are the value's."""

    key: Mark
    value: Mark


class Fault(NamedTuple):
    """Something in the file that cannot be taken as it stands; reading went on behind it.

    ``lost``: the data holds None in its place; otherwise what it repeats.
    """

    path: KeyPath
    mark: Mark
    text: str
    lost: bool = True


class Document(NamedTuple):
    """What a file holds: plain data, the place of each key path in it, and what had to be left out."""

    data: Any
    positions: dict[KeyPath, Place]
    faults: list[Fault]


class _Loader(yaml.SafeLoader):
    """Composes nodes only; nothing is constructed."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {DEEPEST} levels deep",
                problem_mark=parent.start_mark if parent else None,
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes whatever this reader, or one of YAML 1.1, would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text as a node; with any kind of line break in double quotes, the only style that keeps them all."""
    style = '"' if text and text.splitlines() != [text] else None
    return dumper.represent_scalar(f"{_TAG}str", text, style)


_Dumper.add_representer(str, _quoted)
_Loader.yaml_implicit_resolvers = {}
for _name, _pattern in _PLAIN.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), None)
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(_pattern), None)


def read_yaml(text: str | bytes, file: str) -> Document:
    """Read one YAML document.

    Args:
        text: the content; bytes are UTF-8.
        file: its name in messages.
    Raises:
        ConfigError: not UTF-8, not YAML, more than one document, larger than ``LARGEST_FILE``, nested too deeply, or
            more values than ``MOST_VALUES``. The message starts with ``file:line:column:``.
    """
    text = _decoded(text, file) if isinstance(text, bytes) else text.removeprefix("\ufeff")
    if len(text) > LARGEST_FILE:
        raise ConfigError(f"{file}: larger than {LARGEST_FILE >> 20} MiB; this is not a config")
    reader = _Reading(file)
    node = _composed(text, file)
    if node is None:
        return Document(None, {(): Place(Mark(1, 1), Mark(1, 1))}, [])
    data = reader.value(node, (), _start(node))
    return Document(data, reader.positions, reader.faults)


def write_yaml(data: Any) -> str:
    """Plain data as YAML that ``read_yaml`` reads back unchanged; lists and keys of plain values on one line."""
    return _written(data, flow=None)


def write_inline(data: Any) -> str:
    """Plain data as YAML on one line, as it can stand behind a key."""
    return _written([data], flow=True).strip()[1:-1]


def _written(data: Any, flow: bool | None) -> str:
    written: str = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow, width=math.inf
    )
    return written


def _decoded(content: bytes, file: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        byte = content[error.start]
        raise ConfigError(f"{file}:{line}:{column}: not UTF-8 text (byte 0x{byte:02x})") from error


def _composed(text: str, file: str) -> yaml.Node | None:
    """The node tree of the only document, None where there is none."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{mark.line + 1}:{mark.column + 1}" if mark else "1:1"
        raise ConfigError(f"{file}:{at}: {_plain_words(error)}") from error
    except yaml.reader.ReaderError as error:
        line, column = (
            text.count("\n", 0, error.position) + 1,
            error.position - text.rfind("\n", 0, error.position),
        )
        raise ConfigError(f"{file}:{line}:{column}: a character that YAML does not allow") from error
    except (ValueError, OverflowError) as error:  # an escape beyond Unicode, a version number without end
        raise ConfigError(f"{file}: not valid YAML: {error}") from error


def _plain_words(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "syntax error"
    if problem == "but found another document":
        return "a second document starts here; a config is one document"
    if "'\\t'" in problem:
        return f"not valid YAML: {problem}; indent with spaces, not tabs"
    if problem == "sequence entries are not allowed here":
        return "not valid YAML: a list cannot start here; a lone - is written '-'"
    if problem.startswith("nested"):
        return problem
    context = f" ({error.context})" if error.context else ""
    return f"not valid YAML: {problem}{context}"


def _start(node: yaml.Node) -> Mark:
    return Mark(node.start_mark.line + 1, node.start_mark.column + 1)


class _Reading:
    """One walk over the nodes of a document."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.positions: dict[KeyPath, Place] = {}
        self.faults: list[Fault] = []
        self.count = 0
        self.open: set[int] = set()

    def value(self, node: yaml.Node, path: KeyPath, key: Mark) -> Any:
        """The data of a node; None, and a fault, where it cannot be taken."""
        mark = _start(node)
        self.positions[path] = Place(key, mark)
        self.count += 1
        if self.count > MOST_VALUES:
            at = f"{self.file}:{mark.line}:{mark.column}"
            raise ConfigError(f"{at}: more than {MOST_VALUES} values, aliases expanded")
        if id(node) in self.open:
            return self.fault(path, mark, "an alias that contains itself")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                return self.scalar(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
                return [self.value(item, (*path, i), _start(item)) for i, item in enumerate(node.value)]
            if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
                return self.mapping(node, path)
            return self.fault(path, mark, _foreign(node.tag))
        finally:
            self.open.discard(id(node))

    def fault(self, path: KeyPath, mark: Mark, text: str) -> None:
        self.faults.append(Fault(path, mark, text))

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = _start(key_node)
            problem = _bad_key(key_node)
            if problem:
                self.fault(path, mark, problem)
                continue
            key = key_node.value
            if key in data:
                first = self.positions[(*path, key)].key
                text = f"given twice; first at {first.line}:{first.column}"
                self.faults.append(Fault((*path, key), mark, text, lost=False))
                continue
            data[key] = self.value(value_node, (*path, key), mark)
        return data

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        try:
            return _scalar(node.tag, node.value)
        except ValueError as error:
            return self.fault(path, _start(node), str(error))


def _bad_key(node: yaml.Node) -> str | None:
    if not isinstance(node, yaml.ScalarNode):
        return "a key must be text, not a list or a mapping"
    if node.tag != f"{_TAG}str":
        return (
            f"a key must be text; quote it: '{node.value}'"
            if node.tag.startswith(_TAG)
            else _foreign(node.tag)
        )
    if node.value == "<<" and node.style is None:
        return "merge keys (<<) are not supported; write the keys out"
    return None if is_text(node.value) else "text with half a surrogate pair"


def _scalar(tag: str, text: str) -> Any:
    """The value of a scalar of one of the accepted tags. Raises ValueError saying why not."""
    match kind := tag.removeprefix(_TAG):
        case "str":
            if not is_text(text):
                raise ValueError("text with half a surrogate pair")
            return text
        case "null":
            return None
        case "bool" if text.lower() in ("true", "false"):
            return text.lower() == "true"
        case "int" if re.match(_PLAIN["int"], text):
            return _whole(text)
        case "float" if re.match(_PLAIN["float"], text):
            return _decimal(text)
        case "bool" | "int" | "float":
            raise ValueError(f"{text[:40]!r} is not a value of the tag !!{kind}")
    raise ValueError(_foreign(tag))


def _whole(text: str) -> int:
    digits = text.lstrip("+-")
    if len(digits) > 1 and digits[0] == "0":
        bare = digits.lstrip("0") or "0"
        raise ValueError(f"a number with a leading zero has two readings; write {bare[:20]} or '{text[:20]}'")
    if len(digits) > 18:
        raise ValueError("a whole number of more than 18 digits")
    return int(text)


def _decimal(text: str) -> float | int:
    """A finite number; one written with an exponent and without a fraction, such as 1E5, is a whole number."""
    number = math.nan if text.lower().endswith(("inf", "nan")) else float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a finite number")
    whole = "e" in text.lower() and number.is_integer() and abs(number) < 2**53
    return int(number) if whole else number


def is_text(value: Any) -> bool:
    """Whether every string in plain data can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _foreign(tag: str) -> str:
    shown = tag.replace(_TAG, "!!", 1) if tag.startswith(_TAG) else tag
    return f"the tag {shown[:60]!r} is not accepted; a config holds text, numbers, true, false, null, lists and keys"
