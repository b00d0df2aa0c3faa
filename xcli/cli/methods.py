"""xai methods"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from xcli.cli import app
from xcli.cli.options import Json

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
    from xcli.cli.describe import describe
    from xcli.registry import methods

    table = dict(sorted(methods().items(), key=lambda item: (family(item[1]), item[0])))
    describe(table, "method", name, as_json, facts)


def facts(cls: type[Method]) -> dict[str, Any]:
    """What is told of a method beside its claim, options and source."""
    return {"family": family(cls), "score": cls.scale, "needs": sorted(cls.needs)}


def family(cls: type[Method]) -> str:
    """The family that a method's file belongs to."""
    return cls.__module__.split(".")[2]
