"""The host's end of a FUSE file system: requests of a guest's kernel, answered from a directory of this host.

There is no I/O on the channel here: bytes of requests go in, replies come out. The format is Linux's
include/uapi/linux/fuse.h (protocol 7.28 to 7.38, little-endian); `struct` comments below are its names.

The guest is hostile, and its root can send any request. So a name is one component and is only ever used relative to a
descriptor of its directory; no symlink is followed; and what is found under a name is compared with what was known
there before it is used. Who else changes the directory meanwhile, on the host, makes an ESTALE of it, never a way out;
but what he moves out of it may be reached for a second more (FRESH), and as long as it is open.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from struct import Struct

from .errors import ProtocolError
from .linux import errno_of

__all__ = ["MAX_READ", "MAX_REPLY", "MAX_REQUEST", "MAX_WRITE", "DirectoryServer", "Opcode"]

MAJOR = 7
MINOR = 38
"""Of the protocol: the newest that is spoken."""
OLDEST_MINOR = 28
"""The first that has FUSE_MAX_PAGES."""

PAGE = 4096
MAX_WRITE = 7 * PAGE
"""Bytes that one WRITE carries: the request then fits in a frame of 32 KiB."""
MAX_REQUEST = MAX_WRITE + PAGE
"""Bytes. The guest reads /dev/fuse with a buffer of this size, which has its kernel refuse what would be longer."""
MAX_PAGES = 32
MAX_READ = MAX_PAGES * PAGE
"""Bytes that one READ gets."""
MAX_LISTING = 32768
"""Bytes that one READDIR or READDIRPLUS gets. Linux 6.12 asks for one page at a time."""
MAX_BACKGROUND = 64
"""Requests that the guest's kernel may send ahead (read-ahead, write-back)."""

MAX_NODES = 1 << 18
"""Files that a guest may know at once, of some 400 bytes each. Its kernel forgets those that leave its cache."""
MAX_FILES = 1024
MAX_LISTINGS = 256
"""Files and directories that a guest may have open at once; fewer if this process may not open many."""
MAX_CACHED = 64
"""Descriptors of directories that are kept, so that a path need not be walked again."""
MAX_ALLOCATION = 1 << 30
"""Bytes that one FALLOCATE gets: where the host's file system has no such thing, libc writes to each block of them."""
MAX_DEPTH = 2048
"""Directories that a walk goes through at most: as many as a path of Linux can name."""
MAX_SKIP = 1 << 17
"""Names of a directory that one request may have been read again: some tenths of a second. Linux asks for none."""
MAX_NAME = 255
MAX_OFFSET = (1 << 63) - 1

VALID = 1
"""Seconds for which the guest's kernel may believe a name or an attribute: the host may change the directory."""
FRESH = 1.0
"""Seconds for which a kept descriptor is believed to be still where it was found."""
SETTLED = 2 * 10**9
"""Nanoseconds after which a change shows in a file's times: file systems may keep no more than every other second."""

ROOT = 1
_U64 = (1 << 64) - 1
_NOBODY = (1 << 32) - 1
"""The user or group that a kernel sends when it means none."""

_SAFELY = os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PLACE: int = getattr(os, "O_PATH", 0) | _DIRECTORY
"""For a directory that is walked through. With Linux's O_PATH it need not be readable."""
_PRIVILEGES = stat.S_ISUID | stat.S_ISGID


class Opcode(IntEnum):
    """What a request asks for: those that are answered with more than an error."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    IOCTL = 39
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46


# The flags of INIT that are asked for, where the kernel has them.
ASYNC_READ = 1 << 0
ATOMIC_O_TRUNC = 1 << 3
BIG_WRITES = 1 << 5
AUTO_INVAL_DATA = 1 << 12
DO_READDIRPLUS = 1 << 13
READDIRPLUS_AUTO = 1 << 14
PARALLEL_DIROPS = 1 << 18
FLAG_MAX_PAGES = 1 << 22
_FLAGS = (
    ASYNC_READ
    | ATOMIC_O_TRUNC
    | BIG_WRITES
    | AUTO_INVAL_DATA
    | DO_READDIRPLUS
    | READDIRPLUS_AUTO
    | PARALLEL_DIROPS
    | FLAG_MAX_PAGES
)

# FATTR_*: what of a SETATTR is meant.
SET_MODE = 1 << 0
SET_UID = 1 << 1
SET_GID = 1 << 2
SET_SIZE = 1 << 3
SET_ATIME = 1 << 4
SET_MTIME = 1 << 5
SET_HANDLE = 1 << 6
SET_ATIME_NOW = 1 << 7
SET_MTIME_NOW = 1 << 8
_SET_TIMES = SET_ATIME | SET_MTIME | SET_ATIME_NOW | SET_MTIME_NOW

GETATTR_HANDLE = 1 << 0
OPEN_KEEP_CACHE = 1 << 1
WRITE_CACHE = 1 << 0
FSYNC_DATA = 1 << 0

# open(2) as x86_64 and aarch64 have it in common. All other flags are the guest's kernel's own business.
O_ACCMODE = 0o3
O_EXCL = 0o200
O_TRUNC = 0o1000
O_APPEND = 0o2000

# lseek(2) of Linux; macOS has them the other way round.
SEEK_DATA = 3
SEEK_HOLE = 4

HEADER = Struct("<IIQQIII4x")
"""fuse_in_header: length with this header, opcode, unique, nodeid, uid, gid, pid."""
REPLY = Struct("<IiQ")
"""fuse_out_header: length with this header, negated errno, unique."""
MAX_REPLY = REPLY.size + MAX_READ
INIT_IN = Struct("<IIII")
"""fuse_init_in: major, minor, max_readahead, flags; more has no meaning here."""
INIT_OUT = Struct("<IIIIHHIIHHI28x")
"""fuse_init_out: as above, then max_background, congestion_threshold, max_write, time_gran, max_pages, map_alignment,
flags2."""
ATTR_OUT = Struct("<QII6Q10I")
"""fuse_attr_out: seconds and nanoseconds that it is valid, 0, then fuse_attr (_attributes)."""
ENTRY_OUT = Struct("<QQQQII6Q10I")
"""fuse_entry_out: nodeid, generation, seconds that the name and the attributes are valid, nanoseconds, fuse_attr."""
GETATTR_IN = Struct("<I4xQ")
"""fuse_getattr_in: flags, handle."""
SETATTR_IN = Struct("<I4xQQ8xqq8xII4xI4xII4x")
"""fuse_setattr_in: what is meant, handle, size, atime, mtime, their nanoseconds, mode, uid, gid."""
MKNOD_IN = Struct("<II8x")
"""fuse_mknod_in: mode, device; then the name."""
MKDIR_IN = Struct("<I4x")
"""fuse_mkdir_in: mode; then the name."""
RENAME_IN = Struct("<Q")
"""fuse_rename_in: the new directory; then both names."""
RENAME2_IN = Struct("<QI4x")
"""fuse_rename2_in: the new directory, flags; then both names."""
LINK_IN = Struct("<Q")
"""fuse_link_in: the file; then the new name."""
OPEN_IN = Struct("<I4x")
"""fuse_open_in: flags of open(2)."""
OPEN_OUT = Struct("<QI4x")
"""fuse_open_out: handle, flags."""
CREATE_IN = Struct("<II8x")
"""fuse_create_in: flags of open(2), mode; then the name."""
RELEASE_IN = Struct("<Q16x")
"""fuse_release_in: handle."""
READ_IN = Struct("<QQI20x")
"""fuse_read_in: handle, offset, size."""
WRITE_IN = Struct("<QQII8xI4x")
"""fuse_write_in: handle, offset, size, flags of the write, flags of open(2); then the bytes."""
WRITE_OUT = Struct("<I4x")
"""fuse_write_out: size."""
FSYNC_IN = Struct("<QI4x")
"""fuse_fsync_in: handle, flags."""
FORGET_IN = Struct("<Q")
"""fuse_forget_in: lookups."""
BATCH_FORGET_IN = Struct("<I4x")
"""fuse_batch_forget_in: count; then so many of the next."""
FORGET_ONE = Struct("<QQ")
"""fuse_forget_one: nodeid, lookups."""
FALLOCATE_IN = Struct("<QQQI4x")
"""fuse_fallocate_in: handle, offset, length, mode."""
LSEEK_IN = Struct("<QQI4x")
"""fuse_lseek_in: handle, offset, whence."""
LSEEK_OUT = Struct("<Q")
"""fuse_lseek_out: offset."""
STATFS_OUT = Struct("<5QIII28x")
"""fuse_kstatfs: blocks, bfree, bavail, files, ffree, bsize, namelen, frsize."""
DIRENT = Struct("<QQII")
"""fuse_dirent: inode, offset of the next one, length of the name, type; then the name and zeros up to 8 bytes."""
_NO_ENTRY = bytes(ENTRY_OUT.size)
"""In a READDIRPLUS, of a name that is told without a node."""


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class _Budget:
    """The descriptors that all servers of this process have together: half of those that it may have open."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used = 0

    @property
    def size(self) -> int:
        """How many there are."""
        import resource

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return 8 * MAX_FILES if most == resource.RLIM_INFINITY else most // 2

    def take(self, count: int) -> None:
        """Before so many are opened.

        Raises:
            OSError: EMFILE: there are no more.
        """
        with self._lock:
            if self._used + count > self.size:
                raise _error(errno.EMFILE)
            self._used += count

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """As :meth:`take`, for what is opened within; if that fails, they are given back."""
        self.take(count)
        try:
            yield
        except BaseException:
            self.give(count)
            raise

    def give(self, count: int) -> None:
        """After so many have been closed."""
        with self._lock:
            self._used -= count


