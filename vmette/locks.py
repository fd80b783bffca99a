"""Saying that a file of the cache is in use."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress


def hold(fd: int) -> None:
    """Says that what `fd` is open on is in use, until `fd` is closed: :mod:`vmette.images.prune` leaves it alone."""
    with suppress(OSError):  # a file system without locks, or a file that is not of our cache
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def held(path: str | os.PathLike[str]) -> int:
    """A descriptor of the file or directory at `path`, which is in use until it is closed.

    Raises:
        OSError: it cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    hold(fd)
    return fd
