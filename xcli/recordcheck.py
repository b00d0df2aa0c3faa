"""Whether what run.json and inputs.jsonl say can be true, asked before anything is done with it.

The files may come from anybody: a part length of 0, parts without end or an image with a path that leaves the folder
would else show far from here, or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xcli.inputs import Source

_BITS = 2**63
_SIDE, _BATCH = 1 << 16, 1 << 20
_ATTRS = 1 << 20


def refuse_nonsense(document: Mapping[str, Any], inputs: Sequence[Source]) -> None:
    """Raise ``ValueError`` naming what cannot be true in the record of a run and its list of images."""
    attrs, resolved = document["attrs"], document["resolved"]
    said = {
        "fingerprint": is_text(document["fingerprint"]),
        "config": is_text(document["config"]),
        "created": is_text(document["created"]),
        "categories": is_list(document["categories"]) and all(map(is_text, document["categories"])),
        "part_length": is_whole(document["part_length"], 1),
        "generations": is_rising(document["generations"], len(inputs)),
        "base": is_whole(document["base"], 0, len(inputs)),
        "attrs": is_table(attrs) and all(key and is_plain(value) for key, value in attrs.items()),
        "resolved": is_table(resolved),
    }
    if said["attrs"]:
        said["attrs.versions"] = is_table_of_text(attrs.get("versions", "{}"))
    if said["resolved"]:
        said |= {f"resolved.{key}": right for key, right in choices(resolved).items()}
    wrong = [key for key, right in said.items() if not right]
    if wrong:
        raise ValueError(f"what it says of {', '.join(wrong)} cannot be")
    for number, item in enumerate(inputs, 1):
        if not is_image(item):
            raise ValueError(f"line {number} of its list of images names no file below its input")


def choices(resolved: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each choice of a run that is written down could have been made."""
    rules: dict[str, Callable[[Any], bool]] = {
        "size": lambda value: (
            is_list(value) and len(value) == 2 and all(is_whole(v, 1, _SIDE) for v in value)
        ),
        "batch_size": lambda value: is_whole(value, 1, _BATCH),
        "folded": lambda value: is_whole(value, 0),
        "channels_last": lambda value: isinstance(value, bool),
        "layers": lambda value: (
            is_table(value) and all(is_list(v) and all(map(is_text, v)) for v in value.values())
        ),
        "shapes": lambda value: is_table(value) and all(is_shape(v) for v in value.values()),
        "preprocess": is_table,
        "files": is_table,
        "pictures": lambda value: is_table(value) and all(map(is_text, value.values())),
        "steps": lambda value: is_table(value) and all(is_list(v) for v in value.values()),
        "compression": lambda value: value in ("gzip", "lzf", "none"),
        "layout": lambda value: value in ("merged", "parts"),
    }
    return {key: rule(resolved[key]) for key, rule in rules.items() if key in resolved}


def is_image(item: Source) -> bool:
    """Whether an entry of the list is one that ``find_images`` makes: what is shown stays below its input."""
    if not (is_text(item.path) and is_text(item.file) and is_text(item.label or "")):
        return False
    steps = item.path.split("/")
    inside = not any(step in ("", ".", "..") for step in steps)
    return inside and is_whole(item.size, 0) and is_whole(item.mtime_ns, -_BITS)


def is_shape(value: object) -> bool:
    """The shape of a map: (H, W) or (C, H, W)."""
    return (
        isinstance(value, list) and len(value) in (2, 3) and all(is_whole(side, 1, _SIDE) for side in value)
    )


def is_rising(value: object, last: int) -> bool:
    """Numbers of images that grow, up to those that there are."""
    if not isinstance(value, list) or not value or not all(is_whole(number, 0) for number in value):
        return False
    return value == sorted(value) and value[-1] == last


def is_whole(value: object, least: int, most: int = _BITS - 1) -> bool:
    """A whole number within bounds; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_plain(value: object) -> bool:
    """What an attribute of results.h5 can hold."""
    short = not isinstance(value, str) or len(value) <= _ATTRS
    return short and (is_text(value) or is_whole(value, -_BITS) or isinstance(value, bool | float))


def is_text(value: object) -> bool:
    """Text that can name a file: surrogates stand for bytes, and nothing ends it early."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def is_list(value: object) -> bool:
    """A list."""
    return isinstance(value, list)


def is_table_of_text(text: object) -> bool:
    """JSON that holds texts by key."""
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and all(map(is_text, found.values()))


def is_table(value: object) -> bool:
    """Values by key."""
    return isinstance(value, dict)
