"""A file whose space is reserved before it is written, for writers that do not survive a full disk."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from xcli.durable import failpoint, new_file, write_all

_UNSUPPORTED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}


class Allocated(io.RawIOBase):
    """The new file ``path`` with ``size`` bytes reserved, for ``h5py.File(allocated, "w")``.

    Raises ``OSError`` from the constructor where the space cannot be had. A write that fails nevertheless is kept in
    ``error`` and it and later ones are dropped, for an exception inside HDF5 leaves it in pieces; ``check`` and
    ``finish``, which cuts the file at its real end and syncs it, raise it.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.error: OSError | None = None
        self._position = self._end = self._reserved = 0
        self._descriptor = new_file(path)
        try:
            self._reserve(size)
        except OSError:
            self.close()
            raise

    def _reserve(self, size: int) -> None:
        """Have at least ``size`` bytes on disk; file systems that cannot promise them fail at the write instead."""
        if size > self._reserved and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._descriptor, 0, size)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        self._reserved = max(size, self._reserved)

    def write(self, data: Any) -> int:
        """Write at the position, or remember why not."""
        view = memoryview(data).cast("B")
        end = self._position + len(view)
        if self.error is None:
            try:
                self._reserve(end)
                write_all(self._descriptor, view, self._position)
            except OSError as error:
                self.error = error
        self._position, self._end = end, max(self._end, end)
        failpoint("hdf5")
        return len(view)

    def check(self) -> None:
        """Raise the error of the first write that failed, if one did."""
        if self.error is not None:
            raise self.error

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` from the position; zeros where nothing was written."""
        data = os.pread(self._descriptor, len(buffer), self._position).ljust(len(buffer), b"\0")
        buffer[:] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position; the end is that of the bytes written, not of the space."""
        self._position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._end}[whence]
        )
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def truncate(self, size: int | None = None) -> int:
        """Set the end; the space stays until ``finish``."""
        self._end = self._position if size is None else size
        return self._end

    def finish(self) -> None:
        """Give back what was not used and put the file on disk."""
        self.check()
        os.ftruncate(self._descriptor, self._end)
        failpoint("merge-truncated")
        os.fsync(self._descriptor)

    def readable(self) -> bool:
        """True."""
        return True

    def writable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Close the descriptor."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def __enter__(self) -> Self:
        """The file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()
