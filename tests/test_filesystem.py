"""`Sandbox.files` without a VM: what a guest may answer, and the agent's functions as programs of this host."""

from __future__ import annotations

import errno
import io
import os
import pickle
import socket
import stat
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

import vmette
from tests.images.layer_tools import B, C, D, H, Item, L, P, item, tar
from tests.test_builtins import ENVIRONMENT, build
from tests.vm.support import children
from vmette import filesystem
from vmette.config import Command
from vmette.filesystem import Entry, Files, Stat, decode_entries
from vmette.images import unpack
from vmette.images.archive import ArchiveError
from vmette.images.pack import packed
from vmette.protocol import MAX_CONTROL, Tag, encode_record

TIME = 1_600_000_000_123_456_789
STAT = struct.pack("<IIIIQqII", 0o100644, 1, 2, 3, 4, -5, 6, 7)
LINK = struct.pack("<IIIIQqII", 0o120777, 0, 0, 1, 4, 0, 0, 0)


class Function(subprocess.Popen[bytes]):
    """A program of this host in place of a function of the agent: killed if it is left on an error, as that is."""

    def __init__(self, *argv: str | bytes | Path) -> None:
        pipe = subprocess.PIPE
        super().__init__(argv, stdin=pipe, stdout=pipe, stderr=pipe, env=ENVIRONMENT)

    def __exit__(self, kind: Any, *args: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *args)


def real() -> Files:
    """Files of this host, as the guest's agent sees its own."""
    return Files(lambda command: Function(build(), *command.argv))


def shell(script: str) -> Files:
    """A guest that answers everything by a shell script."""
    return Files(lambda command: Function("sh", "-c", script))


def hostile(tmp_path: Path, *items: Item, data: bytes | None = None) -> Files:
    """A guest whose trees are all this archive."""
    archive = tmp_path / "hostile.tar"
    archive.write_bytes(tar(*items) if data is None else data)
    return Files(lambda command: Function("cat", archive))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    files, processes = set(Path("/proc/self/fd").iterdir()), children()
    yield
    assert set(Path("/proc/self/fd").iterdir()) <= files
    assert children() <= processes


def below(top: Path) -> dict[str, int]:
    """The modes of all that is in a directory."""
    return {os.fspath(path.relative_to(top)): path.lstat().st_mode for path in top.rglob("*")}


# --- records


def test_entries() -> None:
    payload = encode_record(
        [
            (Tag.NAME, b"\xff\n"),
            (Tag.STAT, STAT),
            (Tag.NAME, b"link"),
            (Tag.STAT, LINK),
            (Tag.TARGET, b"/\xfe"),
        ]
    )
    assert decode_entries(payload) == [
        Entry("\udcff\n", Stat(0o100644, 1, 2, 3, 4, -5, (6, 7), None)),
        Entry("link", Stat(0o120777, 0, 0, 1, 4, 0, (0, 0), "/\udcfe")),
    ]
    assert decode_entries(b"") == []


def test_what_a_file_is() -> None:
    entry = Stat(0o100644, 0, 0, 1, 0, 0, (0, 0), None)
    assert (entry.is_file, entry.is_dir, entry.is_symlink) == (True, False, False)
    assert Stat(0o040755, 0, 0, 1, 0, 0, (0, 0), None).is_dir
    assert Stat(0o120777, 0, 0, 1, 0, 0, (0, 0), "x").is_symlink


