"""What ``xai methods`` and ``xai metrics`` print: the table of names, and one page."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from xcli.cli.options import print_json

Table = Mapping[str, type[Any]]


def describe(
    table: Table, word: str, name: str | None, as_json: bool, facts: Callable[[type[Any]], dict[str, Any]]
) -> None:
    """Print all of ``table``, or the page of ``name``.

    Args:
        facts: what is told of a class beside its claim, options, presets and source.
    Raises:
        ConfigError: there is no such name.
    """
    from xcli.errors import ConfigError
    from xcli.registry import nearest

    if name is not None and name not in table:
        raise ConfigError(f"there is no {word} {name!r}{nearest(name, list(table))}; xai {word}s lists them")
    chosen = table if name is None else {name: table[name]}
    if as_json:
        print_json([described(cls, facts(cls)) for cls in chosen.values()])
    elif name is None:
        listed(table, facts)
    else:
        print(page(table[name], facts(table[name])))


def described(cls: type[Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """A method or metric as plain data."""
    from pydantic import TypeAdapter

    properties = TypeAdapter(cls).json_schema()["properties"]
    return {
        "name": cls.name,
        "claim": claim(cls),
        **facts,
        "cost": cls.cost,
        "source": cls.source,
        "presets": {"paper": {}, **cls.presets},
        "options": {
            key: {"default": value.get("default"), "help": value.get("description", "")}
            for key, value in properties.items()
        },
    }


def claim(cls: type[Any]) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def listed(table: Table, facts: Callable[[type[Any]], Mapping[str, Any]]) -> None:
    """One line each, below the name of its family where it has one."""
    wide = max(map(len, table)) + 2
    room = max(40, shutil.get_terminal_size((100, 24)).columns - wide)
    family = ""
    for name, cls in table.items():
        if (own := facts(cls).get("family", "")) != family:
            print(f"\n{own}" if family else own)
            family = own
        text = claim(cls)
        print(f"{name:<{wide}}{text if len(text) <= room else text[: room - 1].rsplit(' ', 1)[0] + '…'}")


def page(cls: type[Any], facts: Mapping[str, Any]) -> str:
    """All about one, for a reader."""
    about = described(cls, facts)
    wide = max(map(len, about["options"]), default=0) + 2
    told = {
        **facts,
        "cost": about["cost"],
        "presets": [shown_preset(*one) for one in about["presets"].items()],
    }
    options = [
        f"  {key:<{wide}}{entry['default']!s:<10} {entry['help']}" for key, entry in about["options"].items()
    ]
    lines = [about["name"], "", inspect.cleandoc(cls.__doc__ or ""), ""]
    for key, value in told.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        lines.append(f"{key:<10}{text or 'nothing'}")
    return "\n".join([*lines, "", "options (YAML keys), defaults:" if options else "no options", *options])


def shown_preset(name: str, options: Mapping[str, object]) -> str:
    """``rise (steps 224, sigma 5)``."""
    return f"{name} ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else name
