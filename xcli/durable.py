"""Writing that survives kills and full disks: under its final name a file is absent, old or complete.

Only plain I/O is used. A failed write removes what it began and becomes ``OutputUnwritable``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from xcli.errors import OutputLocked, OutputUnwritable
from xcli.visible import shown as shown

_passes: Counter[str] = Counter()
NOTE = 1 << 16
"""Most bytes that are read of a small file."""


def failpoint(name: str) -> None:
    """Die by SIGKILL at the n-th pass if ``XCLI_FAILPOINT=pattern:n`` is set; the (shell) pattern chooses the names."""
    wanted = os.environ.get("XCLI_FAILPOINT")
    if not wanted:
        return
    pattern, _, count = wanted.rpartition(":")
    if fnmatchcase(name, pattern):
        _passes[pattern] += 1
        if _passes[pattern] == int(count):
            os.kill(os.getpid(), signal.SIGKILL)


# --- errors --------------------------------------------------------------------------------------------------


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_IN_THE_WAY = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def unwritable(path: Path, error: OSError, needed: int = 0) -> OutputUnwritable:
    """The error to raise for ``error`` at ``path``: what failed and what to do; ``needed`` in bytes, if known."""
    if error.errno in _FULL:
        room = (
            f"free at least {max(1, -(-needed // 1_000_000))} MB there" if needed else "free some space there"
        )
        remedy = f"{room} (or raise the quota), then run the same command to go on; finished parts are kept"
    elif error.errno in _FORBIDDEN:
        remedy = "make it writable or choose another output.path"
    elif error.errno == errno.ELOOP:
        remedy = "nothing is written through a link inside an output folder: remove it"
    elif error.errno in _IN_THE_WAY:
        remedy = (
            "a file is where a folder should be (or the reverse): move it away or choose another output.path"
        )
    elif error.errno in _NO_LOCKS and path.suffix == ".lock":
        remedy = "this file system has no locks, without which two runs could mix: choose another output.path"
    else:
        remedy = "check the disk, then run the same command to go on"
    return OutputUnwritable(f"cannot write {shown(path)}: {error.strerror or error}; {remedy}")


@contextmanager
def writing(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn an ``OSError`` of the block into ``OutputUnwritable`` for ``path``."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error, needed) from error


# --- files ---------------------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """Create ``path`` and its parents; their names are on disk on return."""
    with writing(path):
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent)


def refuse_links(root: Path, names: Iterable[str]) -> None:
    """Raise ``OutputUnwritable`` where something of these names in ``root`` is a link: somebody else may have put it
    there, and what is written through it, or removed, lies elsewhere. ``root`` itself may be one."""
    for name in names:
        if (path := root / name).is_symlink():
            raise linked(path)


def linked(path: Path) -> OutputUnwritable:
    """The error to raise for the link ``path`` inside an output folder."""
    return OutputUnwritable(
        f"{shown(path)} is a link, and nothing is written through a link inside an output folder; remove it, or make "
        "the whole output folder a link"
    )


def sync_folder(path: Path) -> None:
    """Put the names in ``path`` on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write every byte of ``data`` at ``offset``, however short the single writes are."""
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def read_note(path: Path) -> tuple[bytes, os.stat_result]:
    """What a small file holds, its first `NOTE` bytes, and which file it is.

    Raises:
        OSError: it cannot be read, or is a link or anything but a regular file, which might never end or answer.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return os.pread(descriptor, NOTE, 0), found
    finally:
        os.close(descriptor)


def new_file(path: Path) -> int:
    """A descriptor of the new file ``path``; what had its name before, be it a link or a FIFO, is gone."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def write_file(path: Path, data: bytes | memoryview, tmp: Path, point: str) -> None:
    """Replace ``path`` by ``data`` in one step: written to ``tmp`` beside it, synced, renamed.

    ``point`` is the prefix of the fail-points passed. Raises ``OutputUnwritable``; ``path`` is then as before.
    """
    view = memoryview(data)
    half = len(view) // 2
    failpoint(f"{point}-start")
    with writing(path, needed=len(view)), removed_on_error(tmp):
        descriptor = new_file(tmp)
        try:
            write_all(descriptor, view[:half], 0)
            failpoint(f"{point}-half")
            write_all(descriptor, view[half:], half)
            failpoint(f"{point}-written")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        publish(tmp, path, point)


def publish(tmp: Path, path: Path, point: str) -> None:
    """Give the synced file ``tmp`` its final name; this is the commit."""
    failpoint(f"{point}-synced")
    tmp.replace(path)
    failpoint(f"{point}-renamed")
    sync_folder(path.parent)
    failpoint(f"{point}-done")


@contextmanager
def removed_on_error(tmp: Path) -> Iterator[None]:
    """Remove ``tmp`` when the block fails, whatever the reason."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise


# --- locks ---------------------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, wait: float | None = 0.0) -> Iterator[None]:
    """Hold the exclusive ``flock`` of the file ``path``; the kernel frees it when the process dies.

    Args:
        wait: seconds to try for; ``None`` waits without end.
    Raises:
        OutputLocked: it is held elsewhere; names process, host and start time of the holder.
        OutputUnwritable: the lock file cannot be made, or the file system has no locks.
    """
    make_folder(path.parent)
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        with writing(path):
            _acquire(descriptor, path, wait)
            _sign(descriptor)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also frees the copy a forked worker may still hold
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, wait: float | None) -> None:
    if wait is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise held_by_another(path) from None
        time.sleep(0.05)


def _sign(descriptor: int) -> None:
    """Write who holds the lock, for the message the next one gets."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    os.ftruncate(descriptor, 0)
    write_all(descriptor, json.dumps(holder).encode(), 0)


def is_held(path: Path) -> bool:
    """Whether some process holds the lock ``path``."""
    with writing(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def held_by_another(path: Path) -> OutputLocked:
    """The error to raise for the held lock ``path``."""
    try:
        holder = json.loads(read_note(path)[0])
        who = shown(f"process {holder['pid']} on {holder['host']}, started {holder['started']}")
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    folder = shown(path.parent.parent)
    return OutputLocked(
        f"{folder} is in use by {who} (lock {path.name}); wait for it or choose another output.path"
    )
