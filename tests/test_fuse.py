"""A directory for a guest, asked over the wire as its kernel asks; and as its root might."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vmette.fuse as fuse
from vmette.errors import ProtocolError
from vmette.fuse import MAX_READ, MAX_REPLY, MAX_REQUEST, MAX_WRITE, DirectoryServer, Opcode

ROOT = 1
ATTR = struct.Struct("<6Q10I")
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do it")


@dataclass(frozen=True)
class Entry:
    """What a LOOKUP and its like say."""

    nodeid: int
    attr: tuple[int, ...]

    @property
    def ino(self) -> int:
        return self.attr[0]

    @property
    def size(self) -> int:
        return self.attr[1]

    @property
    def mode(self) -> int:
        return self.attr[9]


def request(opcode: int, nodeid: int, body: bytes = b"", *, unique: int = 7, caller: tuple[int, int] = (0, 0)) -> bytes:
    return fuse.HEADER.pack(fuse.HEADER.size + len(body), opcode, unique, nodeid, *caller, 1) + body


class Client:
    """The guest's kernel, or who claims to be it."""

    def __init__(self, server: DirectoryServer, caller: tuple[int, int] = (0, 0)) -> None:
        self.server = server
        self.caller = caller

    def ask(self, opcode: int, nodeid: int, body: bytes = b"") -> bytes:
        """What follows the header of the one reply. An error comes as an OSError."""
        (reply,) = self.server.receive(request(opcode, nodeid, body, caller=self.caller))
        length, error, unique = fuse.REPLY.unpack_from(reply)
        assert (length, unique) == (len(reply), 7)
        assert length <= MAX_REPLY
        if error:
            assert length == fuse.REPLY.size
            raise OSError(-error, os.strerror(-error))
        return reply[fuse.REPLY.size :]

    def tell(self, opcode: int, nodeid: int, body: bytes) -> None:
        assert list(self.server.receive(request(opcode, nodeid, body))) == []

    def entry(self, opcode: int, nodeid: int, body: bytes) -> Entry:
        return entry(self.ask(opcode, nodeid, body))

    def lookup(self, name: bytes, parent: int = ROOT) -> Entry:
        return self.entry(Opcode.LOOKUP, parent, name + b"\0")

    def path(self, path: str) -> Entry:
        at = ROOT
        for name in path.split("/"):
            found = self.lookup(os.fsencode(name), at)
            at = found.nodeid
        return found

    def getattr(self, nodeid: int, handle: int | None = None) -> Entry:
        body = fuse.GETATTR_IN.pack(handle is not None, handle or 0)
        reply = fuse.ATTR_OUT.unpack(self.ask(Opcode.GETATTR, nodeid, body))
        assert reply[:3] == (1, 0, 0)
        return Entry(nodeid, reply[3:])

    def setattr(
        self,
        nodeid: int,
        meant: int,
        *,
        handle: int = 0,
        size: int = 0,
        atime: tuple[int, int] = (0, 0),
        mtime: tuple[int, int] = (0, 0),
        mode: int = 0,
        owner: tuple[int, int] = (0, 0),
    ) -> Entry:
        body = fuse.SETATTR_IN.pack(
            meant, handle, size, atime[0], mtime[0], atime[1], mtime[1], mode, owner[0], owner[1]
        )
        return Entry(nodeid, fuse.ATTR_OUT.unpack(self.ask(Opcode.SETATTR, nodeid, body))[3:])

    def open(self, nodeid: int, flags: int = os.O_RDONLY) -> int:
        return opened(self.ask(Opcode.OPEN, nodeid, fuse.OPEN_IN.pack(flags)))[0]

    def create(self, name: bytes, flags: int = os.O_RDWR, mode: int = 0o644, parent: int = ROOT) -> tuple[Entry, int]:
        reply = self.ask(Opcode.CREATE, parent, fuse.CREATE_IN.pack(flags, mode) + name + b"\0")
        return entry(reply[:128]), opened(reply[128:])[0]

    def read(self, handle: int, offset: int = 0, size: int = MAX_READ) -> bytes:
        return self.ask(Opcode.READ, ROOT, fuse.READ_IN.pack(handle, offset, size))

    def write(self, handle: int, data: bytes, offset: int = 0, *, flags: int = 0, how: int = 0) -> int:
        body = fuse.WRITE_IN.pack(handle, offset, len(data), how, flags) + data
        return int(fuse.WRITE_OUT.unpack(self.ask(Opcode.WRITE, ROOT, body))[0])

    def release(self, handle: int) -> None:
        assert self.ask(Opcode.RELEASE, ROOT, fuse.RELEASE_IN.pack(handle)) == b""

    def opendir(self, nodeid: int = ROOT) -> int:
        return opened(self.ask(Opcode.OPENDIR, nodeid, fuse.OPEN_IN.pack(0)))[0]

    def readdir(self, handle: int, offset: int = 0, size: int = 4096) -> list[tuple[bytes, int, int, int]]:
        """Names, inodes, types and the offsets after them."""
        return list(dirents(self.ask(Opcode.READDIR, ROOT, fuse.READ_IN.pack(handle, offset, size))))

    def listed(self, handle: int, size: int = 4096) -> list[bytes]:
        names: list[bytes] = []
        offset = 0
        while got := self.readdir(handle, offset, size):
            names += [name for name, *_ in got]
            offset = got[-1][3]
        return names

    def forget(self, nodeid: int, lookups: int = 1) -> None:
        self.tell(Opcode.FORGET, nodeid, fuse.FORGET_IN.pack(lookups))


def entry(reply: bytes) -> Entry:
    nodeid, generation, *valid = struct.unpack_from("<QQQQII", reply)
    assert (generation, valid, len(reply)) == (0, [1, 1, 0, 0], 128)
    return Entry(nodeid, ATTR.unpack_from(reply, 40))


def opened(reply: bytes) -> tuple[int, int]:
    handle, flags = fuse.OPEN_OUT.unpack(reply)
    return handle, flags


def dirents(data: bytes) -> Iterator[tuple[bytes, int, int, int]]:
    at = 0
    while at < len(data):
        inode, offset, length, kind = fuse.DIRENT.unpack_from(data, at)
        at += fuse.DIRENT.size
        yield data[at : at + length], inode, kind, offset
        at += length + -length % 8
    assert at == len(data)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def snapshot(top: Path) -> list[tuple[str, int, int, bytes]]:
    """All that is in `top`."""
    found = []
    for path in sorted(top.rglob("*")):
        status = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found.append((str(path), status.st_mode, status.st_mtime_ns, data))
    return found


@pytest.fixture
def top(tmp_path: Path) -> Path:
    made = tmp_path / "share"
    (made / "sub/below").mkdir(parents=True)
    (made / "file").write_bytes(b"contents")
    (made / "sub/inner").write_bytes(b"inner")
    (made / "link").symlink_to("file")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(b"secret")
    return made


@pytest.fixture
def client(top: Path) -> Iterator[Client]:
    before = descriptors()
    with closing(DirectoryServer(top, read_only=False)) as server:
        yield Client(server, (os.geteuid(), os.getegid()))
    assert descriptors() == before


@pytest.fixture
def reader(top: Path) -> Iterator[Client]:
    before = descriptors()
    with closing(DirectoryServer(top, read_only=True)) as server:
        yield Client(server)
    assert descriptors() == before


def fails(number: int, function: Callable[..., object], *args: object, **named: object) -> None:
    with pytest.raises(OSError) as caught:
        function(*args, **named)
    assert caught.value.errno == number, caught.value


