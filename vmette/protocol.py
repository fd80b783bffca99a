"""The control protocol, host side: frames, records and flow control without any I/O (docs/protocol.md is the wire)."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, NamedTuple

from .errors import ProtocolError

if TYPE_CHECKING:
    from .config import Command

__all__ = [
    "Channel",
    "Connection",
    "Event",
    "ExecFlag",
    "FrameType",
    "Milestone",
    "SignalFlag",
    "Tag",
    "Usage",
    "decode_record",
    "encode_exec",
    "encode_record",
]

VERSION = 1
SEED_BYTES = 64
HEADER = struct.Struct("<BBHII")
FIELD = struct.Struct("<HHI")
U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")
CREDIT = struct.Struct("<BI")
WINSIZE = struct.Struct("<HH")
USAGE = struct.Struct("<QQQ")

MAX_DATA = 65536
MAX_EXEC = 2 << 20
MAX_CONTROL = 4096
WINDOW = 262144
"""Bytes that may be in flight on one channel of one stream."""
MAX_STREAMS = 256
FROM_GUEST = 1 << 31
"""The bit that streams have which the guest opened."""

KERNEL_TEXT_LIMIT = 256
MAX_ERRNO = 4095


class FrameType(IntEnum):
    """The type byte of a frame's header."""

    HELLO = 1
    ERROR = 2
    SHUTDOWN = 3
    EXEC = 4
    STDIN = 5
    EOF = 6
    STDOUT = 7
    STDERR = 8
    WINDOW = 9
    SIGNAL = 10
    EXIT = 11
    RESIZE = 12
    CONNECT = 13
    LISTEN = 14
    OPENED = 15
    ACCEPTED = 16
    PAUSE = 17
    RESUME = 18


class Tag(IntEnum):
    """The tag of a record's field."""

    VERSION = 1
    KERNEL = 2
    MILESTONE = 3
    ERRNO = 4
    STAGE = 5
    TEXT = 6
    ARG = 7
    ENV = 8
    CWD = 9
    USER = 10
    FLAGS = 11
    CODE = 12
    SIGNAL = 13
    WINSIZE = 14
    USAGE = 15
    PEAK = 16
    OOM_KILLS = 17
    ADDRESS = 18
    LISTENER = 19
    NAME = 20
    STAT = 21
    TARGET = 22
    SEED = 23
    CLOCK = 24
    HOSTNAME = 25
    SHARE = 26


class ExecFlag(IntFlag):
    """What FLAGS of EXEC may say."""

    TERMINAL = 1
    BUILTIN = 2
    INIT = 4
    ANNOUNCED = 8


class SignalFlag(IntFlag):
    """Whom SIGNAL is for: the command's process, its process group, all processes that it has started."""

    PROCESS = 0
    GROUP = 1
    ALL = 2


class Channel(IntEnum):
    """A byte stream of a command, as WINDOW and EOF frames number them. A connection has STDIN and STDOUT."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2


def encode_record(fields: Iterable[tuple[Tag, bytes]]) -> bytes:
    """A record of `fields`, in their order."""
    return b"".join(FIELD.pack(tag, 0, len(value)) + value for tag, value in fields)


def decode_record(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """The (tag, value) fields of a record, unknown tags among them.

    Raises:
        ProtocolError: the record is malformed.
    """
    at = 0
    while at < len(payload):
        if len(payload) - at < FIELD.size:
            raise ProtocolError("the guest sent a record that ends within a field")
        tag, zero, length = FIELD.unpack_from(payload, at)
        at += FIELD.size
        if zero or length > len(payload) - at:
            raise ProtocolError("the guest sent a record with a bad field")
        yield tag, payload[at : at + length]
        at += length


def _u32(value: bytes) -> int:
    if len(value) != U32.size:
        raise ProtocolError("the guest sent a number of the wrong size")
    return int(U32.unpack(value)[0])


def _text(value: bytes) -> str:
    """Text of the guest, fit for one line on a terminal: control characters are replaced."""
    return "".join(c if c.isprintable() else "?" for c in value.decode("utf-8", "replace"))


@dataclass(frozen=True)
class Resume:
    """What a machine that was saved is told when it wakes, so that it is not as others that wake from there."""

    seed: bytes = field(repr=False)
    """For its random numbers."""
    clock: int
    """Nanoseconds since 1970."""
    hostname: str
    shares: tuple[str, ...] = ()
    """What it is to mount, as the kernel's command line has it (vmette/vmm/cmdline.py)."""

    @classmethod
    def now(cls, hostname: str, shares: Iterable[str] = ()) -> Resume:
        """For a machine of that name."""
        return cls(os.urandom(SEED_BYTES), time.time_ns(), hostname, tuple(shares))