@pytest.mark.parametrize(
    "fields",
    [
        *([(Tag.NAME, name), (Tag.STAT, STAT)] for name in (b"", b".", b"..", b"a/b", b"/", b"a\0b", b"x" * 256)),
        [(Tag.NAME, b"a")],
        [(Tag.NAME, b"a"), (Tag.NAME, b"b"), (Tag.STAT, STAT)],
        [(Tag.NAME, b"a"), (Tag.STAT, STAT[:-1])],
        [(Tag.NAME, b"a"), (Tag.STAT, STAT), (Tag.TARGET, b"of a file")],
        [(Tag.NAME, b"a"), (Tag.STAT, LINK)],
        [(Tag.NAME, b"a"), (Tag.STAT, LINK), (Tag.TARGET, b"a\0b")],
        [(Tag.NAME, b"a"), (Tag.STAT, LINK), (Tag.TARGET, b"x" * 4096)],
        [(Tag.NAME, b"a"), (Tag.STAT, struct.pack("<I", 0o644) + STAT[4:])],
        [(Tag.NAME, b"a"), (Tag.STAT, struct.pack("<I", 0o7100644) + STAT[4:])],
        [(Tag.NAME, b"a"), (Tag.STAT, STAT[:16] + struct.pack("<Q", 1 << 63) + STAT[24:])],
    ],
    ids=lambda fields: repr(fields)[:50],
)
def test_entries_that_cannot_be(fields: list[tuple[Tag, bytes]]) -> None:
    with pytest.raises(vmette.ProtocolError):
        decode_entries(encode_record(fields))


def test_damaged_records() -> None:
    whole = encode_record([(Tag.NAME, b"a"), (Tag.STAT, STAT)])
    for size in range(1, len(whole)):
        with pytest.raises(vmette.ProtocolError):
            decode_entries(whole[:size])


def test_too_many_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "MAX_ENTRIES", 3)
    fields = [(Tag.NAME, b"a"), (Tag.STAT, STAT)]
    assert len(decode_entries(encode_record(fields * 3))) == 3
    with pytest.raises(vmette.OutputTooLarge):
        decode_entries(encode_record(fields * 4))


# --- what a guest may do instead of an answer


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (1, PermissionError),
        (2, FileNotFoundError),
        (13, PermissionError),
        (17, FileExistsError),
        (20, NotADirectoryError),
        (21, IsADirectoryError),
        (28, OSError),
    ],
)
def test_failures_are_what_they_are_in_python(tmp_path: Path, number: int, kind: type[OSError]) -> None:
    record = encode_record(
        [(Tag.ERRNO, struct.pack("<I", number)), (Tag.STAGE, b"read"), (Tag.TEXT, b"/a: sub: it \x1b[1m is so")]
    )
    (tmp_path / "record").write_bytes(record)
    with pytest.raises(kind) as caught:
        shell(f"cat '{tmp_path}/record' >&2; exit 1").read("/a")
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert isinstance(error, vmette.GuestFileError)
        assert (error.errno, error.filename, error.strerror) == (number, "/a", "sub: it ?[1m is so")
        assert str(error) == "/a in the guest: sub: it ?[1m is so"


@pytest.mark.parametrize(
    ("script", "text"),
    [("exit 1", "failed with status 1"), ("kill -9 $$", "killed by signal 9"), ("echo; exit 3", "with status 3")],
)
def test_failures_without_a_word(script: str, text: str) -> None:
    with pytest.raises(vmette.GuestFileError, match=text) as caught:
        shell(script).read("/a")
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize(
    "script", ["echo nonsense >&2; exit 1", "yes >&2", f"head -c {MAX_CONTROL + 1} /dev/zero >&2; cat /dev/zero"]
)
def test_errors_that_are_none(script: str) -> None:
    with pytest.raises(vmette.ProtocolError):
        shell(script).read("/a")


@pytest.mark.parametrize(
    "ask",
    [
        lambda files: files.read("/a", timeout=0.5),
        lambda files: files.read_to("/a", io.BytesIO(), timeout=0.5),
        lambda files: files.list("/a", timeout=0.5),
        lambda files: files.mkdir("/a/b", parents=True, timeout=0.5),
        lambda files: files.write("/a", bytes(1 << 22), timeout=0.5),
    ],
)
def test_silence_ends_with_the_time(ask: Callable[[Files], object]) -> None:
    with pytest.raises(vmette.TimeoutExpired, match=r"after 0\.5 seconds"):
        ask(shell("exec sleep 1000"))


def test_much_time_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert real().read(f"{tmp_path}/file", timeout=3_000_000) == b"x"  # seconds: more than poll(2) can wait


