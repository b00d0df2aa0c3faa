"""Which images are being decoded, noted where a crash of the process leaves it; the next run tries these apart.

A decoder that crashes takes the whole run with it, and would do so every night. Each thread notes the image that it is
about to decode in ``locks/<name>.reading``, and takes it back after. What a dead run has left there is decoded in a
process of its own: an image on which that one crashes has failed, now and whenever the run goes on. What may have come
from elsewhere, a SIGKILL (the system was short of memory) or too long a time (a slow disk), must happen twice.

Anybody may have put something into ``locks``: only small regular files are read, and only what can be a note counts.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

import xcli
from xcli.contents import BadImage
from xcli.decode import Colour
from xcli.durable import failpoint, is_held, new_file, read_note, shown, write_file, writing
from xcli.images import Source, load
from xcli.preprocess import Preprocess

LOG = logging.getLogger(__name__)
LIMIT = 60
"""Seconds that one image may take when it is tried."""
CRASHES = {
    getattr(signal, f"SIG{name}") for name in ("SEGV", "BUS", "ABRT", "FPE", "ILL", "KILL", "SYS", "TRAP")
}
NUMBER = 8
"""Bytes of a row."""
ROW = re.compile("[0-9]{1,18}")


class Trial(NamedTuple):
    """How the decoding of some images in a process of its own went."""

    begun: list[int]
    """The rows that it came to; the last one may have ended it."""
    reason: str = ""
    """Of a crash, what is said of that row."""
    sure: bool = True
    """Whether only that row can be the reason."""


class Note(NamedTuple):
    """What a file of notes said, and which file it was."""

    rows: list[int]
    identity: tuple[int, int, int]


class Decoding(NamedTuple):
    """How the images of a run are decoded."""

    preprocess: Preprocess
    background: Colour
    max_pixels: int
    draft: bool


@dataclass
class Breadcrumbs:
    """What ``images.stream`` notes, and what it leaves out: the reason by row."""

    refused: Mapping[int, str]
    sources: Sequence[Source]
    descriptor: int
    free: deque[int] = field(default_factory=deque)
    slots: Iterator[int] = field(default_factory=count)

    @contextmanager
    def reading(self, row: int) -> Iterator[None]:
        """Around the decoding of a row; in any thread."""
        try:
            slot = self.free.pop()
        except IndexError:
            slot = next(self.slots)
        self.note(slot, row + 1)
        failpoint(f"decode-{self.sources[row].path}")
        try:
            yield
        finally:
            self.note(slot, 0)
            self.free.append(slot)

    def note(self, slot: int, number: int) -> None:
        """Plain writing: what is in the kernel's cache outlives this process; a note that has no room is not made."""
        with suppress(OSError):
            os.pwrite(self.descriptor, number.to_bytes(NUMBER, "little"), slot * NUMBER)


@contextmanager
def breadcrumbs(
    locks: Path, name: str, sources: Sequence[Source], decoding: Decoding
) -> Iterator[Breadcrumbs]:
    """Notes of the holder of the lock ``name`` in ``locks``, after those that the dead have left were looked into.

    Raises:
        OutputUnwritable: ``locks`` cannot be written.
    """
    dead = [
        path
        for path in sorted(locks.glob("*.reading"))
        if path.stem == name or not is_held(path.with_suffix(".lock"))
    ]
    refused = {int(row): why for path in sorted(locks.glob("*.crashes")) for row, why in stored(path).items()}
    notes = {path: note for path in dead if (note := noted(path)) is not None}
    left = {row for note in notes.values() for row in note.rows} - set(refused)
    suspects = {row: sources[row] for row in sorted(left) if row < len(sources)}
    if suspects:
        LOG.info("a run before this one died while it read %d images: trying these apart", len(suspects))
        if found := crashing(suspects, decoding):
            refused |= found
            own = locks / f"{name}.crashes"
            write_file(own, json.dumps(refused).encode(), own.with_suffix(".crashes.tmp"), "crashes")
    for path, note in notes.items():
        failpoint("remove-reading")
        if path.stem == name or not is_held(path.with_suffix(".lock")):  # its owner may be back by now
            drop(path, note)
    path = locks / f"{name}.reading"
    with writing(path):
        descriptor = new_file(path)
    try:
        yield Breadcrumbs(refused, sources, descriptor)
    finally:
        os.close(descriptor)
        with suppress(OSError):
            path.unlink()


