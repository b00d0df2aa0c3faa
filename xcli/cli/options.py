"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config.", show_default=False)]
OptionalConfig = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CONFIG]", help="A YAML config; left out, the embedded model.", show_default=False
    ),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input", "-i", metavar="PATH", help="Folder, file, glob, .txt/.csv list or -; again for more.",
        show_default=False,
    ),
]  # fmt: skip
Output = Annotated[
    str | None, typer.Option("--output", "-o", metavar="DIR", help="Where results go.", show_default=False)
]
Methods = Annotated[
    str | None, typer.Option("--methods", "-m", metavar="A,B", help="Only these methods.", show_default=False)
]
Metrics = Annotated[
    str | None, typer.Option("--metrics", metavar="A,B", help="Only these metrics.", show_default=False)
]
Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gate", metavar="GATE", help="What must hold, such as 'road>=0.05'; again for more.",
        show_default=False,
    ),
]  # fmt: skip
Against = Annotated[
    str | None,
    typer.Option("--against", metavar="RUN", help="What 'reference' in a gate means.", show_default=False),
]
Baselines = Annotated[
    bool | None,
    typer.Option(
        "--baselines/--no-baselines", help="Score random, centre and sobel too.", show_default=False
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Only the first N images.", show_default=False),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but what failed.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change the config, such as methods.0.layer=layer3.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]


def print_json(document: Any) -> None:
    """One line of JSON on standard output."""
    import json

    print(json.dumps(document), flush=True)