def test_an_endless_answer_ends_with_the_time(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(vmette.TimeoutExpired):
        shell("exec yes").read_to("/a", file, max_bytes=1 << 50, timeout=0.5)


def test_answers_are_bounded() -> None:
    with pytest.raises(vmette.OutputTooLarge, match="/a in the guest is larger than 100000 bytes"):
        shell("exec yes").read("/a", max_bytes=100_000)
    file = io.BytesIO()
    for take in (shell("exec yes").read_to, lambda *a, **k: shell("exec yes").archive(*a, **k)):
        file = io.BytesIO()
        with pytest.raises(vmette.OutputTooLarge):
            take("/a", file, max_bytes=100_001)
        assert len(file.getvalue()) == 100_001
    with pytest.raises(vmette.OutputTooLarge):
        shell("exec yes").stat("/a")


def test_input_that_is_not_taken() -> None:
    with pytest.raises(vmette.GuestFileError, match="not taken whole"):
        shell("exit 0").write("/a", bytes(1 << 20))


class Broken(io.RawIOBase):
    """A file that cannot be read further."""

    def __init__(self, data: bytes, error: BaseException) -> None:
        self._data = [data]
        self._error = error

    def read(self, size: int = -1) -> bytes:
        if self._data:
            return self._data.pop()
        raise self._error


@pytest.mark.parametrize("error", [OSError("broken"), KeyboardInterrupt()])
def test_a_function_whose_input_breaks_off_can_clean_up(tmp_path: Path, error: BaseException) -> None:
    files = shell(f"cat >/dev/null; echo >'{tmp_path}/cleaned'")
    with pytest.raises(type(error)):
        files.unarchive(Broken(b"x", error), "/a")  # type: ignore[arg-type]
    assert (tmp_path / "cleaned").exists()


def test_a_function_whose_output_cannot_be_kept_is_killed_at_once() -> None:
    started: list[Function] = []

    def start(command: Command) -> Function:
        started.append(Function("yes"))
        return started[0]

    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OSError) as caught:
        Files(start).read_to("/a", full, max_bytes=sys.maxsize)
    assert started[0].poll() is not None  # though somebody still holds the traceback
    assert caught.value.errno == errno.ENOSPC


def test_one_that_does_not_clean_up_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "GRACE_SECONDS", 0.1)
    with pytest.raises(KeyboardInterrupt):
        shell("exec sleep 1000").unarchive(Broken(b"x", KeyboardInterrupt()), "/a")  # type: ignore[arg-type]


# --- what callers may ask


@pytest.mark.parametrize("path", ["", "a", "./a", b"a", "/a\0", b"\0", PurePosixPath("a"), "/\ud800", 3])
def test_paths_that_are_none(path: Any) -> None:
    with pytest.raises(vmette.ConfigError):
        real().read(path)


@pytest.mark.parametrize(
    "ask",
    [
        lambda files: files.write("/tmp/x", b"", mode=0o10000),
        lambda files: files.write("/tmp/x", b"", mode=-1),
        lambda files: files.read("/etc/passwd", offset=-1),
        lambda files: files.read("/etc/passwd", length=-1),
        lambda files: files.read("/etc/passwd", max_bytes=-1),
        lambda files: files.read("/etc/passwd", user="a\0"),
        lambda files: files.read("/etc/passwd", timeout=-1),
        lambda files: files.read("/etc/passwd", timeout=float("nan")),
    ],
)
def test_what_makes_no_sense_is_refused(ask: Callable[[Files], object]) -> None:
    with pytest.raises(vmette.ConfigError):
        ask(real())


def test_the_user_is_the_one_that_was_asked_for() -> None:
    asked: list[Command] = []

    def start(command: Command) -> Function:
        asked.append(command)
        return Function("true")

    files = Files(start)
    files.remove("/a", recursive=True, missing_ok=True, user="some:body", timeout=100)
    files.remove("/a")
    assert asked == [
        Command((b"remove", b"/a", b"recursive", b"missing"), user=b"some:body", builtin=True),
        Command((b"remove", b"/a"), builtin=True),
    ]


# --- files