# --- the start


def init(client: Client, major: int = 7, minor: int = 41, flags: int = 0xFFFFFFFF) -> tuple[int, ...]:
    body = fuse.INIT_IN.pack(major, minor, 131072, flags) + bytes(48)
    return fuse.INIT_OUT.unpack(client.ask(Opcode.INIT, 0, body))


def test_init(client: Client) -> None:
    major, minor, readahead, flags, background, congestion, write, granularity, pages, alignment, more = init(client)
    assert (major, minor, readahead, write, granularity, pages) == (7, 38, 131072, MAX_WRITE, 1, 32)
    assert 0 < congestion < background
    assert (alignment, more) == (0, 0)
    assert flags == 1 << 0 | 1 << 3 | 1 << 5 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 18 | 1 << 22


def test_init_of_other_kernels(client: Client) -> None:
    assert init(client, minor=31, flags=1)[:4] == (7, 31, 131072, 1)
    assert init(client, major=8)[0] == 7
    fails(errno.EPROTO, init, client, minor=27)
    fails(errno.EPROTO, init, client, major=6)


def test_what_is_not_there_is_not_asked_again(client: Client) -> None:
    for opcode in (22, 25, 34, 40, 47, 51, 52, 4096, 0, 0xFFFFFFFF):
        fails(errno.ENOSYS, client.ask, opcode, ROOT, b"anything")
    fails(errno.ENOTTY, client.ask, Opcode.IOCTL, ROOT, bytes(32))
    client.tell(Opcode.INTERRUPT, 0, bytes(8))


def test_only_a_directory_is_served(top: Path) -> None:
    with pytest.raises(NotADirectoryError):
        DirectoryServer(top / "file", read_only=True)
    with pytest.raises(FileNotFoundError):
        DirectoryServer(top / "missing", read_only=True)


def test_destroy(client: Client, top: Path) -> None:
    file = client.lookup(b"file")
    client.open(file.nodeid)
    client.opendir()
    assert client.ask(Opcode.DESTROY, 0) == b""
    fails(errno.ESTALE, client.getattr, file.nodeid)
    assert client.lookup(b"file").size == 8
    client.server.close()
    client.server.close()


# --- what files are


def test_lookup_and_attributes(client: Client, top: Path) -> None:
    os.utime(top / "file", ns=(1_500_000_000_000_000_001, -999_999_999))
    status = (top / "file").lstat()
    found = client.lookup(b"file")
    assert found.attr == (
        status.st_ino,
        8,
        status.st_blocks,
        1_500_000_000,
        2**64 - 1,  # one second before 1970
        status.st_ctime_ns // 10**9,
        1,
        1,
        status.st_ctime_ns % 10**9,
        status.st_mode,
        1,
        status.st_uid,
        status.st_gid,
        0,
        status.st_blksize,
        0,
    )
    assert client.getattr(found.nodeid) == found
    assert client.lookup(b"file") == found
    assert stat.S_ISDIR(client.getattr(ROOT).mode)
    assert client.path("sub/inner").size == 5
    assert client.getattr(found.nodeid, client.open(found.nodeid)) == found
    fails(errno.ENOENT, client.lookup, b"missing")
    fails(errno.ENOTDIR, client.lookup, b"x", found.nodeid)


def test_names_of_one_file_are_one_node(client: Client, top: Path) -> None:
    (top / "other").hardlink_to(top / "file")
    first, second = client.lookup(b"file"), client.lookup(b"other")
    assert first == second
    (top / "file").unlink()
    assert client.getattr(first.nodeid).attr[10] == 1


def test_names_that_lead_elsewhere(client: Client) -> None:
    names = [b"", b".", b"..", b"/", b"../outside", b"sub/inner", b"a\0b", b"\0", b"/etc"]
    for name in names:
        fails(errno.EINVAL, client.lookup, name)
        for opcode, head in (
            (9, fuse.MKDIR_IN.pack(0o755)),
            (10, b""),
            (11, b""),
            (8, fuse.MKNOD_IN.pack(0o100644, 0)),
        ):
            fails(errno.EINVAL, client.ask, opcode, ROOT, head + name + b"\0")
        fails(errno.EINVAL, client.create, name)
        for old, new in ((name, b"new"), (b"file", name)):
            body = fuse.RENAME_IN.pack(ROOT) + old + b"\0" + new + b"\0"
            fails(errno.EINVAL, client.ask, Opcode.RENAME, ROOT, body)
        fails(
            errno.EINVAL, client.ask, Opcode.LINK, ROOT, fuse.LINK_IN.pack(client.lookup(b"file").nodeid) + name + b"\0"
        )
        fails(errno.EINVAL, client.ask, Opcode.SYMLINK, ROOT, name + b"\0target\0")
    fails(errno.ENAMETOOLONG, client.lookup, b"x" * 256)
    fails(errno.ENOENT, client.lookup, b"x" * 255)
    fails(errno.ENOENT, client.lookup, b"\xff\n")


def test_symlinks_are_never_followed(client: Client, top: Path) -> None:
    link = client.lookup(b"link")
    assert stat.S_ISLNK(link.mode)
    assert client.ask(Opcode.READLINK, link.nodeid) == b"file"
    fails(errno.EACCES, client.open, link.nodeid)
    fails(errno.ENOTDIR, client.lookup, b"x", link.nodeid)
    fails(errno.ENOTDIR, client.opendir, link.nodeid)
    fails(errno.EACCES, client.setattr, link.nodeid, fuse.SET_SIZE, size=1)
    fails(errno.EOPNOTSUPP, client.setattr, link.nodeid, fuse.SET_MODE, mode=0o777)
    client.setattr(link.nodeid, fuse.SET_MTIME, mtime=(5, 6))
    assert (top / "link").lstat().st_mtime_ns == 5_000_000_006
    assert (top / "file").stat().st_mtime > 10**9
    fails(errno.EINVAL, client.ask, Opcode.READLINK, client.lookup(b"file").nodeid)


def test_statfs(client: Client, top: Path) -> None:
    for nodeid in (ROOT, client.lookup(b"file").nodeid):
        blocks, _, _, files, _, bsize, namelen, frsize = fuse.STATFS_OUT.unpack(client.ask(Opcode.STATFS, nodeid))
        status = os.statvfs(top)
        assert (blocks, files, bsize, namelen, frsize) == (
            status.f_blocks,
            status.f_files,
            status.f_bsize,
            255,
            status.f_frsize,
        )


