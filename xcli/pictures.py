"""Pictures on disk: safe names that mirror the input folders, threads that encode while the device works."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from PIL import Image

from xcli.durable import unwritable, writing
from xcli.errors import OutputUnwritable

Kind = Literal["overlay", "heatmap", "panel"]

LONGEST = 200
"""Bytes kept of one component of a name; file systems allow 255, the rest is for suffixes."""

_FORBIDDEN = re.compile(r'[<>:"/\\|?*]')
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
_PICTURE = re.compile(r"\.(png(\.tmp)?)$", re.IGNORECASE)
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_MARK = re.compile(r"~[0-9a-f]{8}", re.IGNORECASE)


class Namer:
    """Picture names of a fixed set of images: safe on common file systems, never the same for two images.

    A name is the image's own path, extension included.  Added are ``~`` and 8 hexadecimal digits of the
    SHA-256 of the path's UTF-8 bytes where the path had to be changed (`safe`), where a file system that
    ignores case or Unicode form would merge it with another, and where it is another image's name and a suffix
    (``a.0`` beside ``a``).  Names depend on the set of paths, not on their order: a shard is given the whole
    list of the run, too.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        """``paths``: relative to the input root, ``/`` between components, stray bytes as surrogates."""
        every = set(paths)
        plain = {path: _plain(path) for path in every}
        folded = {path: _fold(name) for path, (name, _) in plain.items()}
        count = Counter(folded.values())
        tagged = [path for path in every if plain[path][1] or _meets(folded[path], count)]
        self._names = {path: name for path, (name, _) in plain.items()}
        self._names |= {path: _tag(self._names[path], path, 8) for path in tagged}
        again = Counter(_fold(self._names[path]) for path in tagged)
        for path in tagged:
            if again[_fold(self._names[path])] > 1:  # two paths with the same 8 digits
                self._names[path] = _tag(plain[path][0], path, 40)

    def __getitem__(self, path: str) -> str:
        """The name of one of the images: relative, ``/`` between components, without ``.png``."""
        return self._names[path]


def picture_path(root: Path, kind: Kind, method: str, name: str, target: str | None = None) -> Path:
    """``<root>/<kind>s/<method>/<name>[.<target>].png``; panels hold every method and have no method folder.

    Args:
        root: the output directory.
        kind: what the picture shows.
        method: name of the result; ignored for panels.
        name: the image's, from a `Namer`.
        target: tells the rows of one image apart; none where it has a single row.  Unsafe characters, ``~``
            and ``.`` become ``_``, and only 32 bytes are kept: give a row number or a class index.
    """
    folder = root / f"{kind}s"
    if kind != "panel":
        label, changed = safe(method)
        folder /= _tag(label, method, 8) if changed else label
    suffix = "" if target is None else "." + _cut(safe(re.sub(r"[~.]", "_", target))[0], 32)
    return folder / f"{name}{suffix}.png"


def safe(component: str) -> tuple[str, bool]:
    """One component as common file systems take it, and whether that changed it.

    Control, formatting and undecodable characters and ``< > : " / \\ | ? *`` become ``_``; trailing dots
    and spaces go; a leading ``-`` and names reserved on Windows get a leading ``_``; at most `LONGEST` bytes
    stay.
    """
    name = component
    if not name.isprintable():
        name = "".join("_" if unicodedata.category(c) in _INVISIBLE else c for c in name)
    name = _cut(_FORBIDDEN.sub("_", name), LONGEST - 1).rstrip(" .")
    if not name or name.startswith("-") or _RESERVED.fullmatch(name):
        name = "_" + name
    return name, name != component


def _plain(path: str) -> tuple[str, bool]:
    """The safe path, and whether it differs from the given one or could be taken for a tagged name."""
    *folders, file = [part for part in path.split("/") if part not in {"", "."}] or [""]
    parts = [_PICTURE.sub(r"_\1", safe(folder)[0]) for folder in folders]  # never a picture's own name
    name = "/".join([*parts, safe(file)[0]])
    return name, name != path or _MARK.search(file) is not None


def _meets(folded: str, count: Counter[str]) -> bool:
    """Whether another name is the same, or this one is another name and a suffix as `picture_path` adds."""
    folder, slash, file = folded.rpartition("/")
    dots = [position for position, character in enumerate(file) if character == "."]
    return count[folded] > 1 or any(folder + slash + file[:dot] in count for dot in dots)


