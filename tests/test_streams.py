"""`vmette.streams`, `vmette.timings`, the console of `vmette.guest`, and `vmette.vmm.probe`."""

from __future__ import annotations

import json
import os
import select
import socket
import tracemalloc
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmette.errors import OutputTooLarge
from vmette.guest import CONSOLE_BYTES, LAST_WORDS, Console
from vmette.streams import READ_BYTES, Buffer, BytesSource, FdSink, FdSource, Limited
from vmette.timings import Stopwatch, Timing
from vmette.vmm import probe


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def closed_fd() -> int:
    fd = os.dup(0)
    os.close(fd)
    return fd


# --- sources


@given(data=st.binary(max_size=50), size=st.integers(1, 20))
def test_bytes_come_in_pieces_and_end(data: bytes, size: int) -> None:
    source = BytesSource(data)
    pieces = list(iter(lambda: source.read(size), b""))
    assert b"".join(pieces) == data
    assert all(len(piece) == size for piece in pieces[:-1])
    assert source.read(size) == b""
    assert source.fd is None


def test_a_descriptor_is_read_as_far_as_it_goes(pipe: tuple[int, int]) -> None:
    source = FdSource(pipe[0])
    os.write(pipe[1], b"12345")
    assert source.fd == pipe[0]
    assert [source.read(3), source.read(3)] == [b"123", b"45"]


def test_one_read_is_limited(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(READ_BYTES + 1))
    with (tmp_path / "big").open("rb") as file:
        source = FdSource(file.fileno())
        assert [len(source.read(1 << 30)) for _ in range(3)] == [READ_BYTES, 1, 0]


def test_what_cannot_be_read_is_at_its_end(tmp_path: Path) -> None:
    assert FdSource(closed_fd()).read(1) == b""
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        assert FdSource(directory).read(1) == b""
    finally:
        os.close(directory)


def test_a_terminal_that_is_hung_up_is_at_its_end() -> None:
    master, slave = os.openpty()
    os.close(slave)
    try:
        assert FdSource(master).read(1) == b""  # EIO
    finally:
        os.close(master)


def test_another_error_of_a_source_is_not_hidden() -> None:
    with socket.socket() as unconnected, pytest.raises(OSError, match="not connected"):
        FdSource(unconnected.fileno()).read(1)


# --- sinks


def test_a_limited_buffer_takes_as_much_as_its_limit() -> None:
    buffer = Buffer()
    sink = Limited(buffer, 5)
    assert sink.fd is None
    assert [sink.write(memoryview(data)) for data in (b"12", b"", b"345", b"")] == [2, 0, 3, 0]
    with pytest.raises(OutputTooLarge, match=r"^the command wrote more than 5 bytes: raise the limit"):
        sink.write(memoryview(b"6"))
    assert buffer.data == b"12345"


def test_a_buffer_without_room() -> None:
    sink = Limited(Buffer(), 0)
    assert sink.write(memoryview(b"")) == 0
    with pytest.raises(OutputTooLarge):
        sink.write(memoryview(b"1"))


def test_a_limit_counts_what_the_sink_takes(pipe: tuple[int, int]) -> None:
    sink = Limited(FdSink(pipe[1]), 100_000)
    assert sink.fd == pipe[1]
    data = memoryview(bytes(100_000))
    taken = sink.write(data)
    assert 0 < taken < len(data)
    os.read(pipe[0], taken)
    with pytest.raises(OutputTooLarge):
        sink.write(memoryview(bytes(100_000 - taken + 1)))


def test_a_pipe_that_polls_writable_never_blocks(pipe: tuple[int, int]) -> None:
    """One that blocked would hang this test."""
    sink = FdSink(pipe[1])
    assert sink.fd == pipe[1]
    data = memoryview(os.urandom(1 << 20))
    poll = select.poll()
    poll.register(pipe[1], select.POLLOUT)
    written, got = 0, bytearray()
    while written < len(data):
        if poll.poll(0):
            size = sink.write(data[written:])
            assert 0 < size <= select.PIPE_BUF
            written += size
        else:
            got += os.read(pipe[0], 5000)
    while len(got) < len(data):
        got += os.read(pipe[0], 1 << 16)
    assert got == data
    assert os.get_blocking(pipe[1]), "the descriptor is shared with others"


def test_a_regular_file_takes_more_at_once(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        assert FdSink(file.fileno()).write(memoryview(bytes(100_000))) == 100_000
    assert (tmp_path / "file").stat().st_size == 100_000


def test_a_full_pipe_that_somebody_made_non_blocking_takes_nothing(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    sink = FdSink(pipe[1])
    data = memoryview(bytes(4096))
    while sink.write(data):
        pass
    os.read(pipe[0], 8192)
    assert sink.write(data) == 4096


def test_nobody_reads_any_more(pipe: tuple[int, int]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        with pytest.raises(BrokenPipeError):
            FdSink(write).write(memoryview(b"x"))
    finally:
        os.close(write)


def test_other_errors_of_a_sink_are_not_hidden() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        FdSink(closed_fd()).write(memoryview(b"x"))
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        FdSink(full.fileno()).write(memoryview(b"x"))


# --- timings


def test_timings_are_in_the_order_of_time() -> None:
    stopwatch = Stopwatch(100.0)
    for name, at in (("last", 103.0), ("first", 100.5), ("middle", 102.0), ("before", 99.0)):
        stopwatch.reached(name, at)
    expected = (Timing("before", -1.0), Timing("first", 0.5), Timing("middle", 2.0), Timing("last", 3.0))
    assert stopwatch.timings == expected


def test_points_at_the_same_time_stay_in_their_order_and_the_last_word_counts() -> None:
    stopwatch = Stopwatch(0.0)
    for name, at in (("b", 1.0), ("a", 1.0), ("c", 5.0), ("c", 0.5)):
        stopwatch.reached(name, at)
    assert [each.name for each in stopwatch.timings] == ["c", "b", "a"]


def test_a_stopwatch_starts_now_and_time_does_not_run_back() -> None:
    stopwatch = Stopwatch()
    stopwatch.reached("one")
    stopwatch.reached("two")
    one, two = stopwatch.timings
    assert (one.name, two.name) == ("one", "two")
    assert 0 <= one.seconds <= two.seconds


def test_no_point_is_no_timing() -> None:
    assert Stopwatch().timings == ()


# --- the console


def fed(*pieces: bytes) -> tuple[tuple[str, ...], list[str]]:
    """The last words, and what was shown."""
    shown: list[str] = []
    console = Console(shown.append)
    for piece in pieces:
        console.feed(piece)
    return console.last_words, shown


def test_lines_are_shown_when_they_are_whole() -> None:
    assert fed(b"on", b"e\r\n\ntw", b"o\nthr") == (("one", "two", "thr"), ["one", "", "two"])


def test_a_console_without_anybody_to_show_to() -> None:
    console = Console()
    console.feed(b"one\ntwo")
    assert console.last_words == ("one", "two")


HOSTILE = {
    "colour": b"\x1b[31mred\x1b[0m",
    "title": b"\x1b]0;title\x07",
    "clipboard": b"\x1b]52;c;ZXZpbA==\x1b\\",
    "C1": "\x9b31m\x9d0;title\x9c".encode(),
    "raw C1": b"\x9b31m\x9d",
    "carriage return": b"seen\rhidden",
    "backspace": b"a\b\x7fb",
    "NUL and bell": b"\0\x07\x0e\x0f",
    "right to left": "\u202egnp.exe\u2066\u2069\u200f".encode(),
    "zero width": "a\u200b\u200d\ufeffb".encode(),
    "line separators": "a\u2028b\u2029c\x0b\x0c\x1c\x1d\x1e\x85d".encode(),
    "tags": "\U000e0041\U000e007f".encode(),
    "private use": "\ue000\U0010ffff".encode(),
    "surrogates": b"\xed\xa0\x80\xed\xb0\x80",
    "not UTF-8": bytes(range(128, 256)),
}


def assert_harmless(text: str) -> None:
    for character in text:
        assert character == " " or unicodedata.category(character)[0] not in "CZ", hex(ord(character))


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_nothing_that_moves_a_terminal_comes_out(hostile: bytes) -> None:
    words, shown = fed(b"before " + hostile + b" after\n")
    assert list(words) == shown
    assert_harmless(shown[0])
    assert shown[0].startswith("before ")
    assert shown[0].endswith(" after")


@given(pieces=st.lists(st.binary(max_size=30), max_size=8))
def test_nothing_harmful_comes_out_however_it_goes_in(pieces: list[bytes]) -> None:
    words, shown = fed(*pieces)
    for line in (*words, *shown):
        assert_harmless(line)
    whole_words, whole_shown = fed(b"".join(pieces))
    assert (words, shown) == (whole_words, whole_shown)


def test_what_is_printable_comes_out() -> None:
    text = "na\u00efve \u6f22\u5b57 \U0001f600 a\tb"
    assert fed(f"{text}   \n".encode())[1] == [text.replace("\t", "    ")]


def test_the_last_words_are_the_last() -> None:
    words, _ = fed(b"".join(b"%d\n\n  \n" % number for number in range(100)))
    assert words == tuple(str(number) for number in range(100 - LAST_WORDS, 100))


@pytest.mark.parametrize(
    "piece",
    [b"x" * 65536, b"x\n" * 1024, b"\n" * 1024, b"\x1b" * 65536, b"x" * 100],
    ids=["x", "lines", "empty lines", "escapes", "little"],
)
def test_memory_is_bounded(piece: bytes) -> None:
    longest = 0

    def show(line: str) -> None:
        nonlocal longest
        longest = max(longest, len(line))

    console = Console(show)
    console.feed(piece)
    tracemalloc.start()
    try:
        for _ in range((1 << 19) // len(piece)):
            console.feed(piece)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 8 * CONSOLE_BYTES
    assert longest <= CONSOLE_BYTES + len(piece)
    assert sum(map(len, console.last_words)) <= CONSOLE_BYTES


# --- probe


class Question:
    """Answers, and counts how often it was asked."""

    def __init__(self, answer: bool) -> None:
        self.asked = 0
        self._answer = answer

    def __call__(self) -> bool:
        self.asked += 1
        return self._answer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cached_files(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if not path.is_dir()]


@pytest.mark.parametrize("answer", [True, False])
def test_an_answer_is_remembered_for_its_facts(cache: Path, answer: bool) -> None:
    ask = Question(answer)
    assert [probe.remembered("works", {"a": "1", "b": "2"}, ask) for _ in range(3)] == [answer] * 3
    assert probe.remembered("works", {"b": "2", "a": "1"}, ask) is answer
    assert ask.asked == 1
    (file,) = cached_files(cache)
    assert json.loads(file.read_text()) == {"answer": answer, "facts": {"a": "1", "b": "2"}}


def test_other_facts_and_other_questions_are_asked(cache: Path) -> None:
    first, other = Question(True), Question(False)
    assert probe.remembered("works", {"a": "1"}, first)
    for question, facts in (("works", {"a": "2"}), ("works", {}), ("works", {"b": "1"}), ("boots", {"a": "1"})):
        assert not probe.remembered(question, facts, other)
    assert (first.asked, other.asked) == (1, 4)
    assert probe.remembered("works", {"a": "1"}, other)
    assert other.asked == 4


CORRUPT = [b"", b"{", b"\xff\xfe", b"null", b"[]", b'"answer"', b"{}", b'{"answer": "no"}', b'{"answer": null}', b"0"]


@pytest.mark.parametrize("content", CORRUPT)
@pytest.mark.parametrize("answer", [True, False])
def test_a_corrupt_file_is_asked_again_and_mended(cache: Path, content: bytes, answer: bool) -> None:
    ask = Question(answer)
    probe.remembered("works", {}, ask)
    (file,) = cached_files(cache)
    file.write_bytes(content)
    assert [probe.remembered("works", {}, ask) for _ in range(2)] == [answer] * 2
    assert ask.asked == 2
    assert cached_files(cache) == [file]


def in_the_way_of_the_cache(cache: Path) -> None:
    cache.write_text("")


def in_the_way_of_the_directory(cache: Path) -> None:
    cache.mkdir()
    (cache / "probes").write_text("")


def in_the_way_of_the_file(cache: Path) -> None:
    probe.remembered("works", {}, Question(True))
    (file,) = cached_files(cache)
    file.unlink()
    (file / "inner").mkdir(parents=True)


def on_a_file_system_without_room(cache: Path) -> None:
    cache.symlink_to("/proc/self")  # where nobody, not even root, makes a directory


@pytest.mark.parametrize(
    "obstruct",
    [
        in_the_way_of_the_cache,
        in_the_way_of_the_directory,
        in_the_way_of_the_file,
        on_a_file_system_without_room,
    ],
)
def test_a_cache_that_cannot_be_written_to_only_asks_again(cache: Path, obstruct: object) -> None:
    assert callable(obstruct)
    obstruct(cache)
    ask = Question(True)
    assert [probe.remembered("works", {}, ask) for _ in range(2)] == [True, True]
    assert ask.asked == 2
    if not cache.is_symlink():
        assert not [path for path in cache.rglob(".*") if path.is_file()]


def test_an_error_of_the_question_is_the_callers_and_nothing_is_remembered(cache: Path) -> None:
    def fail() -> bool:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        probe.remembered("works", {}, fail)
    assert cached_files(cache) == []


def test_an_interrupted_write_leaves_no_temporary_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        probe.remembered("works", {}, Question(True))
    assert cached_files(cache) == []


def test_identity_changes_with_the_file(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    for each in (path, other):
        each.write_bytes(b"1")
        os.utime(each, ns=(0, 1))
    before = probe.identity(path)
    assert probe.identity(path) == before
    assert probe.identity(other) != before
    os.utime(path, ns=(0, 2))
    assert probe.identity(path) != before
    path.write_bytes(b"22")
    os.utime(path, ns=(0, 1))
    assert probe.identity(path) != before
    (tmp_path / "link").symlink_to(other)
    assert probe.identity(tmp_path / "link") == probe.identity(other)