def test_setattr(client: Client, top: Path) -> None:
    file = client.lookup(b"file").nodeid
    assert client.setattr(file, fuse.SET_MODE, mode=0o100400).mode == 0o100400
    assert client.setattr(file, fuse.SET_MODE, mode=0o100000).mode == 0o100000
    assert client.setattr(file, fuse.SET_MODE, mode=0o100640).mode == 0o100640
    assert client.setattr(file, fuse.SET_SIZE, size=3).size == 3
    assert (top / "file").read_bytes() == b"con"
    handle = client.open(file, os.O_RDWR)
    assert client.setattr(file, fuse.SET_SIZE | fuse.SET_HANDLE, size=5, handle=handle).size == 5
    assert (top / "file").read_bytes() == b"con\0\0"
    now = time.time_ns()
    for closed in (False, True):
        if closed:
            client.release(handle)
        got = client.setattr(file, fuse.SET_ATIME | fuse.SET_MTIME, atime=(-3, 4), mtime=(10, 999_999_999))
        assert (got.attr[3], got.attr[6], got.attr[4], got.attr[7]) == (2**64 - 3, 4, 10, 999_999_999)
        client.setattr(file, fuse.SET_ATIME, atime=(20, 1))
        status = (top / "file").stat()
        assert (status.st_atime_ns, status.st_mtime_ns) == (20_000_000_001, 10_999_999_999)
        client.setattr(file, fuse.SET_MTIME | fuse.SET_MTIME_NOW)
        status = (top / "file").stat()
        assert status.st_atime_ns == 20_000_000_001
        assert status.st_mtime_ns > now - 10**9
        client.setattr(file, fuse.SET_ATIME_NOW | fuse.SET_MTIME_NOW)
        assert (top / "file").stat().st_atime_ns > now - 10**9
    fails(errno.EINVAL, client.setattr, file, fuse.SET_MTIME, mtime=(1, 10**9))
    fails(errno.EFBIG, client.setattr, file, fuse.SET_SIZE, size=2**63)
    fails(errno.EISDIR, client.setattr, ROOT, fuse.SET_SIZE, size=1)
    fails(errno.EBADF, client.setattr, file, fuse.SET_SIZE | fuse.SET_HANDLE, size=1, handle=99)
    fails(errno.EINVAL, client.setattr, file, fuse.SET_UID, owner=(2**32 - 1, 0))
    sub = client.lookup(b"sub").nodeid
    assert stat.S_IMODE(client.setattr(sub, fuse.SET_MODE, mode=0o42750).mode) == 0o2750
    assert stat.S_IMODE(client.setattr(ROOT, fuse.SET_MODE, mode=0o40711).mode) == 0o711


@needs_root
def test_owners(client: Client, top: Path) -> None:
    for name in ("file", "link", "sub"):
        node = client.lookup(name.encode()).nodeid
        client.setattr(node, fuse.SET_UID | fuse.SET_GID, owner=(12, 34))
        client.setattr(node, fuse.SET_GID, owner=(99, 35))
        status = (top / name).lstat()
        assert (status.st_uid, status.st_gid) == (12, 35)
    assert (top / "file").stat().st_uid == 12
    client.caller = (1000, 1001)
    client.create(b"created")
    client.ask(Opcode.MKDIR, ROOT, fuse.MKDIR_IN.pack(0o755) + b"made\0")
    client.ask(Opcode.MKNOD, ROOT, fuse.MKNOD_IN.pack(stat.S_IFIFO | 0o644, 0) + b"fifo\0")
    client.ask(Opcode.SYMLINK, ROOT, b"symlink\0/etc/passwd\0")
    for name in ("created", "made", "fifo", "symlink"):
        status = (top / name).lstat()
        assert (status.st_uid, status.st_gid) == (1000, 1001)
    (top / "sub").chmod(0o2777)
    sub = client.lookup(b"sub").nodeid
    client.create(b"created", parent=sub)
    client.ask(Opcode.MKDIR, sub, fuse.MKDIR_IN.pack(0o755) + b"made\0")
    assert ((top / "sub/created").stat().st_uid, (top / "sub/created").stat().st_gid) == (1000, 35)
    assert (top / "sub/made").stat().st_gid == 35
    assert stat.S_IMODE((top / "sub/made").stat().st_mode) == 0o2755


@needs_root
def test_what_a_user_may_not(client: Client, top: Path) -> None:
    """The server of a user who is not root: what he makes is his, and runs as nobody else."""
    for path in (top, top / "file", top / "sub"):
        os.chown(path, NOBODY, NOBODY)
    (top / "file").chmod(0o6755)
    os.seteuid(NOBODY)
    try:
        fd = os.open("/", os.O_RDONLY)
        os.close(fd)
        client.server._root = False  # as it finds when it starts
        client.caller = (0, 0)
        made, _ = client.create(b"made", mode=0o6755)
        client.ask(Opcode.MKDIR, ROOT, fuse.MKDIR_IN.pack(0o7777) + b"directory\0")
        fails(errno.EPERM, client.setattr, made.nodeid, fuse.SET_UID, owner=(0, 0))
        client.setattr(made.nodeid, fuse.SET_MODE, mode=0o106755)
        file = client.lookup(b"file")
        assert stat.S_IMODE(file.mode) == 0o6755
        client.write(client.open(file.nodeid, os.O_RDWR), b"x")
        assert stat.S_IMODE(client.getattr(file.nodeid).mode) == 0o755
    finally:
        os.seteuid(0)
    status = (top / "made").stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (NOBODY, 0o755)
    assert stat.S_IMODE((top / "directory").stat().st_mode) == 0o3777


@needs_root
def test_a_changed_file_runs_as_nobody_else(client: Client, top: Path) -> None:
    file = client.lookup(b"file").nodeid
    handle = client.open(file, os.O_RDWR)
    changes: list[Callable[[], object]] = [
        lambda: client.write(handle, b"x"),
        lambda: client.setattr(file, fuse.SET_SIZE, size=1),
        lambda: client.setattr(file, fuse.SET_UID, owner=(5, 0)),
        lambda: client.ask(Opcode.FALLOCATE, ROOT, fuse.FALLOCATE_IN.pack(handle, 0, 10, 0)),
        lambda: client.open(file, os.O_WRONLY | fuse.O_TRUNC),
    ]
    for change in changes:
        (top / "file").chmod(0o6755)
        change()
        assert stat.S_IMODE((top / "file").stat().st_mode) == 0o755


# --- names that come and go


def test_making(client: Client, top: Path) -> None:
    made = client.entry(Opcode.MKDIR, ROOT, fuse.MKDIR_IN.pack(0o40751) + b"made\0")
    assert made.mode == 0o40751 == (top / "made").stat().st_mode
    made = client.entry(Opcode.SYMLINK, made.nodeid, b"s\0../../outside\0")
    assert (top / "made/s").readlink() == Path("../../outside")
    for kind in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
        name = b"%o" % kind
        made = client.entry(Opcode.MKNOD, ROOT, fuse.MKNOD_IN.pack(kind | 0o666, 0) + name + b"\0")
        assert made.mode == kind | 0o666 == (top / name.decode()).lstat().st_mode
        fails(errno.EEXIST, client.ask, Opcode.MKNOD, ROOT, fuse.MKNOD_IN.pack(kind | 0o666, 0) + name + b"\0")
    for kind, number in ((stat.S_IFCHR, errno.EPERM), (stat.S_IFBLK, errno.EPERM), (stat.S_IFDIR, errno.EINVAL)):
        fails(number, client.ask, Opcode.MKNOD, ROOT, fuse.MKNOD_IN.pack(kind | 0o666, 0x103) + b"device\0")
    assert not (top / "device").exists()
    fails(errno.EEXIST, client.ask, Opcode.MKDIR, ROOT, fuse.MKDIR_IN.pack(0o755) + b"sub\0")


def test_removing(client: Client, top: Path) -> None:
    file, below = client.lookup(b"file"), client.path("sub/below")
    sub = client.lookup(b"sub").nodeid
    assert client.ask(Opcode.UNLINK, ROOT, b"file\0") == b""
    assert client.ask(Opcode.RMDIR, sub, b"below\0") == b""
    assert not (top / "file").exists()
    assert not (top / "sub/below").exists()
    fails(errno.ESTALE, client.getattr, file.nodeid)
    fails(errno.ESTALE, client.lookup, b"x", below.nodeid)
    fails(errno.ENOENT, client.ask, Opcode.UNLINK, ROOT, b"file\0")
    fails(errno.ENOTEMPTY, client.ask, Opcode.RMDIR, ROOT, b"sub\0")
    fails(errno.EISDIR, client.ask, Opcode.UNLINK, ROOT, b"sub\0")
    fails(errno.ENOTDIR, client.ask, Opcode.RMDIR, sub, b"inner\0")
    (top / "file").touch()  # perhaps with the inode that has become free
    assert client.lookup(b"file").nodeid != file.nodeid


