"""A tree of the host as a tar archive (PAX), while others may be changing it: no symlink is ever followed."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from collections.abc import Generator, Iterable, Iterator
from itertools import chain
from pathlib import Path

CHUNK = 1 << 18
_END = bytes(2 * tarfile.BLOCKSIZE)
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}
_SAFELY = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""For what may be a device or a FIFO."""


def packed(source: Path, name: bytes, *, owners: bool = False) -> Generator[bytes]:
    """The archive of the file or directory `source`, in which it is called `name`, piece by piece.

    A directory without a name is what is in it. `source` itself may be a symlink; those below it are packed as such.
    Hard links, modes and times are kept; owners if `owners` is set, root being the owner otherwise. Sockets are left
    out.

    Raises:
        OSError: it cannot be read, or is neither; or a file of it changed while it was read.
    """
    kind = stat.S_IFMT(source.stat().st_mode)
    if kind not in {stat.S_IFREG, stat.S_IFDIR}:  # opening a device may do something
        raise OSError(errno.EINVAL, "it is neither a file nor a directory", str(source))
    fd = os.open(source, _SAFELY)
    packer = _Packer(owners)
    pieces = packer.directory(fd, name) if kind == stat.S_IFDIR else packer.file(fd, name)
    yield from _gathered(chain(pieces, [_END]))


def _gathered(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in larger pieces."""
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        if len(buffer) >= CHUNK:
            yield bytes(buffer)
            buffer.clear()
    yield bytes(buffer)


class _Packer:
    def __init__(self, owners: bool) -> None:
        self._owners = owners
        self._names: dict[tuple[int, int], bytes] = {}
        """Of the files with several names, the first one."""

    def directory(self, fd: int, name: bytes) -> Iterator[bytes]:
        """The directory open as `fd`, which is closed, and what is in it."""
        todo = [(fd, name, self._listed(fd))]
        try:
            if name:
                yield self._header(name, os.fstat(fd))
            while todo:
                at, path, names = todo[-1]
                if not names:
                    todo.pop()
                    os.close(at)
                    continue
                own = names.pop()
                entry = path + b"/" + own if path else own
                status = os.stat(own, dir_fd=at, follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    below = os.open(own, _SAFELY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                    todo.append((below, entry, self._listed(below)))
                    yield self._header(entry, os.fstat(below))
                elif stat.S_ISREG(status.st_mode):
                    yield from self.file(os.open(own, _SAFELY | os.O_NOFOLLOW, dir_fd=at), entry)
                elif stat.S_ISLNK(status.st_mode):
                    yield self._header(entry, status, target=os.readlink(own, dir_fd=at))
                elif not stat.S_ISSOCK(status.st_mode):
                    yield self._header(entry, status)
        finally:
            for at, _, _ in todo:
                os.close(at)

    def _listed(self, fd: int) -> list[bytes]:
        return sorted(map(os.fsencode, os.listdir(fd)), reverse=True)

    def file(self, fd: int, name: bytes) -> Iterator[bytes]:
        """The file open as `fd`, which is closed: as many bytes as it had at first."""
        with os.fdopen(fd, "rb", 0) as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise _changed(name)
            if status.st_nlink > 1:
                first = self._names.setdefault((status.st_dev, status.st_ino), name)
                if first != name:
                    yield self._header(name, status, hard_link=first)
                    return
            yield self._header(name, status)
            left = status.st_size
            while left:
                data = file.read(min(left, CHUNK))
                if not data:
                    raise _changed(name)
                yield data
                left -= len(data)
            yield bytes(-status.st_size % tarfile.BLOCKSIZE)

    def _header(
        self, name: bytes, status: os.stat_result, *, target: bytes = b"", hard_link: bytes | None = None
    ) -> bytes:
        info = tarfile.TarInfo(_text(name))
        info.type = _TYPES[stat.S_IFMT(status.st_mode)] if hard_link is None else tarfile.LNKTYPE
        info.mode = stat.S_IMODE(status.st_mode)
        info.linkname = _text(target if hard_link is None else hard_link)
        if info.type == tarfile.REGTYPE:
            info.size = status.st_size
        if info.type in {tarfile.CHRTYPE, tarfile.BLKTYPE}:
            info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
        if self._owners:
            info.uid, info.gid = status.st_uid, status.st_gid
        seconds, nanoseconds = divmod(abs(status.st_mtime_ns), 10**9)
        info.pax_headers = {"mtime": f"{'-' * (status.st_mtime_ns < 0)}{seconds}.{nanoseconds:09}"}
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _changed(name: bytes) -> OSError:
    return OSError(errno.EAGAIN, "it changed while it was read", os.fsdecode(name))
