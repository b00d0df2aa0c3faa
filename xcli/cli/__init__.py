"""The command ``xai``: thin commands that parse, call one function of the library, print and give an exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from xcli import __version__

app = typer.Typer(
    name="xai",
    help="Explain what vision models look at, over whole folders of images, unattended.",
    epilog="Try it:  xai explain configs/quickstart.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"xai {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Explain what vision models look at, over whole folders of images, unattended."""


from xcli.cli import (  # noqa: E402  (they register)
    check,  # noqa: F401
    compare,  # noqa: F401
    evaluate,  # noqa: F401
    explain,  # noqa: F401
    init,  # noqa: F401
    layers,  # noqa: F401
    merge,  # noqa: F401
    methods,  # noqa: F401
    metrics,  # noqa: F401
    schema,  # noqa: F401
)


def main() -> None:
    """Run the command line; exits with the codes of the README."""
    from xcli.cli.exits import guarded

    sys.exit(guarded(app))