# What the guest says. Named tuples: a run waits for these classes to be made, and a dataclass takes four times as long.


class Milestone(NamedTuple):
    """A point that the guest's boot reached, `usec` microseconds after its kernel started."""

    name: str
    usec: int


class Hello(NamedTuple):
    """The guest is ready for commands."""

    kernel: str
    milestones: tuple[Milestone, ...]


class Failure(NamedTuple):
    """ERROR: the machine (stream 0) or a command could not be set up."""

    stream: int
    errno: int
    stage: str
    text: str


class Output(NamedTuple):
    """Bytes that a command wrote. Give them back with :meth:`Connection.consumed` when they have been passed on."""

    stream: int
    channel: Channel
    data: bytes


class Usage(NamedTuple):
    """What a command took of the machine; None is what the guest could not tell."""

    user_seconds: float
    system_seconds: float
    max_rss: int
    """Bytes of its largest process."""
    peak_memory: int | None = None
    """The most bytes that it and all its children held together."""
    oom_kills: int = 0
    """How many of its processes were killed for lack of memory."""


class Exited(NamedTuple):
    """A command or connection ended: exactly one of `code` (0 to 255) and `signal` (1 to 64) is set."""

    stream: int
    code: int | None
    signal: int | None
    usage: Usage | None = None


class Writable(NamedTuple):
    """The guest took more of a command's stdin: :meth:`Connection.stdin_room` has grown."""

    stream: int


class Opened(NamedTuple):
    """A CONNECT has connected, a LISTEN listens, or a command that was to be announced has started."""

    stream: int


class Accepted(NamedTuple):
    """A listener has taken a connection, which is a stream now."""

    stream: int
    listener: int
    peer: str


class Ended(NamedTuple):
    """The peer of a connection has shut down its writing half."""

    stream: int


class Paused:
    """The guest says nothing more until :meth:`Connection.resume`."""


Event = Paused | Hello | Failure | Output | Exited | Writable | Opened | Accepted | Ended


def encode_exec(command: Command, *, announced: bool = False) -> bytes:
    """The payload of the EXEC frame for `command`, whose start is to be `announced` or not."""
    fields = [(Tag.ARG, arg) for arg in command.argv] + [(Tag.ENV, entry) for entry in command.env]
    if command.cwd is not None:
        fields.append((Tag.CWD, command.cwd))
    if command.user is not None:
        fields.append((Tag.USER, command.user))
    flags = ExecFlag.ANNOUNCED if announced else ExecFlag(0)
    if command.init:
        flags |= ExecFlag.INIT
    if command.builtin:
        flags |= ExecFlag.BUILTIN
    if command.terminal is not None:
        flags |= ExecFlag.TERMINAL
        fields.append((Tag.WINSIZE, WINSIZE.pack(*command.terminal)))
    fields.append((Tag.FLAGS, U32.pack(flags)))
    return encode_record(fields)


class _Kind(IntEnum):
    COMMAND = 0
    CONNECTION = 1
    LISTENER = 2


class _Stream:
    def __init__(self, kind: _Kind, *, opened: bool = True) -> None:
        self.kind = kind
        self.opened = opened
        self.stdin = WINDOW
        self.eof = False
        self.windows = {Channel.STDOUT: WINDOW, Channel.STDERR: WINDOW}
        self.owed = {Channel.STDOUT: 0, Channel.STDERR: 0}
        self.ended = False
        """Whether the peer of a connection will send no more."""


_LIMITS = {FrameType.STDOUT: MAX_DATA, FrameType.STDERR: MAX_DATA}
_ANSWERS = {FrameType.ERROR, FrameType.WINDOW, FrameType.EXIT, FrameType.EOF, FrameType.OPENED, FrameType.ACCEPTED}
_FROM_GUEST = frozenset({FrameType.HELLO, FrameType.PAUSE, *_ANSWERS, *_LIMITS})


