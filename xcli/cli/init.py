"""xai init"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xcli.cli import app


@app.command(epilog="Example:  xai init torchvision --output my.yaml && xai check my.yaml")
def init(
    preset: Annotated[
        str | None,
        typer.Argument(
            metavar="[PRESET]", help="quickstart, torchvision, timm or own-model.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write to a file; else print.", show_default=False
        ),
    ] = None,
) -> None:
    """Write a commented config."""
    from xcli.errors import ConfigError, OutputUnwritable
    from xcli.schema import init_text

    text = init_text(preset)
    if output is None:
        print(text, end="")
        return
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{output} exists already; name another file or remove it first") from None
    except OSError as error:
        raise OutputUnwritable(f"{output} cannot be written: {error.strerror}") from error
    typer.echo(f"wrote {output}; next: xai check {output}", err=True)
