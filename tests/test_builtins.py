"""The functions of the guest agent (csrc/guest/builtins.h), built for this host with sanitizers, as programs."""

from __future__ import annotations

import atexit
import errno
import functools
import io
import os
import select
import shutil
import socket
import stat
import struct
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vmette.fuse import DirectoryServer
from vmette.images import archive
from vmette.protocol import Tag, decode_error, decode_record

ROOT = Path(__file__).parent.parent
GUEST = ("builtins", "function", "beneath", "provision", "share", "tar", "untar", "wire")
SOURCES = ("tests/builtins_host.c", *(f"csrc/guest/{name}.c" for name in GUEST))
COMPILE = ("cc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-Icsrc/guest", "-Wl,--wrap=syscall")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SANITIZER_STATUS = 99
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": f"exitcode={SANITIZER_STATUS}",
    "UBSAN_OPTIONS": f"exitcode={SANITIZER_STATUS}",
}
NO_OPENAT2 = "--no-openat2"
CANNOT = 77
"""How builtins_host ends when it may not change its root directory."""

BLOCK = 512
MTIME = 1_700_000_000_123_456_789

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make devices and give files away")


@functools.cache
def build() -> Path:
    """The program builtins_host, made once for all tests and removed at the end."""
    directory = tempfile.mkdtemp(prefix="builtins_host-")
    atexit.register(shutil.rmtree, directory)
    output = Path(directory) / "builtins_host"
    subprocess.run([*COMPILE, *SANITIZE, *SOURCES, "-o", output], cwd=ROOT, check=True)
    return output


def call(*args: str | bytes | Path, data: bytes = b"", cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([build(), *args], input=data, capture_output=True, cwd=cwd, env=ENVIRONMENT)
    if done.returncode == CANNOT:
        pytest.skip(done.stderr.decode())
    assert done.returncode in (0, 1), done.stderr.decode(errors="replace")  # or else a sanitizer has found something
    if done.returncode == 1:
        decode_error(0, done.stderr)
    else:
        assert done.stderr == b""
    return done


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def good(*args: str | bytes | Path, data: bytes = b"", cwd: Path | None = None) -> bytes:
    done = call(*args, data=data, cwd=cwd)
    assert done.returncode == 0, decode_error(0, done.stderr)
    return done.stdout


def bad(*args: str | bytes | Path, data: bytes = b"") -> tuple[int, str]:
    """The errno and the text of what must fail."""
    done = call(*args, data=data)
    assert done.returncode == 1
    assert len(done.stderr) <= 4096
    failure = decode_error(0, done.stderr)
    assert failure.text.isprintable()
    return failure.errno, f"{failure.stage}: {failure.text}"


# --- Arguments


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("format",),
        ("read",),
        ("read", "/dev/null", "-1"),
        ("read", "/dev/null", "0", "1x"),
        ("read", "/dev/null", "0", "1", "2"),
        ("read", "/dev/null", "9223372036854775808"),
        ("write", "/dev/null"),
        ("write", "/dev/null", "8"),
        ("write", "/dev/null", "17777"),
        ("write", "/dev/null", "644", "prepend"),
        ("list", "/", "all"),
        ("stat", "/", "follow"),
        ("mkdir", "/nothing"),
        ("remove", "/nothing", "twice"),
        ("tar",),
        ("untar", "/nothing", "owner"),
        ("secret", "name"),
        ("ca-certs", "now"),
        ("clock", "yesterday"),
        ("clock", "-1"),
        ("share",),
        ("share", "/work", "rw"),
    ],
    ids=" ".join,
)
def test_what_makes_no_sense_is_refused(args: tuple[str, ...]) -> None:
    code, text = bad(*args)
    assert code == errno.EINVAL
    assert text.startswith(f"{args[0]}: " if args and args[0] != "format" else "function: ")


def test_an_error_is_one_line_of_text_whatever_the_name_is(tmp_path: Path) -> None:
    name = b"\n\x1b[31m\xff" + b"x" * 3000
    code, text = bad("read", os.fsencode(tmp_path) + b"/" + name)
    assert code == errno.ENAMETOOLONG
    assert text.endswith(": File name too long")


# --- Files


