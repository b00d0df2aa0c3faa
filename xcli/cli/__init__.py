"""The command ``xai``: thin commands that parse, call one function of the library, print and give an exit code."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated

import typer

from xcli import __version__

COMMANDS = (
    "check",
    "compare",
    "evaluate",
    "explain",
    "init",
    "layers",
    "merge",
    "methods",
    "metrics",
    "schema",
)

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


for _command in COMMANDS:  # a command registers by being imported
    import_module(f"xcli.cli.{_command}")


def main() -> None:
    """Run the command line; exits with the codes of the README."""
    from xcli.cli.exits import guarded
    from xcli.cli.streams import steady
    from xcli.signals import interruptible

    def run() -> None:
        try:
            with interruptible():
                app()
        finally:
            sys.stdout.flush()

    steady()
    sys.exit(guarded(run))
