"""What a run is, fixed at its start: the record (run.json) and the list of its images (inputs.jsonl).

The list only ever grows at its end, and run.json says how many bytes of it count: whatever a kill leaves of an
update, run.json alone decides between the old run and the new one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from xcli.durable import make_folder, shown, write_file
from xcli.errors import ConfigError, InputError, OutputUnwritable
from xcli.inputs import Source as Input
from xcli.parts import SCHEMA
from xcli.recordcheck import refuse_nonsense

RUN, INPUTS, RESULTS, PARTS = "run.json", "inputs.jsonl", "results.h5", "parts"
CHOICES = ("size", "batch_size", "channels_last", "layers", "shapes")
NAMED = 3
"""Images that a message names."""
Identity = tuple[str, int, int, str | None]
_PART_NAME = re.compile(r"(\d{5,})\.h5")


@dataclass(frozen=True)
class Record:
    """What must stay the same for a run to go on."""

    fingerprint: str  # of everything in the config that changes a number
    config: str  # YAML text
    attrs: dict[str, str | int | float]  # for the root of results.h5: versions, model, device, seed
    resolved: dict[
        str, Any
    ]  # `auto` values as decided at the start; "compression" and "layout" are read here
    part_length: int  # images a part
    created: str
    categories: tuple[str, ...]

    def choices(self) -> dict[str, Any]:
        """``resolved``, of which a run that goes on takes all. Raises ``ConfigError`` where something is lacking."""
        if lacking := [key for key in CHOICES if key not in self.resolved]:
            raise ConfigError(
                f"{RUN} does not say what was decided when the run began ({', '.join(lacking)}); "
                "start over with --fresh"
            )
        return self.resolved


@dataclass(frozen=True)
class Saved:
    """A record with its list of images and how they are cut into parts."""

    record: Record
    inputs: tuple[Input, ...]
    generations: tuple[int, ...]  # images after the start and after every update; parts never straddle these
    base: int = 0  # images that part 0 holds already: the results of before an update

    def plan(self) -> list[slice]:
        """The input rows of every part."""
        spans, start = ([slice(0, self.base)] if self.base else []), self.base
        for stop in self.generations:
            length = self.record.part_length
            spans += [slice(row, min(row + length, stop)) for row in range(start, stop, length)]
            start = max(start, stop)
        return spans

    @cached_property
    def digest(self) -> str:
        """Names the list of images: SHA-256 of its text."""
        return hashlib.sha256(_lines(self.inputs)).hexdigest()


# --- on disk -------------------------------------------------------------------------------------------------


def save(root: Path, saved: Saved, suffix: str = ".tmp") -> None:
    """Write the list, then the record; the record is the commit. Raises ``OutputUnwritable``."""
    text = _lines(saved.inputs)
    write_file(root / INPUTS, text, root / f"{INPUTS}{suffix}", "inputs")
    document = {
        "schema": SCHEMA,
        "inputs": {
            "count": len(saved.inputs),
            "bytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(),
        },
        "generations": saved.generations,
        "base": saved.base,
        **asdict(saved.record),
    }
    write_file(root / RUN, json.dumps(document, indent=1).encode(), root / f"{RUN}{suffix}", "record")


def load(root: Path) -> Saved | None:
    """The run of ``root``; ``None`` where there is none. Raises ``ConfigError`` for a damaged one."""
    try:
        document = json.loads(_content(root / RUN))
        text = _content(root / INPUTS)[: document["inputs"]["bytes"]]
        if document["schema"] != SCHEMA or hashlib.sha256(text).hexdigest() != document["inputs"]["sha256"]:
            raise ValueError("its list of images is not the one recorded")
        return _parse(document, text)
    except NotADirectoryError as error:
        raise OutputUnwritable(f"{shown(root)} is not a folder: choose another output.path") from error
    except FileNotFoundError as error:
        if not (root / RUN).exists():
            return None
        raise _damaged(root, error) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise _damaged(root, error) from error


def _content(path: Path) -> bytes:
    """The bytes of a regular file; another, such as a FIFO, might never end or never answer."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is not a regular file")
    return path.read_bytes()