class Connection:
    """One connection's state. Bytes from the guest go into :meth:`receive`, bytes for it come out of :meth:`outgoing`.

    Holds at most one incomplete frame of input; what it holds of output is what the caller sent and has not taken.
    """

    def __init__(self, resume: Resume | None = None) -> None:
        self._in = bytearray()
        self._out = bytearray()
        self._held: bytearray | None = None
        """What was said since :meth:`pause`."""
        self._paused = False
        self._streams: dict[int, _Stream] = {}
        self._last_stream = 0
        self._greeted = False
        fields = [(Tag.VERSION, U32.pack(VERSION))]
        if resume is not None:
            fields += [(Tag.SEED, resume.seed), (Tag.CLOCK, U64.pack(resume.clock))]
            fields.append((Tag.HOSTNAME, resume.hostname.encode()))
            fields += [(Tag.SHARE, os.fsencode(share)) for share in resume.shares]
        self._send(FrameType.HELLO, 0, encode_record(fields))

    # --- to the guest

    def _send(self, kind: FrameType, stream: int, payload: bytes | memoryview = b"") -> None:
        to = self._out if self._held is None else self._held
        to += HEADER.pack(kind, 0, 0, stream, len(payload))
        to += payload

    @property
    def outgoing(self) -> bytearray:
        """Bytes to be written to the port: delete from its front what has been written."""
        return self._out

    def _open(self, kind: _Kind, frame: FrameType, payload: bytes, *, opened: bool = False) -> int:
        self._last_stream += 1
        self._streams[self._last_stream] = _Stream(kind, opened=opened)
        self._send(frame, self._last_stream, payload)
        return self._last_stream

    def exec(self, command: Command, *, announced: bool = False) -> int:
        """Starts a command and returns its stream number. If it is `announced`, :class:`Opened` says that it runs.

        Raises:
            ProtocolError: the arguments and environment are larger than the protocol carries (2 MiB).
        """
        payload = encode_exec(command, announced=announced)
        if len(payload) > MAX_EXEC:
            raise ProtocolError("the command's arguments and environment are larger than 2 MiB")
        return self._open(_Kind.COMMAND, FrameType.EXEC, payload, opened=not announced)

    def connect(self, address: str) -> int:
        """Has the guest connect to `address` (docs/protocol.md, ADDRESS) and returns the connection's stream number."""
        return self._open(_Kind.CONNECTION, FrameType.CONNECT, encode_record([(Tag.ADDRESS, os.fsencode(address))]))

    def listen(self, address: str) -> int:
        """Has the guest listen at `address` and returns the listener's stream number."""
        return self._open(_Kind.LISTENER, FrameType.LISTEN, encode_record([(Tag.ADDRESS, os.fsencode(address))]))

    def stdin_room(self, stream: int) -> int:
        """How many bytes of stdin may be sent now: none before it is open, nor after its end."""
        state = self._streams.get(stream)
        return 0 if state is None or state.eof or not state.opened else state.stdin

    def send_stdin(self, stream: int, data: bytes) -> None:
        """Sends `data`, at most :meth:`stdin_room` bytes."""
        if len(data) > self.stdin_room(stream):
            raise ValueError("more bytes than the window has room for")
        if not data:
            return
        self._streams[stream].stdin -= len(data)
        view = memoryview(data)
        for at in range(0, len(data), MAX_DATA):
            self._send(FrameType.STDIN, stream, view[at : at + MAX_DATA])

    def send_eof(self, stream: int, channel: Channel = Channel.STDIN) -> None:
        """Ends the stdin of a command or connection; or says that nobody reads that output of a command any more."""
        state = self._streams.get(stream)
        if state is None or (channel is Channel.STDIN and state.eof):
            return
        state.eof = state.eof or channel is Channel.STDIN
        self._send(FrameType.EOF, stream, bytes((channel,)))

    def signal(self, stream: int, number: int, flags: SignalFlag = SignalFlag.PROCESS) -> None:
        """Sends signal `number` (1 to 64) to a command; number 9 ends a connection or a listener."""
        if not 1 <= number <= 64:
            raise ValueError(f"{number} is no signal of Linux")
        if stream in self._streams:
            self._send(FrameType.SIGNAL, stream, bytes((number, flags)))

    def resize(self, stream: int, rows: int, columns: int) -> None:
        """Tells a command's terminal its size."""
        if stream in self._streams:
            self._send(FrameType.RESIZE, stream, WINSIZE.pack(rows, columns))

    def shutdown(self) -> None:
        """Asks the guest to end all commands, sync and power off."""
        self._send(FrameType.SHUTDOWN, 0)

    def pause(self) -> None:
        """Has the guest fall silent, so that its machine can be saved: :class:`Paused` says when.

        What is said to it from now on is held back until :meth:`resume`.
        """
        if self._held is not None:  # it was asked before, and has yet to answer
            return
        self._send(FrameType.PAUSE, 0)
        self._held = bytearray()

    def resume(self) -> None:
        """Ends a pause."""
        assert self._held is not None
        held, self._held, self._paused = self._held, None, False
        self._send(FrameType.RESUME, 0)
        self._out += held

    def consumed(self, stream: int, channel: Channel, size: int) -> None:
        """Gives `size` bytes of output that have been passed on back to the guest's window. Small ones are gathered."""
        state = self._streams.get(stream)
        if state is None:
            return
        state.owed[channel] += size
        if (owed := state.owed[channel]) >= WINDOW // 4:
            state.owed[channel] = 0
            state.windows[channel] += owed
            self._send(FrameType.WINDOW, stream, CREDIT.pack(channel, owed))

    # --- from the guest

    def receive(self, data: bytes) -> Iterator[Event]:
        """Takes bytes from the port; yields what they mean.

        Raises:
            ProtocolError: the guest broke the protocol. The connection is of no more use.
        """
        self._in += data
        at = 0
        try:
            while len(self._in) - at >= HEADER.size:
                kind, zero8, zero16, stream, length = HEADER.unpack_from(self._in, at)
                if zero8 or zero16 or kind not in _FROM_GUEST or length > _LIMITS.get(kind, MAX_CONTROL):
                    raise ProtocolError(f"the guest sent a bad frame (type {kind}, {length} bytes)")
                if len(self._in) - at - HEADER.size < length:
                    break
                start = at + HEADER.size
                at = start + length
                event = self._take(FrameType(kind), stream, bytes(memoryview(self._in)[start:at]))
                if event is not None:
                    yield event
        finally:
            del self._in[:at]

    def _take(self, kind: FrameType, stream: int, payload: bytes) -> Event | None:
        if kind is FrameType.HELLO:
            return self._take_hello(stream, payload)
        if kind is FrameType.ERROR and stream == 0:  # a guest that cannot set itself up says so instead of hello
            return decode_error(stream, payload)
        if not self._greeted:
            raise ProtocolError("the guest did not say hello")
        if self._paused:
            raise ProtocolError("the guest said something in a pause")
        if kind is FrameType.PAUSE:
            if self._held is None or stream != 0 or payload:
                raise ProtocolError("the guest paused and was not asked to")
            self._paused = True
            return Paused()
        if kind is FrameType.ACCEPTED:
            return self._take_accepted(stream, payload)
        state = self._streams.get(stream)
        if state is None:
            raise ProtocolError(f"the guest sent a frame for stream {stream}, which is not open")
        if kind is FrameType.WINDOW:
            return self._take_window(stream, state, payload)
        if kind is FrameType.ERROR:
            del self._streams[stream]
            return decode_error(stream, payload)
        if kind is FrameType.EXIT:
            del self._streams[stream]
            return _decode_exit(stream, payload)
        if kind is FrameType.OPENED:
            if state.opened or payload:
                raise ProtocolError("the guest opened what it had opened before")
            state.opened = True
            return Opened(stream)
        if not state.opened or state.kind is _Kind.LISTENER or state.ended:
            raise ProtocolError("the guest sent data on a stream that has none")
        if kind is FrameType.EOF:
            if state.kind is not _Kind.CONNECTION or payload != bytes((Channel.STDOUT,)):
                raise ProtocolError("the guest ended what it cannot end")
            state.ended = True
            return Ended(stream)
        channel = Channel.STDOUT if kind is FrameType.STDOUT else Channel.STDERR
        if not payload or len(payload) > state.windows[channel]:
            raise ProtocolError("the guest sent more output than it was allowed to")
        if channel is Channel.STDERR and state.kind is _Kind.CONNECTION:
            raise ProtocolError("the guest sent data on a stream that has none")
        state.windows[channel] -= len(payload)
        return Output(stream, channel, payload)

    def _take_accepted(self, stream: int, payload: bytes) -> Accepted:
        listener, peer = 0, ""
        for tag, value in decode_record(payload):
            if tag == Tag.LISTENER:
                listener = _u32(value)
            elif tag == Tag.ADDRESS:
                peer = _text(value)
        state = self._streams.get(listener)
        if state is None or state.kind is not _Kind.LISTENER or not state.opened:
            raise ProtocolError("the guest took a connection where nothing listens")
        if not stream & FROM_GUEST or stream in self._streams or len(self._streams) >= 2 * MAX_STREAMS:
            raise ProtocolError("the guest numbered a connection wrongly")
        self._streams[stream] = _Stream(_Kind.CONNECTION)
        return Accepted(stream, listener, peer)

    def _take_hello(self, stream: int, payload: bytes) -> Hello:
        if self._greeted or stream != 0:
            raise ProtocolError("the guest said hello twice")
        version, kernel = 0, ""
        milestones = []
        for tag, value in decode_record(payload):
            if tag == Tag.VERSION:
                version = _u32(value)
            elif tag == Tag.KERNEL:
                kernel = _text(value[:KERNEL_TEXT_LIMIT])
            elif tag == Tag.MILESTONE:
                if len(value) < 8:
                    raise ProtocolError("the guest sent a milestone without a time")
                milestones.append(Milestone(_text(value[8:]), int.from_bytes(value[:8], "little")))
        if version != VERSION:
            raise ProtocolError(f"the guest speaks control protocol {version}, this is {VERSION}")
        self._greeted = True
        return Hello(kernel, tuple(milestones))

    def _take_window(self, stream: int, state: _Stream, payload: bytes) -> Writable:
        if len(payload) != CREDIT.size:
            raise ProtocolError("the guest sent a window of the wrong size")
        channel, size = CREDIT.unpack(payload)
        if channel != Channel.STDIN or size > WINDOW - state.stdin:
            raise ProtocolError("the guest gave back more of its stdin than it was sent")
        state.stdin += size
        return Writable(stream)


