"""xai check"""

from __future__ import annotations

from xcli.cli import app
from xcli.cli.options import ConfigArgument, Device, Input, Json, Methods, Overrides, print_json


@app.command(epilog="Example:  xai check configs/resnet50.yaml --input photos")
def check(
    config: ConfigArgument,
    input: Input = None,
    methods: Methods = None,
    set: Overrides = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Try a config on one image.

    Validates it, loads the model and says: layers, grids, preprocessing, cost, memory, and traps.
    """
    from xcli.checkup import checked_up
    from xcli.config import load_config
    from xcli.images import find_images
    from xcli.overrides import Changes
    from xcli.visible import shown

    loaded = load_config(
        config, Changes(overrides=set or (), methods=methods, inputs=input or (), device=device)
    )
    report = checked_up(loaded, find_images(loaded.images.paths, labels=loaded.images.labels))
    if as_json:
        print_json(report.as_json())
    else:
        for line in report.lines():
            print(shown(line))
