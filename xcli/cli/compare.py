"""xai compare"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xcli.cli import app
from xcli.cli.options import Json, Output, print_json


@app.command(epilog="Example:  xai compare results/resnet50 results/vit --match path")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Evaluated runs.", show_default=False)],
    match: Annotated[
        str | None,
        typer.Option(
            "--match",
            metavar="path",
            help="Compare the rows that all runs have, by image path and target, whatever the models.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option("--metrics", metavar="A,B", help="Only these metrics.", show_default=False)
    ] = None,
    output: Output = None,
    baselines: Annotated[
        bool,
        typer.Option("--baselines/--no-baselines", help="With random, centre and sobel, scored if need be."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Rank the methods of one or more runs.

    Per metric: mean, 95 % interval, rank, and paired tests against the best. With --output also as
    leaderboard.csv, leaderboard.json and leaderboard.png.
    """
    import sys

    from xcli.errors import ConfigError
    from xcli.leaderboard import as_json as plain
    from xcli.leaderboard import compared
    from xcli.scoretext import console, show

    if match not in (None, "path"):
        raise ConfigError(f"--match {match}: the one thing to match by is path")
    chosen = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]
    failed = False
    if baselines:
        compared(
            runs, by_path=match == "path", metrics=chosen, baselines=False
        )  # what is refused is not scored
        failed = sum(score_baselines(run, chosen) for run in runs) > 0
    board = compared(runs, by_path=match == "path", metrics=chosen, baselines=baselines)
    if output is not None:
        from xcli.plots import save_leaderboard

        for path in save_leaderboard(board, Path(output)):
            typer.echo(str(path), err=True)
    if as_json:
        print_json(plain(board))
    else:
        show(board, console(sys.stdout))
    raise typer.Exit(3 if failed else 0)


def score_baselines(run: Path, metrics: list[str] | None) -> bool:
    """Score the baselines of a run with the metrics that it has, where that is not done yet; whether images failed."""
    from xcli.errors import ConfigError, InputError, ModelError, OutputUnwritable
    from xcli.progress import listen, reporter
    from xcli.scorecard import add_baselines
    from xcli.tuning import keep_freed_memory
    from xcli.visible import shown

    listen()
    keep_freed_memory()
    try:
        done = add_baselines(run if run.is_dir() else run.parent, reporter(quiet=False), metrics)
    except (ConfigError, InputError, ModelError, OutputUnwritable) as error:
        cure = f"the baselines of {shown(run)} are not scored yet, for which its model has to run"
        raise type(error)(f"{error}\n{cure}; --no-baselines compares without them") from None
    return bool(done.failed)
