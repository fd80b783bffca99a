"""A directory served by FUSE to the kernel of this machine, and used by real programs.

These tests mount: they need root and /dev/fuse.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from vmette.fuse import MAX_REQUEST, VALID, DirectoryServer

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="only root can mount FUSE, where the kernel has it"
)

ROOT = Path(__file__).parent.parent
MNT_DETACH = 2
MS_RDONLY = 1
MS_BIND = 4096
_LIBC = ctypes.CDLL(None, use_errno=True)


def _mount(source: Path, target: Path, kind: str, flags: int = 0, data: str = "") -> None:
    texts = (os.fsencode(source), os.fsencode(target), kind.encode())
    if _LIBC.mount(*texts, ctypes.c_ulong(flags), data.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def _serve(server: DirectoryServer, device: int) -> None:
    while True:
        select.select([device], [], [])
        try:
            request = os.read(device, MAX_REQUEST)
        except OSError as error:
            if error.errno == errno.ENODEV:  # it is not mounted any more
                return
            if error.errno in {errno.ENOENT, errno.EINTR, errno.EAGAIN}:
                continue
            raise
        for reply in server.receive(request):
            try:
                os.write(device, reply)
            except OSError as error:
                if error.errno != errno.ENOENT:  # nobody waits for it any more
                    raise


def serve(directory: str, device: str, access: str) -> None:
    """The program of the process that serves a mount. (A thread of this one would wait for whoever waits for it with
    the interpreter.)"""
    _serve(DirectoryServer(Path(directory), read_only=access == "ro"), int(device))


@contextmanager
def _mounted(directory: Path, target: Path, *, read_only: bool = False) -> Iterator[Path]:
    """`directory`, mounted at `target`."""
    target.mkdir()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    try:
        _mount(Path("x"), target, "fuse", MS_RDONLY if read_only else 0, options)
        code = "import sys; from tests.test_fuse_mount import serve; serve(*sys.argv[1:])"
        words = [sys.executable, "-c", code, str(directory), str(device), "ro" if read_only else "rw"]
        server = subprocess.Popen(words, cwd=ROOT, pass_fds=[device])
    except BaseException:
        _LIBC.umount2(os.fsencode(target), MNT_DETACH)
        raise
    finally:
        os.close(device)
    try:
        yield target
    finally:
        _LIBC.umount2(os.fsencode(target), MNT_DETACH)
        assert server.wait(60) == 0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    made = tmp_path / "source"
    made.mkdir()
    return made


@pytest.fixture
def share(tmp_path: Path, source: Path) -> Iterator[Path]:
    with _mounted(source, tmp_path / "mounted") as mounted:
        yield mounted


def _run(*argv: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(argv, cwd=cwd, timeout=60, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def _python(code: str, *args: str | Path) -> str:
    """Runs `code` in a process of its own."""
    return _run(sys.executable, "-c", code, *args)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Some files of all kinds."""
    top = tmp_path / "tree"
    (top / "a/b/c").mkdir(parents=True)
    (top / "empty").mkdir(mode=0o700)
    (top / "many").mkdir()
    for number in range(300):
        (top / "many" / f"a file with the number {number}").write_bytes(b"%d\n" % number * number)
    (top / "large").write_bytes(os.urandom(1_000_003))
    (top / "a/b/c/deep").write_text("deep")
    (top / "a/b/link").symlink_to("c/deep")
    (top / "a/broken").symlink_to("/nowhere/at/all")
    (top / "a/second").hardlink_to(top / "large")
    (top / "a/program").write_text("#!/bin/sh\necho it runs\n")
    (top / "a/program").chmod(0o755)
    (top / "a/secret").write_text("s")
    (top / "a/secret").chmod(0)
    os.mkfifo(top / "a/fifo")
    os.utime(top / "a/secret", ns=(10**18 + 1, 10**18 + 2))
    os.chown(top / "a/program", 12, 34)
    return top


def test_a_tree_goes_in_and_out(share: Path, source: Path, tree: Path, tmp_path: Path) -> None:
    _run("cp", "-a", tree, share / "in")
    _run("diff", "-r", "--no-dereference", tree / "many", source / "in/many")
    _run("cp", "-a", share / "in", tmp_path / "out")
    listing = (
        "find",
        ".",
        "!",
        "-type",
        "d",
        "-printf",
        "%P %y %m %U %G %s %n %T@ %l\n",
        "-o",
        "-printf",
        "%P %y %m\n",
    )
    expected = sorted(_run(*listing, cwd=tree).splitlines())
    assert len(expected) > 300
    for copy in (source / "in", share / "in", tmp_path / "out"):
        assert sorted(_run(*listing, cwd=copy).splitlines()) == expected
        assert (copy / "large").stat().st_ino == (copy / "a/second").stat().st_ino
    assert (source / "in/large").read_bytes() == (tree / "large").read_bytes()
    assert _run(share / "in/a/program") == "it runs\n"
    _run("tar", "--format=posix", "-cf", tmp_path / "archive", "-C", share, "in")
    _run("tar", "-xf", tmp_path / "archive", "--transform=s,^in,again,", "-C", share)
    assert sorted(_run(*listing, cwd=source / "again").splitlines()) == expected
    _run("rm", "-rf", share / "in", share / "again")
    assert list(source.iterdir()) == []


