"""xai schema"""

from __future__ import annotations

import json

from xcli.cli import app


@app.command(epilog="Example:  xai schema > xai.schema.json")
def schema() -> None:
    """Print the config's JSON Schema.

    Every method with its options is in it; editors use it to complete and check a config.
    """
    from xcli.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
