"""`vmette.tree`: what an attacker who owns the tree can do to those who copy into it or measure it."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmette.tree import TreeStat, copy_into, stat_tree

P = ParamSpec("P")
R = TypeVar("R")

LIBC = ctypes.CDLL(None, use_errno=True)
CONTENT = b"the new content"
TIME = 1_600_000_000_123_456_789
SHM = "/dev/shm"
"""A tmpfs: no fsync to wait for, and it keeps any time and size."""


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert set(Path("/proc/self/fd").iterdir()) == before


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    (path / "b").mkdir(parents=True)
    write(path / "file", b"kept")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", CONTENT)


def write(path: Path, content: bytes, mtime_ns: int = TIME) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def names_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def assert_untouched(outside: Path) -> None:
    assert names_below(outside) == {"b", "file"}
    assert (outside / "file").read_bytes() == b"kept"


def refuse_openat2(error: int) -> None:
    """Has openat2 fail in this thread from now on: with ENOSYS as kernels before 5.6 do, with EPERM as old Docker."""
    load_number, jump_if_equal, leave = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    instructions = (
        (load_number, 0, 0, 0),
        (jump_if_equal, 0, 1, 437),
        (leave, 0, 0, 0x00050000 | error),  # SECCOMP_RET_ERRNO
        (leave, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    )
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in instructions))
    header = struct.pack("@H0P", len(instructions)) + struct.pack("P", ctypes.addressof(program))
    assert LIBC.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert LIBC.prctl(22, 2, ctypes.create_string_buffer(header)) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    assert LIBC.syscall(437, -1, None, None, 0) == -1
    assert ctypes.get_errno() == error


class Caller:
    """Calls functions where openat2 works, or in a thread where it does not."""

    def __init__(self, thread: Executor | None) -> None:
        self._thread = thread

    def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        if self._thread is None:
            return function(*args, **kwargs)
        return self._thread.submit(function, *args, **kwargs).result()


@pytest.fixture(params=[None, errno.ENOSYS, errno.EPERM], ids=["openat2", "ENOSYS", "EPERM"])
def call(request: pytest.FixtureRequest) -> Iterator[Caller]:
    if request.param is None:
        yield Caller(None)
        return
    with ThreadPoolExecutor(1, initializer=refuse_openat2, initargs=(request.param,)) as thread:
        yield Caller(thread)


def run_python(code: str, *args: str | Path, cwd: Path, inside: tuple[str, ...] = ()) -> object:
    """What `code` prints, as JSON."""
    command = [*inside, sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


UNPRIVILEGED = """
import json, os, vmette._native
from vmette.tree import copy_into, stat_tree
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    print(json.dumps(repr({})))
except OSError as error:
    print(error.errno)