_budget = _Budget()


# --- names and attributes


def _checked(name: bytes) -> bytes:
    """`name`, if it is one component that can lead nowhere else."""
    if not name or name in {b".", b".."} or b"/" in name or b"\0" in name:
        raise _error(errno.EINVAL)
    if len(name) > MAX_NAME:
        raise _error(errno.ENAMETOOLONG)
    return name


def _text(body: bytes, start: int = 0) -> bytes:
    """What a request has from `start` on, without the NUL at its end."""
    if len(body) <= start or body[-1]:
        raise ProtocolError("the guest sent a file system's request without the end of its name")
    return body[start:-1]


def _two(body: bytes, start: int = 0) -> tuple[bytes, bytes]:
    """Two texts of a request."""
    pieces = _text(body, start).split(b"\0")
    if len(pieces) != 2:
        raise _error(errno.EINVAL)
    return pieces[0], pieces[1]


def _identity(status: os.stat_result) -> int:
    """What tells a file from all others: inode and device, in one number, of which a table takes less memory."""
    return status.st_dev << 64 | status.st_ino


def _device_number(device: int) -> int:
    """A device's number as Linux's kernel has it (include/linux/kdev_t.h)."""
    major, minor = os.major(device), os.minor(device)
    return minor & 0xFF | (major & 0xFFF) << 8 | (minor & 0xFFF00) << 12


def _time(meant: int, to_now: int, to_value: int, now: int, seconds: int, rest: int, before: int) -> int:
    """What a time is to be, in nanoseconds, of what SETATTR has in `meant` and in seconds and nanoseconds."""
    if meant & to_now:
        return now
    if not meant & to_value:
        return before
    if rest >= 10**9:
        raise _error(errno.EINVAL)
    return seconds * 10**9 + rest


# --- the files that the guest knows


class _Node:
    """A file that the guest knows, and where it was last."""

    __slots__ = (
        "checked",
        "children",
        "fd",
        "files",
        "id",
        "identity",
        "kind",
        "lookups",
        "name",
        "parent",
        "stamp",
    )

    def __init__(self, nodeid: int, identity: int, kind: int, parent: _Node | None, name: bytes) -> None:
        self.id = nodeid
        self.identity = identity
        self.kind = kind
        """S_IFMT."""
        self.parent = parent
        """None of the root, and of what is known to be gone."""
        self.name = name
        self.lookups = 0
        """How often the kernel has been told of it, less how often it forgot."""
        self.children = 0
        """The nodes that have this one as their parent, and so keep it."""
        self.fd = -1
        """Of a directory, a descriptor that is kept; -1 if there is none."""
        self.checked = 0.0
        """When it was last seen to be where it should."""
        self.files: list[_File] | None = None
        """Those that are open. What has no name any more is reached by them."""
        self.stamp: tuple[int, int, int] | None = None
        """Its times and size when it was opened last, if they would tell a change."""