def test_a_file_that_is_open_outlives_its_name(client: Client, top: Path) -> None:
    file, handle = client.create(b"temporary")
    client.write(handle, b"data")
    client.ask(Opcode.UNLINK, ROOT, b"temporary\0")
    assert client.getattr(file.nodeid).size == 4
    assert client.setattr(file.nodeid, fuse.SET_MODE, mode=0o600).mode == 0o100600
    assert client.setattr(file.nodeid, fuse.SET_SIZE | fuse.SET_HANDLE, size=2, handle=handle).size == 2
    assert client.read(handle) == b"da"
    fails(errno.ESTALE, client.open, file.nodeid)
    client.release(handle)
    fails(errno.ESTALE, client.getattr, file.nodeid)
    client.ask(Opcode.STATFS, file.nodeid)


def rename(client: Client, old: bytes, new: bytes, parent: int = ROOT, target: int = ROOT, flags: int = 0) -> None:
    names = old + b"\0" + new + b"\0"
    if flags:
        assert client.ask(Opcode.RENAME2, parent, fuse.RENAME2_IN.pack(target, flags) + names) == b""
    else:
        assert client.ask(Opcode.RENAME, parent, fuse.RENAME_IN.pack(target) + names) == b""


def test_renaming(client: Client, top: Path) -> None:
    file, sub, inner, below = (client.path(path) for path in ("file", "sub", "sub/inner", "sub/below"))
    rename(client, b"file", b"moved", target=below.nodeid)
    assert (top / "sub/below/moved").read_bytes() == b"contents"
    assert client.getattr(file.nodeid).size == 8
    rename(client, b"sub", b"sub2")
    assert client.getattr(inner.nodeid).size == 5
    assert client.lookup(b"moved", below.nodeid) == client.getattr(file.nodeid)
    rename(client, b"inner", b"moved", sub.nodeid, below.nodeid)
    fails(errno.ESTALE, client.getattr, file.nodeid)
    assert client.read(client.open(inner.nodeid)) == b"inner"
    fails(errno.EINVAL, rename, client, b"sub2", b"x", target=below.nodeid)
    fails(errno.ENOENT, rename, client, b"missing", b"x")
    for flags in (1, 2, 4, 8):
        fails(errno.EINVAL, rename, client, b"sub2", b"x", flags=flags)
    body = fuse.RENAME2_IN.pack(ROOT, 0) + b"sub2\0sub3\0"
    assert client.ask(Opcode.RENAME2, ROOT, body) == b""
    assert (top / "sub3/below/moved").read_bytes() == b"inner"


def test_links(client: Client, top: Path) -> None:
    file, sub = client.lookup(b"file"), client.lookup(b"sub")
    linked = client.entry(Opcode.LINK, sub.nodeid, fuse.LINK_IN.pack(file.nodeid) + b"linked\0")
    assert (linked.nodeid, linked.attr[10]) == (file.nodeid, 2)
    rename(client, b"linked", b"file", sub.nodeid)  # POSIX: nothing happens
    assert (top / "sub/linked").exists()
    client.ask(Opcode.UNLINK, ROOT, b"file\0")
    assert client.getattr(file.nodeid).attr[10] == 1
    fails(errno.EPERM, client.ask, Opcode.LINK, ROOT, fuse.LINK_IN.pack(sub.nodeid) + b"x\0")
    link = client.lookup(b"link")
    client.ask(Opcode.LINK, ROOT, fuse.LINK_IN.pack(link.nodeid) + b"link2\0")
    assert (top / "link2").readlink() == Path("file")
    fails(errno.ESTALE, client.ask, Opcode.LINK, ROOT, fuse.LINK_IN.pack(999) + b"x\0")


# --- open files


def test_reading(client: Client, top: Path) -> None:
    data = os.urandom(MAX_READ + 100)
    (top / "file").write_bytes(data)
    handle = client.open(client.lookup(b"file").nodeid)
    assert client.read(handle, size=2**32 - 1) == data[:MAX_READ]
    assert client.read(handle, MAX_READ - 5, 50) == data[MAX_READ - 5 : MAX_READ + 45]
    assert client.read(handle, len(data)) == b""
    fails(errno.EINVAL, client.read, handle, 2**63)
    fails(errno.EBADF, client.write, handle, b"x")
    client.release(handle)
    fails(errno.EBADF, client.read, handle)
    fails(errno.EBADF, client.ask, Opcode.RELEASE, ROOT, fuse.RELEASE_IN.pack(handle))


def test_writing(client: Client, top: Path) -> None:
    file, handle = client.create(b"new", os.O_WRONLY | fuse.O_EXCL, 0o400)
    assert file.mode == 0o100400
    data = os.urandom(MAX_WRITE)
    assert client.write(handle, data, 3) == MAX_WRITE
    assert (top / "new").read_bytes() == bytes(3) + data
    assert client.write(handle, b"") == 0
    assert client.write(handle, b"end", 0, flags=fuse.O_APPEND) == 3
    assert client.write(handle, b"map", 0, flags=fuse.O_APPEND, how=fuse.WRITE_CACHE) == 3
    assert (top / "new").read_bytes() == b"map" + data + b"end"
    fails(errno.EBADF, client.read, handle)
    fails(errno.EFBIG, client.write, handle, b"xx", 2**63 - 2)
    fails(errno.EEXIST, client.create, b"new", os.O_WRONLY | fuse.O_EXCL)
    again, handle = client.create(b"new", os.O_RDWR | fuse.O_TRUNC)
    assert (again.nodeid, again.size) == (file.nodeid, 0)
    fails(errno.EACCES, client.create, b"link")
    fails(errno.EISDIR, client.create, b"sub")
    fails(errno.EISDIR, client.open, ROOT)
    fails(errno.EINVAL, client.open, file.nodeid, 3)
    for flags in (0, fuse.FSYNC_DATA):
        assert client.ask(Opcode.FSYNC, ROOT, fuse.FSYNC_IN.pack(handle, flags)) == b""


def test_space(client: Client, top: Path) -> None:
    _, handle = client.create(b"new")
    client.write(handle, b"x", 1 << 20)
    with (top / "new").open("rb") as file:
        for whence, name in ((3, os.SEEK_DATA), (4, os.SEEK_HOLE)):
            got = client.ask(Opcode.LSEEK, ROOT, fuse.LSEEK_IN.pack(handle, 5, whence))
            assert fuse.LSEEK_OUT.unpack(got)[0] == os.lseek(file.fileno(), 5, name)
    fails(errno.ENXIO, client.ask, Opcode.LSEEK, ROOT, fuse.LSEEK_IN.pack(handle, 1 << 30, 3))
    fails(errno.EINVAL, client.ask, Opcode.LSEEK, ROOT, fuse.LSEEK_IN.pack(handle, 0, 0))
    assert client.ask(Opcode.FALLOCATE, ROOT, fuse.FALLOCATE_IN.pack(handle, 0, 2 << 20, 0)) == b""
    assert (top / "new").stat().st_size == 2 << 20
    fails(errno.EOPNOTSUPP, client.ask, Opcode.FALLOCATE, ROOT, fuse.FALLOCATE_IN.pack(handle, 0, 1, 1))
    fails(errno.EFBIG, client.ask, Opcode.FALLOCATE, ROOT, fuse.FALLOCATE_IN.pack(handle, 1, 2**63 - 1, 0))