def test_files_round_trip(tmp_path: Path) -> None:
    files, path = real(), tmp_path / os.fsdecode(b"\xff name\n")
    files.write(os.fsencode(path), b"abc", mode=0o640)
    files.write(os.fspath(path), b"def", append=True)
    assert files.read(PurePosixPath(path)) == b"abcdef"
    assert files.read(os.fspath(path), offset=2, length=3) == b"cde"
    assert files.read(os.fspath(path), max_bytes=6) == b"abcdef"
    assert files.read(os.fspath(path), length=9, max_bytes=6) == b"abcdef"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    files.write_text(os.fspath(path), "é", encoding="latin-1")
    assert files.read_text(os.fspath(path), encoding="latin-1") == "é"
    with pytest.raises(UnicodeDecodeError):
        files.read_text(os.fspath(path))
    data = os.urandom(3_000_000)
    files.write_from(os.fspath(path), io.BytesIO(data))
    file = io.BytesIO()
    assert files.read_to(os.fspath(path), file) == len(data)
    assert file.getvalue() == data
    assert [entry.name for entry in files.list(os.fspath(tmp_path))] == [path.name]
    assert files.stat(os.fspath(path)).size == len(data)
    files.remove(os.fspath(path))
    assert not files.exists(os.fspath(path))


def test_directories(tmp_path: Path) -> None:
    files, top = real(), f"{tmp_path}/a"
    with pytest.raises(FileNotFoundError):
        files.mkdir(f"{top}/b/c")
    files.mkdir(f"{top}/b/c", parents=True, mode=0o700)
    assert below(tmp_path) == {"a": 0o40755, "a/b": 0o40755, "a/b/c": 0o40700}
    with pytest.raises(FileExistsError):
        files.mkdir(f"{top}/b/c", parents=True)
    files.mkdir(f"{top}/b/c", exist_ok=True)
    files.write(f"{top}/file", b"")
    with pytest.raises(FileExistsError):
        files.mkdir(f"{top}/file", exist_ok=True)
    with pytest.raises(NotADirectoryError):
        files.mkdir(f"{top}/file/x", parents=True)
    with pytest.raises(OSError) as caught:
        files.remove(top)
    assert caught.value.errno == errno.ENOTEMPTY
    files.remove(top, recursive=True)
    with pytest.raises(FileNotFoundError):
        files.remove(top)
    files.remove(top, missing_ok=True)


def test_links_and_what_exists(tmp_path: Path) -> None:
    files = real()
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "file").write_bytes(b"")
    assert files.stat(f"{tmp_path}/dangling", follow=False).target == "nothing"
    assert not files.exists(f"{tmp_path}/dangling")
    assert not files.exists(f"{tmp_path}/file/x")
    assert files.exists(f"{tmp_path}/file")


