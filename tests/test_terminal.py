"""`vmette.cli.terminal`, on a terminal of this host."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import pty
import signal
import struct
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.terminals import Terminal
from vmette.cli.terminal import RawTerminal, make_raw, on_resize, terminal_environment, terminal_size
from vmette.errors import ConfigError

EVERY_BYTE = bytes(range(256))


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    """Of a terminal: where a person sits, and where a program does."""
    ends = pty.openpty()
    yield ends
    for fd in ends:
        os.close(fd)


def received(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += os.read(fd, size - len(data))
    return data


flags = st.integers(0, 2**32 - 1)


@given(iflag=flags, oflag=flags, cflag=flags, lflag=flags, keys=st.binary(min_size=32, max_size=32))
def test_raw_is_what_the_c_library_makes(iflag: int, oflag: int, cflag: int, lflag: int, keys: bytes) -> None:
    # struct termios of Linux, which is the same with glibc and musl: four words of flags, the line, 32 keys, the speeds
    layout = struct.Struct("=4IB32s3x2I")
    settings = ctypes.create_string_buffer(layout.pack(iflag, oflag, cflag, lflag, 0, keys, 0, 0), layout.size)
    ctypes.CDLL(None).cfmakeraw(settings)
    *expected, _, expected_keys, _, _ = layout.unpack(settings)
    *raw, _, _, raw_keys = make_raw([iflag, oflag, cflag, lflag, 0, 0, [bytes((key,)) for key in keys]])
    assert raw == expected
    assert b"".join(bytes((key,)) if isinstance(key, int) else key for key in raw_keys) == expected_keys


def test_every_byte_passes_both_ways_and_none_comes_back(ends: tuple[int, int]) -> None:
    person, program = ends
    with RawTerminal(program):
        os.write(person, EVERY_BYTE)
        assert received(program, 256) == EVERY_BYTE
        os.write(program, EVERY_BYTE)
        assert received(person, 256) == EVERY_BYTE


def test_what_was_typed_before_is_kept_and_what_is_unread_thrown_away(ends: tuple[int, int]) -> None:
    person, program = ends
    os.write(person, b"bef")
    with RawTerminal(program):
        os.write(person, b"ore")
        assert received(program, 6) == b"before"
        os.write(person, b"rm -rf .\n")
    os.write(person, b"after\n")
    assert os.read(program, 100) == b"after\n"


def test_a_terminal_that_has_hung_up_is_left_in_peace() -> None:
    person, program = pty.openpty()
    with RawTerminal(program):
        os.close(person)
    os.close(program)


def test_handlers_are_put_back(ends: tuple[int, int]) -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)]

    before = handlers()
    with pytest.raises(ZeroDivisionError), RawTerminal(ends[1]), on_resize(lambda: None):
        assert all(now != then for now, then in zip(handlers(), before, strict=True))
        raise ZeroDivisionError
    assert handlers() == before


def test_no_terminal(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        with pytest.raises(ConfigError, match=r"^the input is no terminal: use -i without -t$"):
            terminal_size(file.fileno())
        with pytest.raises(OSError, match="ioctl"), RawTerminal(file.fileno()):
            pass


def test_size_and_its_changes(ends: tuple[int, int]) -> None:
    sizes = []
    with on_resize(lambda: sizes.append(terminal_size(ends[1]))):
        for rows, columns in [(30, 100), (0, 0), (65535, 1)]:
            fcntl.ioctl(ends[1], termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
            signal.raise_signal(signal.SIGWINCH)
    assert sizes == [(30, 100), (0, 0), (65535, 1)]


def test_continued(ends: tuple[int, int]) -> None:
    """Meanwhile a shell has had the terminal."""
    looks = []
    before = termios.tcgetattr(ends[1])
    with RawTerminal(ends[1]), on_resize(lambda: looks.append("at the size")):
        raw = termios.tcgetattr(ends[1])
        assert raw != before
        termios.tcsetattr(ends[1], termios.TCSANOW, before)
        signal.raise_signal(signal.SIGCONT)
        assert termios.tcgetattr(ends[1]) == raw
    assert looks == ["at the size"]
    assert termios.tcgetattr(ends[1]) == before


@pytest.mark.parametrize(("given", "told"), [("xterm-256color", "xterm-256color"), ("", "xterm"), (None, "xterm")])
def test_environment(monkeypatch: pytest.MonkeyPatch, given: str | None, told: str) -> None:
    monkeypatch.setenv("LANG", "de_AT.UTF-8")
    monkeypatch.setenv("TERM", given) if given is not None else monkeypatch.delenv("TERM", raising=False)
    assert terminal_environment() == {"TERM": told}


def test_a_signal_at_a_bad_moment_is_no_reason_to_give_up(
    ends: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    tcsetattr = termios.tcsetattr

    def interrupted_at_first(*args: Any) -> None:
        calls.append(args)
        if len(calls) % 2:
            raise termios.error(errno.EINTR, "Interrupted system call")
        tcsetattr(*args)

    monkeypatch.setattr(termios, "tcsetattr", interrupted_at_first)
    before = termios.tcgetattr(ends[1])
    with RawTerminal(ends[1]):
        assert termios.tcgetattr(ends[1])[:6] == make_raw(termios.tcgetattr(ends[1]))[:6] != before[:6]
    assert termios.tcgetattr(ends[1]) == before


# --- programs that end


PROGRAM = """
import os, signal, sys
from vmette.cli import terminal

