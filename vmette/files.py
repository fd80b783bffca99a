"""Files that others read while they are written, and files that others may have made."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


class NotRegularError(OSError):
    """What is there is no regular file."""


def open_regular(path: Path) -> BinaryIO:
    """The regular file at `path`, open for reading. Something else there does not hold us up.

    Raises:
        NotRegularError: it is something else.
        OSError: there is none, or it cannot be opened.
        ValueError: there is a NUL in the path.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # first: opening a device may do something
        raise NotRegularError
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotRegularError
    return os.fdopen(fd, "rb")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file, and its directory if need be, so that it is there whole or as it was.

    Raises:
        OSError: it cannot be written.
    """
    import tempfile

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd, staging = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        Path(staging).replace(path)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise
