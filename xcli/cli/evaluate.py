"""xai evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xcli.cli import app
from xcli.cli.options import (
    Against,
    Baselines,
    Device,
    Gates,
    Input,
    Json,
    Limit,
    Metrics,
    Output,
    Overrides,
    Quiet,
    Verbose,
)

if TYPE_CHECKING:
    from xcli.overrides import Changes
    from xcli.pipeline import Summary
    from xcli.progress import Reporter
    from xcli.scorecard import Scorecard


@app.command(epilog="Example:  xai evaluate results/quickstart --gate 'insertion>=0.4'")
def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|CONFIG", help="A finished run, or a config to explain and score.", show_default=False
        ),
    ],
    metrics: Metrics = None,
    gate: Gates = None,
    against: Against = None,
    baselines: Baselines = None,
    input: Input = None,
    output: Output = None,
    set: Overrides = None,
    limit: Limit = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score the maps of a run, or of a config in one pass over its images.

    Scores go to results.h5 and metrics.csv, curves to PNG, a table to standard output.

    A gate that does not hold ends in exit code 4.
    """
    from xcli.cli.explain import reported
    from xcli.errors import ConfigError
    from xcli.overrides import Changes
    from xcli.progress import listen, reporter
    from xcli.tuning import keep_freed_memory

    listen(quiet=quiet, verbose=verbose)
    changes = Changes(
        overrides=set or (), metrics=metrics, inputs=input or (), output=output, device=device,
        gates=gate or (), against=against, baselines=baselines,
    )  # fmt: skip
    keep_freed_memory()
    progress = reporter(quiet=quiet)
    summary: Summary | None = None
    card: Scorecard | None
    if run.is_dir() or run.suffix == ".h5":
        if input or output or limit:
            raise ConfigError(
                f"{run} is a run: its images and its place are fixed; leave out --input, --output and --limit"
            )
        card = of_run(run if run.is_dir() else run.parent, changes, progress)
    else:
        summary, card = of_config(run, changes, limit, progress)
    raise typer.Exit(reported(summary, card, as_json=as_json, quiet=quiet))


def of_run(root: Path, changes: Changes, progress: Reporter) -> Scorecard:
    """Score the finished run in ``root`` with the config that it wrote down."""
    from xcli.scorecard import config_of_run, reference_of, scorecard

    config = config_of_run(root, changes)
    return scorecard(root, config, reference_of(config), progress)


def of_config(
    path: Path, changes: Changes, limit: int | None, progress: Reporter
) -> tuple[Summary, Scorecard | None]:
    """Explain the images of a config and score them in the same pass."""
    from xcli.config import load_config
    from xcli.images import find_images
    from xcli.scorecard import DEFAULT_METRICS, explain_and_score

    config = load_config(path, changes, metrics=DEFAULT_METRICS)
    sources = find_images(config.images.paths, labels=config.images.labels, limit=limit)
    return explain_and_score(config, sources, progress)
