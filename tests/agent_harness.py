"""The guest agent (csrc/guest/agent.c) built for this host with sanitizers, and a host for tests to talk to it."""

from __future__ import annotations

import atexit
import errno
import functools
import os
import pwd
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from vmette import config
from vmette.protocol import (
    HEADER,
    MAX_CONTROL,
    MAX_DATA,
    U32,
    U64,
    Accepted,
    Channel,
    Connection,
    Ended,
    Event,
    Exited,
    Failure,
    FrameType,
    Hello,
    Opened,
    Output,
    Tag,
    decode_record,
    encode_exec,
    encode_record,
)

ROOT = Path(__file__).parent.parent
GUEST = ("agent", "command", "accounts", "address", "cgroup", "resume", "wire")
SOURCES = ("tests/agent_host.c", *(f"csrc/guest/{name}.c" for name in GUEST))
COMPILE = ("cc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-Icsrc/guest")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
WRAPPED = ("poll", "read", "write", "initgroups", "setgroups")
SANITIZER_STATUS = 99

CLEAN, BROKEN = 0, 3
"""How agent_host ends: as the host wished, or because it broke the protocol."""

PIPE = 65536
"""What the kernel holds of a command's stdin."""

PATIENCE = 60.0
"""Seconds without any progress that mean a hang."""

MIB = 1 << 20
AGENT_KERNEL = "6.12.0-test"
HELLO = HEADER.pack(FrameType.HELLO, 0, 0, 0, 12) + encode_record([(Tag.VERSION, U32.pack(1))])
WAKING_FIELDS = {
    Tag.VERSION: U32.pack(1),
    Tag.SEED: bytes(64),
    Tag.CLOCK: U64.pack(0x1122334455667788),
    Tag.HOSTNAME: b"woken",
    Tag.SHARE: b"9p:share1:ro:/b",
}
WAKING_RECORD = encode_record([(Tag.SHARE, b"9p:share0:rw:/a"), *WAKING_FIELDS.items()])
PAUSE = HEADER.pack(FrameType.PAUSE, 0, 0, 0, 0)
WAKING = HEADER.pack(FrameType.HELLO, 0, 0, 0, len(WAKING_RECORD)) + WAKING_RECORD
"""HELLO to an agent whose machine was saved while it paused."""
OWN_USER = str(os.getuid()).encode()
OWN_HOME = pwd.getpwuid(os.getuid()).pw_dir


@functools.cache
def build() -> Path:
    """The program agent_host, made once for all tests and removed at the end."""
    directory = tempfile.mkdtemp(prefix="agent_host-")
    atexit.register(shutil.rmtree, directory)
    output = Path(directory) / "agent_host"
    wrap = [f"-Wl,--wrap={name}" for name in WRAPPED]
    subprocess.run([*COMPILE, *SANITIZE, *wrap, *SOURCES, "-o", output], cwd=ROOT, check=True)
    return output


@dataclass
class Stream:
    """A command, connection or listener of the agent, and what has come of it."""

    number: int
    stdin: memoryview = field(default_factory=lambda: memoryview(b""))
    eof: bool = True
    """Its stdin ends after `stdin`."""
    reads: bool = True
    """Somebody takes its output; or else it stays in the window."""
    data: dict[Channel, bytearray] = field(
        default_factory=lambda: {Channel.STDOUT: bytearray(), Channel.STDERR: bytearray()}
    )
    held: list[Output] = field(default_factory=list)
    opened: bool = False
    ended: bool = False
    """The peer of the connection has shut down its writing half."""
    peer: str = ""
    accepted: list[Stream] = field(default_factory=list)
    end: Exited | Failure | None = None

    @property
    def stdout(self) -> bytes:
        return bytes(self.data[Channel.STDOUT])

    @property
    def stderr(self) -> bytes:
        return bytes(self.data[Channel.STDERR])

    @property
    def status(self) -> int:
        """As in subprocess: negative for the signal that killed it."""
        assert isinstance(self.end, Exited), self.end
        return self.end.code if self.end.code is not None else -(self.end.signal or 0)

    @property
    def failure(self) -> tuple[int, str]:
        assert isinstance(self.end, Failure), self.end
        assert self.end.text == os.strerror(self.end.errno)
        return self.end.errno, self.end.stage