def test_read(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    file = tmp_path / "file"
    file.write_bytes(data)
    assert good("read", file) == data
    assert good("read", file, "1000000") == data[1000000:]
    assert good("read", file, "2000001", "1048577") == data[2000001:3048578]
    assert good("read", file, str(len(data) + 5)) == b""
    assert good("read", file, "0", "0") == b""
    assert good("read", "/proc/self/comm") == b"builtins_host\n"
    assert good("read", "/dev/zero", "0", "70000") == bytes(70000)
    assert bad("read", tmp_path) == (errno.EISDIR, f"read: {tmp_path}: Is a directory")
    assert bad("read", tmp_path / "none")[0] == errno.ENOENT


def test_what_comes_slowly_is_passed_on_as_it_comes(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen([build(), "read", fifo], stdout=subprocess.PIPE) as process, fifo.open("wb", 0) as writer:
        assert process.stdout is not None
        for word in (b"one", b"two"):
            writer.write(word)
            assert os.read(process.stdout.fileno(), 100) == word
        writer.close()
        assert process.wait() == 0


def test_write(tmp_path: Path) -> None:
    file, data = tmp_path / "file", os.urandom(3 << 20)
    good("write", file, "4751", data=data)
    assert file.read_bytes() == data
    assert stat.S_IMODE(file.stat().st_mode) == 0o4751
    good("write", file, "600", data=b"short")
    assert file.read_bytes() == b"short"
    assert stat.S_IMODE(file.stat().st_mode) & 0o777 == 0o751
    good("write", file, "600", "append", data=b" and more")
    assert file.read_bytes() == b"short and more"
    good("write", tmp_path / "new", "666", "append", data=b"new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666
    (tmp_path / "link").symlink_to("new")
    good("write", tmp_path / "link", "600", data=b"through")
    assert (tmp_path / "new").read_bytes() == b"through"
    assert bad("write", tmp_path, "644")[0] == errno.EISDIR
    assert bad("write", tmp_path / "none" / "file", "644")[0] == errno.ENOENT
    if Path("/dev/full").exists():
        assert bad("write", "/dev/full", "644", data=b"x") == (
            errno.ENOSPC,
            "write: /dev/full: No space left on device",
        )


STAT = struct.Struct("<IIIIQqII")


def packed(st: os.stat_result) -> bytes:
    device = os.major(st.st_rdev), os.minor(st.st_rdev)
    return STAT.pack(st.st_mode, st.st_uid, st.st_gid, st.st_nlink, st.st_size, st.st_mtime_ns, *device)


def test_stat(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"x" * 12345)
    os.utime(file, ns=(0, -1_500_000_000))
    link.symlink_to("file")
    assert list(decode_record(good("stat", file))) == [(Tag.STAT, packed(file.stat()))]
    assert list(decode_record(good("stat", link))) == [(Tag.STAT, packed(file.stat()))]
    expected = [(Tag.STAT, packed(link.lstat())), (Tag.TARGET, b"file")]
    assert list(decode_record(good("stat", link, "nofollow"))) == expected
    assert list(decode_record(good("stat", "/dev/null"))) == [(Tag.STAT, packed(Path("/dev/null").stat()))]
    assert bad("stat", tmp_path / "none")[0] == errno.ENOENT


def test_list(tmp_path: Path) -> None:
    base = os.fsencode(tmp_path)
    expected: dict[bytes, tuple[bytes, bytes | None]] = {}
    for number in range(3000):
        (tmp_path / f"{number:0250}").touch()
    Path(os.fsdecode(base + b"/\xff\n")).mkdir()
    (tmp_path / "long").symlink_to("\udcfe" * 4000)
    (tmp_path / "dangling").symlink_to("/none")
    for name in map(os.fsencode, names(tmp_path)):
        path = base + b"/" + name
        expected[name] = packed(os.lstat(path)), os.readlink(path) if os.path.islink(path) else None  # noqa: PTH114, PTH115
    found: dict[bytes, tuple[bytes, bytes | None]] = {}
    name = b""
    for tag, value in decode_record(good("list", tmp_path)):
        if tag == Tag.NAME:
            name = value
        elif tag == Tag.STAT:
            assert name not in found
            found[name] = value, None
        else:
            assert tag == Tag.TARGET
            found[name] = found[name][0], value
    assert found == expected
    (tmp_path / "empty").mkdir()
    assert good("list", tmp_path / "empty") == b""
    assert bad("list", base + b"/long")[0] == errno.ENAMETOOLONG
    assert bad("list", "/dev/null")[0] == errno.ENOTDIR


def test_mkdir(tmp_path: Path) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    good("mkdir", tmp_path / "one", "1777")
    assert mode(tmp_path / "one") == 0o1777
    assert bad("mkdir", tmp_path / "one", "755")[0] == errno.EEXIST
    assert bad("mkdir", tmp_path / "a" / "b", "755")[0] == errno.ENOENT
    good("mkdir", f"{tmp_path}//a/./b///c/", "2700", "parents")
    assert [mode(tmp_path / name) for name in ("a", "a/b", "a/b/c")] == [0o755, 0o755, 0o2700]
    good("mkdir", tmp_path / "a" / "b" / "c", "755", "parents")
    assert mode(tmp_path / "a" / "b" / "c") == 0o2700
    good("mkdir", "x/y", "755", "parents", cwd=tmp_path)
    assert (tmp_path / "x" / "y").is_dir()
    good("mkdir", "/", "755", "parents")
    (tmp_path / "file").touch()
    assert bad("mkdir", tmp_path / "file", "755", "parents")[0] == errno.EEXIST
    assert bad("mkdir", tmp_path / "file" / "x", "755", "parents")[0] == errno.ENOTDIR
    assert bad("mkdir", "x/" * 3000, "755", "parents")[0] == errno.ENAMETOOLONG


# --- Removal


def test_remove(tmp_path: Path) -> None:
    file, full, link = tmp_path / "file", tmp_path / "full", tmp_path / "link"
    file.touch()
    good("remove", file)
    assert not file.exists()
    assert bad("remove", file)[0] == errno.ENOENT
    assert bad("remove", file, "recursive")[0] == errno.ENOENT
    assert bad("remove", tmp_path / "none" / "file")[0] == errno.ENOENT
    good("remove", file, "missing")
    good("remove", tmp_path / "none" / "file", "recursive", "missing")
    (full / "sub").mkdir(parents=True)
    (full / "sub" / "file").touch()
    link.symlink_to(full)
    assert bad("remove", full)[0] == errno.ENOTEMPTY
    good("remove", f"{link}/", "recursive")
    assert (full / "sub" / "file").exists()
    assert not link.is_symlink()
    (full / "out").symlink_to(tmp_path)
    os.mkfifo(full / "sub" / "fifo")
    file.touch()
    good("remove", f"{full}//", "recursive")
    assert list(tmp_path.iterdir()) == [file]
    good("remove", "file", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["/", "//", "/.", "/usr/..", ".", "..", ""])
def test_what_has_no_name_is_not_removed(path: str, tmp_path: Path) -> None:
    done = call("--root", tmp_path, "remove", path, "recursive")
    assert decode_error(0, done.stderr).errno == errno.EINVAL
    assert tmp_path.exists()


def deep_tree(top: Path, depth: int) -> None:
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def test_deep_trees_are_removed_or_refused(tmp_path: Path) -> None:
    try:
        deep_tree(tmp_path, 2000)
        good("remove", tmp_path / "d", "recursive")
        assert not (tmp_path / "d").exists()
        deep_tree(tmp_path, 2100)
        assert bad("remove", tmp_path / "d", "recursive") == (errno.ELOOP, "remove: d: the tree is too deep")
        assert bad("tar", tmp_path)[0] == errno.ENAMETOOLONG
    finally:  # pytest could not
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_what_is_swapped_while_it_is_removed_leads_nowhere_else(tmp_path: Path) -> None:
    """A directory and a link to one that is to stay change places all the time."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    stop = threading.Event()
    tree = tmp_path / "tree"

    def swap() -> None:
        (tmp_path / "link").symlink_to(kept)
        while not stop.is_set():
            for one, other in (("tree/sub", "away"), ("link", "tree/sub"), ("tree/sub", "link"), ("away", "tree/sub")):
                with suppress(OSError):
                    (tmp_path / one).rename(tmp_path / other)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(30):
            with suppress(OSError):  # mkdir found the link, or nothing, where the directory had been
                (tree / "sub" / "deep").mkdir(parents=True, exist_ok=True)
            call("remove", tree, "recursive")
            assert (kept / "file").exists()
    finally:
        stop.set()
        thread.join()


# --- Archives: both ways


def below(top: Path) -> list[Path]:
    """All that is in a tree. (Path.rglob of Python 3.11.2, which is Debian 12's, fails at the link.)"""
    names = ((Path(where), [*directories, *files]) for where, directories, files in os.walk(top))
    return sorted(where / name for where, found in names for name in found)


def make_tree(top: Path) -> None:
    """Everything that an archive can hold, for any user."""
    (top / "sub" / "empty").mkdir(parents=True)
    (top / "file").write_bytes(b"hello")
    (top / "block").write_bytes(os.urandom(BLOCK))
    (top / "large").write_bytes(os.urandom((3 << 20) + 17))
    (top / "none").touch()
    (top / "setuid").write_bytes(b"x")
    (top / "setuid").chmod(0o4755)
    os.link(top / "file", top / "sub" / "second")
    (top / "link").symlink_to("../out/of/it")
    (top / "sub" / "far").symlink_to("x" * 900)
    os.mkfifo(top / "fifo", 0o640)
    (top / ("n" * 200)).write_bytes(b"long")
    (top / "\udcff\udcfe").write_bytes(b"not UTF-8")
    (top / ("\udcff" * 150)).write_bytes(b"long and not UTF-8")
    deep = top.joinpath(*["directory"] * 30)
    deep.mkdir(parents=True)
    (deep / "é").write_bytes(b"deep")
    times = iter([0, 1, -1_250_000_000, (1 << 33) * 10**9, MTIME])
    for path in reversed(below(top)):
        os.utime(path, ns=(0, next(times, MTIME)), follow_symlinks=False)
    (top / "sub").chmod(0o2750)
    (top / "sub" / "empty").chmod(0o1777)
    os.utime(top / "sub", ns=(0, MTIME))
    top.chmod(0o711)
    os.utime(top, ns=(0, 5))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("tree") / "top"
    make_tree(top)
    return top


def snapshot(top: Path) -> dict[bytes, tuple[object, ...]]:
    """What a tree holds. Files that are one have one number."""
    found: dict[bytes, tuple[object, ...]] = {}
    numbers: dict[int, bytes] = {}
    for path in [top, *below(top)]:
        st = path.lstat()
        name = os.fsencode(path.relative_to(top))
        content: bytes | int = st.st_rdev
        if stat.S_ISREG(st.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(st.st_mode):
            content = os.fsencode(path.readlink())
        first = numbers.setdefault(st.st_ino, name)
        found[name] = (oct(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns, content, first)
    return found


@pytest.mark.parametrize("option", [(), (NO_OPENAT2,)], ids=["openat2", "walk"])
def test_a_tree_survives_the_round_trip(tree: Path, tmp_path: Path, option: tuple[str, ...]) -> None:
    good(*option, "untar", tmp_path / "new", data=good("tar", tree))
    assert snapshot(tmp_path / "new") == snapshot(tree)


def test_gnu_tar_understands_what_we_write(tree: Path, tmp_path: Path) -> None:
    command: list[str | Path] = ["tar", "-xp", "-C", tmp_path, "-f", "-"]
    done = subprocess.run(command, input=good("tar", tree), check=True, stderr=subprocess.PIPE)
    assert snapshot(tmp_path) == snapshot(tree)
    assert b"unknown" not in done.stderr


class Kept:
    """Takes files' bytes for `archive.entries`."""

    def __init__(self) -> None:
        self.bytes = bytearray()

    def begin(self) -> int:
        return len(self.bytes)

    def write(self, data: memoryview | bytes) -> None:
        self.bytes += data

    def skip(self, size: int) -> None:
        self.bytes += bytes(size)


def read_by_host(data: bytes) -> tuple[dict[bytes, archive.Entry], bytes]:
    kept = Kept()
    stream = archive.Stream(io.BytesIO(data), 1 << 40)
    found = list(archive.entries(stream, kept, max_entries=1000, whiteouts=False))
    assert len({entry.path for entry in found}) == len(found)
    return {entry.path: entry for entry in found}, bytes(kept.bytes)


def test_the_hosts_reader_understands_what_we_write(tree: Path) -> None:
    found, data = read_by_host(good("tar", tree))
    expected = snapshot(tree)
    assert {path or b"." for path in found} == set(expected)
    for path, entry in found.items():
        mode, uid, gid, mtime, content, first = expected[path or b"."]
        if entry.kind == "h":
            assert entry.target in (first, b"sub/second")
            continue
        assert (oct(stat.S_IMODE(int(str(mode), 8))), entry.uid, entry.gid) == (oct(entry.mode), uid, gid)
        assert entry.mtime == mtime
        if entry.kind == "f":
            assert data[entry.offset : entry.offset + entry.size] == content
        if entry.kind == "l":
            assert entry.target == content


def test_pythons_tarfile_understands_what_we_write(tree: Path) -> None:
    expected = snapshot(tree)
    with tarfile.open(fileobj=io.BytesIO(good("tar", tree))) as tar:
        members = {os.fsencode(member.name): member for member in tar}
        assert set(members) == set(expected)
        for name, member in members.items():
            assert oct(member.mode) == oct(stat.S_IMODE(int(str(expected[name][0]), 8)))
            if member.isfile():
                file = tar.extractfile(member)
                assert file is not None
                assert file.read() == expected[name][4]


FORMATS = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]


@pytest.mark.parametrize("format_", FORMATS, ids=["pax", "gnu"])
def test_we_understand_what_pythons_tarfile_writes(tree: Path, tmp_path: Path, format_: int) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=format_) as tar:
        tar.add(tree, ".")
    good("untar", tmp_path / "new", data=data.getvalue())
    assert without_fractions(snapshot(tmp_path / "new")) == without_fractions(snapshot(tree))


@pytest.mark.parametrize("format_", ["pax", "gnu"])
def test_we_understand_what_gnu_tar_writes(tree: Path, tmp_path: Path, format_: str) -> None:
    command: list[str | Path] = ["tar", "-c", f"--format={format_}", "-C", tree, "-f", "-", "."]
    data = subprocess.run(command, check=True, capture_output=True).stdout
    good("untar", tmp_path / "new", data=data)
    assert without_fractions(snapshot(tmp_path / "new")) == without_fractions(snapshot(tree))


def without_fractions(found: dict[bytes, tuple[Any, ...]]) -> dict[bytes, tuple[Any, ...]]:
    """Times to the second, and none of those before 1970, which are rounded either way."""
    return {k: (*v[:3], v[3] // 10**9 if v[3] >= 0 else None, *v[4:]) for k, v in found.items()}


# --- Archives: what is written


def test_one_file_is_one_entry(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tree / "file")
    for path, name in ((tree / "file", b"file"), (tmp_path / "link", b"link")):
        found, data = read_by_host(good("tar", path))
        assert [(entry.path, entry.kind) for entry in found.values()] == [(name, "f")]
        assert data == b"hello"
    (tmp_path / "directory").symlink_to(tree)
    assert set(read_by_host(good("tar", tmp_path / "directory"))[0]) == set(read_by_host(good("tar", tree))[0])
    assert bad("tar", tmp_path / "none")[0] == errno.ENOENT


def test_sockets_are_left_out_and_attributes_are_kept(tmp_path: Path) -> None:
    top, new = tmp_path / "top", tmp_path / "new"
    top.mkdir()
    (top / "file").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(top / "socket"))
    try:
        os.setxattr(top, "user.of", b"the directory")
        os.setxattr(top / "file", "user.of", bytes(range(256)) * 4)
    except OSError:
        pytest.skip("the file system has no extended attributes")
    data = good("tar", top)
    assert {path: entry.kind for path, entry in read_by_host(data)[0].items()} == {b"": "d", b"file": "f"}
    assert read_by_host(data)[0][b"file"].xattrs == {b"user.of": bytes(range(256)) * 4}
    good("untar", new, data=data)
    assert os.getxattr(new, "user.of") == b"the directory"
    assert os.getxattr(new / "file", "user.of") == bytes(range(256)) * 4


@as_root
def test_owners_and_devices(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    for name, number in (("small", 1000), ("large", 4_000_000_000)):
        (top / name).touch()
        os.chown(top / name, number, number + 1)
        (top / name).chmod(0o6755)
    (top / "link").symlink_to("nothing")
    os.chown(top / "link", 5, 6, follow_symlinks=False)
    os.chown(top, 7, 8)
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(top / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 300_000))
    data = good("tar", top)
    good("untar", tmp_path / "new", "owners", data=data)
    assert snapshot(tmp_path / "new") == snapshot(top)
    code, text = bad("untar", tmp_path / "other", data=data)
    assert code == errno.EPERM
    assert "device" in text
    (top / "null").unlink()
    (top / "disk").unlink()
    good("untar", tmp_path / "mine", data=good("tar", top))
    assert {(e.stat(follow_symlinks=False).st_uid) for e in os.scandir(tmp_path / "mine")} == {0}


def test_a_file_beyond_8_gib(tmp_path: Path) -> None:
    """Its header alone: what follows is cut off."""
    with (tmp_path / "huge").open("wb") as file:
        file.truncate((8 << 30) + 5)
    with subprocess.Popen([build(), "tar", tmp_path / "huge"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        head = process.stdout.read(1 << 16)
        process.stdout.close()
        process.wait()
    with tarfile.open(fileobj=io.BytesIO(head), mode="r|") as tar:
        member = tar.next()
        assert member is not None
        assert member.size == (8 << 30) + 5


def test_a_file_that_changes_while_it_is_read_leaves_the_archive_sound(tmp_path: Path) -> None:
    """The pipe is not read before the file has another size: the archive's writer waits in the middle of it."""
    size = 8 << 20
    for name, new in (("shrinks", 1000), ("grows", 2 * size)):
        top = tmp_path / name
        top.mkdir()
        (top / "file").write_bytes(b"x" * size)
        with subprocess.Popen([build(), "tar", top], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            head = process.stdout.read(1 << 16)
            os.truncate(top / "file", new)
            found, data = read_by_host(head + process.stdout.read())
        assert found[b"file"].size == size
        assert len(data.rstrip(b"\0")) == (size if name == "grows" else len(data.rstrip(b"\0")))
        assert set(data) <= set(b"x\0")
        assert (data[-1:] == b"\0") == (name == "shrinks")


def test_the_kernels_own_file_systems_are_empty_directories(tmp_path: Path) -> None:
    """And so the archive of a whole system ends."""
    (tmp_path / "proc").mkdir()
    script = 'mount -t proc proc "$1/proc" && exec "$2" tar "$1"'
    own = [] if os.geteuid() == 0 else ["-r"]
    command: list[str | Path] = ["unshare", *own, "-m", "-p", "-f", "sh", "-c", script, "sh", tmp_path, build()]
    done = subprocess.run(command, capture_output=True)
    if b"mount" in done.stderr or b"unshare" in done.stderr:
        pytest.skip(done.stderr.decode())
    assert done.returncode == 0
    assert set(read_by_host(done.stdout)[0]) == {b"", b"proc"}


def test_a_mounted_directory_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "top" / "mounted").mkdir(parents=True)
    script = 'mount -t tmpfs tmpfs "$1/mounted" && touch "$1/mounted/file" && exec "$2" remove "$1" recursive'
    own = [] if os.geteuid() == 0 else ["-r"]
    command: list[str | Path] = ["unshare", *own, "-m", "sh", "-c", script, "sh", tmp_path / "top", build()]
    done = subprocess.run(command, capture_output=True)
    if b"mount:" in done.stderr or b"unshare" in done.stderr:
        pytest.skip(done.stderr.decode())
    assert done.returncode == 1
    assert decode_error(0, done.stderr).errno == errno.EBUSY


# --- Archives: what is read


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0, mode: int = 0o644) -> bytes:
    """One entry without its data."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, target, size, mode
    return info.tobuf(tarfile.PAX_FORMAT)


def file(name: str, data: bytes = b"data") -> bytes:
    return member(name, size=len(data)) + data + bytes(-len(data) % BLOCK)


END = bytes(2 * BLOCK)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory for archives; what is outside it must be the same afterwards."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"precious")
    before = snapshot(outside)
    (tmp_path / "in").mkdir()
    yield tmp_path / "in"
    assert snapshot(outside) == before
    assert names(tmp_path) == ["in", "outside"]


@pytest.fixture(params=[(), (NO_OPENAT2,)], ids=["openat2", "walk"])
def option(request: pytest.FixtureRequest) -> tuple[str, ...]:
    chosen: tuple[str, ...] = request.param
    return chosen


@pytest.mark.parametrize("name", ["../outside/file", "a/../../outside/file", "..", "/tmp/x", "//x", "a/..", "./../x"])
def test_names_that_lead_elsewhere_are_refused(place: Path, option: tuple[str, ...], name: str) -> None:
    for entry in (file(name), member(name, tarfile.DIRTYPE), member(name, tarfile.SYMTYPE, "x")):
        code, text = bad(*option, "untar", place, data=entry + END)
        assert code == errno.EINVAL
        assert text.startswith("untar: ")
    code, _ = bad(*option, "untar", place, data=member("hard", tarfile.LNKTYPE, name) + END)
    assert code == errno.EINVAL
    assert names(place) == []


@pytest.mark.parametrize("target", ["../outside", "/", "sub", "."])
def test_no_link_is_followed(place: Path, option: tuple[str, ...], target: str) -> None:
    """Whether it was there or comes out of the archive."""
    (place / "sub").mkdir()
    (place / "there").symlink_to(target)
    comes = member("comes", tarfile.SYMTYPE, target)
    for name in ("there", "comes"):
        for entry in (
            file(f"{name}/file"),
            file(f"{name}/new/file"),
            member(f"{name}/directory", tarfile.DIRTYPE),
            member(f"{name}/link", tarfile.SYMTYPE, "x"),
            member("hard", tarfile.LNKTYPE, f"{name}/file"),
        ):
            code, text = bad(*option, "untar", place, data=comes + entry + END)
            assert code == errno.ELOOP, text
        code, _ = bad(*option, "untar", place, data=comes + member(name, tarfile.DIRTYPE, mode=0) + END)
        assert code == errno.ENOTDIR
        assert names(place) == ["comes", "sub", "there"]
        assert names(place / "sub") == []
    good(*option, "untar", place, data=comes + file("comes") + file("there") + END)
    assert (place / "comes").read_bytes() == (place / "there").read_bytes() == b"data"
    assert not (place / "comes").is_symlink()


def test_a_link_to_a_link_is_a_link(place: Path, option: tuple[str, ...]) -> None:
    data = member("link", tarfile.SYMTYPE, "../outside/file") + member("hard", tarfile.LNKTYPE, "link") + file("hard")
    good(*option, "untar", place, data=data + END)
    assert (place / "hard").read_bytes() == b"data"
    assert (place / "link").is_symlink()


def test_a_file_is_replaced_and_not_written_to(place: Path) -> None:
    os.link(place.parent / "outside" / "file", place / "file")
    (place / "open").write_bytes(b"old")
    with (place / "open").open("rb") as before:
        good("untar", place, data=file("file") + file("open") + END)
        assert before.read() == b"old"
    assert (place / "file").read_bytes() == (place / "open").read_bytes() == b"data"


def test_hard_links_to_themselves_and_twice(place: Path) -> None:
    link = member("link", tarfile.LNKTYPE, "file")
    good("untar", place, data=file("file") + link + link + member("file", tarfile.LNKTYPE, "./link") + END)
    assert names(place) == ["file", "link"]
    assert (place / "file").stat().st_nlink == 2


def test_directories_merge_and_conflicts_are_errors(place: Path, option: tuple[str, ...]) -> None:
    (place / "a" / "b").mkdir(parents=True)
    (place / "a" / "kept").touch()
    entries = [member("a", tarfile.DIRTYPE, mode=0o500), file("a/new"), file("x/y/z"), member("x/y", tarfile.DIRTYPE)]
    good(*option, "untar", place, data=b"".join(entries) + END)
    assert names(place / "a") == ["b", "kept", "new"]
    assert [stat.S_IMODE((place / n).stat().st_mode) for n in ("a", "x", "x/y")] == [0o500, 0o755, 0o644]
    (place / "a").chmod(0o700)
    (place / "x" / "y").chmod(0o700)
    assert bad(*option, "untar", place, data=member("a/new", tarfile.DIRTYPE) + END)[0] == errno.ENOTDIR
    assert bad(*option, "untar", place, data=file("a/b") + END)[0] == errno.EISDIR
    assert bad(*option, "untar", place, data=file("a/new/x") + END)[0] == errno.ENOTDIR
    assert bad(*option, "untar", place, data=file(".") + END)[0] == errno.EBADMSG
    assert bad(*option, "untar", place, data=member("h", tarfile.LNKTYPE, "a/b") + END)[0] == errno.EPERM
    assert bad(*option, "untar", place, data=member("h", tarfile.LNKTYPE, "none") + END)[0] == errno.ENOENT
    assert names(place) == ["a", "x"]
    assert names(place / "a") == ["b", "kept", "new"]


def test_the_directory_is_made_and_may_be_a_file(tmp_path: Path) -> None:
    good("untar", tmp_path / "new", data=END)
    assert (tmp_path / "new").is_dir()
    (tmp_path / "file").touch()
    assert bad("untar", tmp_path / "file", data=END)[0] == errno.ENOTDIR
    assert bad("untar", tmp_path / "no" / "such", data=END)[0] == errno.ENOENT


def test_a_truncated_archive_is_told(tmp_path: Path) -> None:
    whole = file("one", b"x" * 700) + member("n" * 150, tarfile.SYMTYPE, "t" * 200) + file("two")
    for size in [*range(0, len(whole) + 1, BLOCK), 1, 511, 513, len(whole) - 1]:
        code, _ = bad("untar", tmp_path / "new", data=whole[:size])
        assert code == errno.EBADMSG
        assert not [name for name in names(tmp_path / "new") if name.startswith(".")]
    good("untar", tmp_path / "new", data=whole + bytes(BLOCK))


def pax(*records: bytes) -> bytes:
    data = b"".join(records)
    return member("pax", tarfile.XHDTYPE, size=len(data)) + data + bytes(-len(data) % BLOCK)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"x",
        b"5 a=b\n",
        b"8 a=bc\n",
        b"6 a=b\n\n",
        b"6 =bc\n",
        b"6 abc\n",
        b"6 a=bc",
        b"99999999999999999999 a=b\n",
        b"-6 a=b\n",
        b" 6 a=b\n",
        b"6\0a=b\n",
        b"19 path=with\0a nul\n",
        b"11 size=-1\n",
        b"11 size=0x\n",
        b"29 size=9223372036854775807\n",
        b"30 size=99999999999999999999\n",
        b"21 uid=4294967295\n",
        b"10 gid=-1\n",
        b"12 mtime=.\n",
        b"30 mtime=-99999999999999999999\n",
    ],
)
def test_malformed_pax_records_are_told(tmp_path: Path, record: bytes) -> None:
    if not record:
        good("untar", tmp_path, data=pax(record) + file("file") + END)
        return
    assert bad("untar", tmp_path, data=pax(record) + file("file") + END)[0] == errno.EBADMSG
    assert names(tmp_path) == []


def with_field(offset: int, value: bytes) -> bytes:
    """A header with other bytes at `offset`, and the right sum."""
    header = bytearray(member("file"))
    header[offset : offset + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (with_field(124, b"\xff" * 12), errno.EBADMSG),  # sizes: -1,
        (with_field(124, b"\x80\0\0\0\x7f" + b"\xff" * 7), errno.EBADMSG),  # the largest,
        (with_field(124, b"\x80" + b"\xff" * 11), errno.EBADMSG),  # more than that,
        (with_field(124, b"9" * 11), errno.EBADMSG),  # no number
        (with_field(124, b"7" * 11), errno.EBADMSG),  # more than comes
        (with_field(108, b"\xff" * 8), errno.EBADMSG),  # an owner
        (with_field(156, b"S"), errno.EOPNOTSUPP),
        (with_field(156, b"Z"), errno.EOPNOTSUPP),
        (with_field(156, b"1"), errno.EBADMSG),  # a hard link to nothing
        (with_field(156, b"2"), errno.EBADMSG),  # a link to nowhere
        (pax(b"25 GNU.sparse.size=10000\n") + member("file"), errno.EOPNOTSUPP),
        (pax(b"%d path=%s\n" % (6 + 4 + 5000 + 1, b"x" * 5000)) + member("file"), errno.ENAMETOOLONG),
        (member("x", tarfile.GNUTYPE_LONGNAME, size=5000), errno.EBADMSG),
        (member("x", tarfile.XHDTYPE, size=(1 << 20) + 1) + bytes(2 << 20), errno.EBADMSG),
        (member("x", tarfile.XGLTYPE, size=1 << 40), errno.EBADMSG),
        (file("x" * 256), errno.ENAMETOOLONG),
    ],
)
def test_headers_that_make_no_sense_are_told(tmp_path: Path, header: bytes, code: int) -> None:
    assert bad("untar", tmp_path, data=header + END)[0] == code
    assert names(tmp_path) == []


SAMPLE = b"".join(
    [
        member("d", tarfile.DIRTYPE, mode=0o755),
        file("d/one", b"1" * 600),
        member("d/link", tarfile.SYMTYPE, "../../outside"),
        member("hard", tarfile.LNKTYPE, "d/one"),
        pax(b"19 path=d/extended\n", b"16 mtime=12.345\n", b"25 SCHILY.xattr.user.x=y\n") + file("x"),
        member("n" * 120, tarfile.FIFOTYPE),
        END,
    ]
)


@example(changes=[], fix=False)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), max_size=6), fix=st.booleans())
def test_a_damaged_archive_harms_nothing(tmp_path: Path, changes: list[tuple[int, int]], fix: bool) -> None:
    """Bytes that are changed, with the headers' sums right again or not."""
    data = bytearray(SAMPLE)
    for offset, value in changes:
        data[offset] = value
        start = offset - offset % BLOCK
        if fix and SAMPLE[start + 257 : start + 262] == b"ustar":
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + BLOCK])
    top = tmp_path / "in"
    shutil.rmtree(top, ignore_errors=True)  # of another example, whose directory is the same
    if not changes:
        good("untar", top, data=SAMPLE)
        assert len(snapshot(top)) == 7
        shutil.rmtree(top)
    (tmp_path / "outside").mkdir(exist_ok=True)
    call("untar", top, data=bytes(data))
    assert names(tmp_path) == ["in", "outside"]
    assert names(tmp_path / "outside") == []


# --- What a guest is given: in a root directory of its own


def in_root(root: Path, *args: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return call("--root", root, *args, data=data)


def test_a_secret_is_in_memory(tmp_path: Path) -> None:
    """So it has gone with the mount of its namespace."""
    done = in_root(tmp_path, "secret", "token", "0", data=b"hush")
    assert done.returncode == 0, decode_error(0, done.stderr)
    assert names(tmp_path / "run" / "secrets") == []


@as_root
def test_a_secret_is_its_users(tmp_path: Path) -> None:
    """In a directory that is a tmpfs, which it finds."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("nonsense\nother:x:1:1:::\nuser:x:1234:99:::\n")
    program = tmp_path / "builtins_host"
    script = (
        "mkdir run && mount -t tmpfs tmpfs run && umask 077 && for user in user 55:66 user; do "
        'printf %s "$user" | "$1" --root . secret token "$user" && stat -c "%a %u %g" run/secrets run/secrets/token && '
        "cat run/secrets/token && echo && ls -A run/secrets || exit 1; done"
    )
    shutil.copy(build(), program)
    command: list[str | Path] = ["unshare", "-m", "sh", "-c", script, "sh", build()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    if b"mount:" in done.stderr or b"unshare" in done.stderr:
        pytest.skip(done.stderr.decode())
    assert done.returncode == 0, done.stderr
    user = "755 0 0\n400 1234 0\nuser\ntoken\n"
    assert done.stdout.decode() == user + "755 0 0\n400 55 0\n55:66\ntoken\n" + user


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a"])
def test_a_secret_has_a_plain_name(tmp_path: Path, name: str) -> None:
    assert decode_error(0, in_root(tmp_path, "secret", name, "0").stderr).errno == errno.EINVAL


def test_a_secret_needs_a_user_and_a_place(tmp_path: Path) -> None:
    for user in ("nobody", "", "-1", "4294967295", "x" * 300):
        assert in_root(tmp_path, "secret", "name", user).returncode == 1
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "secrets").symlink_to("/elsewhere")
    assert in_root(tmp_path, "secret", "name", "0", data=b"x").returncode == 1
    assert names(tmp_path / "elsewhere") == []


def certificate(text: str) -> bytes:
    return f"-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----".encode()


ONE, TWO = certificate("MIIBone"), certificate("MIIBtwo")
BUNDLES = [
    "etc/ssl/certs/ca-certificates.crt",
    "etc/pki/tls/certs/ca-bundle.crt",
    "etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "etc/ssl/ca-bundle.pem",
    "etc/ssl/cert.pem",
]


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def test_certificates_become_trusted_once(tmp_path: Path) -> None:
    put(tmp_path / BUNDLES[1], b"# no newline at the end")
    put(tmp_path / BUNDLES[3], ONE + b"\n")
    (tmp_path / BUNDLES[4]).symlink_to("ca-bundle.pem")
    anchors = tmp_path / "usr/local/share/ca-certificates"
    anchors.mkdir(parents=True)
    (anchors / "vmette.crt").symlink_to("/etc/precious")
    for _ in range(2):
        done = in_root(tmp_path, "ca-certs", data=b"# comment\n" + ONE + b"\n" + TWO)
        assert done.returncode == 0, decode_error(0, done.stderr)
        assert (tmp_path / BUNDLES[1]).read_bytes() == b"# no newline at the end\n" + ONE + b"\n" + TWO + b"\n"
        assert (tmp_path / BUNDLES[3]).read_bytes() == ONE + b"\n" + TWO + b"\n"
        assert (anchors / "vmette.crt").read_bytes() == b"# comment\n" + ONE + b"\n" + TWO
        assert names(anchors) == ["vmette.crt"]
    assert not (tmp_path / BUNDLES[0]).exists()
    assert not (tmp_path / "etc/precious").exists()
    assert not (tmp_path / "etc/pki/ca-trust").exists()


def test_where_there_is_no_bundle_one_is_made(tmp_path: Path) -> None:
    assert in_root(tmp_path, "ca-certs", data=ONE).returncode == 0
    assert (tmp_path / BUNDLES[0]).read_bytes() == ONE + b"\n"
    assert stat.S_IMODE((tmp_path / BUNDLES[0]).stat().st_mode) == 0o644


def test_a_bundle_that_is_a_trap_is_left_alone(tmp_path: Path) -> None:
    for bundle in BUNDLES:
        (tmp_path / bundle).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(tmp_path / BUNDLES[1])
    (tmp_path / BUNDLES[2]).mkdir()
    (tmp_path / BUNDLES[3]).symlink_to("/dangling")
    (tmp_path / BUNDLES[4]).symlink_to("cert.pem")
    assert in_root(tmp_path, "ca-certs", data=ONE).returncode == 0
    assert (tmp_path / BUNDLES[0]).read_bytes() == ONE + b"\n"
    assert not (tmp_path / "dangling").exists()
    (tmp_path / BUNDLES[0]).unlink()
    (tmp_path / BUNDLES[0]).symlink_to("/dangling")
    assert decode_error(0, in_root(tmp_path, "ca-certs", data=ONE).stderr).errno == errno.EEXIST
    assert not (tmp_path / "dangling").exists()


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"", errno.EINVAL), (b"rubbish", errno.EINVAL), (ONE[:-3], errno.EINVAL), (bytes((4 << 20) + 1), errno.EFBIG)],
)
def test_what_holds_no_certificates_is_refused(tmp_path: Path, data: bytes, code: int) -> None:
    assert decode_error(0, in_root(tmp_path, "ca-certs", data=data).stderr).errno == code
    assert names(tmp_path) == []


# --- Shares


with_fuse = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="only root can mount FUSE, where the kernel has it"
)


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """A root directory with the device."""
    (tmp_path / "root/dev").mkdir(parents=True)
    os.mknod(tmp_path / "root/dev/fuse", stat.S_IFCHR | 0o600, os.makedev(10, 229))
    return tmp_path / "root"


def share(root: Path, *args: str) -> subprocess.Popen[bytes]:
    command = [str(build()), "--root", str(root), "share", *args]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=ENVIRONMENT
    )


@with_fuse
def test_a_share_is_served_over_stdin_and_stdout(guest: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_bytes(b"data")
    server = DirectoryServer(tmp_path / "tree", read_only=False)
    with share(guest, "/a/b") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        (reply,) = server.receive(process.stdout.read(65536))  # INIT
        for byte in reply:  # in pieces
            process.stdin.write(bytes((byte,)))
        # What is mounted in the process's own namespace is reached through it.
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(Path(f"/proc/{process.pid}/root/a/b/file").read_bytes)
            while not reading.done():
                if select.select([process.stdout], [], [], 0.01)[0]:
                    for reply in server.receive(process.stdout.read(65536)):
                        process.stdin.write(reply)
        assert reading.result() == b"data"
        process.stdin.close()
        process.stdout.read()
        assert process.wait(60) == 0
    server.close()
    assert list((guest / "a/b").iterdir()) == []


@with_fuse
@pytest.mark.parametrize("length", [0, 15, 262_145, 0xFFFFFFFF])
def test_answers_that_are_none(length: int, guest: Path) -> None:
    with share(guest, "/work", "ro") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.read(65536)
        process.stdin.write(struct.pack("<I", length) + bytes(100))
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""


@with_fuse
def test_answers_that_nobody_waits_for(guest: Path) -> None:
    with share(guest, "/work") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.read(65536)
        process.stdin.write(
            struct.pack("<IiQ", 16, 0, 99) * 1000 + struct.pack("<IiQ", 200_000, 0, 98) + bytes(199_984)
        )
        process.stdin.close()
        assert process.wait(60) == 0


@with_fuse
def test_where_a_share_cannot_be(guest: Path) -> None:
    (guest / "file").write_bytes(b"")
    assert bad("--root", guest, "share", "work")[1] == "share: work: it is no absolute path"
    assert bad("--root", guest, "share", "/file/below") == (errno.ENOTDIR, "share: /file/below: Not a directory")
    assert bad("--root", guest, "share", "/" + "x/" * 3000)[0] == errno.ENAMETOOLONG
    (guest / "loop").symlink_to("loop")
    assert bad("--root", guest, "share", "/loop")[0] == errno.ELOOP
    (guest / "dev/fuse").unlink()
    os.mkfifo(guest / "dev/fuse")
    assert bad("--root", guest, "share", "/work") == (errno.ENODEV, "share: /dev/fuse: No such device")
    (guest / "dev/fuse").unlink()
    assert bad("--root", guest, "share", "/work")[0] == errno.ENOENT
