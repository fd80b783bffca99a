"""Files that others read while they are written, and files that others may have made."""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
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


def synced(path: Path) -> None:
    """Has the disk have the directory or file at `path`.

    Raises:
        OSError: it cannot.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Writes a file, and its directory if need be, so that it is there whole or as it was.

    One that is not `durable` may be empty if this computer stops at once.

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
            if durable:
                os.fsync(fd)
        Path(staging).replace(path)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise


PIECE = 1 << 16
"""Bytes that are looked at, and left out if they are zeros, at once."""


def pieces(fd: int) -> Iterator[tuple[int, bytes]]:
    """What is in a file, but for zeros: pieces that start at multiples of :data:`PIECE`, and where they do.

    Raises:
        OSError: it cannot be read.
    """
    size, at, zeros = os.fstat(fd).st_size, 0, bytes(PIECE)
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # there are no more data
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        at = start // PIECE * PIECE
        while at < end:
            piece = os.pread(fd, PIECE, at)
            if piece != zeros[: len(piece)]:
                yield at, piece
            at += PIECE


def copy_with_holes(source: int, target: int) -> None:
    """Makes the empty file `target` as large as `source` and copies all but zeros.

    Raises:
        OSError: one cannot be read, or the other not written.
    """
    os.ftruncate(target, os.fstat(source).st_size)
    write_pieces(target, pieces(source))


def write_pieces(target: int, each: Iterable[tuple[int, bytes]]) -> None:
    """Writes pieces to where they are to be in the file `target`.

    Raises:
        OSError: it cannot be written.
    """
    for at, piece in each:
        left = memoryview(piece)
        while left:
            written = os.pwrite(target, left, at)
            left, at = left[written:], at + written


def checksum(fd: int) -> int:
    """A CRC-32 of what is in a file, but for zeros, and where it is.

    Raises:
        OSError: it cannot be read.
    """
    value = 0
    for at, piece in pieces(fd):
        value = zlib.crc32(piece, zlib.crc32(at.to_bytes(8, "little"), value))
    return value