"""


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """While it lasts, `one` and `other` change places as fast as they can. Each name is always there."""
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            assert LIBC.renameat2(-100, bytes(one), -100, bytes(other), 2) == 0  # AT_FDCWD, RENAME_EXCHANGE

    with ThreadPoolExecutor(1) as thread:
        swapper = thread.submit(swap)
        try:
            yield
        finally:
            stop.set()
            swapper.result()


# --- copy_into: what it copies


def test_copy_makes_missing_directories(root: Path, source: Path, call: Caller) -> None:
    assert call(copy_into, root, "a/b/c/file", source) is True
    assert (root / "a/b/c/file").read_bytes() == CONTENT
    assert names_below(root) == {"a", "a/b", "a/b/c", "a/b/c/file"}


def test_directories_that_it_makes_can_be_passed_by_others_whatever_the_umask(root: Path, source: Path) -> None:
    (root / "there").mkdir(mode=0o700)
    before = os.umask(0o077)
    try:
        copy_into(root, "there/made/file", source, 0o666)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((root / path).stat().st_mode) for path in ("there", "there/made", "there/made/file")]
    assert modes == [0o700, 0o755, 0o666]


@pytest.mark.parametrize("mode", [0o644, 0o755, 0o400, 0o4711])
def test_mode_and_mtime(root: Path, source: Path, mode: int) -> None:
    copy_into(root, "file", source, mode)
    status = (root / "file").stat()
    assert stat.S_IMODE(status.st_mode) == mode
    assert status.st_mtime_ns == TIME


def test_mode_is_0644_unless_told_otherwise(root: Path, source: Path) -> None:
    copy_into(root, "file", source)
    assert stat.S_IMODE((root / "file").stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("old", "age", "copied"),
    [
        (b"the old content", 0, False),
        (b"the old content", -1, False),
        (b"the old content", -(10**9), False),
        (b"the old content", 1, True),
        (b"the old content", 10**9, True),
        (b"another size", -(10**9), True),
        (b"", 0, True),
    ],
)
def test_a_target_is_left_alone_if_its_size_is_equal_and_it_is_not_older(
    root: Path, source: Path, old: bytes, age: int, copied: bool
) -> None:
    target = write(root / "a/file", old, TIME - age)
    inode = target.stat().st_ino
    assert copy_into(root, "a/file", source) is copied
    assert target.read_bytes() == (CONTENT if copied else old)
    assert (target.stat().st_ino != inode) is copied


def test_a_second_copy_has_nothing_to_do(root: Path, source: Path, call: Caller) -> None:
    assert [call(copy_into, root, "a/file", source) for _ in range(3)] == [True, False, False]


@pytest.mark.parametrize("size", [0, 1, 65536, (32 << 20) + 4097])
def test_content_is_byte_exact(root: Path, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    copy_into(root, "file", write(tmp_path / "big", content))
    assert (root / "file").read_bytes() == content


def test_sparse_source(root: Path, tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.seek(3 << 20)
        file.write(b"end")
    copy_into(root, "file", tmp_path / "sparse")
    assert (root / "file").read_bytes() == bytes(3 << 20) + b"end"


def test_a_file_that_the_kernel_cannot_copy_by_itself_is_read_and_written(root: Path) -> None:
    copy_into(root, "file", "/proc/version")
    assert (root / "file").read_bytes() == Path("/proc/version").read_bytes()


def test_a_source_may_be_a_symlink_and_the_root_too(root: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source.name)
    (tmp_path / "current").symlink_to(root.name)
    assert copy_into(tmp_path / "current", "file", tmp_path / "link")
    assert (root / "file").read_bytes() == CONTENT
    assert not (root / "file").is_symlink()


def test_paths_may_be_strings_relative_and_not_utf8(
    root: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9/\xff")
    copy_into("root", name, "source")
    assert (root / name).read_bytes() == CONTENT


# --- copy_into: symlinks and other things in the way


@pytest.mark.parametrize("target", ["{outside}", "../outside", "../outside/file", "real", "real/..", "nowhere", "link"])
@pytest.mark.parametrize("place", ["link/file", "link/b/file", "real/link/file", "real/b/link/new/file"])
def test_a_symlink_among_the_parents_is_refused(
    root: Path, outside: Path, source: Path, call: Caller, target: str, place: str
) -> None:
    (root / "real/b").mkdir(parents=True)
    link = root / place[: place.index("link") + 4]
    link.symlink_to(target.format(outside=outside))
    before = names_below(root)
    with pytest.raises(OSError) as caught:
        call(copy_into, root, place, source)
    assert caught.value.errno == errno.ELOOP
    assert caught.value.filename == f"{root}/{place}"
    assert names_below(root) == before
    assert_untouched(outside)


@pytest.mark.parametrize("target", ["{outside}/file", "{outside}/new", "{outside}", "../../outside/file", "file"])
def test_a_symlink_at_the_end_is_replaced(root: Path, outside: Path, source: Path, call: Caller, target: str) -> None:
    (root / "a").mkdir()
    (root / "a/file").symlink_to(target.format(outside=outside))
    assert call(copy_into, root, "a/file", source) is True
    assert not (root / "a/file").is_symlink()
    assert (root / "a/file").read_bytes() == CONTENT
    assert_untouched(outside)


def test_an_up_to_date_file_behind_a_symlink_does_not_count(root: Path, source: Path) -> None:
    (root / "file").symlink_to(source)
    assert copy_into(root, "file", source) is True
    assert not (root / "file").is_symlink()


def test_a_hard_link_is_parted_from_its_other_name(root: Path, outside: Path, source: Path) -> None:
    (root / "file").hardlink_to(outside / "file")
    assert copy_into(root, "file", source)
    assert_untouched(outside)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(0, 0))  # the one that needs no privilege


def make_socket(path: Path) -> None:
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(f"/proc/self/fd/{directory}/{path.name}")  # the name of a socket has to be short
    finally:
        os.close(directory)


SPECIAL = pytest.mark.parametrize("make", [make_fifo, make_device, make_socket])


@SPECIAL
def test_a_special_file_at_the_end_is_replaced(root: Path, source: Path, make: Callable[[Path], None]) -> None:
    make(root / "file")
    assert copy_into(root, "file", source) is True
    assert (root / "file").read_bytes() == CONTENT


@SPECIAL
def test_a_special_file_is_no_source_and_does_not_hold_us(
    root: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "special")
    with pytest.raises(OSError) as caught:
        copy_into(root, "a/file", tmp_path / "special")
    assert caught.value.errno in {errno.EINVAL, errno.ENXIO}
    assert names_below(root) == set()


# --- copy_into: what it refuses


BAD_PATHS = [
    *("", ".", "..", "/", "/file", "//file", "a/", "a//file", "./file", "a/./file", "a/.", "a/..", "../file"),
    *("a/../file", "a/../../file", "a" * 256, f"a/{'b' * 256}/c", "file\0", "a\0/../file"),
    pytest.param("/".join(["a" * 127] * 32), id="4095 bytes and the NUL too many"),
]


@pytest.mark.parametrize("relative", BAD_PATHS)
def test_paths_that_are_not_plain_are_refused(root: Path, source: Path, call: Caller, relative: str) -> None:
    if len(relative) == 4095:
        relative += "a"
    with pytest.raises(OSError) as caught:
        call(copy_into, root, relative, source)
    assert caught.value.errno == errno.EINVAL
    assert names_below(root) == set()


@pytest.mark.parametrize("relative", ["...", ".a", "a..", "..a/.b", "a" * 255, "a" * 255 + "/" + "b" * 255, " ", "\n"])
def test_odd_but_plain_paths_are_taken(root: Path, source: Path, relative: str) -> None:
    assert copy_into(root, relative, source)
    assert (root / relative).read_bytes() == CONTENT


def test_the_longest_path(source: Path, call: Caller) -> None:
    relative = "/".join(["a" * 255] * 16)
    assert len(relative) == 4095
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        assert call(copy_into, directory, relative, source) is True
        assert call(copy_into, directory, relative, source) is False
        assert call(stat_tree, directory).entries == 16


@settings(max_examples=300, deadline=None)
@given(relative=st.text("a./\0", max_size=8))
def test_exactly_the_plain_paths_are_taken(relative: str) -> None:
    plain = "\0" not in relative and all(part not in {"", ".", ".."} for part in relative.split("/"))
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        root, source = Path(directory, "root"), Path(directory, "source")
        root.mkdir()
        source.write_bytes(CONTENT)
        try:
            copied = copy_into(root, relative, source)
        except OSError as error:
            assert error.errno == errno.EINVAL
            copied = False
        assert copied == plain
        assert set(Path(directory).iterdir()) == {root, source}
        assert [path for path in root.rglob("*") if path.is_file()] == ([root / relative] if plain else [])


@pytest.mark.parametrize(
    ("name", "number"),
    [("missing", errno.ENOENT), ("outside", errno.EINVAL), ("outside/file/x", errno.ENOTDIR), ("a\0b", errno.EINVAL)],
)
def test_sources_that_are_no_file(root: Path, outside: Path, tmp_path: Path, name: str, number: int) -> None:
    old = write(root / "file", b"old")
    with pytest.raises(OSError) as caught:
        copy_into(root, "file", tmp_path / name)
    assert caught.value.errno == number
    assert old.read_bytes() == b"old"
    assert names_below(root) == {"file"}


@pytest.mark.parametrize(
    ("name", "number"), [("missing", errno.ENOENT), ("source", errno.ENOTDIR), ("root\0", errno.EINVAL)]
)
def test_roots_that_are_no_directory(root: Path, source: Path, tmp_path: Path, name: str, number: int) -> None:
    with pytest.raises(OSError) as caught:
        copy_into(tmp_path / name, "file", source)
    assert caught.value.errno == number
    with pytest.raises(OSError) as caught:
        copy_into(tmp_path / name, "file", tmp_path / "no source either")
    assert caught.value.errno == number


@pytest.mark.parametrize("full", [False, True])
def test_a_directory_at_the_end_is_not_replaced(root: Path, source: Path, full: bool) -> None:
    (root / "file").mkdir()
    if full:
        write(root / "file/inner", b"old")
    before = names_below(root)
    with pytest.raises(IsADirectoryError):
        copy_into(root, "file", source)
    assert names_below(root) == before


def test_a_file_among_the_parents(root: Path, source: Path, call: Caller) -> None:
    write(root / "a", b"old")
    with pytest.raises(NotADirectoryError):
        call(copy_into, root, "a/b/file", source)
    assert names_below(root) == {"a"}


def test_a_directory_that_may_not_be_written_to(tmp_path: Path) -> None:
    root = tmp_path / "there/root"
    write(root / "file", b"old")
    root.parent.chmod(0o755)
    root.chmod(0o555)
    try:
        code = UNPRIVILEGED.format("copy_into('root', 'file', '/proc/version')")
        assert run_python(code, cwd=root.parent) == errno.EACCES
    finally:
        root.chmod(0o755)
    assert (root / "file").read_bytes() == b"old"
    assert names_below(root) == {"file"}


FULL_DISK = """
import json, os, subprocess, sys
from vmette.tree import copy_into
root, source = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", root], check=True)
os.mkdir(root + "/a")
with open(root + "/a/file", "w") as file:
    file.write("old")