def test_the_cache_is_kept_if_nothing_changed(client: Client, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = client.lookup(b"file").nodeid

    def kept() -> bool:
        return opened(client.ask(Opcode.OPEN, file, fuse.OPEN_IN.pack(os.O_RDONLY)))[1] == fuse.OPEN_KEEP_CACHE

    assert [kept(), kept()] == [False, False]  # it is too new: a change would not be sure to show
    monkeypatch.setattr(fuse, "SETTLED", -(10**12))
    assert [kept(), kept()] == [False, True]
    (top / "file").write_bytes(b"Contents")
    assert [kept(), kept()] == [False, True]


# --- directories


@pytest.mark.parametrize("size", [4096, 100, 1 << 20])
def test_listing(client: Client, top: Path, size: int) -> None:
    for number in range(500):
        (top / f"entry{number}").touch()
    handle = client.opendir()
    names = client.listed(handle, size)
    assert names[:2] == [b".", b".."]
    assert sorted(names[2:]) == sorted(os.listdir(os.fsencode(top)))  # noqa: PTH208
    assert client.listed(handle, size) == names
    got = {name: (inode, kind) for name, inode, kind, _ in client.readdir(handle, 0, 1 << 20)}
    for name, kind in ((b"file", 8), (b"sub", 4), (b"link", 10)):
        assert got[name] == (client.lookup(name).ino, kind)


def test_listing_goes_back_and_forth(client: Client, top: Path) -> None:
    for number in range(300):
        (top / f"entry{number}").touch()
    handle = client.opendir()
    everything = client.readdir(handle, 0, 1 << 20)
    assert len(everything) == 305
    for offset in (0, 7, 1, 300, 304, 305, 2, 150, 3, 0, 9999):
        assert client.readdir(handle, offset, 1 << 20) == everything[offset:]
        some = client.readdir(handle, offset, 200)
        assert some == everything[offset : offset + len(some)]
        assert len(some) >= min(5, len(everything) - offset)
    fails(errno.EINVAL, client.readdir, handle, 2**64 - 1)
    assert client.readdir(handle, 0) == everything[: len(client.readdir(handle, 0))]
    assert client.readdir(handle, 0, 10) == []


def test_what_is_removed_while_it_is_listed(client: Client, top: Path) -> None:
    names = {f"entry{number:04}".encode() for number in range(2000)}
    for name in names:
        (top / name.decode()).touch()
    handle, offset, seen = client.opendir(), 0, set()
    while got := client.readdir(handle, offset, 1000):
        for name, *_ in got[: len(got) - 1]:
            if name in names:
                client.ask(Opcode.UNLINK, ROOT, name + b"\0")
                assert name not in seen
                seen.add(name)
        offset = got[-2][3] if len(got) > 1 else got[-1][3]  # as when the last one did not fit
        if len(got) == 1:
            break
    assert len(names - seen) <= 1


def test_listing_with_attributes(client: Client, top: Path) -> None:
    handle = client.opendir()
    reply = client.ask(Opcode.READDIRPLUS, ROOT, fuse.READ_IN.pack(handle, 0, 4096))
    got = {}
    while reply:
        length = fuse.DIRENT.unpack_from(reply, 128)[2]
        total = 128 + fuse.DIRENT.size + length + -length % 8
        ((name, *_),) = dirents(reply[128:total])
        got[name] = reply[:128]
        reply = reply[total:]
    assert set(got) == {b".", b"..", b"file", b"sub", b"link"}
    assert got.pop(b".") == got.pop(b"..") == bytes(128)
    for name, data in got.items():
        assert entry(data) == client.lookup(name)
    file = entry(got[b"file"]).nodeid
    client.forget(file)
    client.getattr(file)  # it was counted twice
    client.forget(file)
    fails(errno.ESTALE, client.getattr, file)


def test_listing_with_attributes_of_what_is_forgotten(client: Client) -> None:
    sub = client.lookup(b"sub").nodeid
    handle = client.opendir(sub)
    client.forget(sub)
    reply = client.ask(Opcode.READDIRPLUS, sub, fuse.READ_IN.pack(handle, 0, 4096))
    assert b"inner" in reply
    assert len(client.server._nodes) == 1
    client.ask(Opcode.FSYNCDIR, sub, fuse.FSYNC_IN.pack(handle, 0))
    client.ask(Opcode.RELEASEDIR, sub, fuse.RELEASE_IN.pack(handle))
    for opcode in (Opcode.READDIR, Opcode.READDIRPLUS):
        fails(errno.EBADF, client.ask, opcode, sub, fuse.READ_IN.pack(handle, 0, 4096))
    fails(errno.EBADF, client.ask, Opcode.FSYNCDIR, sub, fuse.FSYNC_IN.pack(handle, 0))
    fails(errno.EBADF, client.ask, Opcode.RELEASEDIR, sub, fuse.RELEASE_IN.pack(handle))


# --- attacks


def everything_that_changes(file: int, directory: int, handle: int) -> list[tuple[Opcode, int, bytes]]:
    return [
        (Opcode.SETATTR, file, fuse.SETATTR_IN.pack(fuse.SET_SIZE, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
        (Opcode.SETATTR, file, fuse.SETATTR_IN.pack(fuse.SET_MODE, 0, 0, 0, 0, 0, 0, 0o777, 0, 0)),
        (Opcode.SETATTR, file, fuse.SETATTR_IN.pack(fuse.SET_MTIME, 0, 0, 0, 9, 0, 0, 0, 0, 0)),
        (Opcode.SYMLINK, directory, b"new\0target\0"),
        (Opcode.MKNOD, directory, fuse.MKNOD_IN.pack(0o100644, 0) + b"new\0"),
        (Opcode.MKDIR, directory, fuse.MKDIR_IN.pack(0o755) + b"new\0"),
        (Opcode.UNLINK, directory, b"inner\0"),
        (Opcode.RMDIR, directory, b"below\0"),
        (Opcode.RENAME, directory, fuse.RENAME_IN.pack(ROOT) + b"inner\0new\0"),
        (Opcode.RENAME2, directory, fuse.RENAME2_IN.pack(ROOT, 0) + b"inner\0new\0"),
        (Opcode.LINK, directory, fuse.LINK_IN.pack(file) + b"new\0"),
        (Opcode.OPEN, file, fuse.OPEN_IN.pack(os.O_WRONLY)),
        (Opcode.OPEN, file, fuse.OPEN_IN.pack(os.O_RDWR)),
        (Opcode.OPEN, file, fuse.OPEN_IN.pack(os.O_RDONLY | fuse.O_TRUNC)),
        (Opcode.WRITE, file, fuse.WRITE_IN.pack(handle, 0, 1, 0, 0) + b"x"),
        (Opcode.CREATE, directory, fuse.CREATE_IN.pack(os.O_RDONLY, 0o644) + b"new\0"),
        (Opcode.CREATE, directory, fuse.CREATE_IN.pack(os.O_RDONLY, 0o644) + b"inner\0"),
        (Opcode.FALLOCATE, file, fuse.FALLOCATE_IN.pack(handle, 0, 100, 0)),
    ]


def test_read_only(reader: Client, top: Path) -> None:
    file, sub = reader.lookup(b"file").nodeid, reader.lookup(b"sub").nodeid
    handle = reader.open(file)
    before = snapshot(top)
    for opcode, nodeid, body in everything_that_changes(file, sub, handle):
        fails(errno.EROFS, reader.ask, opcode, nodeid, body)
    assert reader.read(handle) == b"contents"
    assert snapshot(top) == before


@pytest.mark.parametrize("link", [True, False], ids=["symlink", "directory"])
@pytest.mark.parametrize("stale", [False, True], ids=["at once", "after a while"])
def test_something_else_in_place_of_a_directory(
    client: Client, top: Path, stale: bool, link: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody on the host swaps it, between the guest's LOOKUP and what it then does."""
    outside = top.parent / "outside"
    (outside / "inner").write_bytes(b"theirs")
    (outside / "below").mkdir()
    sub, file = client.lookup(b"sub").nodeid, client.path("sub/inner").nodeid
    if stale:
        monkeypatch.setattr(fuse, "FRESH", 0.0)
    else:
        client.server._nodes.let_go(client.server._nodes.get(sub))
    handle = client.open(client.lookup(b"file").nodeid)
    (top / "sub").rename(top / "was")
    if link:
        (top / "sub").symlink_to(outside)
    else:
        outside = outside.rename(top / "sub")
    before = snapshot(outside)
    for opcode, nodeid, body in everything_that_changes(file, sub, handle):
        if opcode not in {Opcode.WRITE, Opcode.FALLOCATE}:
            fails(errno.ESTALE, client.ask, opcode, nodeid, body)
    fails(errno.ESTALE, client.lookup, b"secret", sub)
    fails(errno.ESTALE, client.opendir, sub)
    fails(errno.ESTALE, client.open, file)
    fails(errno.ESTALE, client.getattr, sub)
    assert snapshot(outside) == before
    again = client.lookup(b"was")
    assert again.nodeid == sub  # which it still is, there
    assert client.getattr(file).size == 5


@pytest.mark.parametrize("link", [False, True], ids=["moved", "moved and linked"])
def test_a_directory_that_leaves(client: Client, top: Path, link: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sub, below = client.lookup(b"sub").nodeid, client.path("sub/below").nodeid
    assert client.opendir(below)
    (top / "sub").rename(top.parent / "outside/sub")
    if link:  # then it would be the same directory, by a way that leads outside
        (top / "sub").symlink_to(top.parent / "outside/sub")
        for nodeid in (sub, below):
            client.server._nodes.let_go(client.server._nodes.get(nodeid))
    monkeypatch.setattr(fuse, "FRESH", 0.0)
    fails(errno.ESTALE, client.lookup, b"inner", sub)
    fails(errno.ESTALE, client.create, b"x", parent=below)


def test_freshness_is_that_of_the_whole_way(client: Client, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    below, sub = client.path("sub/below").nodeid, client.lookup(b"sub").nodeid
    client.lookup(b"inner", sub)
    now[0] += 0.9
    fails(errno.ENOENT, client.lookup, b"x", below)
    (top / "sub").rename(top.parent / "outside/sub")
    now[0] += 0.2  # the lower one was reached a moment ago, by way of the upper one that was seen before
    fails(errno.ESTALE, client.lookup, b"x", below)


@pytest.mark.parametrize("what", ["symlink", "fifo", "another", "nothing", "socket"])
def test_something_else_in_place_of_a_file(client: Client, top: Path, what: str) -> None:
    file = client.lookup(b"file").nodeid
    (top / "file").rename(top / "was")
    secret = top.parent / "outside/secret"
    if what == "symlink":
        (top / "file").symlink_to(secret)
    elif what == "fifo":
        os.mkfifo(top / "file")
    elif what == "another":
        (top / "file").write_bytes(b"other")
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(top / "file"))
    fails(errno.ESTALE, client.open, file, os.O_RDWR)
    fails(errno.ESTALE, client.getattr, file)
    fails(errno.ESTALE, client.ask, Opcode.READLINK, file)
    for meant in (fuse.SET_SIZE, fuse.SET_MODE, fuse.SET_MTIME, fuse.SET_UID):
        fails(errno.ESTALE, client.setattr, file, meant, mode=0o777, size=1)
    assert secret.read_bytes() == b"secret"
    assert (top / "was").read_bytes() == b"contents"


@pytest.mark.timeout(20)
def test_special_files_are_not_opened(client: Client, top: Path) -> None:
    os.mkfifo(top / "fifo")
    names = [b"fifo"]
    if os.geteuid() == 0:
        os.mknod(top / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        names.append(b"device")
        assert client.lookup(b"device").attr[13] == 0x103
    for name in names:
        nodeid = client.lookup(name).nodeid
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_WRONLY | fuse.O_TRUNC):
            fails(errno.EACCES, client.open, nodeid, flags)
            fails(errno.EACCES, client.create, name, flags)
        fails(errno.EACCES, client.setattr, nodeid, fuse.SET_SIZE)
        assert stat.S_IMODE(client.setattr(nodeid, fuse.SET_MODE, mode=0o600).mode) == 0o600


def test_what_was_never_there(client: Client) -> None:
    for nodeid in (0, 2, 999, 2**64 - 1):
        fails(errno.ESTALE, client.getattr, nodeid)
        fails(errno.ESTALE, client.lookup, b"file", nodeid)
        fails(errno.ESTALE, client.open, nodeid)
        fails(errno.ESTALE, client.opendir, nodeid)
        client.forget(nodeid, 2**64 - 1)
    file, sub = client.lookup(b"file").nodeid, client.lookup(b"sub").nodeid
    handle, listing = client.open(file, os.O_RDWR), client.opendir(sub)
    for wrong in (0, listing, 2**64 - 1):
        fails(errno.EBADF, client.read, wrong)
        fails(errno.EBADF, client.write, wrong, b"x")
        fails(errno.EBADF, client.getattr, file, wrong)
        fails(errno.EBADF, client.ask, Opcode.FSYNC, file, fuse.FSYNC_IN.pack(wrong, 0))
    fails(errno.EBADF, client.readdir, handle)
    fails(errno.EBADF, client.getattr, sub, handle)  # of another file


def test_forgetting(client: Client) -> None:
    nodes = client.server._nodes
    client.lookup(b"file")
    file, below = client.lookup(b"file").nodeid, client.path("sub/below").nodeid
    sub = client.lookup(b"sub").nodeid
    client.forget(file)
    client.getattr(file)
    client.forget(file, 2**64 - 1)
    fails(errno.ESTALE, client.getattr, file)
    client.forget(ROOT, 1000)
    client.getattr(ROOT)
    client.forget(sub, 1000)
    client.getattr(below)  # what is in it keeps it
    client.tell(Opcode.BATCH_FORGET, 0, fuse.BATCH_FORGET_IN.pack(2) + fuse.FORGET_ONE.pack(below, 5) * 2)
    assert (len(nodes), nodes.root.children) == (1, 0)
    for _ in range(3):
        known = client.path("sub/below").nodeid
        client.forget(known)
        client.forget(client.lookup(b"sub").nodeid, 2)
    assert (len(nodes), nodes.root.children) == (1, 0)


def test_the_table_is_bounded(client: Client, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "MAX_NODES", 3)
    file = client.lookup(b"file").nodeid
    client.lookup(b"sub")
    fails(errno.ENFILE, client.lookup, b"link")
    fails(errno.ENFILE, client.create, b"new")
    fails(errno.ENFILE, client.ask, Opcode.MKDIR, ROOT, fuse.MKDIR_IN.pack(0o755) + b"new\0")
    fails(errno.ENFILE, client.ask, Opcode.MKNOD, ROOT, fuse.MKNOD_IN.pack(0o100644, 0) + b"new\0")
    fails(errno.ENFILE, client.ask, Opcode.SYMLINK, ROOT, b"new\0x\0")
    assert not (top / "new").exists()
    reply = client.ask(Opcode.READDIRPLUS, ROOT, fuse.READ_IN.pack(client.opendir(), 0, 4096))
    assert b"link" in reply
    client.forget(file, 10)
    client.lookup(b"link")


def test_descriptors_are_bounded(client: Client, top: Path) -> None:
    file = client.lookup(b"file").nodeid
    client.server._max_files, client.server._max_listings = 10, 5
    handles = [client.open(file) for _ in range(10)]
    fails(errno.EMFILE, client.open, file)
    fails(errno.EMFILE, client.create, b"new")
    assert not (top / "new").exists()
    listings = [client.opendir() for _ in range(5)]
    fails(errno.EMFILE, client.opendir)
    client.release(handles[0])
    client.open(file)
    client.ask(Opcode.RELEASEDIR, ROOT, fuse.RELEASE_IN.pack(listings[0]))
    client.opendir()


def test_the_process_keeps_some_descriptors(top: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))
    try:
        with closing(DirectoryServer(top, read_only=True)) as server:
            client = Client(server)
            file = client.lookup(b"file").nodeid
            asks: list[Callable[[], int]] = [lambda: client.open(file), client.opendir]
            for ask in asks:
                with pytest.raises(OSError, match="Too many open files"):
                    for _ in range(401):
                        ask()
            (top / "file").read_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_directories_are_kept_open_for_a_while(client: Client, top: Path) -> None:
    before = descriptors()
    for number in range(200):
        (top / f"d{number}/e").mkdir(parents=True)
        assert client.path(f"d{number}/e").nodeid
        fails(errno.ENOENT, client.path, f"d{number}/e/x")
    assert descriptors() - before == fuse.MAX_CACHED
    nodes = [client.path(f"d{number}/e").nodeid for number in range(200)]
    for node in nodes:
        client.forget(node, 1000)
    for number in range(200):
        client.forget(client.lookup(b"d%d" % number).nodeid, 1000)
    assert descriptors() == before


def test_a_deep_way(client: Client, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = ROOT
    for _ in range(300):
        at = client.entry(Opcode.MKDIR, at, fuse.MKDIR_IN.pack(0o755) + b"d" * 30 + b"\0").nodeid
    client.create(b"file", parent=at)
    monkeypatch.setattr(fuse, "FRESH", 0.0)
    rename(client, b"file", b"moved", at)
    assert (top / "moved").exists()
    rename(client, b"moved", b"file", target=at)
    client.getattr(at)
    monkeypatch.setattr(fuse, "MAX_DEPTH", 200)
    fails(errno.ENAMETOOLONG, client.lookup, b"file", at)


def test_directories_that_the_host_turns_round(client: Client, top: Path) -> None:
    below, sub = client.path("sub/below").nodeid, client.lookup(b"sub").nodeid
    fails(errno.ENOENT, client.lookup, b"x", below)
    (top / "sub/below").rename(top / "below")
    (top / "sub").rename(top / "below/sub")
    fails(errno.ELOOP, client.lookup, b"sub", below)  # as far as is known, it is the other way
    assert client.lookup(b"below").nodeid == below
    assert client.lookup(b"sub", below).nodeid == sub
    assert client.path("below/sub/inner").size == 5


def test_an_inode_that_becomes_another_kind_of_file(client: Client, top: Path) -> None:
    file = client.lookup(b"file").nodeid
    node = client.server._nodes.get(file)
    node.kind = stat.S_IFDIR  # as if it had been one
    again = client.lookup(b"file")
    assert again.nodeid != file
    fails(errno.ESTALE, client.getattr, file)


# --- the stream


def test_any_pieces(top: Path) -> None:
    asked = [
        request(Opcode.LOOKUP, ROOT, b"file\0", unique=1),
        request(Opcode.FORGET, 2, fuse.FORGET_IN.pack(0), unique=2),
        request(Opcode.OPEN, 2, fuse.OPEN_IN.pack(os.O_RDWR), unique=3),
        request(Opcode.WRITE, 2, fuse.WRITE_IN.pack(1, 0, 8, 0, 0) + b"contents", unique=4),
        request(Opcode.READ, 2, fuse.READ_IN.pack(1, 0, 100), unique=5),
        request(Opcode.LOOKUP, ROOT, b"missing\0", unique=6),
        request(Opcode.STATFS, 77, unique=7),
    ]
    stream = b"".join(asked)

    def replies(pieces: list[bytes]) -> list[tuple[int, int, int]]:
        with closing(DirectoryServer(top, read_only=False)) as server:
            return [fuse.REPLY.unpack_from(reply) for piece in pieces for reply in server.receive(piece)]

    whole = replies([stream])
    assert [unique for _, _, unique in whole] == [1, 3, 4, 5, 6, 7]
    assert replies(asked) == whole
    for size in (1, 2, 3, 7, 39, 40, 41, 100):
        assert replies([stream[at : at + size] for at in range(0, len(stream), size)]) == whole
    for at in range(len(stream)):
        assert replies([stream[:at], b"", stream[at:]]) == whole


def test_replies_may_be_left_for_later(client: Client) -> None:
    stream = request(Opcode.STATFS, 1, unique=1) + request(Opcode.STATFS, 1, unique=2)
    replies = client.server.receive(stream)
    first = next(replies)
    del replies
    (second,) = client.server.receive(b"")
    assert [fuse.REPLY.unpack_from(reply)[2] for reply in (first, second)] == [1, 2]


@pytest.mark.parametrize(
    "malformed",
    [
        struct.pack("<I", 39) + bytes(36),
        bytes(40),
        struct.pack("<I", MAX_REQUEST + 1) + bytes(36),
        struct.pack("<I", 2**32 - 1) + bytes(36),
        request(Opcode.GETATTR, 1, bytes(15)),
        request(Opcode.GETATTR, 1, bytes(17)),
        request(Opcode.LOOKUP, 1),
        request(Opcode.LOOKUP, 1, b"file"),
        request(Opcode.MKDIR, 1, bytes(8)),
        request(Opcode.MKDIR, 1, bytes(8) + b"name"),
        request(Opcode.RENAME, 1, bytes(8) + b"a\0b"),
        request(Opcode.FORGET, 1, bytes(9)),
        request(Opcode.BATCH_FORGET, 0, struct.pack("<II", 2, 0) + bytes(16)),
        request(Opcode.BATCH_FORGET, 0, struct.pack("<II", 2**32 - 1, 0) + bytes(16)),
        request(Opcode.WRITE, 1, fuse.WRITE_IN.pack(1, 0, 5, 0, 0) + b"1234"),
        request(Opcode.WRITE, 1, fuse.WRITE_IN.pack(1, 0, 3, 0, 0) + b"1234"),
        request(Opcode.STATFS, 1, b"x"),
        request(Opcode.INIT, 0, bytes(15)),
    ],
    ids=lambda data: data[:8].hex(),
)
def test_malformed_requests(client: Client, malformed: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(client.server.receive(malformed))


def test_the_largest_request(client: Client, top: Path) -> None:
    _, handle = client.create(b"new")
    room = MAX_REQUEST - fuse.HEADER.size - fuse.WRITE_IN.size
    assert client.write(handle, bytes(room)) == room
    with pytest.raises(ProtocolError):
        client.write(handle, bytes(room + 1))


def test_a_mistake_of_ours_is_not_swallowed(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "VALID", "soon")
    with pytest.raises(struct.error):
        client.lookup(b"file")


# --- what nobody has thought of


SMALL = st.integers(0, 12)
WIDE = st.one_of(SMALL, st.sampled_from([2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1))
NARROW = st.one_of(SMALL, st.integers(0, 2**32 - 1), st.sampled_from([0o100644, 0o40755, 0o10644, 0o1101, 0o102]))
NAMES = st.one_of(
    st.sampled_from(
        [b"file", b"sub", b"link", b"inner", b"below", b"..", b".", b"", b"a/b", b"../outside/secret", b"new"]
    ),
    st.binary(max_size=20),
)


def _values(structure: struct.Struct) -> st.SearchStrategy[bytes]:
    """Any values for the fields of `structure`."""
    fields = structure.format.lstrip("<")
    spread = []
    digits = ""
    for code in fields:
        if code.isdigit():
            digits += code
            continue
        if code != "x":
            spread += [code] * int(digits or 1)
        digits = ""
    kinds = {"Q": WIDE, "q": WIDE.map(lambda value: value - 2**63), "I": NARROW}
    return st.tuples(*(kinds[code] for code in spread)).map(lambda values: structure.pack(*values))


def _named(head: st.SearchStrategy[bytes], names: int) -> st.SearchStrategy[bytes]:
    tail = st.lists(NAMES, min_size=names, max_size=names).map(lambda parts: b"".join(part + b"\0" for part in parts))
    return st.tuples(head, tail).map(b"".join)


NOTHING = st.just(b"")
BODIES: dict[int, st.SearchStrategy[bytes]] = {
    Opcode.LOOKUP: _named(NOTHING, 1),
    Opcode.FORGET: _values(fuse.FORGET_IN),
    Opcode.GETATTR: _values(fuse.GETATTR_IN),
    Opcode.SETATTR: _values(fuse.SETATTR_IN),
    Opcode.READLINK: NOTHING,
    Opcode.SYMLINK: _named(NOTHING, 2),
    Opcode.MKNOD: _named(_values(fuse.MKNOD_IN), 1),
    Opcode.MKDIR: _named(_values(fuse.MKDIR_IN), 1),
    Opcode.UNLINK: _named(NOTHING, 1),
    Opcode.RMDIR: _named(NOTHING, 1),
    Opcode.RENAME: _named(_values(fuse.RENAME_IN), 2),
    Opcode.RENAME2: _named(_values(fuse.RENAME2_IN), 2),
    Opcode.LINK: _named(_values(fuse.LINK_IN), 1),
    Opcode.OPEN: _values(fuse.OPEN_IN),
    Opcode.READ: _values(fuse.READ_IN),
    Opcode.WRITE: st.tuples(SMALL, WIDE, NARROW, NARROW, st.binary(max_size=50)).map(
        lambda values: fuse.WRITE_IN.pack(values[0], values[1], len(values[4]), values[2], values[3]) + values[4]
    ),
    Opcode.STATFS: NOTHING,
    Opcode.RELEASE: _values(fuse.RELEASE_IN),
    Opcode.FSYNC: _values(fuse.FSYNC_IN),
    Opcode.INIT: _values(fuse.INIT_IN),
    Opcode.OPENDIR: _values(fuse.OPEN_IN),
    Opcode.READDIR: _values(fuse.READ_IN),
    Opcode.RELEASEDIR: _values(fuse.RELEASE_IN),
    Opcode.FSYNCDIR: _values(fuse.FSYNC_IN),
    Opcode.CREATE: _named(_values(fuse.CREATE_IN), 1),
    Opcode.INTERRUPT: st.just(bytes(8)),
    Opcode.DESTROY: NOTHING,
    Opcode.IOCTL: st.just(bytes(32)),
    Opcode.BATCH_FORGET: st.lists(_values(fuse.FORGET_ONE), max_size=5).map(
        lambda ones: fuse.BATCH_FORGET_IN.pack(len(ones)) + b"".join(ones)
    ),
    Opcode.FALLOCATE: _values(fuse.FALLOCATE_IN),
    Opcode.READDIRPLUS: _values(fuse.READ_IN),
    Opcode.LSEEK: _values(fuse.LSEEK_IN),
}


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    opcode = draw(st.sampled_from(sorted(BODIES)))
    body = draw(BODIES[opcode])
    if draw(st.integers(0, 30)) == 0:  # damaged
        body = draw(st.binary(max_size=100))
    return request(opcode, draw(st.one_of(SMALL, WIDE)), body, caller=(draw(NARROW), draw(NARROW)))


@pytest.fixture
def no_large_files() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("no_large_files")
@pytest.mark.parametrize("read_only", [True, False], ids=["read-only", "writable"])
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(stream=st.lists(requests(), min_size=1, max_size=40))
def test_any_requests(top: Path, read_only: bool, stream: list[bytes]) -> None:
    (top / "sub/below").mkdir(parents=True, exist_ok=True)
    if not (top / "file").exists():
        (top / "file").write_bytes(b"contents")
    before, outside, inside = descriptors(), snapshot(top.parent / "outside"), snapshot(top)
    with closing(DirectoryServer(top, read_only=read_only)) as server:
        try:
            for data in stream:
                for reply in server.receive(data):
                    length, error, _ = fuse.REPLY.unpack_from(reply)
                    assert length == len(reply) <= MAX_REPLY
                    assert -4096 < error <= 0
        except ProtocolError:
            pass
    assert descriptors() == before
    assert snapshot(top.parent / "outside") == outside
    if read_only:
        assert snapshot(top) == inside
    top.chmod(0o755)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.lists(st.binary(max_size=200), max_size=10))
def test_any_bytes(top: Path, data: list[bytes]) -> None:
    with closing(DirectoryServer(top, read_only=True)) as server:
        try:
            for piece in data:
                list(server.receive(piece))
        except ProtocolError:
            pass


# --- the process that all servers share


def test_servers_share_a_budget_of_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = fuse._budget._used
    monkeypatch.setattr(fuse._Budget, "size", used + 8)
    (tmp_path / "file").write_bytes(b"")
    one, two = (Client(DirectoryServer(tmp_path, read_only=True)) for _ in range(2))
    for client in (one, two):
        client.server._max_files = client.server._max_listings = 100
    handles = [one.open(one.lookup(b"file").nodeid) for _ in range(5)]
    listing = two.opendir()
    two.open(two.lookup(b"file").nodeid)
    for client in (one, two):
        fails(errno.EMFILE, client.open, client.lookup(b"file").nodeid)
        fails(errno.EMFILE, client.opendir)
    one.release(handles[0])
    two.open(two.lookup(b"file").nodeid)
    assert two.ask(Opcode.RELEASEDIR, ROOT, fuse.RELEASE_IN.pack(listing)) == b""
    one.open(one.lookup(b"file").nodeid)
    one.server.close()
    two.server.close()
    assert fuse._budget._used == used


def test_a_file_system_that_counts_to_minus_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fstatvfs

    def unlimited(fd: int) -> os.statvfs_result:
        values = list(real(fd))
        values[6] = -1
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "fstatvfs", unlimited)
    client = Client(DirectoryServer(tmp_path, read_only=True))
    assert fuse.STATFS_OUT.unpack(client.ask(Opcode.STATFS, ROOT))[4] == (1 << 64) - 1
    client.server.close()