def _fold(name: str) -> str:
    """Names that some file system may take for one another fold to the same text."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).upper().casefold())


def _tag(name: str, path: str, digits: int) -> str:
    folder, slash, file = name.rpartition("/")
    mark = "~" + sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:digits]
    return folder + slash + _cut(file, LONGEST - len(mark)) + mark


def _cut(text: str, size: int) -> str:
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")


Drawn = Callable[[], Image.Image | None]


class PictureWriter:
    """Encode and write PNG files in threads; each appears whole or not at all.

    Used by one producer, as a context manager: leaving the block writes what is pending, leaving it by an
    exception drops that.  Files are renamed into place but not synced: a power cut may lose the latest.
    """

    def __init__(self, workers: int = 2, pending_mib: int = 256, root: Path | None = None) -> None:
        """``workers``: threads; ``pending_mib``: raw pixels that may wait before `write` blocks, MiB; ``root``: the
        output folder, inside which no link to a folder is followed."""
        self._root = root
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="png")
        self._limit = pending_mib << 20
        self._pending: deque[tuple[Future[None], Path, int]] = deque()
        self._paths: set[Path] = set()
        self._bytes = 0
        self._folders: set[Path] = set()
        self._failure: OutputUnwritable | None = None

    def write(self, path: Path, image: Image.Image | Drawn, pixels: int = 0) -> None:
        """Queue one picture, which must not be changed any more; blocks while too many wait.

        Args:
            image: the picture, or a function that draws it in a thread (``None``: there is nothing to write).
            pixels: how many it will have, where it is still to be drawn.
        Raises:
            OutputUnwritable: an earlier picture could not be written; nothing more will be.
        """
        pixels = image.width * image.height if isinstance(image, Image.Image) else pixels
        size = pixels * 4  # Pillow keeps 4 bytes a pixel
        while self._pending and (
            self._pending[0][0].done() or self._bytes + size > self._limit or path in self._paths
        ):
            self._settle()
        self._check()
        self._pending.append((self._pool.submit(self._store, path, image), path, size))
        self._paths.add(path)
        self._bytes += size

    def remove(self, path: Path) -> None:
        """Remove what an earlier run may have left in the place of a picture that is not drawn.

        Raises:
            OutputUnwritable: it cannot be removed, or lies behind a link.
        """
        with writing(path):
            self._refuse_links(path.parent)
            path.unlink(missing_ok=True)

    def flush(self) -> None:
        """Return when every picture given so far is in place.

        Raises:
            OutputUnwritable: one of them could not be written.
        """
        while self._pending:
            self._settle()
        self._check()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _settle(self) -> None:
        """Wait for the oldest picture."""
        done, path, size = self._pending.popleft()
        self._paths.discard(path)
        self._bytes -= size
        try:
            done.result()
        except OutputUnwritable as failure:
            self._failure = failure
            self._pending.clear()  # leaving the block cancels them

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _store(self, path: Path, drawn: Image.Image | Drawn) -> None:
        image = drawn if isinstance(drawn, Image.Image) else drawn()
        if image is None:
            return
        encoded = BytesIO()
        strategy = zlib.Z_DEFAULT_STRATEGY if image.mode == "P" else zlib.Z_RLE  # the better one for each
        image.save(encoded, format="PNG", compress_level=1, compress_type=strategy)
        try:
            if path.parent not in self._folders:
                self._refuse_links(path.parent)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._folders.add(path.parent)
            _replace(path, encoded.getbuffer())
        except OSError as error:
            raise unwritable(path, error, needed=encoded.tell()) from error

    def _refuse_links(self, folder: Path) -> None:
        while self._root is not None and folder != self._root and folder != folder.parent:
            if folder.is_symlink():
                raise OutputUnwritable(
                    f"{str(folder)!r} is a link, and nothing is written through a link inside an output folder; remove "
                    "it, or make the whole output folder a link"
                )
            folder = folder.parent


def _replace(path: Path, content: memoryview) -> None:
    """Put the content in place by a rename; a killed run's leftover has the same name and is overwritten."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.unlink(missing_ok=True)  # it may be a link, or a FIFO
        with beside.open("xb") as file:
            file.write(content)
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise
