"""What runs before it is known whether it is wanted."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_startup import modules_after
from tests.vm.support import children, wait_until
from vmette import headstart
from vmette.headstart import HeadStart, Start, Started
from vmette.protocol import Connection, Resume, Tag, decode_record

SLEEP = ["/bin/sleep", "1000"]
WORDS = ["run", "--quiet", "builtin://base", "true"]


@pytest.fixture(autouse=True)
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the notes are. After the test, nothing is left but them."""
    monkeypatch.setenv("VMETTE_STATE_DIR", str(tmp_path / "state"))
    fds, before = sorted(Path("/proc/self/fd").iterdir()), children()
    yield tmp_path / "state/starts"
    assert sorted(Path("/proc/self/fd").iterdir()) == fds
    assert children() <= before


def noted(words: list[str], start: Start, command: int = 1) -> None:
    """A run with `words`, of which the last are its command, has begun with this."""
    head = HeadStart(words)
    head.end_of_options(words[len(words) - command :])
    assert head.take(start) is None
    head.end()


def release(started: Started | None) -> None:
    assert started is not None
    started.kill()


def test_it_is_repeated_for_the_same_words_before_a_command(starts: Path) -> None:
    start = Start(SLEEP)
    noted(WORDS, start)
    assert [path.stat().st_mode & 0o7777 for path in starts.iterdir()] == [0o600]
    head = HeadStart([*WORDS[:-1], "--", "sh", "-c", "echo"])
    started = head.take(start)
    assert started is not None
    assert Path(f"/proc/{started.pid}/cmdline").read_bytes() == b"/bin/sleep\x001000\0"
    head.end()
    assert started.pid == int(Path(f"/proc/{started.pid}/stat").read_text().split()[0])  # ours now: it goes on
    release(started)
    assert len(list(starts.iterdir())) == 1


@pytest.mark.parametrize("words", [["run"], ["run", "--quiet"], ["run", "builtin://base", "true"], ["ps", *WORDS[1:]]])
def test_other_words_start_nothing(words: list[str], starts: Path) -> None:
    noted(WORDS, Start(SLEEP))
    head = HeadStart(words)
    assert head.take(Start(SLEEP)) is None
    assert len(list(starts.iterdir())) == 1


def test_what_is_not_wanted_ends(starts: Path) -> None:
    noted(WORDS, Start(SLEEP))
    (before,) = [path.read_bytes() for path in starts.iterdir()]
    head = HeadStart(WORDS)
    assert head.take(Start(["/bin/sleep", "1001"])) is None
    head.end_of_options(["true"])
    head.end()  # the fixture looks for it
    (after,) = [path.read_bytes() for path in starts.iterdir()]
    assert (before.count(b"1000"), after.count(b"1001")) == (1, 1)
    HeadStart(WORDS).end()


@pytest.mark.parametrize(
    "other",
    [
        Start(SLEEP, hello=b"i" * 12),
        Start(SLEEP, hello=b"h" * 13),
        Start([*SLEEP, "1"], hello=b"h" * 12),
        Start(SLEEP),
    ],
)
def test_all_that_it_is_told_has_to_be_the_same(other: Start) -> None:
    noted(WORDS, Start(SLEEP, hello=b"h" * 12))
    head = HeadStart(WORDS)
    assert head.take(other) is None
    head.end()


def with_file(path: Path, kind: str = "file") -> Start:
    with path.open() as file:
        return Start(SLEEP, files={6: (str(path), headstart.stamp(file.fileno()), kind)})