# --- trees, both ways


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with everything that is kept."""
    top = tmp_path / "tree"
    (top / "empty").mkdir(parents=True)
    (top / "sub").mkdir(mode=0o700)
    (top / "sub/file").write_bytes(b"x" * 100_000)
    (top / "sub/file").chmod(0o640)
    (top / "hard").hardlink_to(top / "sub/file")
    (top / "link").symlink_to("/nowhere/else")
    (top / "sub/up").symlink_to("..")
    (top / os.fsdecode(b"\xff\n")).write_bytes(b"odd")
    (top / ("n" * 200)).mkdir()
    (top / ("n" * 200) / "long").write_bytes(b"")
    with (top / "holes").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"between")
    for path in sorted(top.rglob("*"), reverse=True):
        os.utime(path, ns=(TIME, TIME), follow_symlinks=False)
    os.utime(top, ns=(-TIME, -TIME))
    return top


def facts(top: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in [top, *top.rglob("*")]:
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)  # noqa: PTH115
        elif path.is_file():
            content = (path.read_bytes(), status.st_nlink)
        found[os.fspath(path.relative_to(top))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def test_trees_round_trip(tree: Path, tmp_path: Path) -> None:
    before = facts(tree)
    real().copy_in(tree, f"{tmp_path}/in")
    assert facts(tmp_path / "in") == before
    real().copy_out(f"{tmp_path}/in", tmp_path / "out")
    assert facts(tmp_path / "out") == before
    assert (tmp_path / "out/hard").samefile(tmp_path / "out/sub/file")
    assert (tmp_path / "out/holes").stat().st_blocks < 1024
    assert {path.name for path in tmp_path.iterdir()} == {"tree", "in", "out"}


@pytest.mark.parametrize("way", ["in", "out"])
def test_where_copies_land(tree: Path, tmp_path: Path, way: str) -> None:
    def copy(source: str | Path, target: Path) -> None:
        if way == "in":
            real().copy_in(source, os.fspath(target))
        else:
            real().copy_out(os.fspath(source), target)

    there = tmp_path / "there"
    there.mkdir()
    copy(tree, there)
    assert facts(there / "tree") == facts(tree)
    (there / "tree/more").write_bytes(b"stays")
    (there / "tree/hard").unlink()
    (there / "tree/hard").write_bytes(b"goes")
    copy(tree, there)  # once more: into what is there
    more = facts(there / "tree")
    assert more.pop("more")[2] == (b"stays", 1)
    assert more == facts(tree)
    copy(f"{tree}/sub/.", there)
    assert (there / "file").stat().st_size == 100_000
    copy(f"{tree}/sub/..", there)
    assert (there / "sub/file").stat().st_size == 100_000
    copy(tree / "sub/file", there / "other")
    copy(tree / "hard", there / "other")
    assert (there / "other").stat().st_size == 100_000
    copy(tree / "sub/up", there / "followed")  # what is named is
    assert facts(there / "followed") == facts(tree)
    with pytest.raises(FileNotFoundError):
        copy(tree, there / "no/such")
    with pytest.raises(NotADirectoryError):
        copy(tree, there / "other")
    (there / "file").unlink()
    (there / "file").mkdir()
    with pytest.raises(IsADirectoryError):
        copy(tree / "sub/file", there)
    assert not [name for name in below(there) if ".vmette" in name]


@pytest.mark.parametrize("way", ["in", "out"])
def test_no_link_in_the_target_is_followed(tree: Path, tmp_path: Path, way: str) -> None:
    def copy(target: Path) -> None:
        if way == "in":
            real().copy_in(tree, os.fspath(target))
        else:
            real().copy_out(os.fspath(tree), target)

    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    (there / "tree").mkdir(parents=True)
    elsewhere.mkdir(mode=0o711)
    before = elsewhere.stat()
    (there / "tree/sub").symlink_to(elsewhere)
    with pytest.raises(OSError):
        copy(there)
    (there / "tree/sub").unlink()
    (elsewhere / "file").write_bytes(b"precious")
    (there / "tree/hard").unlink(missing_ok=True)
    (there / "tree/hard").symlink_to(elsewhere / "file")
    copy(there)  # in place of a link, a file
    assert not (there / "tree/hard").is_symlink()
    (tmp_path / "two").mkdir()
    (tmp_path / "two/tree").symlink_to(elsewhere)
    with pytest.raises(OSError):
        copy(tmp_path / "two")
    assert [(path.name, path.read_bytes()) for path in elsewhere.iterdir()] == [("file", b"precious")]
    assert elsewhere.stat().st_mode == before.st_mode


def test_a_target_that_is_a_link_is_refused_on_the_host(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    with pytest.raises(OSError, match="symlink") as caught:
        real().copy_out(os.fspath(tree), tmp_path / "link")
    assert not isinstance(caught.value, vmette.GuestFileError)
    assert list((tmp_path / "place").iterdir()) == []


def test_streams_of_archives(tree: Path, tmp_path: Path) -> None:
    with (tmp_path / "archive").open("w+b") as file:
        real().archive(os.fspath(tree), file)
        file.seek(0)
        real().unarchive(file, f"{tmp_path}/again")
    assert facts(tmp_path / "again") == facts(tree)


def test_owners_are_kept_only_if_that_is_asked(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    (tmp_path / "file").write_bytes(b"")
    os.chown(tmp_path / "file", 5, 6)
    real().copy_in(tmp_path / "file", f"{tmp_path}/given", owners=True)
    real().copy_in(tmp_path / "file", f"{tmp_path}/mine")
    assert [(p.stat().st_uid, p.stat().st_gid) for p in (tmp_path / "given", tmp_path / "mine")] == [(5, 6), (0, 0)]
    real().copy_out(f"{tmp_path}/file", tmp_path / "out")
    assert (tmp_path / "out").stat().st_uid == 0


# --- trees that come out of a hostile guest


@pytest.mark.parametrize(
    "items",
    [
        [item("./", D), item("../out", content=b"x")],
        [item("./", D), item("a/../../out", content=b"x")],
        [item("./", D), item("a", L, target="/etc"), item("a/../../out")],
        [item("./", D), item("hard", H, target="../outside")],
        [item("./", D), item("hard", H, target="/etc/passwd")],
        [item("./", D), item("null", C, device=(1, 3))],
        [item("./", D), item("disk", B, device=(8, 0))],
        [item("./", D), item("fifo", P)],
        [item("./", D), item("name", pax={"path": "a\0b"})],
        [item("./", D), item("x" * 256)],
        [item("./", D), item("huge", pax={"size": str(1 << 60)})],
        [item("./", D), item("holes", pax={"GNU.sparse.size": str(1 << 60), "GNU.sparse.map": "0,0"})],
        [item("./", D), item("file"), item("file/below")],
        [item("a", L, target="/etc/passwd")],
        [item("null", C, device=(1, 3))],
        [item("a"), item("b")],
        [item("a/b")],
        [item("a", D), item("a/b")],
        [item("file"), item("./", D)],
        [],
    ],
    ids=lambda items: " ".join(entry.name for entry, _ in items)[:60] or "nothing",
)
def test_hostile_trees_leave_nothing(tmp_path: Path, items: list[Item]) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "outside").write_bytes(b"precious")
    files = hostile(tmp_path, *items)
    for target in (tmp_path / "place", tmp_path / "place/new"):
        with pytest.raises(ArchiveError, match=r"^/tree in the guest: "):
            files.copy_out("/tree", target, max_bytes=1 << 20)
        assert below(tmp_path).keys() == {"place", "outside", "hostile.tar"}
        assert (tmp_path / "outside").read_bytes() == b"precious"


def test_links_of_a_hostile_tree_lead_nowhere_while_it_is_written(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    files = hostile(
        tmp_path,
        item("./", D),
        item("a", L, target=os.fspath(elsewhere)),
        item("a/file", content=b"x"),
        item("b", L, target="../../../../../../etc"),
        item("b/passwd", content=b"x"),
        item("/absolute", content=b"y"),
    )
    files.copy_out("/tree", tmp_path / "out")
    assert list(elsewhere.iterdir()) == []
    # As in an image, the ways lead within the tree.
    assert (tmp_path / "out").joinpath(*elsewhere.parts[1:], "file").read_bytes() == b"x"
    assert (tmp_path / "out/etc/passwd").read_bytes() == b"x"
    assert (tmp_path / "out/absolute").read_bytes() == b"y"


def test_truncated_archives_leave_nothing(tmp_path: Path) -> None:
    whole = tar(item("./", D), item("file", content=b"x" * 2000), item("link", L, target="y"))
    for size in (1, 511, 513, 1024 + 600, 1024 + 2000, 1024 + 512 + 2048 + 100):
        with pytest.raises(ArchiveError):
            hostile(tmp_path, data=whole[:size]).copy_out("/tree", tmp_path / "out")
        assert below(tmp_path).keys() == {"hostile.tar"}


def test_the_guest_s_failure_comes_before_the_archive_s(tmp_path: Path) -> None:
    record = encode_record([(Tag.ERRNO, struct.pack("<I", 13)), (Tag.STAGE, b"tar"), (Tag.TEXT, b"secret: no")])
    (tmp_path / "record").write_bytes(record)
    (tmp_path / "part").write_bytes(tar(item("./", D), item("file", content=b"x" * 2000))[:2000])
    files = shell(f"cat '{tmp_path}/part'; cat '{tmp_path}/record' >&2; exit 1")
    with pytest.raises(PermissionError, match="/tree in the guest: secret: no"):
        files.copy_out("/tree", tmp_path / "out")


def test_an_endless_tree_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "start").write_bytes(tar(item("./", D), item("file", pax={"size": str(1 << 40)}))[:2048])
    with pytest.raises(ArchiveError, match="more than 3000000 bytes"):
        shell(f"cat '{tmp_path}/start'; exec cat /dev/zero").copy_out("/tree", tmp_path / "out", max_bytes=3_000_000)
    assert below(tmp_path).keys() == {"start"}


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "MAX_ENTRIES", 3)
    hostile(tmp_path, item("./", D), item("a"), item("b")).copy_out("/tree", tmp_path / "out")
    with pytest.raises(ArchiveError, match="more than 3"):
        hostile(tmp_path, item("./", D), item("a"), item("b"), item("c")).copy_out("/tree", tmp_path / "more")


def test_what_a_guest_may_not_give(tmp_path: Path) -> None:
    items = [
        item("./", D, mode=0),
        item("suid", mode=0o6755, uid=5, gid=6, xattrs={b"user.a": b"b"}),
        item("closed", D, mode=0),
        item("closed/file", mode=0),
        item("sticky", D, mode=0o3777),
    ]
    hostile(tmp_path, *items).copy_out("/tree", tmp_path / "out")
    mask = 0o777 & ~unmasked(tmp_path)
    modes = {"suid": 0o100755 & ~mask, "closed": 0o40700, "closed/file": 0o100000, "sticky": 0o41777 & ~mask}
    assert below(tmp_path / "out") == modes
    assert (tmp_path / "out").stat().st_mode == 0o40700
    owner = (tmp_path / "out/suid").stat()
    assert (owner.st_uid, os.listxattr(tmp_path / "out/suid")) == (os.geteuid(), [])
    hostile(tmp_path, *items).copy_out("/tree", tmp_path / "asked", setuid=True)
    assert (tmp_path / "asked/suid").stat().st_mode == 0o106755 & ~mask


def unmasked(place: Path) -> int:
    """The permissions that the umask allows."""
    (place / "probe").touch(0o777)
    return (place / "probe").stat().st_mode & 0o777


def test_a_guest_does_not_open_what_is_the_host_s(tmp_path: Path) -> None:
    items = [
        item("./", D, mode=0o777),
        item("there", D, mode=0o777),
        item("there/new", D, mode=0o777),
        item("file", mode=0o666),
    ]
    (tmp_path / "out/tree/there").mkdir(parents=True)
    (tmp_path / "out/tree").chmod(0o750)
    (tmp_path / "out/tree/there").chmod(0o710)
    before = os.umask(0o027)
    try:
        hostile(tmp_path, *items).copy_out("/tree", tmp_path / "out")
        hostile(tmp_path, *items).copy_out("/tree", tmp_path / "made")
    finally:
        os.umask(before)
    modes = {"there/new": 0o40750, "file": 0o100640}
    assert below(tmp_path / "out/tree") == {**modes, "there": 0o40710}
    assert below(tmp_path / "made") == {**modes, "there": 0o40750}
    assert [(tmp_path / name).stat().st_mode for name in ("out/tree", "made")] == [0o40750, 0o40750]


def test_a_target_that_becomes_a_link_is_not_followed(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest may have the directory that it is in, by a share."""
    target, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    target.mkdir()
    elsewhere.mkdir()
    original = os.open

    def swap_first(path: Any, *args: Any, **options: Any) -> int:
        if path == target and not target.is_symlink():
            target.rmdir()
            target.symlink_to(elsewhere)
        return original(path, *args, **options)

    monkeypatch.setattr(os, "open", swap_first)
    with pytest.raises(OSError, match="symlink"):
        real().copy_out(os.fspath(tree), target)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("call", ["rename", "utime", "symlink", "link"])