class Agent:
    """An agent that runs, and the host that it talks to."""

    def __init__(self, program: Path, kernel: str = AGENT_KERNEL) -> None:
        self.connection = Connection()
        self.hello: Hello | None = None
        self.streams: dict[int, Stream] = {}
        self.left = 0
        """Processes that were still there when it had ended."""
        self.port, theirs = socket.socketpair()
        self.port.settimeout(PATIENCE)
        with theirs:
            self.process = spawn(program, "serve", theirs, kernel)

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.port.close()
        with self.process:
            self.process.kill()

    def ended(self) -> int:
        """Its exit status. A sanitizer that has something to say fails the test."""
        left, said = self.process.communicate(timeout=PATIENCE)
        assert said.decode() == ""
        self.left = int(left)
        return self.process.returncode

    def start(
        self,
        *argv: str | bytes,
        env: tuple[bytes, ...] = (),
        cwd: bytes | None = None,
        user: bytes | None = OWN_USER,
        terminal: tuple[int, int] | None = None,
        builtin: bool = False,
        init: bool = False,
        announced: bool = False,
        stdin: bytes = b"",
        eof: bool = True,
        reads: bool = True,
    ) -> Stream:
        words = tuple(os.fsencode(arg) for arg in argv)
        command = config.Command(words, env, cwd, user, terminal=terminal, builtin=builtin, init=init)
        number = self.connection.exec(command, announced=announced)
        return self._add(Stream(number, memoryview(stdin), eof, reads))

    def run(
        self,
        *argv: str | bytes,
        env: tuple[bytes, ...] = (),
        cwd: bytes | None = None,
        user: bytes | None = OWN_USER,
        builtin: bool = False,
        init: bool = False,
        stdin: bytes = b"",
    ) -> Stream:
        command = self.start(*argv, env=env, cwd=cwd, user=user, builtin=builtin, init=init, stdin=stdin)
        self.wait(command)
        return command

    def connect(self, address: str, stdin: bytes = b"", *, eof: bool = True, reads: bool = True) -> Stream:
        return self._add(Stream(self.connection.connect(address), memoryview(stdin), eof, reads))

    def listen(self, address: str) -> Stream:
        """A listener that listens. What it accepts does not end its stdin by itself."""
        listener = self._add(Stream(self.connection.listen(address), eof=False))
        self.until(lambda: listener.opened or listener.end is not None)
        return listener

    def _add(self, stream: Stream) -> Stream:
        self.streams[stream.number] = stream
        return stream

    def wait(self, *streams: Stream) -> None:
        self.until(lambda: all(stream.end is not None for stream in streams))

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.turn()

    def turn(self) -> None:
        """Moves what can be moved, both ways. Waits for the agent if nothing can."""
        for stream in self.streams.values():
            self.feed(stream)
        outgoing = self.connection.outgoing
        readable, writable, _ = select.select([self.port], [self.port] if outgoing else [], [], PATIENCE)
        assert readable or writable, "the agent hangs"
        if writable:
            sent = self.port.send(memoryview(outgoing)[:PIPE])
            del outgoing[:sent]
        if readable:
            data = self.port.recv(MIB)
            assert data, "the agent has closed the port"
            for event in self.connection.receive(data):
                self._take(event)

    def feed(self, stream: Stream) -> None:
        piece = stream.stdin[: self.connection.stdin_room(stream.number)]
        if piece:
            self.connection.send_stdin(stream.number, bytes(piece))
            stream.stdin = stream.stdin[len(piece) :]
        if stream.eof and not stream.stdin:
            self.connection.send_eof(stream.number)

    def _take(self, event: Event) -> None:
        if isinstance(event, Hello):
            self.hello = event
        elif isinstance(event, Output):
            stream = self.streams[event.stream]
            assert stream.end is None
            stream.data[event.channel] += event.data
            stream.held.append(event)
            if stream.reads:
                self.give_back(stream)
        elif isinstance(event, Accepted):
            stream = self._add(Stream(event.stream, eof=False, peer=event.peer))
            self.streams[event.listener].accepted.append(stream)
        elif isinstance(event, Opened):
            self.streams[event.stream].opened = True
        elif isinstance(event, Ended):
            self.streams[event.stream].ended = True
        elif isinstance(event, Exited | Failure):
            assert event.stream, event
            self.streams[event.stream].end = event

    def give_back(self, stream: Stream) -> None:
        """Takes the output of `stream` out of the window."""
        for output in stream.held:
            self.connection.consumed(output.stream, output.channel, len(output.data))
        stream.held.clear()


def spawn(program: Path, mode: str, port: socket.socket, *args: str) -> subprocess.Popen[bytes]:
    """agent_host, in a session of its own: a signal to its group, by whatever mistake, is its own affair."""
    options = f"exitcode={SANITIZER_STATUS}:print_stacktrace=1:detect_stack_use_after_return=1"
    return subprocess.Popen(
        [program, mode, str(port.fileno()), *args],
        pass_fds=[port.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict.fromkeys(("ASAN_OPTIONS", "UBSAN_OPTIONS", "LSAN_OPTIONS"), options),
        start_new_session=True,
    )


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for what the agent does without a word."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, "it does not happen"
        time.sleep(0.002)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes in which a piece that is lost, doubled or out of place shows."""
    return b"".join(struct.pack("<II", seed, at) for at in range(0, size, 8))[:size]


def descriptors(agent: Agent) -> set[int]:
    agent.until(lambda: agent.hello is not None)
    return {int(path.name) for path in Path(f"/proc/{agent.process.pid}/fd").iterdir()}


def drain(port: socket.socket) -> bytes:
    """All that the agent says until it ends."""
    data = bytearray()
    try:
        while piece := port.recv(MIB):
            data += piece
    except ConnectionResetError:  # it ended without having read all that it was sent
        pass
    return bytes(data)


# --- Frames by hand ---------------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    kind: int
    stream: int
    payload: bytes


def frame(kind: int, stream: int, payload: bytes = b"", *, reserved: int = 0, length: int | None = None) -> bytes:
    header = struct.pack(
        "<B3sII", kind, reserved.to_bytes(3, "little"), stream, len(payload) if length is None else length
    )
    return header + payload


def fields(*items: tuple[Tag, bytes]) -> bytes:
    return encode_record(items)


def exec_frame(*argv: bytes, stream: int = 1) -> bytes:
    return frame(FrameType.EXEC, stream, encode_exec(config.Command(argv, user=OWN_USER)))


def parse(data: bytes, *, whole: bool) -> list[Frame]:
    """The frames of the agent. It may stop within one only if the host is gone."""
    found = []
    while len(data) >= HEADER.size:
        kind, zero8, zero16, stream, length = HEADER.unpack_from(data)
        assert not zero8
        assert not zero16
        assert length <= (MAX_DATA if kind in {FrameType.STDOUT, FrameType.STDERR} else MAX_CONTROL)
        if len(data) - HEADER.size < length:
            break
        found.append(Frame(FrameType(kind), stream, data[HEADER.size : HEADER.size + length]))
        data = data[HEADER.size + length :]
    assert not (whole and data)
    return found


def converse(program: Path, data: bytes) -> tuple[int, list[Frame]]:
    """Says `data` to a new agent and nothing more; returns how it ended and what it said."""
    with Agent(program) as agent:
        try:
            agent.port.sendall(data)
            agent.port.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has heard enough
        said = drain(agent.port)
        status = agent.ended()
    frames = parse(said, whole=status == BROKEN)
    assert status in {CLEAN, BROKEN}
    assert frames[0].kind == FrameType.HELLO
    last = frames[-1]
    if status == BROKEN:
        assert (last.kind, last.stream) == (FrameType.ERROR, 0)
        record = dict(decode_record(last.payload))
        assert record[Tag.ERRNO] == U32.pack(errno.EPROTO)
        assert record[Tag.STAGE] == b"protocol"
    else:
        # Of the machine as a whole it says that it has paused, and no more.
        assert all(each.kind == FrameType.PAUSE for each in frames[1:] if each.stream == 0)
    return status, frames
