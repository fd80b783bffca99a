"""Saying that a file of the cache is in use."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path


def hold(fd: int) -> None:
    """Says that what `fd` is open on is in use, until `fd` is closed: :mod:`vmette.images.prune` leaves it alone."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(fd, fcntl.LOCK_SH)  # which has it exclusively for a moment only


def held(path: str | os.PathLike[str], flags: int = 0) -> int:
    """A descriptor of the file or directory at `path`, opened with more `flags`: it is in use until that is closed.

    Raises:
        OSError: it cannot be opened, or has just been removed.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    try:
        hold(fd)
        if not os.path.samestat(os.fstat(fd), Path(path).stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
    except BaseException:
        os.close(fd)
        raise
    return fd
