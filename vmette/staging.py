"""Directories that others find whole or not at all: they come from a place beside them, and go to one.

The directory that they are in may be one that others can write to: nobody knows the place's name before it is there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .files import synced
from .locks import held

SUFFIX = ".vmette-part"
"""Of the places' names, and of nobody else's: what has it may be removed."""


@contextmanager
def staging(beside: Path) -> Iterator[Path]:
    """A new, empty directory of this user's beside that path, to become what is to be there: see :func:`publish`.

    It is gone at the end, if it has not. :func:`sweep` leaves it alone until then.

    Raises:
        OSError: it cannot be made.
    """
    path, fd = _made(beside)
    try:
        yield path
    finally:
        with suppress(OSError):
            shutil.rmtree(path)
        os.close(fd)


def _made(beside: Path) -> tuple[Path, int]:
    """A new place, and a descriptor that holds it."""
    while True:
        path = Path(tempfile.mkdtemp(dir=beside.parent, prefix=f".{beside.name}.", suffix=SUFFIX))
        with suppress(FileNotFoundError):  # another process's sweep came between
            return path, held(path, os.O_NOFOLLOW)


def publish(staged: Path, path: Path) -> None:
    """Has a directory that has been made be at `path`, and the disk know of it.

    Raises:
        OSError: there is something at `path` already, or it cannot be done.
    """
    synced(staged)
    staged.rename(path)
    synced(path.parent)


def remove(path: Path) -> None:
    """Removes a directory.

    Raises:
        OSError: it is none, or cannot be removed.
    """
    fd = held(path, os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        # No new directory to move it to: on a full disk there might be no room for that.
        gone = path.with_name(f".{os.urandom(8).hex()}{SUFFIX}")
        path.rename(gone)  # first, so that nobody finds half of one
        shutil.rmtree(gone)
    finally:
        os.close(fd)


def sweep(directory: Path) -> list[Path]:
    """Removes the places there whose processes did not come to their end; returns those that are in use.

    Only this user's: others may have made what looks like one.
    """
    used = []
    for path in directory.glob(f".*{SUFFIX}"):
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_uid == os.geteuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
            except BlockingIOError:
                used.append(path)
            finally:
                os.close(fd)
    return used


def is_place_of(path: Path, what: Path) -> bool:
    """Whether the place at `path` is for what is to be at the path `what`."""
    return path.name.removesuffix(SUFFIX).rpartition(".")[0] == f".{what.name}"
