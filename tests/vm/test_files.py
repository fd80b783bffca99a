"""`Sandbox.files`, against the real guest."""

from __future__ import annotations

import gc
import hashlib
import io
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pytest

import vmette
from tests.vm.support import BASE, wait_until

TIME = 1_600_000_000_123_456_789


@pytest.fixture(scope="module")
def sandbox() -> Iterator[vmette.Sandbox]:
    """One for all tests: each has a directory of its own in it."""
    with vmette.Sandbox(BASE, mem_mib=1024) as sandbox:
        yield sandbox


@pytest.fixture
def place(sandbox: vmette.Sandbox, request: pytest.FixtureRequest) -> Iterator[PurePosixPath]:
    """A directory of the guest, and a look at what is left in it that has no business there."""
    path = PurePosixPath("/tmp", request.node.name)
    sandbox.files.mkdir(path)
    yield path
    left = sandbox.run(["find", os.fspath(path), "-name", ".vmette*"], text=True, check=True)
    assert left.stdout == ""
    sandbox.files.remove(path, recursive=True)


def in_guest(sandbox: vmette.Sandbox, script: str) -> str:
    return sandbox.run(["sh", "-c", script], text=True, check=True).stdout


def facts(top: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in [top, *top.rglob("*")]:
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)  # noqa: PTH115
        elif path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[os.fspath(path.relative_to(top))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def different(found: dict[str, tuple[object, ...]], wanted: dict[str, tuple[object, ...]]) -> list[tuple[object, ...]]:
    """What a failure should show of two large trees."""
    names = sorted(found.keys() | wanted.keys())
    return [(name, found.get(name), wanted.get(name)) for name in names if found.get(name) != wanted.get(name)]


def test_files(sandbox: vmette.Sandbox, place: PurePosixPath) -> None:
    files = sandbox.files
    files.write(place / "file", b"abc", mode=0o640)
    files.write(place / "file", b"def", append=True)
    assert files.read(place / "file") == b"abcdef"
    assert files.read(place / "file", offset=2, length=2) == b"cd"
    assert in_guest(sandbox, f"stat -c '%a %u' {place}/file; cat {place}/file") == "640 0\nabcdef"
    found = files.stat(place / "file")
    assert (found.mode, found.size, found.uid, found.nlink) == (0o100640, 6, 0, 1)
    in_guest(sandbox, f"cd {place} && ln -s file link && mkdir 'a b' && mknod null c 1 3 && mkfifo fifo")
    assert {entry.name: stat.S_IFMT(entry.stat.mode) for entry in files.list(place)} == {
        "a b": stat.S_IFDIR,
        "fifo": stat.S_IFIFO,
        "file": stat.S_IFREG,
        "link": stat.S_IFLNK,
        "null": stat.S_IFCHR,
    }
    assert files.stat(place / "link", follow=False).target == "file"
    assert files.stat(place / "link") == found
    assert files.stat(place / "null").rdev == (1, 3)
    files.remove(place / "link")
    assert (files.exists(place / "link"), files.exists(place / "file")) == (False, True)
    assert files.read("/proc/self/comm")  # a file without a size


def test_failures_are_what_they_are_in_python(sandbox: vmette.Sandbox, place: PurePosixPath) -> None:
    files = sandbox.files
    with pytest.raises(FileNotFoundError) as caught:
        files.read(place / "missing")
    assert isinstance(caught.value, vmette.GuestFileError)
    assert caught.value.filename == f"{place}/missing"
    with pytest.raises(IsADirectoryError):
        files.read(place)
    with pytest.raises(NotADirectoryError):
        files.list("/etc/passwd")
    with pytest.raises(FileExistsError):
        files.mkdir(place)
    with pytest.raises(PermissionError):
        files.remove("/proc/self/comm")
    with pytest.raises(OSError):
        files.write("/dev/full", b"x")


def test_rights_are_those_of_the_user(sandbox: vmette.Sandbox, place: PurePosixPath, tmp_path: Path) -> None:
    files = sandbox.files
    files.write(place / "secret", b"root's", mode=0o600)
    (tmp_path / "file").write_bytes(b"")
    for attempt in (
        lambda: files.read(place / "secret", user="nobody"),
        lambda: files.write(place / "secret", b"x", user="nobody"),
        lambda: files.write(place / "new", b"x", user="nobody"),
        lambda: files.remove(place / "secret", user="nobody"),
        lambda: files.mkdir("/root/x", user="nobody"),
        lambda: files.copy_in(tmp_path / "file", place, user="nobody"),
        lambda: files.copy_out(place, tmp_path / "out", user="nobody"),
    ):
        with pytest.raises(PermissionError):
            attempt()
    assert files.read(place / "secret") == b"root's"
    assert [path.name for path in tmp_path.iterdir() if path.name != "TMPDIR"] == ["file"]
    files.mkdir(place / "open", mode=0o1777)
    files.copy_in(tmp_path / "file", place / "open", user="nobody")
    assert files.stat(place / "open/file").uid == 65534
    with pytest.raises(vmette.CommandNotStarted):
        files.read("/etc/passwd", user="no such user")


def test_a_large_tree_round_trips(sandbox: vmette.Sandbox, place: PurePosixPath, tmp_path: Path) -> None:
    top = tmp_path / "tree"
    top.mkdir()
    for number in range(3000):
        path = top / f"dir{number % 60}" / f"file{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"%d\n" % number * (number % 50))
        path.chmod(0o600 | number % 0o200)
    (top / "empty").mkdir(mode=0o700)
    (top / os.fsdecode(b"\xff\xfe\n name")).write_bytes(b"odd")
    (top / "absolute").symlink_to("/etc/passwd")
    (top / "dangling").symlink_to("../../..")
    (top / "suid").write_bytes(b"")
    (top / "suid").chmod(0o4755)
    (top / "hard").hardlink_to(top / "dir1/file1")
    for path in sorted(top.rglob("*"), reverse=True):
        os.utime(path, ns=(TIME, TIME), follow_symlinks=False)
    before = facts(top)
    sandbox.files.copy_in(top, place)
    assert in_guest(sandbox, f"find {place}/tree -name 'file*' | wc -l").strip() == "3000"
    umask = os.umask(0)  # which takes from what comes from the guest, as from all that is made here
    try:
        sandbox.files.copy_out(place / "tree", tmp_path / "again", setuid=True)
    finally:
        os.umask(umask)
    assert different(facts(tmp_path / "again"), before)[:10] == []
    assert (tmp_path / "again/hard").samefile(tmp_path / "again/dir1/file1")
    sandbox.files.copy_out(place / "tree", tmp_path / "plain")
    assert (tmp_path / "plain/suid").stat().st_mode == 0o100755


def test_a_big_file_is_the_same(sandbox: vmette.Sandbox, place: PurePosixPath, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 64
    (tmp_path / "big").write_bytes(data)
    sandbox.files.copy_in(tmp_path / "big", place)
    with (tmp_path / "stream").open("wb") as file:
        assert sandbox.files.read_to(place / "big", file) == len(data)
    sandbox.files.copy_out(place / "big", tmp_path / "copy")
    assert (tmp_path / "stream").read_bytes() == data
    assert (tmp_path / "copy").read_bytes() == data
    with pytest.raises(vmette.OutputTooLarge):
        sandbox.files.read(place / "big", max_bytes=len(data) - 1)


def test_many_threads_at_once(sandbox: vmette.Sandbox, place: PurePosixPath, tmp_path: Path) -> None:
    files = sandbox.files

    def work(number: int) -> bytes:
        data = b"%d" % number * 50_000
        files.write(place / f"{number}", data)
        files.copy_out(place / f"{number}", tmp_path / f"{number}")
        files.copy_in(tmp_path / f"{number}", place / f"{number}.back")
        assert files.read(place / f"{number}.back") == data
        return data

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(24)))
    assert [(tmp_path / f"{number}").read_bytes() for number in range(24)] == found
    assert len(files.list(place)) == 48


