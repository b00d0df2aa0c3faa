"""xai methods"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from xcli.cli import app
from xcli.cli.options import Json, print_json

if TYPE_CHECKING:
    from xcli.methods.base import Method


@app.command(epilog="Example:  xai methods gradcam")
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One method.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or show one.

    What it computes, its options with defaults, its cost and its source.
    """
    from xcli.errors import ConfigError
    from xcli.registry import methods, nearest

    table = methods()
    if name is not None and name not in table:
        raise ConfigError(f"there is no method {name!r}{nearest(name, list(table))}; xai methods lists them")
    chosen = table if name is None else {name: table[name]}
    if as_json:
        print_json([described(cls) for cls in chosen.values()])
    elif name is None:
        listed(table)
    else:
        print(page(table[name]))


def described(cls: type[Method]) -> dict[str, Any]:
    """A method as plain data: what ``xai methods NAME`` shows."""
    from pydantic import TypeAdapter

    properties = TypeAdapter(cls).json_schema()["properties"]
    return {
        "name": cls.name,
        "claim": claim(cls),
        "score": cls.scale,
        "needs": sorted(cls.needs),
        "cost": cls.cost,
        "source": cls.source,
        "presets": ["paper", *cls.presets],
        "options": {
            key: {"default": value.get("default"), "help": value.get("description", "")}
            for key, value in properties.items()
        },
    }


def claim(cls: type[Method]) -> str:
    """The first paragraph of a method's docstring, on one line."""
    return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


def listed(table: Any) -> None:
    """One line a method."""
    import shutil

    wide = max(map(len, table)) + 2
    room = max(40, shutil.get_terminal_size((100, 24)).columns - wide)
    for name, cls in table.items():
        text = claim(cls)
        print(f"{name:<{wide}}{text if len(text) <= room else text[: room - 1].rsplit(' ', 1)[0] + '…'}")


def page(cls: type[Method]) -> str:
    """All about one method, for a reader."""
    import inspect

    about = described(cls)
    wide = max(map(len, about["options"])) + 2
    options = [
        f"  {key:<{wide}}{entry['default']!s:<10} {entry['help']}" for key, entry in about["options"].items()
    ]
    lines = [
        about["name"],
        "",
        inspect.cleandoc(cls.__doc__ or ""),
        "",
        f"explains  {about['score']} by default",
        f"needs     {', '.join(about['needs']) or 'nothing but outputs'}",
        f"cost      {about['cost']} an image",
        f"presets   {', '.join(about['presets'])}",
        "",
        "options (YAML keys), defaults:",
        *options,
    ]
    return "\n".join(lines)
