"""Which annotation belongs to which image, and which class a name means."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import cache
from pathlib import Path

from xcli.errors import ConfigError
from xcli.inputs import Source
from xcli.targets import label_classes


def files_below(folder: str, suffix: str) -> dict[str, str]:
    """Files with that suffix (any case) in a folder and below: path in the folder without suffix -> file."""
    found = {}
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(here, folder)
        for name in names:
            if name.lower().endswith(suffix) and not name.startswith("."):
                key = name[: -len(suffix)] if below == "." else f"{below}/{name[: -len(suffix)]}"
                found[key] = str(Path(here) / name)
    return found


def stem(path: str) -> str:
    """A shown path without its suffix."""
    return str(Path(path).with_suffix(""))


def matched(
    sources: Sequence[Source], names: Iterable[str], key: Callable[[str], str], *, basenames: bool = False
) -> dict[str, str]:
    """The annotation of each image that has one: path of the image -> name of the annotation.

    The paths are the same, or one is the end of the other (the input folder may lie above or below that of the
    annotations) and this fits one alone.

    Args:
        names: relative paths of the annotations.
        key: what is compared of an image's path.
        basenames: where nothing fits, the file's name alone is enough if no other image or annotation has it.
    Raises:
        ConfigError: two images fit one annotation, unless by their whole path.
    """
    known = {_plain(name): name for name in names}
    tails: dict[str, str | None] = {}  # every end of a name -> the name, None where several end so
    for plain, original in known.items():
        for tail in _tails(plain):
            tails[tail] = None if tail in tails else original
    paths = {source.path: key(source.path) for source in sources}
    times = Counter(_base(path) for path in paths.values())
    found: dict[str, str] = {}
    for shown, path in paths.items():
        name = next((known[tail] for tail in _tails(path) if tail in known), None) or tails.get(path)
        if name is None and basenames and times[_base(path)] == 1:
            name = tails.get(_base(path))
        if name is not None:
            found[shown] = name
    return _of_one_image(found, {shown for shown, name in found.items() if _plain(name) == paths[shown]})


def _of_one_image(found: Mapping[str, str], exact: Set[str]) -> dict[str, str]:
    """Annotations that an image has by its whole path are taken from the others; no two others share one."""
    taken = {found[shown] for shown in exact}
    owner: dict[str, str] = {}
    for shown, name in found.items():
        if name not in taken and (other := owner.setdefault(name, shown)) != shown:
            raise ConfigError(
                f"the annotation {name!r} fits both images {other!r} and {shown!r};"
                " keep annotations in the same folders as their images"
            )
    return {shown: name for shown, name in found.items() if shown in exact or name not in taken}


def _plain(name: str) -> str:
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _tails(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def class_index(categories: Sequence[str]) -> Callable[[str], int | None]:
    """The class that a name means, by the rule for labels (``targets.label_classes``); ``None``: no class."""

    @cache
    def index(name: str) -> int | None:
        return label_classes([name], categories, len(categories), folders=False).get(name)

    return index


def require_classes(what: str, names: Iterable[str], categories: Sequence[str]) -> None:
    """See that one of the names, asked for until then, is a class.

    Raises:
        ConfigError: none is; with some of both.
    """
    index, seen = class_index(categories), dict[str, None]()
    for name in names:
        if index(name) is not None:
            return
        seen[name] = None
    some = ", ".join(map(repr, list(seen)[:3])) + (", ..." if len(seen) > 3 else "")
    model = (
        f"the model's are {', '.join(map(repr, categories[:3]))}, ..."
        if categories
        else "the model has no names"
    )
    raise ConfigError(
        f"{what}: no annotated class ({some or 'there is none'}) is a category of the model; {model}."
        " Name the model's categories as the annotations do, or set values: object"
    )


def require_matches(
    what: str, found: Mapping[str, object], sources: Sequence[Source], names: Iterable[str]
) -> None:
    """See that an image has an annotation.

    Raises:
        ConfigError: none has; with an example of both.
    """
    if found or not sources:
        return
    name = next(iter(names), None)
    text = f"it has {name!r}, for example" if name is not None else "it names no image"
    raise ConfigError(f"{what}: holds no annotation of any image, such as {sources[0].path!r}; {text}")