def _parse(document: dict[str, Any], text: bytes) -> Saved:
    inputs = tuple(Input(**json.loads(line)) for line in text.splitlines())
    refuse_nonsense(document, inputs)
    fields = {name: document[name] for name in Record.__dataclass_fields__}
    record = Record(**{**fields, "categories": tuple(document["categories"])})
    return Saved(record, inputs, tuple(document["generations"]), document["base"])


def _lines(inputs: Sequence[Input]) -> bytes:
    return b"".join(
        json.dumps(asdict(item)).encode() + b"\n" for item in inputs
    )  # ASCII: surrogates are escaped


def _damaged(root: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"the record of the run in {shown(root)} cannot be read ({shown(str(error)[:200])}); start over with --fresh"
    )


# --- comparing -----------------------------------------------------------------------------------------------


def additions(root: Path, saved: Saved, fingerprint: str, inputs: Sequence[Input]) -> list[Input]:
    """The images of ``inputs`` that the run lacks; the place of a file may differ, not its name, size, time or label.

    Raises:
        ConfigError: the config is another one; or an image of the run changed or is gone.
    """
    if saved.record.fingerprint != fingerprint:
        raise ConfigError(
            f"{shown(root)} holds a run with another config; choose a new output.path, or replace that run with --fresh"
        )
    known, given = Counter(map(_identity, saved.inputs)), Counter(map(_identity, inputs))
    if gone := known - given:
        raise ConfigError(
            f"{gone.total()} of the images of the run in {shown(root)} changed or vanished: "
            f"{_changes(sorted(gone, key=str), given - known)}; put them back, or start over with --fresh"
        )
    fresh = given - known
    return [item for item in inputs if _taken(fresh, _identity(item))]


def _changes(gone: Sequence[Identity], given: Counter[Identity]) -> str:
    """What became of the first few images that are not as they were."""
    now = {path: rest for path, *rest in given}
    told = []
    for path, size, _, label in gone[:NAMED]:
        if path not in now:
            told.append(f"{shown(path)} is not there")
            continue
        size_now, _, label_now = now[path]
        what = [f"{size} -> {size_now} bytes"] if size != size_now else []
        what += [f"label {label!r} -> {label_now!r}"] if label != label_now else []
        told.append(f"{shown(path)} {', '.join(what) or 'was written again'}")
    return "; ".join(told) + ("; ..." if len(gone) > NAMED else "")


def grown(root: Path, count: int) -> ConfigError:
    """The error to raise when ``count`` images are new and nobody said what to do."""
    return ConfigError(
        f"{count} new images since the run in {shown(root)} began: --update explains only these, --fresh starts over"
    )


def relocated(saved: Saved, inputs: Sequence[Input]) -> Saved:
    """``saved`` with every file where ``inputs`` says it is now."""
    places = {_identity(item): item.file for item in inputs}
    return replace(saved, inputs=tuple(replace(item, file=places[_identity(item)]) for item in saved.inputs))


def _identity(item: Input) -> Identity:
    return item.path, item.size, item.mtime_ns, item.label


def _taken(stock: Counter[Identity], key: Identity) -> bool:
    stock[key] -= 1
    return stock[key] >= 0


# --- parts ---------------------------------------------------------------------------------------------------


def part_path(root: Path, number: int) -> Path:
    """Where part ``number`` has its place."""
    return root / PARTS / f"{number:05d}.h5"


def part_numbers(root: Path) -> set[int]:
    """The parts that are committed."""
    folder = root / PARTS
    if not folder.is_dir():
        return set()
    return {int(match[1]) for path in folder.iterdir() if (match := _PART_NAME.fullmatch(path.name))}


def create(root: Path, record: Record, inputs: Sequence[Input]) -> Saved:
    """Begin a run in ``root``."""
    refuse_orphans(root)
    if not inputs:
        raise InputError("no image to explain")
    saved = Saved(record, tuple(inputs), (len(inputs),))
    make_folder(root)
    save(root, saved)
    return saved


def refuse_orphans(root: Path) -> None:
    """Raise ``ConfigError`` where results lie in ``root`` without the record they belong to."""
    if (root / RESULTS).exists() or part_numbers(root):
        raise ConfigError(
            f"{shown(root)} holds results but no {RUN} to go on from; choose a new output.path, or --fresh removes them"
        )
