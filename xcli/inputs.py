"""Which images a run explains: folders, files, globs, lists and manifests become one sorted list."""

from __future__ import annotations

import csv
import difflib
import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from xcli import visible
from xcli.contents import Stamp
from xcli.errors import InputError

Labels = Literal["none", "folder", "manifest"]
SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"])
_RUN = {"run.json", "inputs.jsonl"}
_PATH_COLUMNS = ("path", "file", "filename", "image")


@dataclass(frozen=True, slots=True)
class Source:
    """One image of the run's list.

    Args:
        path: shown and stored: relative to its input, never absolute, never with "..", unique; raw bytes that are not
            UTF-8 are kept as surrogates (``os.fsencode`` gives them back).
        file: how to open it.
        size: in bytes, 0 where the file is missing; ``mtime_ns``: its time of change.
        label: the name of its class, if labels were asked for and it has one.
    """

    path: str
    file: str
    size: int
    mtime_ns: int
    label: str | None

    @property
    def stamp(self) -> Stamp:
        """What the file must still be when it is read."""
        return Stamp(self.size, self.mtime_ns)


class _Found(NamedTuple):
    """A file as an input names it: ``shown`` below that input; ``label`` as the manifest gives it."""

    shown: str
    file: str
    label: str | None
    status: os.stat_result | None


class _Input(NamedTuple):
    name: str  # prefixes the shown paths where there are several inputs
    found: Iterable[_Found]
    labelled: bool = False  # a manifest with a column of labels


def find_images(
    paths: Sequence[str], *, labels: Labels = "none", stdin: TextIO | None = None, limit: int | None = None
) -> list[Source]:
    """The list of images that some inputs name, without opening one.

    Args:
        paths: folders (recursive; hidden entries and the results of runs skipped, links to folders not followed; what
            is named like an image and is none, such as a FIFO or a dangling link, is listed and fails later),
            files of any suffix, globs (``**`` is any depth), .txt (a path a line; empty lines and lines with #
            skipped), .csv or .tsv manifests (path and perhaps label, with or without a header), or "-": a path a line
            on standard input. Listed paths are relative to the current directory, else to the manifest; a missing one
            is listed and fails later.
        labels: "folder": the name of the directory that holds the image; "manifest": its label column.
        stdin: read for "-"; None: standard input.
        limit: keep that many, after sorting.
    Returns: sorted by the raw bytes of the shown path; a file named twice is listed once.
    Raises:
        InputError: a path does not exist or cannot be read, no image was found, or labels are missing or disagree.
    """
    found: dict[str, tuple[str, _Found]] = {}  # by absolute path: (prefix, file)
    names: set[str] = set()
    here = str(Path.cwd())
    for path in paths:
        try:
            given = _input(path, stdin or sys.stdin, alone=len(paths) == 1)
            if labels == "manifest" and not given.labelled:
                raise InputError(
                    f"{visible.shown(path)}: labels: manifest needs a .csv with columns path and label"
                )
            prefix = _unused(given.name, names) + "/" if given.name and len(paths) > 1 else ""
            for one in given.found:
                _add(
                    found,
                    os.path.normpath(one.file if one.file[:1] == "/" else f"{here}/{one.file}"),
                    prefix,
                    one,
                    labels,
                )
        except OSError as error:
            raise InputError(f"{visible.shown(path)}: cannot be read: {error.strerror or error}") from error
    if not found:
        searched, suffixes = ", ".join(map(repr, paths)) or "an empty list", " ".join(sorted(SUFFIXES))
        raise InputError(f"no image found in {searched}; in folders and globs these count: {suffixes}")
    return _named(found.values(), labels)[:limit]


def _add(found: dict[str, tuple[str, _Found]], key: str, prefix: str, one: _Found, labels: Labels) -> None:
    _, known = found.setdefault(key, (prefix, one))
    if labels == "manifest" and known.label != one.label:
        raise InputError(f"{one.file!r} has two labels: {known.label!r} and {one.label!r}")


def _named(found: Iterable[tuple[str, _Found]], labels: Labels) -> list[Source]:
    """Sources with safe and unique shown paths, in the order of their bytes."""
    safe = [(prefix + _safe(one.shown), one) for prefix, one in found]
    safe.sort(key=lambda pair: os.fsencode(pair[0]))
    taken, sources, last = {shown for shown, _ in safe}, [], None
    for shown, one in safe:
        path, last = _unused(shown, taken) if shown == last else shown, shown
        label = _folder_name(one.file) if labels == "folder" else one.label if labels == "manifest" else None
        size, changed = (one.status.st_size, one.status.st_mtime_ns) if one.status else (0, 0)
        sources.append(Source(path, one.file, size, changed, label))
    return sorted(sources, key=lambda source: os.fsencode(source.path))


def _safe(path: str) -> str:
    """The path without a root and without steps upwards; what is left cannot leave a directory."""
    return "/".join(part for part in path.split("/") if part not in ("", ".", "..")) or "unnamed"


def _unused(name: str, taken: set[str]) -> str:
    """``name``, else ``stem~2.suffix`` and so on; the result joins ``taken``."""
    here = Path(name)
    free, count = name, 1
    while free in taken:
        count += 1
        free = str(here.with_name(f"{here.stem}~{count}{here.suffix}"))
    taken.add(free)
    return free


def _folder_name(file: str) -> str | None:
    folder = file.rpartition("/")[0].rpartition("/")[2]
    return folder if folder not in ("", ".", "..") else Path(file).parent.resolve().name or None