def noted(path: Path) -> Note | None:
    """The rows in a file of notes; nothing where it cannot be read."""
    try:
        data, found = read_note(path)
    except OSError as error:
        LOG.warning("%s is ignored: %s", shown(path), error.strerror)
        return None
    numbers = (int.from_bytes(data[at : at + NUMBER], "little") for at in range(0, len(data), NUMBER))
    return Note([number - 1 for number in numbers if number], identity(found))


def identity(found: os.stat_result) -> tuple[int, int, int]:
    """Which file it is, and which state of it: a new file may get the number of one that was just removed."""
    return found.st_dev, found.st_ino, found.st_mtime_ns


def drop(path: Path, note: Note) -> None:
    """Remove a file of notes that were looked into; not one that has taken its place."""
    try:
        if identity(path.lstat()) == note.identity:
            path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        LOG.warning("%s stays: %s", shown(path), error.strerror)


def stored(path: Path) -> dict[str, str]:
    """The verdicts in a file, as far as they can be some; none where it cannot be read."""
    try:
        found = json.loads(read_note(path)[0])
    except (OSError, ValueError, RecursionError) as error:
        LOG.warning("%s is ignored: %s", shown(path), shown(str(error)))
        return {}
    pairs = found.items() if isinstance(found, dict) else ()
    return {row: why for row, why in pairs if ROW.fullmatch(row) and isinstance(why, str)}


def forget(locks: Path) -> None:
    """Remove all notes and verdicts: rows are those of another list from now on."""
    for path in [path for kind in ("reading", "crashes", "crashes.tmp") for path in locks.glob(f"*.{kind}")]:
        if path.is_dir() and not path.is_symlink():
            continue  # no note
        with writing(path):
            path.unlink(missing_ok=True)


# --- in a process of its own ---------------------------------------------------------------------------------


def crashing(suspects: Mapping[int, Source], decoding: Decoding) -> dict[int, str]:
    """Those on which the decoder crashes or does not end, and which of the two.

    Where the process ends in another way, the image that it was at is left to the run, and so are all where it does
    not begin: the run notes them again.
    """
    left, found = dict(suspects), dict[int, str]()
    while left:
        begun, reason, sure = tried(left, decoding)
        if not begun:
            LOG.warning("the images could not be tried apart; the run reads them")
            break
        last = begun[-1]
        if reason and not sure:
            LOG.debug("%s once more: %s", shown(left[last].path), reason)
            again = tried({last: left[last]}, decoding)
            reason = again.reason if again.begun else ""
        if reason:
            found[last] = reason
            LOG.warning("%s is left out: %s", shown(left[last].path), reason)
        for row in begun:
            del left[row]
    return found


def tried(suspects: Mapping[int, Source], decoding: Decoding) -> Trial:
    """Decode them one after the other."""
    paths = [str(Path(xcli.__path__[0]).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        ended = subprocess.run(
            [
                sys.executable,
                "-P",
                "-m",
                "xcli.breadcrumbs",
            ],  # -P: nothing is imported from the current directory
            input=pickle.dumps((dict(suspects), decoding)),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=LIMIT * len(suspects),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # a signal from the keyboard is for us, and no crash
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        begun = [int(line) for line in (late.stdout or b"").split()]
        return Trial(begun, f"the decoder does not end on it ({LIMIT} s)", sure=False)
    begun = [int(line) for line in ended.stdout.split()]
    if -ended.returncode in CRASHES:
        by = signal.Signals(-ended.returncode)
        return Trial(begun, f"the decoder crashes on it ({by.name})", sure=by != signal.SIGKILL)
    return Trial(begun)


def main() -> None:
    """The process of its own: each row is told before it is decoded."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    suspects, decoding = pickle.load(sys.stdin.buffer)
    for row, source in suspects.items():
        print(row, flush=True)
        failpoint(f"decode-{source.path}")
        with suppress(BadImage):
            load(source, *decoding)


if __name__ == "__main__":
    main()
