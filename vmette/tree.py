"""Copying into and measuring directory trees whose content is not trusted (`csrc/inject.c`)."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

__all__ = ["TreeStat", "copy_into", "stat_tree"]


def copy_into(root: str | os.PathLike[str], relative: str, source: str | os.PathLike[str], mode: int = 0o644) -> bool:
    """Copies the file `source` to `relative` below `root`; never follows a symlink below `root`.

    Missing directories are made. A target of equal size whose mtime is not older than the source's is left alone.

    Returns:
        Whether anything was copied.

    Raises:
        OSError: ELOOP for a symlink among the parents, EINVAL for a path with `..` or a source that is no regular
            file, and whatever the file systems refuse. The target is then as it was.
    """
    from ._native import lib

    result = lib.vmette_copy_into(_encoded(root), _encoded(relative), _encoded(source), mode)
    if result < 0:
        raise OSError(-result, os.strerror(-result), os.path.join(os.fspath(root), relative))  # noqa: PTH118
    return bool(result)


@dataclass(frozen=True)
class TreeStat:
    """The size of a directory tree."""

    entries: int
    """Names below the root."""
    size: int
    """Bytes in regular files; a file with two names counts twice."""
    newest: int
    """Newest mtime of the root and all below it, in nanoseconds since 1970."""


def stat_tree(root: str | os.PathLike[str]) -> TreeStat:
    """Measures the tree at `root`, in C; symlinks are counted and never followed.

    Raises:
        OSError: a directory of the tree cannot be read.
    """
    from ._native import ffi, lib

    result = ffi.new("struct vmette_tree *")
    error = lib.vmette_stat_tree(_encoded(root), result)
    if error < 0:
        raise OSError(-error, os.strerror(-error), os.fspath(root))
    return TreeStat(result.entries, result.bytes, result.newest)


def _encoded(path: str | os.PathLike[str]) -> bytes:
    encoded = os.fsencode(path)
    if b"\0" in encoded:  # C would take what is before it for the whole
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), os.fspath(path))
    return encoded