class _Nodes:
    """All of them, by number and by identity; a file with several names is one node.

    A node stays as long as the kernel counts it or it has children, so that everything in memory is counted here.
    """

    def __init__(self, fd: int) -> None:
        status = os.fstat(fd)
        self.root = _Node(ROOT, _identity(status), stat.S_IFDIR, None, b".")
        self.root.fd = fd
        self.root.checked = float("inf")
        self._by_id = {ROOT: self.root}
        self._by_identity = {self.root.identity: self.root}
        self._kept: OrderedDict[_Node, None] = OrderedDict()
        """The directories with a descriptor, the one that was used last at the end."""
        self._next = ROOT + 1

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, node: _Node) -> bool:
        return self._by_id.get(node.id) is node

    @property
    def full(self) -> bool:
        """Whether a file that is not known yet cannot become so."""
        return len(self._by_id) >= MAX_NODES

    def get(self, nodeid: int) -> _Node:
        """A node that the guest names.

        Raises:
            OSError: ESTALE: there is none.
        """
        node = self._by_id.get(nodeid)
        if node is None:
            raise _error(errno.ESTALE)
        return node

    def found(self, parent: _Node, name: bytes, status: os.stat_result) -> _Node:
        """The node of what is now called `name` in `parent`; the kernel is told of it once more.

        Raises:
            OSError: ENFILE: there are too many; ELOOP: it is a directory that `parent` is in.
        """
        identity = status.st_dev << 64 | status.st_ino
        node = self._by_identity.get(identity)
        if node is not None and node.kind != status.st_mode & 0o170000:  # the number belongs to another file now
            self.gone(node)
            node = None
        if node is None:
            if self.full:
                raise _error(errno.ENFILE)
            node = _Node(self._next, identity, stat.S_IFMT(status.st_mode), parent, name)
            self._next += 1
            parent.children += 1
            self._by_id[node.id] = self._by_identity[identity] = node
        elif node.parent is not parent or node.name != name:
            self._move(node, parent, name)
        node.lookups += 1
        return node

    def moved(self, status: os.stat_result, parent: _Node, name: bytes) -> None:
        """What `status` is of is called `name` in `parent` from now on."""
        node = self._by_identity.get(_identity(status))
        if node is not None:
            self._move(node, parent, name)

    def removed(self, status: os.stat_result) -> None:
        """A name of what `status` was of, before, is no more. If another is left, the next LOOKUP will find it."""
        node = self._by_identity.get(_identity(status))
        if node is not None and (status.st_nlink <= 1 or stat.S_ISDIR(status.st_mode)):
            self.gone(node)

    def gone(self, node: _Node) -> None:
        """It has no name any more, and another file may get its identity."""
        if node is self.root:
            return
        if self._by_identity.get(node.identity) is node:
            del self._by_identity[node.identity]
        self.let_go(node)
        parent, node.parent = node.parent, None
        self._left(parent)

    def forget(self, nodeid: int, lookups: int) -> None:
        """The kernel has forgotten so many lookups; more than it made are all of them."""
        node = self._by_id.get(nodeid)
        if node is not None and node is not self.root:
            node.lookups = max(0, node.lookups - lookups)
            self._drop(node)

    def _move(self, node: _Node, parent: _Node, name: bytes) -> None:
        if node.parent is not parent:
            if node.kind == stat.S_IFDIR:  # a mount of a directory within itself; or the host has been moving things
                at: _Node | None = parent
                while at is not None:
                    if at is node:
                        raise _error(errno.ELOOP)
                    at = at.parent
            parent.children += 1
            before, node.parent = node.parent, parent
            node.name = name
            self._left(before)
        node.name = name

    def _left(self, parent: _Node | None) -> None:
        """`parent` has one child less."""
        if parent is not None:
            parent.children -= 1
            self._drop(parent)

    def _drop(self, node: _Node | None) -> None:
        """Takes `node` out if nothing needs it, and then perhaps what it was in."""
        while node is not None and node.lookups == node.children == 0 and node is not self.root:
            if self._by_id.pop(node.id, None) is None:
                return
            if self._by_identity.get(node.identity) is node:
                del self._by_identity[node.identity]
            self.let_go(node)
            above, node.parent = node.parent, None
            if above is not None:
                above.children -= 1
            node = above

    # --- the way to them

    def directory(self, node: _Node) -> int:
        """A descriptor of the directory `node`, to be used before the next call here, which may close it.

        Raises:
            OSError: ESTALE: it is not where it was any more.
        """
        now = time.monotonic()
        if now - node.checked < FRESH and node.fd >= 0:
            if node is not self.root:
                self._kept.move_to_end(node)
            return node.fd
        way: list[_Node] = []
        at = node
        while at.fd < 0 or now - at.checked >= FRESH:
            if at.kind != stat.S_IFDIR:
                raise _error(errno.ENOTDIR)
            if at.parent is None:
                raise _error(errno.ESTALE)
            if len(way) >= MAX_DEPTH:
                raise _error(errno.ENAMETOOLONG)
            way.append(at)
            at = at.parent
        now = min(now, at.checked)  # so that no part of the way is older than it seems
        above = at.fd
        for at in reversed(way):
            above = self._step(at, above, now)
        return above

    def _step(self, node: _Node, above: int, checked: float) -> int:
        """The descriptor of `node`, which is in the directory `above`, where that was `checked`."""
        if node.fd >= 0:
            try:
                self.verified(node, above)
            except OSError:
                self.let_go(node)
                raise
        else:
            with _budget.taken(1):
                node.fd = self._opened(node, above)
            self._kept[node] = None
            if len(self._kept) > MAX_CACHED:
                self.let_go(next(iter(self._kept)))
        node.checked = checked
        self._kept.move_to_end(node)
        return node.fd

    def _opened(self, node: _Node, above: int) -> int:
        try:
            fd = os.open(node.name, _PLACE, dir_fd=above)
        except OSError as error:
            raise _stale(error) from None
        if _identity(os.fstat(fd)) != node.identity:
            os.close(fd)
            raise _error(errno.ESTALE)
        return fd

    def verified(self, node: _Node, above: int) -> os.stat_result:
        """The status of `node`, which is in the directory `above`.

        Raises:
            OSError: ESTALE: something else is there, or nothing.
        """
        try:
            status = os.stat(node.name, dir_fd=above, follow_symlinks=False)
        except OSError as error:
            raise _stale(error) from None
        if status.st_dev << 64 | status.st_ino != node.identity:
            raise _error(errno.ESTALE)
        return status

    def place(self, node: _Node) -> tuple[int, bytes]:
        """The descriptor of the directory that `node` is in, as :meth:`directory` gives it, and its name there."""
        if node.parent is None:
            if node is self.root:
                return node.fd, b"."
            raise _error(errno.ESTALE)
        return self.directory(node.parent), node.name

    def let_go(self, node: _Node) -> None:
        """Closes its descriptor, if one is kept."""
        if node.fd >= 0 and node is not self.root:
            os.close(node.fd)
            node.fd = -1
            del self._kept[node]
            _budget.give(1)

    def clear(self) -> None:
        """Forgets all but the root."""
        while self._kept:
            self.let_go(next(iter(self._kept)))
        for node in self._by_id.values():
            node.parent = None
        self.root.children = 0
        self._by_id = {ROOT: self.root}
        self._by_identity = {self.root.identity: self.root}


def _stale(error: OSError) -> OSError:
    """What a way that does not lead there any more means. The guest's kernel then looks for a new one."""
    lost = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
    return _error(errno.ESTALE) if error.errno in lost else error


# --- what is open


class _File:
    """A regular file that is open."""

    __slots__ = ("fd", "node")

    def __init__(self, fd: int, node: _Node) -> None:
        self.fd = fd
        self.node = node


_Name = tuple[bytes, int, int]
"""A name of a directory, its inode and its type (S_IFMT >> 12, 0 if that is not known)."""


LISTING_FDS = 2
"""Descriptors of a directory that is open: its own, and the one that scandir makes."""


