"""xai metrics"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from xcli.cli import app
from xcli.cli.options import Json

if TYPE_CHECKING:
    from xcli.metrics.base import Metric


@app.command(epilog="Example:  xai metrics deletion")
def metrics(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One metric.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the metrics, or show one.

    What it computes, which way is better, its options with defaults, its cost and its source.
    """
    from xcli.cli.describe import describe
    from xcli.registry import metrics

    table = dict(sorted(metrics().items(), key=lambda item: (family(item[1]), item[0])))
    describe(table, "metric", name, as_json, facts)


def facts(cls: type[Metric]) -> dict[str, Any]:
    """What is told of a metric beside its claim, options and source."""
    low, high = cls.bounds
    span = f"{'-inf' if low is None else low} to {'inf' if high is None else high}"
    better = f"{cls.direction}, {span}"
    return {"family": family(cls), "better": better, "consumes": list(cls.consumes)}


def family(cls: type[Metric]) -> str:
    """The family that a metric's file belongs to."""
    return cls.__module__.split(".")[2]
