"""xai merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xcli.cli import app
from xcli.cli.options import Json, print_json


@app.command(epilog="Example:  xai merge results/photos")
def merge(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The output directory of the shards.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Join the shards of a run.

    Writes results.h5 from the parts of all shards; refused while parts are missing.
    """
    from xcli.store import merge_run
    from xcli.summaries import add_summaries

    path = merge_run(run, finish=add_summaries)
    print_json({"status": "done", "results": str(path)}) if as_json else typer.echo(str(path))