def test_git(share: Path, source: Path) -> None:
    def git(*args: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "safe.directory=*")
        return _run("git", *who, *args, cwd=share)

    git("init", "--quiet", ".")
    for number in range(30):
        (share / f"file{number}").write_text(f"{number}\n" * 1000)
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    (share / "file3").write_text("changed\n")
    git("mv", "file4", "file5.moved")
    git("commit", "--quiet", "-a", "-m", "two")
    git("checkout", "--quiet", "-b", "side", "HEAD~1")
    assert (source / "file4").is_file()
    git("gc", "--quiet")
    git("fsck", "--strict")
    assert git("status", "--short") == ""
    assert git("log", "--all", "--format=%s") == "two\none\n"


def test_sqlite(share: Path, source: Path) -> None:
    code = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute(f"pragma journal_mode={sys.argv[2]}")
db.execute("create table t (a integer primary key, b text)")
for part in range(10):
    with db:
        db.executemany("insert into t (b) values (?)", [("x" * 100,)] * 200)
print(db.execute("pragma integrity_check").fetchone()[0], db.execute("select count(*) from t").fetchone()[0])
db.close()
"""
    for mode in ("delete", "truncate"):
        assert _python(code, share / f"{mode}.db", mode) == "ok 2000\n"
        with closing(sqlite3.connect(source / f"{mode}.db")) as database:
            assert database.execute("select count(*) from t").fetchone() == (2000,)
    assert _names(source) == {"delete.db", "truncate.db", "truncate.db-journal"}  # the last one is empty


def test_python_modules(share: Path, source: Path) -> None:
    package = share / "package"
    package.mkdir()
    for number in range(40):
        (package / f"m{number}.py").write_text(f"VALUE = {number}\n")
    _run(sys.executable, "-m", "compileall", "-q", package)
    assert len(list((source / "package/__pycache__").iterdir())) == 40
    assert _python("import sys; sys.path[0] = sys.argv[1]; from package import m7; print(m7.VALUE)", share) == "7\n"


def test_mappings(share: Path, source: Path) -> None:
    code = """
import mmap, os, sys
with open(sys.argv[1], "w+b") as file:
    file.truncate(300_000)
    with mmap.mmap(file.fileno(), 0) as mapping:
        mapping[100_000:100_005] = b"hello"
        mapping[-1:] = b"!"
        mapping.flush()
