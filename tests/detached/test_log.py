"""The log of a detached machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vmette.detached.log import HEADER, STDERR, STDOUT, VMETTE, Log, LogReader, LogSink


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_a_log_is_read_as_it_was_written(tmp_path: Path, directory: int) -> None:
    log = Log(tmp_path)
    with LogReader(directory) as reader:
        assert list(reader.frames()) == []
        assert LogSink(log, STDOUT).write(memoryview(b"\0\xff\n")) == 3
        LogSink(log, STDERR).write(memoryview(b"err"))
        assert list(reader.frames()) == [(STDOUT, b"\0\xff\n"), (STDERR, b"err")]
        log.line("a word")
        assert list(reader.frames()) == [(VMETTE, b"a word\n")]
        assert list(reader.frames()) == []
    log.close()


def test_a_log_is_bounded(tmp_path: Path, directory: int) -> None:
    log = Log(tmp_path, segment_bytes=1000)
    frames = [(STDOUT, b"%099d" % number) for number in range(100)]
    with LogReader(directory) as follower:
        seen = []
        for channel, data in frames:
            log.write(channel, data)
            seen += list(follower.frames())
        assert seen == frames  # one that keeps up misses nothing
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert sum(sizes) < 2 * 1200
    with LogReader(directory) as reader:
        kept = list(reader.frames())
    assert kept == frames[-len(kept) :]
    assert len(kept) >= 10
    log.close()


def test_a_reader_that_is_behind_goes_on_with_what_there_is(tmp_path: Path, directory: int) -> None:
    log = Log(tmp_path, segment_bytes=100)
    log.write(STDOUT, b"first")
    with LogReader(directory) as reader:
        assert list(reader.frames()) == [(STDOUT, b"first")]
        for number in range(50):
            log.write(STDOUT, b"%099d" % number)
        assert list(reader.frames())[-1] == (STDOUT, b"%099d" % 49)
    log.close()


def test_a_torn_frame_is_no_frame(tmp_path: Path, directory: int) -> None:
    log = Log(tmp_path)
    log.write(STDOUT, b"whole")
    log.close()
    with (tmp_path / "log.0").open("ab") as file:
        file.write(HEADER.pack(STDOUT, 100) + b"torn")
    with LogReader(directory) as reader:
        assert list(reader.frames()) == [(STDOUT, b"whole")]


def test_one_thread_at_a_time_writes(tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path, segment_bytes=1)  # each frame begins a file, and closes that of another
    barrier = threading.Barrier(2)
    met = []

    def write(fd: int, data: bytes) -> int:
        with suppress(threading.BrokenBarrierError):  # as it should be: nobody came
            met.append(barrier.wait(0.2))
        return original(fd, data)

    original = os.write
    monkeypatch.setattr(os, "write", write)
    threads = [threading.Thread(target=log.write, args=(STDOUT, b"%d" % number)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == []
    with LogReader(directory) as reader:
        assert sorted(reader.frames()) == [(STDOUT, b"0"), (STDOUT, b"1")]
    log.close()


def test_a_log_that_is_closed_stays_as_it_is(tmp_path: Path) -> None:
    log = Log(tmp_path, segment_bytes=1)
    log.line("last words")
    log.close()
    log.line("of a thread that did not know")
    assert [path.name for path in tmp_path.iterdir()] == ["log.0"]


def test_a_full_disk_loses_output_and_nothing_else(directory: int, tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.write(STDOUT, b"before")
    kept, log._fd = log._fd, os.open("/dev/full", os.O_WRONLY)
    log.write(STDOUT, b"lost")
    os.close(log._fd)
    log._fd = kept
    log.write(STDOUT, b"after")
    with LogReader(directory) as reader:
        assert list(reader.frames()) == [(STDOUT, b"before"), (STDOUT, b"after")]
    log.close()