def _input(path: str, stdin: TextIO, *, alone: bool) -> _Input:
    """What one entry of the list of inputs stands for."""
    if not path:
        raise InputError("an input path is empty")
    if path == "-":
        buffer = getattr(stdin, "buffer", None)  # bytes keep names that are not UTF-8
        return _Input(
            "stdin", _listed(_lines("standard input", buffer.read() if buffer else stdin.read()), None)
        )
    here = Path(path)
    if here.is_dir():
        name = Path(os.path.normpath(Path.cwd() / here)).name
        return _Input(name, (_Found(shown, e.path, None, _status(e)) for shown, e in _walk(path)))
    if here.is_file():
        if here.suffix.lower() in (".csv", ".tsv"):
            rows, labelled = _table(here)
            return _Input(here.stem, _listed(rows, here.parent), labelled)
        if here.suffix.lower() == ".txt":
            return _Input(here.stem, _listed(_lines(path, here.read_bytes()), here.parent))
        return _Input("", [_Found(here.name if alone else path, path, None, here.stat())])
    if here.exists():
        raise InputError(f"{visible.shown(path)}: neither a file nor a folder")
    if has_magic(path):
        return _glob(path)
    raise InputError(_absent(here))


def _walk(root: str, depth: int | None = None) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """What is named like an image below a folder, with its relative path; nothing hidden, no run's output.

    That may be a file, or what cannot be read as one: a FIFO, a device, a link that leads nowhere or to a folder. A
    folder is walked whatever its name, and listed only where it is named like an image and holds nothing.
    """
    waiting: list[tuple[str, str, os.DirEntry[str] | None]] = [(root, "", None)]
    while waiting:
        folder, shown, itself = waiting.pop()
        with os.scandir(folder) as found:
            entries = list(found)
        if {entry.name for entry in entries} >= _RUN:  # an output directory: its overlays are no input
            continue
        empty = True
        for entry in entries:
            if entry.name.startswith("."):
                continue
            here, image = f"{shown}{entry.name}", _suffix(entry.name) in SUFFIXES
            if entry.is_dir(follow_symlinks=False):
                empty = False
                if image or depth is None or here.count("/") + 1 < depth:
                    waiting.append((entry.path, f"{here}/", entry))
            elif image:
                empty = False
                yield here, entry
        if empty and itself is not None and _suffix(itself.name) in SUFFIXES:
            yield shown.removesuffix("/"), itself


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Of what a link leads to; None where that is nothing, or the entry has vanished."""
    try:
        return entry.stat()
    except OSError:
        return None


def _glob(pattern: str) -> _Input:
    """Images that match, below the longest part of the pattern that is plain."""
    parts = pattern.split("/")
    start = next(i for i, part in enumerate(parts) if has_magic(part))
    root, wanted = "/".join(parts[:start]) or ("/" if start else "."), parts[start:]
    if not Path(root).is_dir():
        raise InputError(_absent(Path(root)))
    tree = _walk(root, None if "**" in wanted else len(wanted))
    matches = (
        _Found(shown, e.path, None, _status(e)) for shown, e in tree if _matches(shown.split("/"), wanted)
    )
    return _Input(Path(os.path.normpath(Path.cwd() / root)).name, matches)


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return _matches(names, patterns[1:]) or (bool(names) and _matches(names[1:], patterns))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:])


def _absent(path: Path) -> str:
    """The message for a path that does not exist, with what it may have meant."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    close = difflib.get_close_matches(missing.name, [entry.name for entry in missing.parent.iterdir()])
    hint = (
        f"; did you mean {' or '.join(repr(str(missing.parent / name)) for name in close)}?" if close else ""
    )
    return f"{str(path)!r} does not exist{hint}"


def _lines(name: str, data: bytes | str) -> list[tuple[str, str | None]]:
    lines = (line.rstrip("\r") for line in _text(name, data).split("\n"))
    return [(line, None) for line in lines if line.strip() and not line.startswith("#")]


def _text(name: str, data: bytes | str) -> str:
    text = data if isinstance(data, str) else os.fsdecode(data.removeprefix(b"\xef\xbb\xbf"))
    if "\0" in text:
        raise InputError(f"{name}: holds zero bytes, so it is no list of paths; save it as UTF-8 text")
    return text


def _table(manifest: Path) -> tuple[list[tuple[str, str | None]], bool]:
    """(path, label) of each row, and whether there is a label column; separated by comma, semicolon or tab."""
    text = _text(str(manifest), manifest.read_bytes())
    first = text.lstrip().partition("\n")[0]
    separator = max(",;\t", key=first.count)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) if any(row)]
    except csv.Error as error:
        raise InputError(f"{visible.shown(manifest)}: not a readable table: {error}") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    path, label = 0, 1 if len(header) > 1 else None
    column = next((name for name in _PATH_COLUMNS if name in header), None)
    if column:
        path, label = header.index(column), header.index("label") if "label" in header else None
        rows = rows[1:]
    for row in rows:
        if len(row) <= max(path, label or 0) or not row[path]:
            raise InputError(
                f"{visible.shown(manifest)}: a row lacks a path or a column: {separator.join(row)!r}"
            )
    return [
        (row[path], None if label is None else row[label].strip() or None) for row in rows
    ], label is not None


def _listed(rows: Iterable[tuple[str, str | None]], folder: Path | None) -> Iterator[_Found]:
    """Files by name: from the current directory, else from the manifest's ``folder``, else missing."""
    for path, label in rows:
        for file in [path] if folder is None else [path, str(folder / path)]:
            try:
                status = Path(file).stat()
            except OSError:
                continue
            yield _Found(path, file, label, status)
            break
        else:
            yield _Found(path, path, label, None)