def test_a_file_goes_along(tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    ram.write_bytes(b"one")
    noted(WORDS, with_file(ram))
    started = HeadStart(WORDS).take(with_file(ram))
    assert started is not None
    assert Path(f"/proc/{started.pid}/fd/6").read_bytes() == b"one"
    release(started)


def test_what_comes_through_a_pipe(tmp_path: Path) -> None:
    state = tmp_path / "devices"
    state.write_bytes(content := os.urandom(headstart.MAX_PIPE))
    noted(WORDS, with_file(state, "pipe"))
    assert HeadStart(WORDS).take(with_file(state)) is None  # that is another way
    started = HeadStart(WORDS).take(with_file(state, "pipe"))
    assert started is not None
    with Path(f"/proc/{started.pid}/fd/6").open("rb") as theirs:
        assert stat.S_ISFIFO(os.fstat(theirs.fileno()).st_mode)
        os.close(started.files.pop(6))
        assert theirs.read() == content  # and ends: nobody has it open to write
    release(started)


def refused(*_: object) -> None:
    raise PermissionError


@pytest.mark.parametrize("why", ["too large", "too many pipes", "empty"])
def test_a_file_that_no_pipe_takes(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "devices"
    state.write_bytes(content := b"" if why == "empty" else os.urandom(1000))
    if why == "too large":
        monkeypatch.setattr(headstart, "MAX_PIPE", 999)
    if why == "too many pipes":
        monkeypatch.setattr("fcntl.fcntl", refused)
    with state.open("rb") as file, os.fdopen(headstart.piped(file.fileno()), "rb") as theirs:
        assert stat.S_ISREG(os.fstat(theirs.fileno()).st_mode)
        assert theirs.read() == content


@pytest.mark.parametrize("change", ["other", "written", "gone", "link", "fifo"])
def test_a_file_that_is_another_one_is_given_to_nobody(change: str, tmp_path: Path, starts: Path) -> None:
    """Not even for a moment: what others have put there is for QEMU to trust."""
    ram, old = tmp_path / "ram", tmp_path / "old"
    ram.write_bytes(b"one")
    noted(WORDS, with_file(ram))
    if change == "written":
        ram.write_bytes(b"two")
    else:
        ram.rename(old)
    if change == "other":
        ram.write_bytes(b"one")
    if change == "link":
        ram.symlink_to("old")
    if change == "fifo":
        os.mkfifo(ram)
    spawned: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vmette.native.spawn", lambda *args: spawned.append(args))
        HeadStart(WORDS).end()
    assert spawned == []


def test_one_that_has_ended_is_not_taken() -> None:
    start = Start(["/bin/true"])
    noted(WORDS, start)
    head = HeadStart(WORDS)
    assert head._started is not None
    os.waitid(os.P_PID, head._started.pid, os.WEXITED | os.WNOWAIT)
    assert head.take(start) is None
    head.end()


def test_what_is_not_wanted_ends_at_once() -> None:
    noted(WORDS, Start(SLEEP))
    head = HeadStart(WORDS)
    assert head._started is not None
    pid = head._started.pid
    assert head.take(Start(["/bin/sleep", "1"])) is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_standard_stream_that_is_closed(closed: int, starts: Path) -> None:
    noted(WORDS, Start(SLEEP))
    code = f"import os, vmette.headstart as h; os.close({closed}); h.begin({WORDS}); os._exit(h.current is not None)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_children_that_nobody_waits_for(starts: Path) -> None:
    noted(WORDS, Start(SLEEP))
    code = f"import vmette.headstart as h, signal; signal.signal(17, signal.SIG_IGN); h.begin({WORDS}); h.end()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


ECHO = [sys.executable, "-SIc", "import os; os.write(1, os.read(3, 999)); os.read(4, 1)"]
"""Says on its stdout what it is told."""


def said(start: Start) -> bytes:
    """What a QEMU would hear."""
    started = HeadStart(WORDS).take(start)
    assert started is not None
    assert sorted(started.ends) == [3, 4]
    heard = os.read(started.errors, 2000)
    release(started)
    return heard


def test_what_it_is_told() -> None:
    hello = bytes(Connection(Resume(b"s" * 64, 1, "name", ("9p:share0:rw:/x",))).outgoing)
    start = Start(ECHO, hello=hello)
    assert b"s" * 8 not in start.encode()
    noted(WORDS, start)
    told = [said(Start(ECHO, hello=hello)) for _ in range(2)]
    fields = [dict(decode_record(words[12:])) for words in told]
    assert fields[0][Tag.HOSTNAME] == b"name"
    assert fields[0][Tag.SHARE] == b"9p:share0:rw:/x"
    seeds = [each[Tag.SEED] for each in fields]
    assert seeds[0] != seeds[1]
    assert [len(seed) for seed in seeds] == [64, 64]
    clocks = [int.from_bytes(each[Tag.CLOCK], "little") for each in fields]
    assert clocks[0] < clocks[1]
    assert abs(clocks[1] - time.time_ns()) < 60e9


LARGE = Start(SLEEP, files={1 << 40: ("/dev/null", "", "file")}).encode()
NOTES = [LARGE, b"", b"\0", b"4\0x", b"x" + Start(SLEEP).encode()[1:], b"\xff" * 100, b"4\0\0\x009"]


@pytest.mark.parametrize("note", NOTES)
def test_a_note_that_is_none(note: bytes, starts: Path) -> None:
    noted(WORDS, Start(SLEEP))
    (path,) = starts.iterdir()
    path.write_bytes(note)
    head = HeadStart(WORDS)
    assert head.take(Start(SLEEP)) is None
    head.end()


@pytest.mark.parametrize("mode", [0o644, 0o620, 0o602, 0o4600])
def test_a_note_that_others_could_write_or_read(mode: int, starts: Path) -> None:
    noted(WORDS, Start(SLEEP))
    (path,) = starts.iterdir()
    path.chmod(mode)
    assert HeadStart(WORDS).take(Start(SLEEP)) is None


def test_a_note_of_another_user(starts: Path) -> None:
    noted(WORDS, Start(SLEEP))
    (path,) = starts.iterdir()
    os.chown(path, 1234, -1)
    assert HeadStart(WORDS).take(Start(SLEEP)) is None


def test_a_link_or_a_fifo_is_no_note(starts: Path) -> None:
    noted(WORDS, Start(SLEEP))
    (path,) = starts.iterdir()
    path.rename(path.parent / "elsewhere")
    path.symlink_to("elsewhere")
    assert HeadStart(WORDS).take(Start(SLEEP)) is None
    path.unlink()
    os.mkfifo(path, 0o600)
    assert HeadStart(WORDS).take(Start(SLEEP)) is None


def test_a_program_that_is_gone(tmp_path: Path) -> None:
    noted(WORDS, Start([str(tmp_path / "gone")]))
    head = HeadStart(WORDS)
    assert head.take(Start([str(tmp_path / "gone")])) is None
    head.end()


def test_no_more_notes_than_there_may_be(starts: Path) -> None:
    for number in range(headstart.MAX_NOTES + 5):
        noted(["run", f"spec{number}", "true"], Start(SLEEP))
        os.utime(starts, (number, number))
    assert len(list(starts.iterdir())) == headstart.MAX_NOTES
    release(HeadStart(["run", f"spec{number}", "true"]).take(Start(SLEEP)))


def test_many_words(starts: Path) -> None:
    words = ["run", *["-e", "A=B"] * headstart.MAX_WORDS, "spec", "true"]
    headstart.begin(words)
    assert headstart.current is None
    assert not starts.exists()


def test_a_cache_that_cannot_be_written(starts: Path) -> None:
    starts.parent.mkdir()
    starts.write_bytes(b"a file")
    noted(WORDS, Start(SLEEP))
    assert HeadStart(WORDS).take(Start(SLEEP)) is None


def test_nothing_stands_before_it() -> None:
    imported = modules_after("import vmette.__main__")
    assert {name for name in imported if not name.startswith("vmette")} <= {"_socket", "zlib", "__future__", "gc"}
    ours = {"vmette", "vmette._version", "vmette.__main__", "vmette.headstart"}
    assert {name for name in imported if name.startswith("vmette")} == ours


def runs(pid: int) -> bool:
    """Whether it has not ended; who is to hear of that is not this process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_it_ends_with_its_parent() -> None:
    noted(WORDS, Start(SLEEP))
    code = (
        f"import vmette.headstart as h, os; h.begin({WORDS}); print(h.current._started.pid, flush=True); os.read(0, 1)"
    )
    with subprocess.Popen([sys.executable, "-uc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    wait_until(lambda: not runs(pid), "its end")
