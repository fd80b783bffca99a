"""The pages that a process has of its own in a private mapping of a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmette.errors import VmmError
from vmette.files import PIECE, copy_with_holes, write_pieces
from vmette.vmm import memory
from vmette.vmm.memory import own_pieces

PAGE = os.sysconf("SC_PAGESIZE")
PAGES = 5000
SIZE = PAGES * PAGE

PROGRAM = """
import mmap, sys
file, *written = sys.argv[1:]
with open(file) as file:
    memory = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
for at in range(0, len(memory), 1 << 14):
    memory[at]  # it has many of the file's pages, too
for at in map(int, written):
    memory[at] = ord("w") if memory[at] != ord("w") else 0
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def writer(file: Path, written: Sequence[int]) -> Iterator[int]:
    """The number of a process that has written to these places of its mapping of the file."""
    argv = [sys.executable, "-c", PROGRAM, str(file), *map(str, written)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A file that is nearly all holes."""
    path = tmp_path / "base"
    with path.open("wb") as file:
        for number in range(0, PAGES, 100):
            file.seek(number * PAGE)
            file.write(b"w" * (3 * PAGE))
        file.truncate(SIZE)
    return path


@pytest.mark.parametrize("entries", [memory.ENTRIES, 7, 4999, 5000])
def test_what_it_has_written(entries: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ENTRIES", entries)
    pages = [0, 1, 2, 3, 6, 7, 99, 100, 101, *range(1000, 1040), 2800, 4999]
    written = [number * PAGE + number % PAGE for number in pages]
    expected = bytearray(base.read_bytes())
    for at in written:
        expected[at] = ord("w") if expected[at] != ord("w") else 0
    with writer(base, written) as pid, base.open("rb") as source, (tmp_path / "copy").open("wb") as target:
        pieces = list(own_pieces(pid, SIZE))
        copy_with_holes(source.fileno(), target.fileno())
        write_pieces(target.fileno(), pieces)
    assert (tmp_path / "copy").read_bytes() == expected
    assert sum(len(piece) for _, piece in pieces) == len(pages) * PAGE, "no page of the file's is read"
    assert all(len(piece) <= PIECE for _, piece in pieces)


def test_what_it_has_not_written(base: Path) -> None:
    with writer(base, []) as pid:
        assert list(own_pieces(pid, SIZE)) == []


def no_process(base: Path) -> None:
    with writer(base, []) as pid:
        pass
    list(own_pieces(pid, SIZE))


def no_mapping(base: Path) -> None:
    with writer(base, [0]) as pid:
        list(own_pieces(pid, SIZE + PAGE))


def it_ends(base: Path) -> None:
    with writer(base, [0, 10 * PAGE]) as pid:
        pieces = own_pieces(pid, SIZE)
        next(pieces)
        os.kill(pid, 9)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        list(pieces)


def not_ours(base: Path) -> None:
    user = os.geteuid()
    if user != 0:
        list(own_pieces(1, SIZE))
    with writer(base, [0]) as pid:
        os.seteuid(65534)
        try:
            list(own_pieces(pid, SIZE))
        finally:
            os.seteuid(user)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (no_process, r"the memory of process \d+ cannot be read: No such file or directory"),
        (no_mapping, r"the process has no memory of \d+ bytes to save"),
        (it_ends, r"the memory of process \d+ cannot be read: its memory is smaller than it was"),
        (
            not_ours,
            r"the memory of process \d+ cannot be read: Permission denied; kernel.yama.ptrace_scope must be 0 or 1",
        ),
    ],
)
def test_what_cannot_be_read(attempt: Callable[[Path], None], message: str, base: Path) -> None:
    with pytest.raises(VmmError, match=f"^{message}$"):
        attempt(base)