class _Listing:
    """A directory that is open, and is read as it is asked for: it may be larger than what can be held."""

    def __init__(self, fd: int, node: _Node) -> None:
        self.fd = fd
        self.node = node
        self._stream: Iterator[os.DirEntry[str]] | None = None
        self._first = 0
        self._recent = self._dots()
        """The names from number `_first` on that have been read. The kernel asks again for those that it had no use for
        yet."""

    def names(self, offset: int) -> Iterator[_Name]:
        """The names from number `offset` on. Those that are taken stay known until the next call.

        Raises:
            OSError: EINVAL: there are too many before them that would have to be read again.
        """
        if offset < self._first:
            self._rewind()
        self._skip(offset)
        del self._recent[: offset - self._first]
        self._first = offset
        yield from self._recent
        while (name := self._read()) is not None:
            self._recent.append(name)
            yield name

    def _rewind(self) -> None:
        self.close_stream()
        os.lseek(self.fd, 0, os.SEEK_SET)
        self._first = 0
        self._recent = self._dots()

    def _dots(self) -> list[_Name]:
        """What every directory begins with."""
        return [(name, self.node.identity & _U64, stat.S_IFDIR >> 12) for name in (b".", b"..")]

    def _skip(self, offset: int) -> None:
        """Goes on to number `offset`, or to the end."""
        if offset > self._first + len(self._recent) + MAX_SKIP:
            raise _error(errno.EINVAL)
        while offset > self._first + len(self._recent):
            self._first += len(self._recent)
            self._recent.clear()
            if (name := self._read()) is None:
                self._first = offset
                return
            self._recent.append(name)

    def _read(self) -> _Name | None:
        if self._stream is None:
            self._stream = os.scandir(self.fd)
        entry = next(self._stream, None)
        if entry is None:
            return None
        if entry.is_symlink():
            kind = stat.S_IFLNK
        elif entry.is_dir(follow_symlinks=False):
            kind = stat.S_IFDIR
        else:
            kind = stat.S_IFREG if entry.is_file(follow_symlinks=False) else 0
        return os.fsencode(entry.name), entry.inode(), kind >> 12

    def close_stream(self) -> None:
        """Ends the reading."""
        if self._stream is not None:
            self._stream.close()  # type: ignore[attr-defined]  # it is an os.ScandirIterator, whose type has no name
            self._stream = None

    def close(self) -> None:
        """Ends all of it."""
        self.close_stream()
        os.close(self.fd)


# --- the server

_Method = Callable[[int, bytes], "bytes | None"]
"""From the nodeid and what follows the header, to what follows the header of the reply; None for no reply."""