def test_what_never_ends_ends(sandbox: vmette.Sandbox, place: PurePosixPath, tmp_path: Path) -> None:
    files = sandbox.files
    in_guest(sandbox, f"mkfifo {place}/fifo; (while echo line; do :; done) >{place}/log 2>&1 & echo $! >/tmp/pid")
    try:
        wait_until(lambda: files.stat(place / "log").size > 100_000, "a log that grows")
        files.copy_out(place / "log", tmp_path / "log")  # as much of it as there was
        assert (tmp_path / "log").read_bytes()[:5] == b"line\n"
    finally:
        in_guest(sandbox, f"kill $(cat /tmp/pid); rm /tmp/pid {place}/log")
    with pytest.raises(vmette.OutputTooLarge):
        files.read("/dev/zero", max_bytes=1_000_000)
    with pytest.raises(vmette.TimeoutExpired):
        files.read(place / "fifo", timeout=1)
    with pytest.raises(PermissionError):  # some of the kernel's own files can only be written
        files.copy_out("/proc", tmp_path / "proc")
    with pytest.raises(vmette.VmetteError, match="device"):
        files.copy_out("/dev", tmp_path / "dev")
    assert {path.name for path in tmp_path.iterdir()} == {"log", "TMPDIR"}


def test_no_link_of_the_guest_is_followed(sandbox: vmette.Sandbox, place: PurePosixPath, tmp_path: Path) -> None:
    files, top = sandbox.files, tmp_path / "tree"
    (top / "sub").mkdir(parents=True)
    (top / "sub/file").write_bytes(b"mine")
    in_guest(sandbox, f"cd {place} && mkdir t t/tree elsewhere && ln -s {place}/elsewhere t/tree/sub")
    with pytest.raises(vmette.GuestFileError):
        files.copy_in(top, place / "t")
    in_guest(sandbox, f"cd {place} && rm -r t/tree && ln -s ../elsewhere t/tree")
    with pytest.raises(vmette.GuestFileError):
        files.copy_in(top, place / "t")
    assert files.list(place / "elsewhere") == []


