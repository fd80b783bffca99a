"""`vmette.guest` and `vmette.sandbox.Session` against guests that break their word: a peer on the control port."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vmette
from vmette.config import Command
from vmette.guest import Guest
from vmette.machine import Machine
from vmette.process import Captured, Popen, Running, run
from vmette.protocol import HEADER, U32, FrameType, Tag, encode_record
from vmette.sandbox import Session
from vmette.streams import BytesSource, Discard
from vmette.vsock import BACKLOG, Vsock

COMMAND = Command((b"x",))
Frames = Iterator[tuple[int, int, bytes]]
Script = Callable[[socket.socket, Frames], None]


def frame(kind: FrameType, stream: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(kind, 0, 0, stream, len(payload)) + payload


HELLO = frame(FrameType.HELLO, 0, encode_record([(Tag.VERSION, U32.pack(1)), (Tag.KERNEL, b"fake")]))
EXIT = encode_record([(Tag.CODE, U32.pack(0))])


def accepted(stream: int, listener: int) -> bytes:
    record = encode_record([(Tag.LISTENER, U32.pack(listener)), (Tag.ADDRESS, b"vsock:3:1")])
    return frame(FrameType.ACCEPTED, stream, record)


class FakeMachine:
    """In place of QemuMachine."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(shares=(), disks=())
        self.vsock = None
        self.resume = None
        self.greeted = False
        self.control, self.guest = socket.socketpair()
        self.console, self._console = socket.socketpair()
        self.errors, self._errors = os.pipe()
        self.ends: list[int] = []
        self.child = SimpleNamespace(status=0, poll=lambda wait: True)
        self.failure = lambda said: None
        self.closed = False

    def close(self) -> None:
        self.closed = True
        for end in (self.control, self.console, self._console):
            end.close()
        with suppress(OSError):
            self.guest.shutdown(socket.SHUT_RDWR)
        for fd in (self.errors, self._errors):
            with suppress(OSError):
                os.close(fd)


def frames(port: socket.socket) -> Frames:
    """What the host sends, until it hangs up."""
    data = b""
    while piece := port.recv(65536):
        data += piece
        while len(data) >= HEADER.size:
            kind, _, _, stream, length = HEADER.unpack_from(data)
            if len(data) < HEADER.size + length:
                break
            yield kind, stream, data[HEADER.size : HEADER.size + length]
            data = data[HEADER.size + length :]


@contextmanager
def session(monkeypatch: pytest.MonkeyPatch, script: Script) -> Iterator[tuple[Session, FakeMachine]]:
    """A session with a guest that does as `script` says, once it has said hello."""
    machine = FakeMachine()

    def act() -> None:
        with suppress(OSError), machine.guest:
            machine.guest.sendall(HELLO)
            script(machine.guest, frames(machine.guest))

    @contextmanager
    def booted(asked: object, stopwatch: Any, **options: object) -> Iterator[Guest]:
        with Guest(machine, stopwatch) as guest:  # type: ignore[arg-type]
            yield guest

    monkeypatch.setattr("vmette.sandbox.booted", booted)
    actor = threading.Thread(target=act)
    actor.start()
    made = Session(Machine(machine.config), max_lifetime=None, idle_timeout=None)  # type: ignore[arg-type]
    try:
        yield made, machine
    finally:
        made.close()
        actor.join()
        assert machine.closed


def silence(port: socket.socket, heard: Frames) -> None:
    with suppress(OSError):
        for _ in heard:
            pass


def open_files() -> list[Path]:
    return sorted(Path("/proc/self/fd").iterdir())


def start(made: Session, stdin: int, stdout: int, stderr: int) -> Popen:
    return Popen(SimpleNamespace(), made, COMMAND, stdin, stdout, stderr)  # type: ignore[arg-type]