class DirectoryServer:
    """Answers the FUSE requests of one mount from a directory of this host.

    The guest mounts with `default_permissions`: its kernel checks modes and owners. All that its root could do, the
    user of this process does in the directory; with `read_only`, nothing is changed.

    One thread uses it at a time.
    """

    def __init__(self, directory: Path, *, read_only: bool) -> None:
        """Opens `directory`, which may be a symlink itself.

        Raises:
            OSError: it cannot be opened, or is none.
        """
        self._root = os.geteuid() == 0
        # The descriptors of this process are not the guest's alone, nor are they this guest's.
        self._max_files = min(MAX_FILES, _budget.size // 2)
        self._max_listings = min(MAX_LISTINGS, _budget.size // 8)
        self._read_only = read_only
        self._in = bytearray()
        self._wanted = 0
        """Bytes of the next request that must be there before it is looked at."""
        self._caller = (0, 0)
        """User and group, in the guest, of who is behind the request that is being answered."""
        self._files: dict[int, _File] = {}
        self._listings: dict[int, _Listing] = {}
        self._next_handle = 1
        self._nodes = _Nodes(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        self._devices = {self._nodes.root.identity >> 64: 0}
        """By device: what is mixed into its inodes' numbers, for the guest sees one device and may compare them."""
        self._closed = False
        self._operations = self._table()

    def close(self) -> None:
        """Closes all descriptors. May be called again."""
        if not self._closed:
            self._closed = True
            self._forget_all()
            os.close(self._nodes.root.fd)

    # --- requests and replies

    def receive(self, data: bytes) -> Iterator[bytes]:
        """Takes bytes from the guest, in any pieces; yields the replies, each to be written to /dev/fuse in one write.

        A reply has at most MAX_REPLY bytes. Some requests have none.

        Raises:
            ProtocolError: the guest sent what no kernel sends. The server is of no more use than to be closed.
        """
        if self._in:
            self._in += data
            if len(self._in) < self._wanted:
                return
            data = bytes(self._in)
        at, self._wanted = 0, HEADER.size
        try:
            while len(data) - at >= HEADER.size:
                length, opcode, unique, nodeid, uid, gid, _ = HEADER.unpack_from(data, at)
                if not HEADER.size <= length <= MAX_REQUEST:
                    raise ProtocolError(f"the guest sent a file system's request of {length} bytes")
                if len(data) - at < length:
                    self._wanted = length
                    break
                start, at = at + HEADER.size, at + length
                self._caller = uid, gid
                reply = self._answer(opcode, unique, nodeid, data[start:at])
                if reply is not None:
                    yield reply
        finally:
            self._in = bytearray(data[at:])

    def _answer(self, opcode: int, unique: int, nodeid: int, body: bytes) -> bytes | None:
        """The reply to one request."""
        operation = self._operations.get(opcode)
        if operation is None:  # the kernel will not ask again
            return REPLY.pack(REPLY.size, -errno_of(errno.ENOSYS), unique)
        method, size, more = operation
        if len(body) != size and not (more and len(body) > size):
            raise ProtocolError(f"the guest sent a file system's request {opcode} of the wrong size")
        try:
            result = method(nodeid, body)
        except OSError as error:
            return REPLY.pack(REPLY.size, -errno_of(error.errno), unique)
        return None if result is None else REPLY.pack(REPLY.size + len(result), 0, unique) + result

    def _table(self) -> dict[int, tuple[_Method, int, bool]]:
        """By opcode: what answers it, the size of what follows the header, and whether names or bytes follow that."""
        reading: dict[int, tuple[_Method, int, bool]] = {
            Opcode.INIT: (self._init, INIT_IN.size, True),
            Opcode.DESTROY: (self._destroy, 0, False),
            Opcode.LOOKUP: (self._lookup, 0, True),
            Opcode.FORGET: (self._forget, FORGET_IN.size, False),
            Opcode.BATCH_FORGET: (self._batch_forget, BATCH_FORGET_IN.size, True),
            Opcode.GETATTR: (self._getattr, GETATTR_IN.size, False),
            Opcode.READLINK: (self._readlink, 0, False),
            Opcode.OPEN: (self._open, OPEN_IN.size, False),
            Opcode.READ: (self._read, READ_IN.size, False),
            Opcode.RELEASE: (self._release, RELEASE_IN.size, False),
            Opcode.FSYNC: (self._fsync, FSYNC_IN.size, False),
            Opcode.LSEEK: (self._lseek, LSEEK_IN.size, False),
            Opcode.STATFS: (self._statfs, 0, False),
            Opcode.OPENDIR: (self._opendir, OPEN_IN.size, False),
            Opcode.READDIR: (self._readdir, READ_IN.size, False),
            Opcode.READDIRPLUS: (self._readdirplus, READ_IN.size, False),
            Opcode.RELEASEDIR: (self._releasedir, RELEASE_IN.size, False),
            Opcode.FSYNCDIR: (self._fsyncdir, FSYNC_IN.size, False),
            Opcode.INTERRUPT: (_ignored, 8, False),
            Opcode.IOCTL: (_no_ioctl, 0, True),
        }
        changing: dict[int, tuple[_Method, int, bool]] = {
            Opcode.SETATTR: (self._setattr, SETATTR_IN.size, False),
            Opcode.SYMLINK: (self._symlink, 0, True),
            Opcode.MKNOD: (self._mknod, MKNOD_IN.size, True),
            Opcode.MKDIR: (self._mkdir, MKDIR_IN.size, True),
            Opcode.UNLINK: (self._unlink, 0, True),
            Opcode.RMDIR: (self._rmdir, 0, True),
            Opcode.RENAME: (self._rename, RENAME_IN.size, True),
            Opcode.RENAME2: (self._rename2, RENAME2_IN.size, True),
            Opcode.LINK: (self._link, LINK_IN.size, True),
            Opcode.CREATE: (self._create, CREATE_IN.size, True),
            Opcode.WRITE: (self._write, WRITE_IN.size, True),
            Opcode.FALLOCATE: (self._fallocate, FALLOCATE_IN.size, False),
        }
        if self._read_only:
            changing = {opcode: (_refused, size, more) for opcode, (_, size, more) in changing.items()}
        # FLUSH, at each close(2), is not among them: nothing is held back here, and without an answer it is not asked
        # again. Nor is ACCESS: the kernel checks by itself.
        return reading | changing

    def _init(self, _: int, body: bytes) -> bytes:
        major, minor, readahead, flags = INIT_IN.unpack_from(body)
        if major > MAJOR:  # it is to ask again, with this version
            return INIT_OUT.pack(MAJOR, MINOR, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        if major < MAJOR or minor < OLDEST_MINOR:
            raise _error(errno.EPROTO)
        return INIT_OUT.pack(
            MAJOR,
            min(minor, MINOR),
            readahead,
            flags & _FLAGS,
            MAX_BACKGROUND,
            MAX_BACKGROUND * 3 // 4,
            MAX_WRITE,
            1,
            MAX_PAGES,
            0,
            0,
        )

    def _destroy(self, _: int, __: bytes) -> bytes:
        self._forget_all()
        return b""

    def _forget_all(self) -> None:
        for file in self._files.values():
            os.close(file.fd)
            file.node.files = None
        for listing in self._listings.values():
            listing.close()
        _budget.give(len(self._files) + LISTING_FDS * len(self._listings))
        self._files.clear()
        self._listings.clear()
        self._nodes.clear()

    # --- what a file is

    def _attributes(self, status: os.stat_result) -> tuple[int, ...]:
        """fuse_attr: inode, size, blocks, times, their nanoseconds, mode, links, owner, device, block size, flags."""
        mix = self._devices.get(status.st_dev)
        if mix is None:
            mix = self._devices[status.st_dev] = len(self._devices) << 48 & _U64
        atime, atime_ns = divmod(status.st_atime_ns, 10**9)
        mtime, mtime_ns = divmod(status.st_mtime_ns, 10**9)
        ctime, ctime_ns = divmod(status.st_ctime_ns, 10**9)
        return (
            status.st_ino ^ mix,
            status.st_size,
            status.st_blocks,
            atime & _U64,
            mtime & _U64,
            ctime & _U64,
            atime_ns,
            mtime_ns,
            ctime_ns,
            status.st_mode,
            status.st_nlink & 0xFFFFFFFF,
            status.st_uid,
            status.st_gid,
            _device_number(status.st_rdev) if status.st_rdev else 0,
            status.st_blksize,
            0,
        )

    def _entry(self, parent: _Node, name: bytes, status: os.stat_result) -> bytes:
        """Tells the kernel of what is called `name` in `parent`."""
        node = self._nodes.found(parent, name, status)
        return ENTRY_OUT.pack(node.id, 0, VALID, VALID, 0, 0, *self._attributes(status))

    def _status(self, node: _Node) -> os.stat_result:
        if node.files:
            return os.fstat(node.files[0].fd)
        return self._nodes.verified(node, self._nodes.place(node)[0])

    def _lookup(self, nodeid: int, body: bytes) -> bytes:
        name = _checked(_text(body))
        nodes = self._nodes
        parent = nodes.get(nodeid)
        status = os.stat(name, dir_fd=nodes.directory(parent), follow_symlinks=False)
        return self._entry(parent, name, status)

    def _forget(self, nodeid: int, body: bytes) -> None:
        self._nodes.forget(nodeid, FORGET_IN.unpack(body)[0])

    def _batch_forget(self, _: int, body: bytes) -> None:
        (count,) = BATCH_FORGET_IN.unpack_from(body)
        ones = memoryview(body)[BATCH_FORGET_IN.size :]
        if len(ones) != count * FORGET_ONE.size:
            raise ProtocolError("the guest sent a file system's request with another count than it has")
        for nodeid, lookups in FORGET_ONE.iter_unpack(ones):
            self._nodes.forget(nodeid, lookups)

    def _getattr(self, nodeid: int, body: bytes) -> bytes:
        flags, handle = GETATTR_IN.unpack(body)
        node = self._nodes.get(nodeid)
        status = os.fstat(self._file(handle, node).fd) if flags & GETATTR_HANDLE else self._status(node)
        return ATTR_OUT.pack(VALID, 0, 0, *self._attributes(status))

    def _setattr(self, nodeid: int, body: bytes) -> bytes:
        meant, handle, size, atime, mtime, atime_ns, mtime_ns, mode, uid, gid = SETATTR_IN.unpack(body)
        node = self._nodes.get(nodeid)
        file = self._file(handle, node) if meant & SET_HANDLE else None
        status = self._status(node)
        if meant & (SET_UID | SET_GID):
            self._set_owner(node, uid if meant & SET_UID else -1, gid if meant & SET_GID else -1)
        if meant & SET_SIZE:
            self._set_size(node, file, size)
        if meant & SET_MODE:
            self._set_mode(node, mode)
        if meant & _SET_TIMES:
            if meant & (SET_ATIME_NOW | SET_MTIME_NOW) == SET_ATIME_NOW | SET_MTIME_NOW:
                self._set_times(node, None)  # which also those may do who can write, but do not own it
            else:
                now = time.time_ns()
                accessed = _time(meant, SET_ATIME_NOW, SET_ATIME, now, atime, atime_ns, status.st_atime_ns)
                modified = _time(meant, SET_MTIME_NOW, SET_MTIME, now, mtime, mtime_ns, status.st_mtime_ns)
                self._set_times(node, (accessed, modified))
        return ATTR_OUT.pack(VALID, 0, 0, *self._attributes(self._status(node)))

    def _set_owner(self, node: _Node, uid: int, gid: int) -> None:
        if _NOBODY in {uid, gid}:
            raise _error(errno.EINVAL)
        if node.files:
            os.chown(node.files[0].fd, uid, gid)
        else:
            directory, name = self._nodes.place(node)
            os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)
        status = self._status(node)
        if stat.S_ISREG(status.st_mode) and status.st_mode & _PRIVILEGES:  # systems differ in whether root keeps them
            self._chmod(node, status.st_mode & 0o1777)

    def _set_mode(self, node: _Node, mode: int) -> None:
        if node.kind == stat.S_IFLNK:
            raise _error(errno.EOPNOTSUPP)
        self._chmod(node, self._allowed(mode, node.kind))

    def _chmod(self, node: _Node, mode: int) -> None:
        if node.files:
            os.fchmod(node.files[0].fd, mode)
        else:
            _chmod(*self._nodes.place(node), mode, node.identity)

    def _allowed(self, mode: int, kind: int) -> int:
        """`mode`, without what would have a program of the guest's run as somebody else on this host."""
        return mode & (0o3777 if kind == stat.S_IFDIR else 0o1777)

    def _set_size(self, node: _Node, file: _File | None, size: int) -> None:
        if size > MAX_OFFSET:
            raise _error(errno.EFBIG)
        fd = file.fd if file is not None else self._opened(node, os.O_WRONLY)[0]
        try:
            self._drop_privileges(fd)
            os.ftruncate(fd, size)
        finally:
            if file is None:
                os.close(fd)

    def _drop_privileges(self, fd: int) -> None:
        """Before a file is changed: what it does as somebody else is not the guest's to say.

        For other users than root, the system does it.
        """
        if self._root:
            mode = os.fstat(fd).st_mode
            if mode & _PRIVILEGES:
                os.fchmod(fd, mode & 0o1777)

    def _set_times(self, node: _Node, times: tuple[int, int] | None) -> None:
        """Sets both times, in nanoseconds; None: to now."""
        if node.files:
            fd = node.files[0].fd
            if times is None:
                os.utime(fd)
            else:
                os.utime(fd, ns=times)
        else:
            directory, name = self._nodes.place(node)
            if times is None:
                os.utime(name, dir_fd=directory, follow_symlinks=False)
            else:
                os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)

    def _readlink(self, nodeid: int, _: bytes) -> bytes:
        node = self._nodes.get(nodeid)
        directory, name = self._nodes.place(node)
        self._nodes.verified(node, directory)
        return os.readlink(name, dir_fd=directory)

    def _statfs(self, nodeid: int, _: bytes) -> bytes:
        node = self._nodes.get(nodeid)
        status = os.fstatvfs(
            self._nodes.directory(node if node.kind == stat.S_IFDIR else node.parent or self._nodes.root)
        )
        return STATFS_OUT.pack(
            status.f_blocks & _U64,  # some file systems have -1
            status.f_bfree & _U64,
            status.f_bavail & _U64,
            status.f_files & _U64,
            status.f_ffree & _U64,
            status.f_bsize & 0xFFFFFFFF,
            MAX_NAME,
            status.f_frsize & 0xFFFFFFFF,
        )

    # --- names that come and go

    def _room(self) -> None:
        """Before something is made: whether its node will have room."""
        if self._nodes.full:
            raise _error(errno.ENFILE)

    def _made(self, parent: _Node, directory: int, name: bytes, mode: int) -> bytes:
        """What has just been made as `name`, by its name: gives it to its owner, with its mode."""
        kind = stat.S_IFMT(mode)
        if self._root:
            os.chown(name, *self._owner(directory), dir_fd=directory, follow_symlinks=False)
        if kind != stat.S_IFLNK:
            _chmod(directory, name, self._allowed(mode, kind), None)
        return self._entry(parent, name, os.stat(name, dir_fd=directory, follow_symlinks=False))

    def _owner(self, directory: int) -> tuple[int, int]:
        """Whose something new in `directory` is, if root makes it; -1 for the one that it has already."""
        uid, gid = self._caller
        if gid == _NOBODY or os.fstat(directory).st_mode & stat.S_ISGID:
            gid = -1
        return -1 if uid == _NOBODY else uid, gid

    def _symlink(self, nodeid: int, body: bytes) -> bytes:
        name, target = _two(body)
        _checked(name)
        parent = self._nodes.get(nodeid)
        self._room()
        directory = self._nodes.directory(parent)
        os.symlink(target, name, dir_fd=directory)
        return self._made(parent, directory, name, stat.S_IFLNK)

    def _mknod(self, nodeid: int, body: bytes) -> bytes:
        mode, _ = MKNOD_IN.unpack_from(body)
        name = _checked(_text(body, MKNOD_IN.size))
        parent = self._nodes.get(nodeid)
        self._room()
        directory = self._nodes.directory(parent)
        kind = stat.S_IFMT(mode)
        if kind == stat.S_IFREG:
            fd, status = self._new_file(directory, name, os.O_WRONLY, mode)
            os.close(fd)
            return self._entry(parent, name, status)
        if kind not in {stat.S_IFIFO, stat.S_IFSOCK}:
            raise _error(errno.EPERM if kind in {stat.S_IFCHR, stat.S_IFBLK} else errno.EINVAL)
        if (os.mkfifo if kind == stat.S_IFIFO else os.mknod) not in os.supports_dir_fd:  # an old macOS
            raise _error(errno.EPERM)
        if kind == stat.S_IFIFO:
            os.mkfifo(name, 0o600, dir_fd=directory)
        else:
            os.mknod(name, kind | 0o600, dir_fd=directory)
        return self._made(parent, directory, name, mode)

    def _mkdir(self, nodeid: int, body: bytes) -> bytes:
        (mode,) = MKDIR_IN.unpack_from(body)
        name = _checked(_text(body, MKDIR_IN.size))
        parent = self._nodes.get(nodeid)
        self._room()
        directory = self._nodes.directory(parent)
        os.mkdir(name, 0o700, dir_fd=directory)
        fd = os.open(name, _DIRECTORY, dir_fd=directory)
        try:
            inherited = os.fstat(fd).st_mode & stat.S_ISGID
            if self._root:
                os.fchown(fd, *self._owner(directory))
            os.fchmod(fd, self._allowed(mode, stat.S_IFDIR) | inherited)
            return self._entry(parent, name, os.fstat(fd))
        finally:
            os.close(fd)

    def _unlink(self, nodeid: int, body: bytes) -> bytes:
        return self._remove(nodeid, body, os.unlink)

    def _rmdir(self, nodeid: int, body: bytes) -> bytes:
        return self._remove(nodeid, body, os.rmdir)

    def _remove(self, nodeid: int, body: bytes, remove: Callable[..., None]) -> bytes:
        name = _checked(_text(body))
        directory = self._nodes.directory(self._nodes.get(nodeid))
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        remove(name, dir_fd=directory)
        self._nodes.removed(status)
        return b""

    def _rename(self, nodeid: int, body: bytes) -> bytes:
        (there,) = RENAME_IN.unpack_from(body)
        return self._renamed(nodeid, there, *_two(body, RENAME_IN.size))

    def _rename2(self, nodeid: int, body: bytes) -> bytes:
        there, flags = RENAME2_IN.unpack_from(body)
        if flags:  # Python has no renameat2, and two steps would be a race with the host
            raise _error(errno.EINVAL)
        return self._renamed(nodeid, there, *_two(body, RENAME2_IN.size))

    def _renamed(self, nodeid: int, there: int, old: bytes, new: bytes) -> bytes:
        _checked(old)
        _checked(new)
        before, after = self._nodes.get(nodeid), self._nodes.get(there)
        source = os.dup(self._nodes.directory(before))  # the next line may close it
        try:
            target = self._nodes.directory(after)
            status = os.stat(old, dir_fd=source, follow_symlinks=False)
            try:
                replaced = os.stat(new, dir_fd=target, follow_symlinks=False)
            except FileNotFoundError:
                replaced = None
            os.rename(old, new, src_dir_fd=source, dst_dir_fd=target)
        finally:
            os.close(source)
        if replaced is not None and _identity(replaced) == _identity(status):  # two names of one file: both stay
            return b""
        if replaced is not None:
            self._nodes.removed(replaced)
        self._nodes.moved(status, after, new)
        return b""

    def _link(self, nodeid: int, body: bytes) -> bytes:
        (existing,) = LINK_IN.unpack_from(body)
        name = _checked(_text(body, LINK_IN.size))
        node, parent = self._nodes.get(existing), self._nodes.get(nodeid)
        directory, old = self._nodes.place(node)
        self._nodes.verified(node, directory)
        source = os.dup(directory)  # the next line may close it
        try:
            target = self._nodes.directory(parent)
            os.link(old, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        finally:
            os.close(source)
        return self._entry(parent, name, os.stat(name, dir_fd=target, follow_symlinks=False))

    # --- files that are open

    def _file(self, handle: int, node: _Node | None = None) -> _File:
        file = self._files.get(handle)
        if file is None or (node is not None and file.node is not node):
            raise _error(errno.EBADF)
        return file

    def _opened(self, node: _Node, access: int) -> tuple[int, os.stat_result]:
        """A descriptor of the regular file `node`, and its status."""
        if node.kind != stat.S_IFREG:
            raise _error(errno.EISDIR if node.kind == stat.S_IFDIR else errno.EACCES)
        directory, name = self._nodes.place(node)
        self._nodes.verified(node, directory)  # opening a device may do something
        try:
            fd = os.open(name, access | _SAFELY, dir_fd=directory)
        except OSError as error:
            raise _stale(error) from None
        status = os.fstat(fd)
        if _identity(status) == node.identity and stat.S_ISREG(status.st_mode):
            return fd, status
        os.close(fd)
        raise _error(errno.ESTALE)

    def _new_file(self, directory: int, name: bytes, access: int, mode: int) -> tuple[int, os.stat_result]:
        """A descriptor of a new regular file, and its status.

        Raises:
            OSError: EEXIST: something is there already.
        """
        fd = os.open(name, access | os.O_CREAT | os.O_EXCL | _SAFELY, 0o600, dir_fd=directory)
        try:
            if self._root:
                os.fchown(fd, *self._owner(directory))
            os.fchmod(fd, self._allowed(mode, stat.S_IFREG))
            return fd, os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise

    def _handle(self, fd: int, node: _Node, flags: int) -> bytes:
        """Makes `fd` an open file of the guest's, or closes it."""
        try:
            _budget.take(1)
        except OSError:
            os.close(fd)
            raise
        file = _File(fd, node)
        if node.files is None:
            node.files = []
        node.files.append(file)
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._files[handle] = file
        return OPEN_OUT.pack(handle, flags)

    def _access(self, flags: int) -> int:
        """Of the flags of open(2), whether to read or to write."""
        access = flags & O_ACCMODE
        if access == O_ACCMODE:
            raise _error(errno.EINVAL)
        if self._read_only and (access != os.O_RDONLY or flags & O_TRUNC):
            raise _error(errno.EROFS)
        if len(self._files) >= self._max_files:
            raise _error(errno.EMFILE)
        return access

    def _open(self, nodeid: int, body: bytes) -> bytes:
        (flags,) = OPEN_IN.unpack(body)
        return self._open_node(self._nodes.get(nodeid), flags)

    def _open_node(self, node: _Node, flags: int) -> bytes:
        access = self._access(flags)
        if flags & O_TRUNC and access == os.O_RDONLY:  # whatever that means: it needs to be written
            access = os.O_RDWR
        fd, status = self._opened(node, access)
        keep = 0
        try:
            if flags & O_TRUNC:
                self._drop_privileges(fd)
                os.ftruncate(fd, 0)
                node.stamp = None
            else:
                # What the kernel has read of it is still right if it has not changed since it was last opened. Only a
                # change that is some time ago is sure to show.
                stamp = status.st_mtime_ns, status.st_ctime_ns, status.st_size
                keep = OPEN_KEEP_CACHE if node.stamp == stamp else 0
                node.stamp = stamp if status.st_ctime_ns < time.time_ns() - SETTLED else None
        except BaseException:
            os.close(fd)
            raise
        return self._handle(fd, node, keep)

    def _create(self, nodeid: int, body: bytes) -> bytes:
        flags, mode = CREATE_IN.unpack_from(body)
        name = _checked(_text(body, CREATE_IN.size))
        parent = self._nodes.get(nodeid)
        access = self._access(flags)
        self._room()
        directory = self._nodes.directory(parent)
        try:
            fd, status = self._new_file(directory, name, access, mode)
        except FileExistsError:
            if flags & O_EXCL:
                raise
            return self._create_existing(parent, directory, name, flags)
        try:
            node = self._nodes.found(parent, name, status)
        except BaseException:
            os.close(fd)
            raise
        try:
            opened = self._handle(fd, node, 0)
        except OSError:
            self._nodes.forget(node.id, 1)  # the kernel does not hear of it
            raise
        return ENTRY_OUT.pack(node.id, 0, VALID, VALID, 0, 0, *self._attributes(status)) + opened

    def _create_existing(self, parent: _Node, directory: int, name: bytes, flags: int) -> bytes:
        """The answer to a CREATE of what somebody else has made in the meantime."""
        node = self._nodes.found(parent, name, os.stat(name, dir_fd=directory, follow_symlinks=False))
        try:
            opened = self._open_node(node, flags)
        except BaseException:
            self._nodes.forget(node.id, 1)  # the kernel does not hear of it
            raise
        return ENTRY_OUT.pack(node.id, 0, VALID, VALID, 0, 0, *self._attributes(self._status(node))) + opened

    def _read(self, _: int, body: bytes) -> bytes:
        handle, offset, size = READ_IN.unpack(body)
        if offset > MAX_OFFSET:
            raise _error(errno.EINVAL)
        return os.pread(self._file(handle).fd, min(size, MAX_READ), offset)

    def _write(self, _: int, body: bytes) -> bytes:
        handle, offset, size, how, flags = WRITE_IN.unpack_from(body)
        data = memoryview(body)[WRITE_IN.size :]
        if len(data) != size:
            raise ProtocolError("the guest sent a WRITE of another size than it says")
        fd = self._file(handle).fd
        if offset > MAX_OFFSET - size:
            raise _error(errno.EFBIG)
        self._drop_privileges(fd)
        # What comes from a mapping goes where it was mapped from, however the file was opened.
        if flags & O_APPEND and not how & WRITE_CACHE:
            return WRITE_OUT.pack(_append(fd, data))
        return WRITE_OUT.pack(os.pwrite(fd, data, offset))

    def _release(self, _: int, body: bytes) -> bytes:
        (handle,) = RELEASE_IN.unpack(body)
        file = self._file(handle)
        del self._files[handle]
        assert file.node.files is not None
        file.node.files.remove(file)
        os.close(file.fd)
        _budget.give(1)
        return b""

    def _fsync(self, _: int, body: bytes) -> bytes:
        handle, flags = FSYNC_IN.unpack(body)
        _sync(self._file(handle).fd, flags)
        return b""

    def _fallocate(self, _: int, body: bytes) -> bytes:
        handle, offset, length, mode = FALLOCATE_IN.unpack(body)
        fd = self._file(handle).fd
        if mode or not hasattr(os, "posix_fallocate"):
            raise _error(errno.EOPNOTSUPP)
        if offset > MAX_OFFSET or length > MAX_OFFSET - offset:
            raise _error(errno.EFBIG)
        if length > MAX_ALLOCATION:
            raise _error(errno.EOPNOTSUPP)
        self._drop_privileges(fd)
        os.posix_fallocate(fd, offset, length)
        return b""

    def _lseek(self, _: int, body: bytes) -> bytes:
        handle, offset, whence = LSEEK_IN.unpack(body)
        fd = self._file(handle).fd
        if whence not in {SEEK_DATA, SEEK_HOLE} or offset > MAX_OFFSET:
            raise _error(errno.EINVAL)
        return LSEEK_OUT.pack(os.lseek(fd, offset, os.SEEK_DATA if whence == SEEK_DATA else os.SEEK_HOLE))

    # --- directories that are open

    def _listing(self, handle: int) -> _Listing:
        listing = self._listings.get(handle)
        if listing is None:
            raise _error(errno.EBADF)
        return listing

    def _opendir(self, nodeid: int, _: bytes) -> bytes:
        node = self._nodes.get(nodeid)
        if len(self._listings) >= self._max_listings:
            raise _error(errno.EMFILE)
        place = self._nodes.directory(node)
        with _budget.taken(LISTING_FDS):
            fd = os.open(b".", _DIRECTORY, dir_fd=place)  # anew: two that read share no position
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self._listings[handle] = _Listing(fd, node)
        return OPEN_OUT.pack(handle, 0)

    def _readdir(self, _: int, body: bytes) -> bytes:
        handle, offset, size = READ_IN.unpack(body)
        listing = self._listing(handle)
        mix = self._devices.get(listing.node.identity >> 64, 0)
        out = bytearray()
        size = min(size, MAX_LISTING)
        for name, inode, kind in listing.names(offset):
            offset += 1
            record = _dirent(inode ^ mix, offset, name, kind)
            if len(out) + len(record) > size:
                break
            out += record
        return bytes(out)

    def _readdirplus(self, _: int, body: bytes) -> bytes:
        handle, offset, size = READ_IN.unpack(body)
        listing = self._listing(handle)
        mix = self._devices.get(listing.node.identity >> 64, 0)
        counted = listing.node in self._nodes
        out = bytearray()
        size = min(size, MAX_LISTING)
        for name, inode, kind in listing.names(offset):
            offset += 1
            record = _dirent(inode ^ mix, offset, name, kind)
            if len(out) + ENTRY_OUT.size + len(record) > size:  # before the kernel is told of it
                break
            entry = _NO_ENTRY
            if counted and name not in {b".", b".."}:
                try:
                    status = os.stat(name, dir_fd=listing.fd, follow_symlinks=False)
                    entry = self._entry(listing.node, name, status)
                except OSError:  # it has gone, or is one too many: then the kernel gets its name only
                    pass
            out += entry
            out += record
        return bytes(out)

    def _releasedir(self, _: int, body: bytes) -> bytes:
        (handle,) = RELEASE_IN.unpack(body)
        self._listing(handle).close()
        del self._listings[handle]
        _budget.give(LISTING_FDS)
        return b""

    def _fsyncdir(self, _: int, body: bytes) -> bytes:
        handle, flags = FSYNC_IN.unpack(body)
        _sync(self._listing(handle).fd, flags)
        return b""


def _ignored(_: int, __: bytes) -> None:
    """INTERRUPT: every request is answered before the next one is looked at."""


def _refused(_: int, __: bytes) -> bytes:
    raise _error(errno.EROFS)


def _no_ioctl(_: int, __: bytes) -> bytes:
    raise _error(errno.ENOTTY)


def _dirent(inode: int, following: int, name: bytes, kind: int) -> bytes:
    """A fuse_dirent."""
    return DIRENT.pack(inode & _U64, following & _U64, len(name), kind) + name + bytes(-len(name) % 8)


def _chmod(directory: int, name: bytes, mode: int, identity: int | None) -> None:
    """Sets the mode of what is called `name` and has `identity`, if it is known; never of what a symlink leads to."""
    if not hasattr(os, "O_PATH"):
        os.chmod(name, mode, dir_fd=directory, follow_symlinks=False)
        return
    # Linux before 6.6 has no call for that. Here, the file need neither be readable nor opened.
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if identity is not None and _identity(os.fstat(fd)) != identity:
            raise _error(errno.ESTALE)
        os.chmod(f"/proc/self/fd/{fd}", mode)  # noqa: PTH101
    finally:
        os.close(fd)


def _append(fd: int, data: memoryview) -> int:
    """Writes at the end of the file, wherever that is by now."""
    if hasattr(os, "RWF_APPEND"):  # Linux
        return os.pwritev(fd, [data], 0, os.RWF_APPEND)
    return os.pwrite(fd, data, os.fstat(fd).st_size)


def _sync(fd: int, flags: int) -> None:
    if flags & FSYNC_DATA and hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)