with open(sys.argv[1], "a+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
    mapping[5:6] = b"."
    file.write(b"more")
    file.flush()
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
    print(len(mapping), mapping[5:6], mapping[100_000:100_005], mapping[-5:])
"""
    assert _python(code, share / "mapped") == "300004 b'.' b'hello' b'!more'\n"
    expected = bytearray(300_000)
    expected[5:6], expected[100_000:100_005], expected[-1:] = b".", b"hello", b"!"
    assert (source / "mapped").read_bytes() == expected + b"more"


def test_writers_side_by_side(share: Path, source: Path) -> None:
    code = """
import os, sys
fd = os.open(sys.argv[1] + "/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for number in range(200):
    os.write(fd, f"{sys.argv[2]} {number}\\n".encode())
with open(sys.argv[1] + "/" + sys.argv[2], "wb") as file:
    for number in range(50):
        file.write(bytes([number]) * 10_000)
"""
    running = [subprocess.Popen([sys.executable, "-c", code, share, f"w{number}"]) for number in range(4)]
    assert [process.wait(timeout=60) for process in running] == [0] * 4
    lines = (source / "log").read_text().splitlines()
    assert sorted(lines) == sorted(f"w{writer} {number}" for writer in range(4) for number in range(200))
    for writer in range(4):
        assert (source / f"w{writer}").read_bytes() == b"".join(bytes([number]) * 10_000 for number in range(50))


def test_a_file_without_a_name_lives_on(share: Path, source: Path) -> None:
    with (share / "temporary").open("w+b") as file:
        file.write(b"kept")
        file.flush()
        (share / "temporary").unlink()
        assert list(source.iterdir()) == []
        assert os.fstat(file.fileno()).st_nlink == 0
        os.fchmod(file.fileno(), 0o600)
        file.truncate(2)
        assert (os.fstat(file.fileno()).st_size, os.pread(file.fileno(), 9, 0)) == (2, b"ke")
        (share / "temporary").write_bytes(b"another")
        assert os.pread(file.fileno(), 9, 0) == b"ke"


def test_a_name_less(share: Path) -> None:
    (share / "one").write_bytes(b"x")
    (share / "two").hardlink_to(share / "one")
    assert (share / "one").stat().st_nlink == 2
    (share / "two").unlink()
    (share / "one").chmod(0o600)
    assert (share / "one").read_bytes() == b"x"
    (share / "one").rename(share / "three")
    assert _names(share) == {"three"}


def test_changes_of_the_host_are_seen(share: Path, source: Path) -> None:
    (source / "file").write_bytes(b"first")
    assert (share / "file").read_bytes() == b"first"
    (source / "file").write_bytes(b"other")
    time.sleep(VALID + 0.1)
    assert (share / "file").read_bytes() == b"other"
    (source / "file").unlink()
    (source / "file").mkdir()
    (source / "file/below").touch()
    time.sleep(VALID + 0.1)
    assert _names(share / "file") == {"below"}
    (source / "file").rename(source / "moved")
    assert (share / "moved/below").exists()


def test_a_large_directory(share: Path, source: Path) -> None:
    names = {f"{number:05}-{'x' * 90}" for number in range(3000)}
    for name in names:
        (source / name).touch()
    assert _names(share) == names
    assert len(_run("find", share, "-type", "f").splitlines()) == 3000
    for name in sorted(names)[:1500]:
        (source / name).unlink()
    _run("rm", "-rf", *(share / name for name in sorted(names)[1500:1600]))
    assert len(_names(share)) == 1400


def test_the_kernel_checks_permissions(share: Path, source: Path) -> None:
    (source / "private").write_text("x")
    (source / "private").chmod(0o600)
    (source / "open").mkdir(mode=0o777)
    (source / "open").chmod(0o777)
    code = """
import os, sys
os.chdir(sys.argv[1])
os.setgroups([]); os.setgid(1234); os.setuid(1234); os.umask(0o027)
try:
    open("private")
except PermissionError:
    print("denied")
os.mkdir("open/mine")
open("open/mine/file", "w").close()
os.utime("open/mine/file")
os.truncate("open/mine/file", 77)
"""
    assert _python(code, share) == "denied\n"
    made = (source / "open/mine/file").stat()
    assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode), made.st_size) == (1234, 1234, 0o640, 77)
    assert stat.S_IMODE((source / "open/mine").stat().st_mode) == 0o750


def test_holes(share: Path, source: Path) -> None:
    with (share / "sparse").open("w+b") as file:
        file.seek(1 << 20)
        file.write(b"x")
        file.flush()
        with (source / "sparse").open("rb") as there:
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                assert os.lseek(file.fileno(), 5, whence) == os.lseek(there.fileno(), 5, whence)
        os.posix_fallocate(file.fileno(), 0, 2 << 20)
    assert (source / "sparse").stat().st_size == 2 << 20
    assert shutil.disk_usage(share).total == shutil.disk_usage(source).total


def test_mounts_in_it(share: Path, source: Path) -> None:
    mounts = [(source / "memory", "tmpfs", 0), (source / "a/b/loop", "", MS_BIND)]
    (source / "file").touch()
    mounted = []
    try:
        for target, kind, flags in mounts:
            target.mkdir(parents=True)
            _mount(source / "a", target, kind, flags)
            mounted.append(target)
        (share / "memory/file").write_bytes(b"x")
        (share / "memory/sub").mkdir()
        (share / "memory/file").rename(share / "memory/sub/file")
        assert (source / "memory/sub/file").read_bytes() == b"x"
        numbers = [(source / path).stat().st_ino for path in ("file", "memory", "memory/sub", "memory/sub/file")]
        seen = [(share / path).stat().st_ino for path in ("file", "memory", "memory/sub", "memory/sub/file")]
        assert seen[0] == numbers[0]
        assert [there ^ here for there, here in zip(numbers[1:], seen[1:], strict=True)] == [1 << 48] * 3
        with pytest.raises(OSError, match="Invalid cross-device link"):
            (share / "memory/sub/file").rename(share / "x")
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            (share / "a/b/loop").stat()  # it would be its own parent
        assert _names(share / "a/b") == {"loop"}
    finally:
        for target in mounted:
            _LIBC.umount2(os.fsencode(target), MNT_DETACH)


def test_read_only(tmp_path: Path, source: Path, tree: Path) -> None:
    with _mounted(tree, tmp_path / "mounted", read_only=True) as share:
        _run("diff", "-r", "--no-dereference", tree / "many", share / "many")
        with pytest.raises(OSError, match="Read-only file system"):
            (share / "new").touch()