def ended(number, frame):
    raise SystemExit(128 + number)

signal.signal(signal.SIGTERM, ended)
settings = terminal.RawTerminal(0)
"""

ENDINGS = {
    "at its end": ("with settings: pass", 0),
    "by an exception": ("with settings: 1 / 0", 1),
    "by sys.exit": ("with settings: sys.exit(7)", 7),
    "by a signal": ("with settings: os.kill(os.getpid(), signal.SIGTERM)", 143),
    "by a signal before the block": ("settings.__enter__(); os.kill(os.getpid(), signal.SIGTERM)", 143),
    "by a signal within a handler": (
        "signal.signal(signal.SIGWINCH, lambda *_: os.kill(os.getpid(), signal.SIGTERM))\n"
        "with settings: os.kill(os.getpid(), signal.SIGCONT)",
        143,
    ),
    # In a session without a shell that could continue it, the kernel does not stop it, and it goes on as before.
    "asked to stop, but not stopped": (
        "with settings: os.kill(os.getpid(), signal.SIGTSTP); sys.exit(os.system('stty -a | grep -q -e -icanon'))",
        0,
    ),
    "with its terminal's settings changed": ("with settings: os.system('stty sane'); sys.exit(3)", 3),
}


@pytest.mark.parametrize(("line", "status"), ENDINGS.values(), ids=ENDINGS)
def test_a_terminal_is_as_it_was_when_its_program_has_ended(line: str, status: int) -> None:
    with Terminal([sys.executable, "-c", PROGRAM + line]) as terminal:
        assert terminal.ended() == status


def test_in_the_background_it_waits_until_it_is_in_the_foreground() -> None:
    program = PROGRAM + "with settings: os.system('stty -a | grep -o -e -icanon')"
    with Terminal(["dash", "-i"], env={**os.environ, "PS1": "host> ", "PROGRAM": program}) as terminal:
        terminal.until("host> ")
        terminal.type(f'{sys.executable} -c "$PROGRAM" &\r')
        state = b""
        while b"Stopped" not in state:
            terminal.until("host> ")
            terminal.type("jobs\r")
            terminal.until("jobs\r\n")
            state = terminal.groups("(?s)(.*?)host> ")[0]
            terminal.type("\r")
        terminal.until("host> ")
        terminal.type("fg\r")
        terminal.until("\n-icanon\n")
        terminal.until("host> ")
        terminal.type("exit 0\r")
        assert terminal.ended() == 0