def test_no_link_of_the_host_is_followed(sandbox: vmette.Sandbox, place: PurePosixPath, tmp_path: Path) -> None:
    elsewhere, there = tmp_path / "elsewhere", tmp_path / "there"
    elsewhere.mkdir()
    (there / place.name).mkdir(parents=True)
    (there / place.name / "sub").symlink_to(elsewhere)
    in_guest(sandbox, f"mkdir {place}/sub && echo x >{place}/sub/file")
    with pytest.raises(NotADirectoryError):
        sandbox.files.copy_out(place, there)
    assert list(elsewhere.iterdir()) == []


class Interrupted(io.RawIOBase):
    """A file in the middle of which somebody presses Ctrl-C."""

    def __init__(self, data: bytes) -> None:
        self._data = [data]

    def read(self, size: int = -1) -> bytes:
        if self._data:
            return self._data.pop()
        raise KeyboardInterrupt


def test_what_is_interrupted_leaves_nothing(sandbox: vmette.Sandbox, place: PurePosixPath, tmp_path: Path) -> None:
    files = sandbox.files
    (tmp_path / "big").write_bytes(bytes(4_000_000))
    files.copy_in(tmp_path / "big", place)
    archive = io.BytesIO()
    files.archive(place, archive)
    with pytest.raises(KeyboardInterrupt):
        files.unarchive(Interrupted(archive.getvalue()[:2_000_000]), place / "in")  # type: ignore[arg-type]
    assert files.list(place / "in") == []

    class Full(io.RawIOBase):
        def write(self, data: object) -> int:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.read_to("/dev/zero", Full())  # type: ignore[arg-type]
    assert sandbox.run(["echo", "on"]).stdout == b"on\n"


def test_archives_go_from_one_sandbox_to_another(sandbox: vmette.Sandbox, place: PurePosixPath) -> None:
    in_guest(sandbox, f"mkdir {place}/sub && echo x >{place}/sub/file && chown 5:6 {place}/sub/file")
    archive = io.BytesIO()
    sandbox.files.archive(place, archive)
    archive.seek(0)
    with vmette.Sandbox(BASE) as other:
        other.files.unarchive(archive, "/srv", owners=True)
        assert in_guest(other, "stat -c '%u %g' /srv/sub/file; cat /srv/sub/file") == "5 6\nx\n"


def test_files_keep_their_sandbox() -> None:
    files = vmette.Sandbox(BASE).files
    gc.collect()
    assert files.exists("/etc")
    del files
    gc.collect()


def test_a_sandbox_that_ends_ends_what_goes_on() -> None:
    with vmette.Sandbox(BASE) as sandbox:
        files = sandbox.files
        started = threading.Event()

        class File(io.RawIOBase):
            def write(self, data: object) -> int:
                started.set()
                return 0

        with ThreadPoolExecutor(1) as pool:
            endless = pool.submit(files.read_to, "/dev/zero", File(), max_bytes=1 << 60)  # type: ignore[arg-type]
            assert started.wait(60)
            sandbox.close()
            with pytest.raises(vmette.SandboxClosed):
                endless.result()
        with pytest.raises(vmette.SandboxClosed):
            files.read("/etc/passwd")
