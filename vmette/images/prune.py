"""Taking from the cache what nobody uses, the least recently used first."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .store import Store, bottom_up, remove

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""An entry that was asked for so recently is left alone: whoever did may not hold it yet."""


KINDS = ("layers", "images", "directories", "downloads", "templates")
"""Of entries: directories of the store (see :class:`vmette.images.store.Store`, and :mod:`vmette.templates`)."""


@dataclass(frozen=True)
class Item:
    """An entry of the cache."""

    kind: str
    """One of :data:`KINDS`."""
    path: Path
    size: int
    """Bytes on the disk."""
    used: float
    """When it was last asked for, in seconds since 1970."""

    @property
    def held(self) -> Path:
        """What users hold a shared lock on (see :func:`vmette.locks.hold`)."""
        return {"layers": self.path / "data", "directories": self.path / "rootfs"}.get(self.kind, self.path)


def items(store: Store) -> Iterator[Item]:
    """Every entry.

    Raises:
        OSError: the cache cannot be read.
    """
    for root in (store.root / kind for kind in KINDS):
        if root.is_dir():
            for path in root.glob("[!.]*"):  # where others begin with a point, they are on their way
                with suppress(FileNotFoundError):  # somebody else is faster
                    yield Item(root.name, path, size_of(path), path.stat().st_mtime)


def size_of(path: Path) -> int:
    """Bytes on the disk of the file or directory at `path`."""
    total = path.lstat().st_blocks * 512
    if path.is_dir() and not path.is_symlink():
        seen: set[int] = set()
        for fd, name, _ in bottom_up(path):
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if status.st_ino not in seen:
                seen.add(status.st_ino)
                total += status.st_blocks * 512
    return total


def prune(store: Store, *, max_bytes: int | None = None, unused_since: float | None = None) -> list[Item]:
    """Removes entries that nobody holds, and returns them. What cannot be removed is logged.

    Args:
        store: The cache.
        max_bytes: Stop as soon as no more than this is left.
        unused_since: Leave what was used after this time, in seconds since 1970.

    Raises:
        OSError: the cache cannot be read.
    """
    _sweep(store)
    there = sorted(items(store), key=lambda item: item.used)
    left = sum(item.size for item in there)
    removed = []
    for item in there:
        if max_bytes is not None and left <= max_bytes:
            break
        if unused_since is not None and item.used > unused_since:
            continue
        try:
            if _take(store, item):
                removed.append(item)
                left -= item.size
        except OSError as error:
            logger.warning("cannot remove %s from the cache: %s", item.path, error)
    return removed


def _take(store: Store, item: Item) -> bool:
    """Removes an entry, unless it is in use."""
    try:
        with store.locked(store.lock_of(item.path), lambda: True):
            if _recent(item.path):
                return False
            store.staging.mkdir(mode=0o700, exist_ok=True)
            trash = store.staging / store.lock_of(item.path)
            remove(trash)
            fd = _opened(item)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _recent(item.path):
                    return False
                item.path.rename(trash)  # gone in one step, whatever happens to us next
            finally:
                os.close(fd)
            remove(trash)
            return True
    except (BlockingIOError, InterruptedError, FileNotFoundError):
        return False


def _recent(path: Path) -> bool:
    return path.lstat().st_mtime > time.time() - GRACE_SECONDS


def _opened(item: Item) -> int:
    """What users of the entry hold; of a damaged one, which has no users, what there is."""
    try:
        return os.open(item.held, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return os.open(item.path.parent, os.O_RDONLY | os.O_CLOEXEC)


def _sweep(store: Store) -> None:
    """Removes what processes left that died while they made or removed an entry: the half of one, or a lock alone."""
    for name in {path.name for place in (store.staging, store.locks) if place.is_dir() for path in place.iterdir()}:
        with suppress(InterruptedError), store.locked(name, lambda: True):
            remove(store.staging / name)
