"""What a run writes down at its start: the config, the choices made, and where its numbers come from."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version

from xcli import __version__
from xcli.plan import Plan
from xcli.record import Record


def recorded(plan: Plan, fingerprint: str, images: int, shards: int) -> Record:
    """What is written down at the start: the config, the choices made, and where the numbers come from.

    Parts are short enough for each of the shards to get its share of the images.
    """
    share = -(-images // (shards * plan.batch_size)) * plan.batch_size
    output = plan.config.output
    attrs: dict[str, str | int | float] = {
        "model": f"{plan.model.source}:{plan.model.name}",
        "weights": plan.model.weights,
        "weights_sha256": plan.weights_sha256,
        "device": str(plan.device),
        "seed": plan.config.runtime.seed,
        "versions": json.dumps(versions()),
        "size": json.dumps(list(plan.size)),
        "preprocess": json.dumps(plan.preprocess.describe()),
    }
    if (revision := git_revision()) is not None:
        attrs["git"] = revision
    resolved = {**plan.resolved(), "compression": output.compression, "layout": output.layout}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(
        fingerprint,
        plan.config.text(),
        attrs,
        resolved,
        min(plan.part_length, share),
        created,
        plan.model.categories,
    )


def versions() -> dict[str, str]:
    """Of this tool, Python and the libraries that compute."""
    names = ("torch", "torchvision", "numpy", "h5py", "pillow")
    return {
        "xcli": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def git_revision() -> str | None:
    """The revision of the current directory, where it is a git checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