def decode_error(stream: int, payload: bytes) -> Failure:
    """What an ERROR says, or a function of the agent that failed (which is the same record).

    Raises:
        ProtocolError: it is malformed.
    """
    errno, stage, text = 0, "", ""
    for tag, value in decode_record(payload):
        if tag == Tag.ERRNO:
            errno = _u32(value)
        elif tag == Tag.STAGE:
            stage = _text(value)
        elif tag == Tag.TEXT:
            text = _text(value)
    if errno > MAX_ERRNO:  # os.strerror takes no number that is larger than a C int
        raise ProtocolError("the guest sent an error without a sound number")
    return Failure(stream, errno, stage, text)


def _decode_exit(stream: int, payload: bytes) -> Exited:
    code = signal = peak = None
    usage, oom_kills = None, 0
    for tag, value in decode_record(payload):
        if tag == Tag.CODE:
            code = _u32(value)
        elif tag == Tag.SIGNAL:
            signal = _u32(value)
        elif tag == Tag.USAGE and len(value) == USAGE.size:
            usage = USAGE.unpack(value)
        elif tag == Tag.PEAK and len(value) == U64.size:
            (peak,) = U64.unpack(value)
        elif tag == Tag.OOM_KILLS:
            oom_kills = _u32(value)
    sound = code <= 255 and signal is None if code is not None else signal is not None and 1 <= signal <= 64
    if not sound:
        raise ProtocolError("the guest sent an exit without one sound code or signal")
    if usage is None:
        return Exited(stream, code, signal)
    user, system, max_rss = usage
    return Exited(stream, code, signal, Usage(user / 1e6, system / 1e6, max_rss, peak, oom_kills))