def soon(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def memory() -> int:
    """Bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_guest_that_only_keeps_the_loop_busy_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ignores the signal that kills the command, and writes a byte at a time."""
    monkeypatch.setattr("vmette.guest.KILL_SECONDS", 1)

    def script(port: socket.socket, heard: Frames) -> None:
        for kind, stream, _ in heard:
            if kind == FrameType.EXEC:
                threading.Thread(target=silence, args=(port, heard)).start()
                while True:
                    port.sendall(frame(FrameType.STDOUT, stream, b"x") * 100)

    with session(monkeypatch, script) as (made, _):
        with pytest.raises(vmette.TimeoutExpired):
            run(made, COMMAND, b"", Captured(COMMAND), timeout=0.5)
        assert "did not kill a command within 1 seconds" in str(made.ended)


@pytest.mark.parametrize("same", [True, False], ids=["one number", "many numbers"])
def test_connections_that_end_and_are_not_read_are_bounded(monkeypatch: pytest.MonkeyPatch, same: bool) -> None:
    before = memory()

    def script(port: socket.socket, heard: Frames) -> None:
        for kind, stream, _ in heard:
            if kind == FrameType.LISTEN:
                port.sendall(frame(FrameType.OPENED, stream))
                for number in range(1, 3000):
                    connection = 0x80000000 | (1 if same else number)
                    port.sendall(accepted(connection, stream))
                    for _ in range(4):
                        port.sendall(frame(FrameType.STDOUT, connection, bytes(65536)))
                    port.sendall(frame(FrameType.EXIT, connection, EXIT))

    with session(monkeypatch, script) as (made, _):
        with Vsock(made).listen(5) as listener:
            while made.ended is None and memory() - before < (1 << 29):
                time.sleep(0.05)
                if not same and listener._accepted.qsize() >= BACKLOG:
                    break
        assert memory() - before < 1 << 29


def test_single_bytes_take_no_more_memory_than_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(port: socket.socket, heard: Frames) -> None:
        for kind, stream, _ in heard:
            if kind == FrameType.EXEC:
                port.sendall(frame(FrameType.STDOUT, stream, b"x") * 250_000)
                port.sendall(frame(FrameType.STDERR, stream, b"done"))

    with session(monkeypatch, script) as (made, _):
        before = memory()
        theirs, ours = os.pipe()
        with os.fdopen(theirs, "rb") as reader:
            process = start(made, -3, ours, -1)
            os.close(ours)
            assert process.stderr is not None
            assert process.stderr.read1(4) == b"done"
            assert memory() - before < 20 << 20
            assert reader.read(1000) == b"x" * 1000
            process.stderr.close()


def test_an_interrupted_start_gives_its_descriptors_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = threading.Event()

    def script(port: socket.socket, heard: Frames) -> None:
        for kind, stream, payload in heard:
            if kind == FrameType.EXEC:
                started.append(stream)
            if kind == FrameType.SIGNAL and payload[0] == signal.SIGKILL:
                port.sendall(frame(FrameType.STDOUT, stream, b"stray"))
                port.sendall(frame(FrameType.EXIT, stream, EXIT))
                killed.set()

    started: list[int] = []
    with session(monkeypatch, script) as (made, _):
        before = open_files()
        made.post(lambda: time.sleep(1))
        interrupt = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            start(made, -1, -1, -1)
        interrupt.join()
        assert killed.wait(60)
        assert started
        soon(lambda: open_files() == before)
        assert made.ended is None


def test_a_callback_that_fails_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with session(monkeypatch, silence) as (made, machine):
        commands = [Running(made, COMMAND, BytesSource(b""), Discard(), Discard()) for _ in range(3)]
        for command in commands:
            command.when_done(fail)
        made.close()
        for command in commands:
            with pytest.raises(vmette.SandboxClosed):
                command.wait(time.monotonic() + 60)
        assert machine.closed
    assert caplog.text.count("has failed") == 3


def test_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than poll(2) can wait."""

    def script(port: socket.socket, heard: Frames) -> None:
        for kind, stream, _ in heard:
            if kind == FrameType.EXEC:
                port.sendall(frame(FrameType.EXIT, stream, EXIT))

    with session(monkeypatch, script) as (made, _):
        made._dies_at = time.monotonic() + 1e8
        assert run(made, COMMAND, b"", Captured(COMMAND), timeout=1e8).code == 0
        process = start(made, -1, -1, -1)
        assert process.communicate(timeout=1e8) == (b"", b"")


def test_a_silent_guest_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmette.vsock.ANSWER_SECONDS", 0.2)
    with session(monkeypatch, silence) as (made, _):
        with pytest.raises(TimeoutError, match="has not connected"):
            Vsock(made).connect(5, timeout=0.2)
        with pytest.raises(vmette.GuestError, match="has not listened"):
            Vsock(made).listen(5)


def test_connections_that_nobody_accepts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(port: socket.socket, heard: Frames) -> None:
        for kind, stream, _ in heard:
            if kind == FrameType.LISTEN:
                port.sendall(frame(FrameType.OPENED, stream))
                for number in range(1, 2000):
                    port.sendall(accepted(0x80000000 | number, stream))
                    port.sendall(frame(FrameType.EXIT, 0x80000000 | number, EXIT))
                port.sendall(accepted(0x8FFFFFFF, stream))
            elif kind == FrameType.EXEC:
                port.sendall(frame(FrameType.EXIT, stream, EXIT))

    with session(monkeypatch, script) as (made, _):
        before = len(open_files())
        with Vsock(made).listen(5) as listener:
            with start(made, -3, -3, -3) as process:  # at its end all that was said before has been taken
                assert process.wait(60) == 0
            soon(lambda: len(open_files()) <= before + BACKLOG + 2)
            for _ in range(BACKLOG):
                listener.accept(60).close()
        assert made.ended is None


def test_lines_and_output_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def script(port: socket.socket, heard: Frames) -> None:
        room = {}
        for kind, stream, payload in heard:
            if kind == FrameType.EXEC:
                room[stream] = 262144
            elif kind == FrameType.WINDOW and stream in room:
                room[stream] += U32.unpack(payload[1:])[0]
            elif kind == FrameType.SIGNAL:
                port.sendall(frame(FrameType.EXIT, stream, EXIT))
                room.pop(stream, None)
            for number in room:
                while room[number] >= 65536:
                    room[number] -= 65536
                    port.sendall(frame(FrameType.STDOUT, number, b"x" * 65536))

    with session(monkeypatch, script) as (made, _):
        with start(made, -3, -1, -3) as process:
            with pytest.raises(vmette.OutputTooLarge, match="a line of more than"):
                list(process.lines())
            process.kill()
        with start(made, -3, -1, -3) as process, pytest.raises(vmette.OutputTooLarge, match="more than 1000000 bytes"):
            process.communicate(max_output=1_000_000)


def test_a_sandbox_of_the_parent_is_refused_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    with session(monkeypatch, silence) as (made, _):
        monkeypatch.setattr("os.getpid", lambda: -1)
        with pytest.raises(vmette.SandboxClosed, match="belongs to another process"):
            made.call(lambda guest: None)
        monkeypatch.undo()