try:
    result = copy_into(root, "a/file", source)
except OSError as error:
    result = error.errno
print(json.dumps([result, sorted(os.listdir(root + "/a")), open(root + "/a/file").read()]))
"""


def test_a_full_disk_leaves_the_old_target_and_nothing_else(root: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "big", bytes(1 << 20))
    namespaces = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--user", "--map-root-user")), "--")
    result = run_python(FULL_DISK, root, source, cwd=tmp_path, inside=namespaces)
    assert result == [errno.ENOSPC, ["file"], "old"]


def test_a_file_that_is_too_large_leaves_the_old_target_and_nothing_else(root: Path, tmp_path: Path) -> None:
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); {FULL_DISK}"
    code = "\n".join(line for line in code.splitlines() if "mount" not in line)
    result = run_python(code, root, write(tmp_path / "big", bytes(1 << 20)), cwd=tmp_path)
    assert result == [errno.EFBIG, ["file"], "old"]


# --- copy_into: several at once


COPY = "import sys; from vmette.tree import copy_into; print(int(copy_into(*sys.argv[1:])))"


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_concurrent_copies_leave_a_whole_file(root: Path, tmp_path: Path, kind: str) -> None:
    size, workers, rounds = 1 << 18, 4, 60 if kind == "threads" else 12
    sources = [write(tmp_path / f"source{i}", bytes([i]) * (size + i)) for i in range(workers)]

    def copy(source: Path) -> object:
        if kind == "threads":
            return copy_into(root, "a/b/file", source)
        return run_python(COPY, root, "a/b/file", source, cwd=tmp_path)

    def assert_whole() -> None:
        data = (root / "a/b/file").read_bytes()
        assert data == data[:1] * (size + data[0])

    with ThreadPoolExecutor(workers) as executor:
        copies = [executor.submit(copy, sources[number % workers]) for number in range(rounds)]
        copies[0].result()
        while not all(each.done() for each in copies):
            assert_whole()
    assert sum(bool(each.result()) for each in copies) > 1
    assert_whole()
    assert names_below(root) == {"a", "a/b", "a/b/file"}


@pytest.mark.parametrize("relative", ["a/{}", "a/b/{}", "a/b/new{}/c"])
def test_a_parent_that_turns_into_a_symlink_is_never_followed(source: Path, call: Caller, relative: str) -> None:
    outcomes = {"copied": 0, "refused": 0}
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        root, outside = Path(directory, "root"), Path(directory, "outside")
        (root / "a/b").mkdir(parents=True)
        (outside / "b").mkdir(parents=True)
        (root / "link").symlink_to(outside)
        with swapping(root / "a", root / "link"):
            for number in range(20000):
                try:
                    call(copy_into, root, relative.format(number), source)
                    outcomes["copied"] += 1
                except OSError as error:
                    assert error.errno in {errno.ELOOP, errno.ENOTDIR}  # which, is a race too
                    outcomes["refused"] += 1
                if min(outcomes.values()) >= 300:
                    break
        assert min(outcomes.values()) > 0, "the race did not take place"
        assert names_below(outside) == {"b"}


# --- stat_tree


def reference(root: str) -> TreeStat:
    entries, size, newest = 0, 0, Path(root).stat().st_mtime_ns
    for directory, directories, files in os.walk(root, followlinks=False):
        for name in directories + files:
            status = Path(directory, name).lstat()
            entries += 1
            newest = max(newest, status.st_mtime_ns)
            size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return TreeStat(entries, size, newest)


def test_stat_of_an_empty_tree(root: Path) -> None:
    os.utime(root, ns=(0, TIME))
    assert stat_tree(root) == TreeStat(0, 0, TIME)


@pytest.mark.parametrize("newest", [".", "a", "a/b", "a/b/file", "file", "link", "hard"])
def test_stat_counts_all_and_finds_the_newest_wherever_it_is(
    root: Path, outside: Path, call: Caller, newest: str
) -> None:
    write(root / "a/b/file", b"12345")
    write(root / "file", b"123")
    (root / "hard").hardlink_to(write(root / "other", b"1234567"))
    (root / "link").symlink_to(outside)
    for path in (root, *root.rglob("*")):
        os.utime(path, ns=(TIME, TIME), follow_symlinks=False)
    os.utime(root / newest, ns=(TIME, TIME + 1), follow_symlinks=False)
    assert call(stat_tree, root) == TreeStat(7, 5 + 3 + 7 + 7, TIME + 1)


def test_stat_does_not_follow_symlinks(root: Path, outside: Path, call: Caller) -> None:
    (root / "d").mkdir()
    for name, target in {"self": "self", "up": "..", "d/up": "..", "out": str(outside), "no": "/nowhere"}.items():
        (root / name).symlink_to(target)
    assert call(stat_tree, root).entries == 6
    assert call(stat_tree, root).size == 0


def test_stat_takes_a_root_that_is_a_symlink(root: Path, tmp_path: Path) -> None:
    write(root / "file", b"123")
    (tmp_path / "current").symlink_to("root")
    assert stat_tree(tmp_path / "current") == stat_tree(str(root)) == reference(str(root))


@SPECIAL
def test_stat_counts_special_files(root: Path, make: Callable[[Path], None]) -> None:
    make(root / "special")
    assert stat_tree(root) == reference(str(root))
    assert stat_tree(root).entries == 1


@contextmanager
def deep_tree(root: Path, name: str, depth: int) -> Iterator[TreeStat]:
    """What stat_tree has to say of `depth` directories in each other, which no single path reaches."""
    directory = os.open(root, os.O_RDONLY)
    try:
        for _ in range(depth):
            os.mkdir(name, dir_fd=directory)
            child = os.open(name, os.O_RDONLY, dir_fd=directory)
            os.close(directory)
            directory = child
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=directory))
        os.truncate(f"/proc/self/fd/{directory}/file", 12345)
        os.utime("file", ns=(0, 2 * TIME), dir_fd=directory)
        yield TreeStat(depth + 1, 12345, 2 * TIME)
    finally:
        os.close(directory)
        subprocess.run(["rm", "-rf", root], check=True)  # shutil.rmtree recurses, and Python has a limit for that


@pytest.mark.parametrize(("length", "total"), [(1, 5000), (2, 5000), (3, 6000), (16, 6000), (100, 9000)])
def test_stat_of_a_tree_deeper_than_a_path_can_be_long(root: Path, length: int, total: int) -> None:
    with deep_tree(root, "d" * length, total // (length + 1)) as expected:
        assert stat_tree(root) == expected


@pytest.mark.parametrize("length", [240, 254, 255])
def test_stat_of_a_deep_tree_with_long_names(root: Path, call: Caller, length: int) -> None:
    with deep_tree(root, "d" * length, 50) as expected:
        assert call(stat_tree, root) == expected


def test_stat_of_a_wide_tree(root: Path) -> None:
    for number in range(2000):
        (root / str(number)).mkdir()
    assert stat_tree(root).entries == 2000


def test_stat_does_not_overflow() -> None:
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        for number in range(3):
            path = Path(directory, str(number))
            path.touch()
            os.truncate(path, 2**63 - 1)
            os.utime(path, (2**40, 2**40))
        assert stat_tree(directory) == TreeStat(3, 2**64 - 1, 2**63 - 1)


def test_stat_of_times_before_1970_and_before_what_fits() -> None:
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        os.utime(directory, ns=(-1, -1))
        assert stat_tree(directory).newest == -1
        os.utime(directory, (-(2**40), -(2**40)))
        assert stat_tree(directory).newest == -(2**63)


@pytest.mark.parametrize(
    ("name", "number"), [("missing", errno.ENOENT), ("source", errno.ENOTDIR), ("root\0", errno.EINVAL)]
)
def test_stat_of_no_directory(root: Path, source: Path, tmp_path: Path, name: str, number: int) -> None:
    with pytest.raises(OSError) as caught:
        stat_tree(tmp_path / name)
    assert caught.value.errno == number
    assert caught.value.filename == str(tmp_path / name)


@pytest.mark.parametrize("unreadable", ["root", "root/a"])
@pytest.mark.parametrize("mode", [0o000, 0o311, 0o444])
def test_stat_of_what_may_not_be_read(tmp_path: Path, unreadable: str, mode: int) -> None:
    there = tmp_path / "there"
    write(there / "root/a/file", b"123")
    for path in (there, there / "root", there / "root/a"):
        path.chmod(0o755)
    (there / unreadable).chmod(mode)
    try:
        assert run_python(UNPRIVILEGED.format("stat_tree('root')"), cwd=there) == errno.EACCES
    finally:
        (there / unreadable).chmod(0o755)


def test_stat_of_a_tree_that_changes_meanwhile(call: Caller) -> None:
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        root, outside = Path(directory, "root"), Path(directory, "outside")
        for number in range(10):
            (root / f"a/{number}/b").mkdir(parents=True)
            (outside / str(number)).mkdir(parents=True)
            for name in range(1000):
                (outside / f"{number}/{name}").touch()
        (root / "b/c").mkdir(parents=True)
        (root / "link").symlink_to(outside)
        (root / "file").touch()
        seen = set()
        with swapping(root / "a", root / "link"), swapping(root / "b", root / "file"), churning(root / "churn"):
            for _ in range(400):
                seen.add(call(stat_tree, root).entries)
        assert len(seen) > 1, "nothing changed meanwhile"
        assert max(seen) < 1000, "it followed the symlink"


@contextmanager
def churning(path: Path) -> Iterator[None]:
    """While it lasts, directories come and go at `path`."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            (path / "a/b").mkdir(parents=True)
            shutil.rmtree(path)

    with ThreadPoolExecutor(1) as thread:
        churner = thread.submit(churn)
        try:
            yield
        finally:
            stop.set()
            churner.result()