def test_a_copy_that_fails_leaves_nothing(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    original, calls = getattr(os, call), []

    def fail(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == (5 if call in {"rename", "utime"} else 1):
            raise OSError(errno.ENOSPC, "full")
        original(*args, **options)

    place = tmp_path / "place"
    place.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="full"):
            real().copy_out(os.fspath(tree), place)
    assert list(place.iterdir()) == []


def test_a_directory_that_is_moved_meanwhile_leads_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest may have the target too, by a share."""
    items = [item("./", D), item("a", D), item("a/b", D), item("a/b/c", D), item("a/b/c/d"), item("a/b/z"), item("a/z")]
    share = tmp_path / "share"
    (share / "tree").mkdir(parents=True)
    original = unpack._Placer._file

    def move_first(self: Any, node: Any, name: bytes, fd: int) -> None:
        original(self, node, name, fd)
        if name == b"d":
            (share / "tree/a/b/c").rename(share / "c")

    monkeypatch.setattr(unpack._Placer, "_file", move_first)
    with pytest.raises(OSError) as caught:
        hostile(tmp_path, *items).copy_out("/tree", share)
    assert caught.value.errno == errno.ESTALE
    assert below(tmp_path).keys() == {
        "hostile.tar", "share", "share/c", "share/c/d", "share/tree", "share/tree/a", "share/tree/a/b",
    }  # fmt: skip


# --- trees that go into a guest


def members(source: Path, name: bytes = b"top") -> dict[str, tarfile.TarInfo]:
    data = b"".join(packed(source, name))
    assert len(data) % tarfile.BLOCKSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: member for member in archive}


def test_sockets_are_left_out_and_fifos_are_not_opened(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    os.mkfifo(top / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(top / "socket"))
        assert {name: member.type for name, member in members(top).items()} == {"top": D, "top/fifo": P}
    with pytest.raises(OSError, match="neither a file nor a directory"):
        members(top / "fifo")
    with pytest.raises(OSError, match="neither"):
        members(Path("/dev/zero"))


def test_deep_trees(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "/".join("d" * 300)).mkdir(parents=True)
    assert len(members(top)) == 301
    real().copy_in(top, f"{tmp_path}/in")
    real().copy_out(f"{tmp_path}/in", tmp_path / "out")
    assert facts(tmp_path / "out") == facts(top)


class Swapped:
    """Puts something else in place of a file when it has been looked at, and has not been opened yet."""

    def __init__(self, path: Path, swap: Callable[[Path], object]) -> None:
        self._path, self._swap, self._stat = path, swap, os.stat

    def stat(self, path: Any, **options: Any) -> os.stat_result:
        status = self._stat(path, **options)
        if path == os.fsencode(self._path.name):
            self._swap(self._path)
        return status


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_link_that_takes_a_place_meanwhile_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    top, victim = tmp_path / "top", tmp_path / "victim"
    top.mkdir()
    (victim if kind == "directory" else top).mkdir(exist_ok=True)
    (top / "x").mkdir() if kind == "directory" else (top / "x").write_bytes(b"")
    if kind == "file":
        victim.write_bytes(b"secret")

    def swap(path: Path) -> None:
        path.rmdir() if kind == "directory" else path.unlink()
        path.symlink_to(victim)

    monkeypatch.setattr(os, "stat", Swapped(top / "x", swap).stat)
    with pytest.raises(OSError) as caught:
        list(packed(top, b"top"))
    assert caught.value.errno in {errno.ELOOP, errno.ENOTDIR}


def test_files_that_change_meanwhile(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (top / "log").write_bytes(bytes(1 << 20))
    pieces = packed(top, b"top")
    next(pieces)
    os.truncate(top / "log", 10)
    with pytest.raises(OSError, match="changed while it was read"):
        list(pieces)
    (top / "log").write_bytes(bytes(1 << 20))
    pieces = packed(top, b"top")
    data = next(pieces)
    with (top / "log").open("ab") as file:
        file.write(b"x" * 1000)
    data += b"".join(pieces)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getmember("top/log").size == 1 << 20


def test_what_cannot_be_read_leaves_the_guest_alone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        real().copy_in(tmp_path / "missing", f"{tmp_path}/target")
    assert not isinstance(caught.value, vmette.GuestFileError)
    assert below(tmp_path) == {}


def test_a_copy_that_breaks_off_leaves_no_draft(tree: Path, tmp_path: Path) -> None:
    data = tar(item("a", content=b"x" * 1_000_000))
    with pytest.raises(KeyboardInterrupt):
        real().unarchive(Broken(data[:500_000], KeyboardInterrupt()), f"{tmp_path}/in")  # type: ignore[arg-type]
    assert list((tmp_path / "in").iterdir()) == []
