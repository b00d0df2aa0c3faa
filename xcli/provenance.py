"""What a run writes down at its start: the config, the choices made, and where its numbers come from; and that all of
it is the same when the run goes on."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.machinery import PathFinder
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import xcli
from xcli import __version__
from xcli.choices import chosen_device
from xcli.config import Config
from xcli.durable import shown
from xcli.errors import ConfigError
from xcli.plan import Plan
from xcli.record import Record

COMPUTING = ("xcli", "torch", "torchvision", "numpy", "pillow")
"""Of the versions that a run notes, those that a number may depend on."""

TALKING = (
    *("cli", "checkup", "complaints", "leaderboard", "joining", "plots", "progress", "schema", "scoretext"),
    *("signals", "summary", "template", "demo/drawing", "demo/localise", "demo/scenes", "demo/train"),
)
"""Files and folders of xcli that no number of a run depends on."""


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
        "definitions": definitions(),
        "size": json.dumps(list(plan.size)),
        "preprocess": json.dumps(plan.preprocess.describe()),
    }
    if (revision := git_revision()) is not None:
        attrs["git"] = revision
    resolved = {
        **plan.resolved(),
        "compression": output.compression,
        "layout": output.layout,
        "files": named_files(plan.config),
    }
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


@cache
def definitions() -> str:
    """SHA-256 of the source files of xcli that a number may depend on."""
    found, root = hashlib.sha256(), Path(xcli.__path__[0])
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).with_suffix("").as_posix()
        if not f"{name}/".startswith(tuple(f"{quiet}/" for quiet in TALKING)):
            found.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()


def named_files(config: Config) -> dict[str, str]:
    """SHA-256 of each file that the config names and the maps depend on, by its name there: the source of a factory
    (that file alone), an exported program, the list of categories, label maps. Weights have a hash of their own, and so
    have the pictures that methods compare with (``references``)."""
    return {name: digest(file) for name, file in _named(config)}


def digest(file: Path) -> str:
    """SHA-256 of a file; empty where it cannot be read."""
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError:
        return ""


def _named(config: Config) -> Iterator[tuple[str, Path]]:
    model = config.model
    if model.source == "factory":
        source = factory_source(model.name)
        if source is not None:
            yield model.name, source
    elif model.source == "exported":
        yield model.path, Path(model.path)
    names = [model.categories] if isinstance(model.categories, str) and model.categories != "auto" else []
    leaves = (value for spec in config.methods for value in flat(spec.plain()).values())
    names += [
        value for value in leaves if isinstance(value, str) and Path(value).suffix and Path(value).is_file()
    ]
    yield from ((name, Path(name)) for name in names)


def factory_source(name: str) -> Path | None:
    """The file of ``path/to/file.py:callable`` or ``package.module:callable``, found without running any of it."""
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    spec, path = None, [*sys.path, str(Path.cwd())]
    for part in place.split("."):
        spec = PathFinder.find_spec(part, path)
        path = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin is not None else None


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested data by dotted key path."""
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, inner in pairs for key, leaf in flat(inner, f"{path}.{name}").items()}
    return {path.removeprefix("."): value}


def refuse_changes(root: Path, record: Record, config: Config) -> None:
    """Before a run goes on: everything that its numbers depend on is as it was when it began.

    Raises:
        ConfigError: what was changed, and what to do.
    """
    if changed := other_versions(record.attrs):
        raise ConfigError(
            f"the run in {shown(root)} began with other versions: {', '.join(changed)}; what is new would not fit what "
            "is there: go on with those of then, choose a new output.path, or start over with --fresh"
        )
    now, before = chosen_device(config.runtime.device), str(record.attrs.get("device", ""))
    if now.type != before.partition(":")[0]:
        raise ConfigError(
            f"the run in {shown(root)} began on {before}, this is {now}, whose numbers differ in the fourth digit: "
            f"go on with --device {before}, choose a new output.path, or start over with --fresh"
        )
    files, found = record.resolved.get("files", {}), named_files(config)
    if changed := [shown(name) for name, known in files.items() if found.get(name) != known]:
        raise ConfigError(
            f"{', '.join(changed)}: changed or gone since the run in {shown(root)} began; put back what was there, "
            "choose a new output.path, or start over with --fresh"
        )


def makers(device: torch.device) -> dict[str, str]:
    """What must not change while the parts of one thing are made: versions, definitions, the kind of device."""
    told = versions()
    return {**{name: told[name] for name in COMPUTING}, "definitions": definitions(), "device": device.type}


def other_versions(attrs: Mapping[str, Any]) -> list[str]:
    """In what the versions that a run notes differ from those at hand: ``torch 2.6.0 -> 2.14.1``."""
    before, now = json.loads(attrs.get("versions", "{}")), versions()
    changed = [
        f"{name} {before.get(name, '(not noted)')} -> {now[name]}"
        for name in COMPUTING
        if before.get(name) != now[name]
    ]
    if not changed and attrs.get("definitions") != definitions():
        changed = [f"xcli {now['xcli']} with other source files"]
    return changed
