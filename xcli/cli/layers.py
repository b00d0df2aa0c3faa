"""xai layers"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xcli.cli import app
from xcli.cli.options import ConfigArgument, Device, Json, Overrides, print_json

if TYPE_CHECKING:
    from xcli.layers import Row


@app.command(epilog="Example:  xai layers configs/resnet50.yaml")
def layers(
    config: ConfigArgument, set: Overrides = None, device: Device = None, as_json: Json = False
) -> None:
    """List the model's layers.

    Each with its output shape; the default target layer is marked with *.
    """
    from xcli.config import load_config
    from xcli.overrides import Changes
    from xcli.plan import surveyed

    found = surveyed(load_config(config, Changes(overrides=set or (), device=device)))
    if as_json:
        print_json(
            [
                {
                    "name": row.name,
                    "kind": row.kind,
                    "shape": row.shape,
                    "grid": [row.grid.h, row.grid.w] if row.grid else None,
                    "calls": row.calls,
                    "default": row.default,
                }
                for row in found.rows
            ]
        )
        return
    wide = max(2 * row.depth + len(row.name.rsplit(".", 1)[-1]) for row in found.rows) + 2
    kinds = max(len(row.kind) for row in found.rows) + 2
    for row in found.rows:
        print(line(row, wide, kinds))
    print(f"\n* the default layer: {found.default.name}")


def line(row: Row, wide: int, kinds: int) -> str:
    """One module: indented name, class, output shape of one image, map size."""
    from xcli.visible import shown

    name = "  " * row.depth + row.name.rsplit(".", 1)[-1]
    shape = "x".join(map(str, row.shape)) if row.shape else ("not run" if not row.calls else "-")
    grid = f"map {row.grid.h}x{row.grid.w}" if row.grid else ""
    calls = f"runs {row.calls} times" if row.calls > 1 else ""
    notes = ", ".join(note for note in (grid, calls) if note)
    name, kind = shown(name), shown(row.kind)  # those of an exported program are text of a file
    return f"{'*' if row.default else ' '} {name:<{wide}}{kind:<{kinds}}{shape:<16}{notes}".rstrip()