NAMES = (
    st.binary(min_size=1, max_size=12)
    .map(os.fsdecode)
    .filter(lambda name: not set("\0/") & set(name) and name not in {".", ".."})
)
LEAVES = st.one_of(
    st.integers(0, 1 << 33),  # a file of that size
    st.sampled_from([".", "..", "/", "/etc/passwd", "nowhere", "a"]),  # a symlink
    st.none(),  # a FIFO
)
TREES = st.recursive(
    st.dictionaries(NAMES, LEAVES, max_size=4),
    lambda children: st.dictionaries(NAMES, st.one_of(LEAVES, children), max_size=4),
    max_leaves=20,
)


def build(path: Path, node: object, times: Iterator[int]) -> None:
    if isinstance(node, dict):
        path.mkdir(exist_ok=True)
        for name, child in node.items():
            build(path / name, child, times)
    elif isinstance(node, str):
        path.symlink_to(node)
    elif isinstance(node, int):
        path.touch()
        os.truncate(path, node)
    else:
        os.mkfifo(path)
    time = next(times, 0)
    os.utime(path, ns=(time, time), follow_symlinks=False)


@settings(max_examples=150, deadline=None)
@given(tree=TREES, times=st.lists(st.integers(-(10**18), 10**19 // 2), max_size=10))
def test_stat_agrees_with_os_walk(tree: dict[str, object], times: list[int]) -> None:
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        build(Path(directory), tree, iter(times))
        assert stat_tree(directory) == reference(directory)
