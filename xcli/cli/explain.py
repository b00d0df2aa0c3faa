"""xai explain"""

from __future__ import annotations

import logging
from datetime import date
from typing import TYPE_CHECKING, Annotated

import typer

from xcli.cli import app
from xcli.cli.options import (
    Device,
    Input,
    Json,
    Limit,
    Methods,
    OptionalConfig,
    Output,
    Overrides,
    Quiet,
    Verbose,
    print_json,
)

LOG = logging.getLogger(__name__)

if TYPE_CHECKING:
    from xcli.pipeline import Summary
    from xcli.scorecard import Scorecard


@app.command(epilog="Example:  xai explain configs/quickstart.yaml --output results/first")
def explain(
    config: OptionalConfig = None,
    input: Input = None,
    output: Output = None,
    methods: Methods = None,
    set: Overrides = None,
    limit: Limit = None,
    device: Device = None,
    shard: Annotated[
        str, typer.Option("--shard", metavar="I/N", help="Do every N-th part, I from 1 to N.")
    ] = "1/1",
    engine: Annotated[str, typer.Option("--engine", metavar="local", help="Who runs the work.")] = "local",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over: remove the results of an earlier run.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Explain only images that are new since a run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the config and count the images; run nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Explain every image of a folder.

    Heatmaps go to results.h5, overlays to PNG; scores too, where the config names metrics.

    An unfinished run in the output directory is resumed; a finished one is left alone.
    """
    from xcli.config import load_config
    from xcli.errors import ConfigError
    from xcli.images import find_images
    from xcli.overrides import Changes
    from xcli.progress import listen, reporter

    listen(quiet=quiet, verbose=verbose)
    part = shard_of(shard)
    if fresh and part[1] > 1:
        raise ConfigError(
            "--fresh with --shard would remove what other shards have done; remove the output folder first"
        )
    if engine != "local":
        raise ConfigError(f"--engine {engine}: not in this version; the only engine is local")
    loaded = load_config(
        config,
        Changes(overrides=set or (), methods=methods, inputs=input or (), output=output, device=device),
    )
    sources = find_images(loaded.images.paths, labels=loaded.images.labels, limit=limit)
    if dry_run:
        folder = loaded.output.folder(date.today())
        if as_json:
            print_json(
                {"status": "dry run", "images": len(sources), "output": folder, "config": loaded.plain()}
            )
        else:
            print(f"{loaded.text()}\n# {len(sources)} images -> {folder}")
        return
    from xcli.scorecard import explain_and_score
    from xcli.tuning import keep_freed_memory

    keep_freed_memory()
    summary, card = explain_and_score(
        loaded, sources, reporter(quiet=quiet), shard=part, fresh=fresh, update=update
    )
    raise typer.Exit(reported(summary, card, as_json=as_json, quiet=quiet))


def reported(summary: Summary | None, card: Scorecard | None, *, as_json: bool, quiet: bool) -> int:
    """Print what a call has done, and return its exit code.

    Args:
        summary: of an explaining run; ``None`` where a finished one was scored.
    """
    codes = {0, *([summary.exit_code] if summary else []), *([card.exit_code] if card else [])}
    code = 4 if 4 in codes else max(codes)  # a gate that fails comes before images that do
    told = {"status": "done", "output": str(card.root)} if card else {}
    if as_json:
        whole = {**told, **(summary.as_json() if summary else {}), **(card.as_json() if card else {})}
        print_json({**whole, "exit_code": code})
        return code
    if summary is not None:
        tell(summary)
    if card is not None:
        show_scores(card, quiet=quiet)
    return code


def show_scores(card: Scorecard, *, quiet: bool) -> None:
    """The table of scores and the verdicts of gates, on standard output; ``quiet``: the gates that fail."""
    import sys

    from xcli.scoretext import console, table

    if not quiet:
        table(card.scores, console(sys.stdout))
    verdicts = zip(card.gates(), card.verdicts, strict=True)
    for line, verdict in verdicts:
        if not (quiet and verdict.passed):
            print(line)
    if card.evaluated.failed:
        LOG.warning("%d images could not be scored; mend them and run this again", len(card.evaluated.failed))
    LOG.info("scores are in %s", card.root / "metrics.csv")


def shard_of(text: str) -> tuple[int, int]:
    """``"2/4"`` as numbers."""
    from xcli.errors import ConfigError

    first, slash, count = text.partition("/")
    if not (slash and first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise ConfigError(f"--shard {text}: write I/N with I from 1 to N, such as 2/4")
    return int(first), int(count)


def tell(summary: Summary) -> None:
    """The end of a run: what was done, what went wrong and what to do next."""
    if summary.results is None:
        LOG.info("%s: %s; when all are through: xai merge %s", summary.status, summary.output, summary.output)
    rate = (
        f" in {summary.seconds:.1f} s ({summary.images_per_second:.1f} images/s)"
        if summary.status == "done"
        else ""
    )
    if summary.failed:
        where = "/images/error of results.h5"
        cure = (
            f"{where}; mend them and explain again with --fresh"
            if summary.results
            else f"{where}, once merged"
        )
        LOG.warning("%d of %d images failed: why is in %s", summary.failed, summary.images, cure)
    if flat := ", ".join(f"{name} {count}" for name, count in summary.flat.items() if count):
        LOG.warning("flat maps: %s; which is in /status of results.h5", flat)
    if summary.results is not None:
        counted = f"{summary.explanations} explanations of {summary.images} images"
        LOG.info("%s: %s%s: %s", summary.status, counted, rate, summary.results)
