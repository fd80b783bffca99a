"""The host's half of the control protocol, by the rules of docs/protocol.md."""

from __future__ import annotations

import os
import re
import struct
from collections import Counter
from collections.abc import Iterable
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmette.config import Command
from vmette.errors import ProtocolError
from vmette.protocol import (
    CREDIT,
    FIELD,
    HEADER,
    MAX_CONTROL,
    MAX_DATA,
    MAX_EXEC,
    U32,
    WINDOW,
    Channel,
    Connection,
    Event,
    Exited,
    Failure,
    FrameType,
    Hello,
    Milestone,
    Output,
    Paused,
    Resume,
    SignalFlag,
    Tag,
    Writable,
    decode_record,
    encode_exec,
    encode_record,
)

DEFINITION = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()


class Frame(NamedTuple):
    kind: int
    stream: int
    payload: bytes = b""

    def encode(self, *, reserved: int = 0, length: int | None = None) -> bytes:
        size = len(self.payload) if length is None else length
        header = struct.pack("<B3sII", self.kind, reserved.to_bytes(3, "little"), self.stream, size)
        return header + self.payload


def parse(data: bytes | bytearray) -> list[Frame]:
    found = []
    while data:
        kind, zero8, zero16, stream, length = HEADER.unpack_from(data)
        assert (zero8, zero16) == (0, 0)
        payload = bytes(data[HEADER.size : HEADER.size + length])
        assert len(payload) == length
        found.append(Frame(FrameType(kind), stream, payload))
        data = data[HEADER.size + length :]
    return found


def record(*fields: tuple[Tag, bytes]) -> bytes:
    return encode_record(fields)


def number(value: int) -> bytes:
    return U32.pack(value)


VERSION_1 = (Tag.VERSION, number(1))
HELLO = Frame(FrameType.HELLO, 0, record(VERSION_1))
EXIT_0 = Frame(FrameType.EXIT, 1, record((Tag.CODE, number(0))))
TRUE = Command((b"true",))


def receive(connection: Connection, *frames: Frame | bytes) -> list[Event]:
    data = b"".join(frame.encode() if isinstance(frame, Frame) else frame for frame in frames)
    return list(connection.receive(data))


def kinds(events: Iterable[Event]) -> list[tuple[type, Event]]:
    """The events with their types: those of two types with the same fields are equal, as tuples are."""
    return [(type(event), event) for event in events]


def sent(connection: Connection) -> list[Frame]:
    """What the connection has sent since the last call."""
    frames = parse(connection.outgoing)
    connection.outgoing.clear()
    return frames


@pytest.fixture
def connection() -> Connection:
    """One command runs on it, as stream 1. Nothing is waiting to be sent."""
    connection = Connection()
    connection.exec(TRUE)
    receive(connection, HELLO)
    connection.outgoing.clear()
    return connection


# --- The wire --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [FrameType, Tag])
def test_numbers_are_the_definition_s(names: type[IntEnum]) -> None:
    section = DEFINITION.partition("## Records")[2 if names is Tag else 0]
    table = {name: int(value) for value, name in re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", section, re.MULTILINE)}
    assert table == {member.name: member.value for member in names}


def test_frame_layout() -> None:
    assert bytes(Connection().outgoing) == b"\1\0\0\0\0\0\0\0\x0c\0\0\0\1\0\0\0\4\0\0\0\1\0\0\0"


@given(st.lists(st.tuples(st.sampled_from(Tag), st.binary(max_size=100))))
def test_records_round_trip(fields: list[tuple[Tag, bytes]]) -> None:
    assert list(decode_record(encode_record(fields))) == fields


def test_unknown_tags_are_passed_on_and_ignored(connection: Connection) -> None:
    unknown = FIELD.pack(999, 0, 2) + b"??"
    assert list(decode_record(unknown)) == [(999, b"??")]
    known = record((Tag.CODE, number(3)))
    assert receive(connection, Frame(FrameType.EXIT, 1, unknown + known + unknown)) == [Exited(1, 3, None)]


BAD_RECORDS = [
    b"\0",
    FIELD.pack(Tag.TEXT, 0, 0)[:-1],
    FIELD.pack(Tag.TEXT, 1, 0),
    FIELD.pack(Tag.TEXT, 0, 1),
    FIELD.pack(Tag.TEXT, 0, 0xFFFFFFFF) + b"x",
    record((Tag.TEXT, b"good")) + FIELD.pack(Tag.TEXT, 0, 2) + b"x",
]


@pytest.mark.parametrize("payload", BAD_RECORDS)
def test_malformed_record(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(decode_record(payload))


# --- From the host ---------------------------------------------------------------------------------------------------


def test_hello_is_the_first_frame() -> None:
    connection = Connection()
    connection.exec(TRUE)
    assert [frame.kind for frame in sent(connection)] == [FrameType.HELLO, FrameType.EXEC]


def test_exec() -> None:
    connection = Connection()
    command = Command((b"prog", b"", b"\xff"), (b"A=1", b"B="), b"/tmp", b"user:group")
    assert [connection.exec(command), connection.exec(TRUE)] == [1, 2]
    _, full, plain = sent(connection)
    assert (full.kind, full.stream, plain.stream) == (FrameType.EXEC, 1, 2)
    assert list(decode_record(full.payload)) == [
        (Tag.ARG, b"prog"),
        (Tag.ARG, b""),
        (Tag.ARG, b"\xff"),
        (Tag.ENV, b"A=1"),
        (Tag.ENV, b"B="),
        (Tag.CWD, b"/tmp"),
        (Tag.USER, b"user:group"),
        (Tag.FLAGS, number(0)),
    ]
    assert list(decode_record(plain.payload)) == [(Tag.ARG, b"true"), (Tag.FLAGS, number(0))]


def test_exec_of_2_mib_is_the_largest() -> None:
    connection = Connection()
    room = MAX_EXEC - len(encode_exec(Command((b"",))))
    with pytest.raises(ProtocolError, match="larger than 2 MiB"):
        connection.exec(Command((bytes(room + 1),)))
    assert [frame.kind for frame in sent(connection)] == [FrameType.HELLO]
    stream = connection.exec(Command((bytes(room),)))
    assert stream == 1
    assert len(sent(connection)[0].payload) == MAX_EXEC


@pytest.mark.parametrize("size", [0, 1, MAX_DATA, MAX_DATA + 1, WINDOW])
def test_stdin_goes_in_frames_that_are_not_too_large(connection: Connection, size: int) -> None:
    data = os.urandom(size)
    connection.send_stdin(1, data)
    frames = sent(connection)
    assert {(frame.kind, frame.stream) for frame in frames} <= {(FrameType.STDIN, 1)}
    assert all(0 < len(frame.payload) <= MAX_DATA for frame in frames)
    assert b"".join(frame.payload for frame in frames) == data
    assert connection.stdin_room(1) == WINDOW - size


def test_stdin_beyond_the_window(connection: Connection) -> None:
    connection.send_stdin(1, bytes(WINDOW - 10))
    with pytest.raises(ValueError, match="window"):
        connection.send_stdin(1, bytes(11))
    connection.send_stdin(1, bytes(10))
    assert connection.stdin_room(1) == 0


@pytest.mark.parametrize("end", ["eof", "exit"])
def test_stdin_after_its_end(connection: Connection, end: str) -> None:
    if end == "eof":
        connection.send_eof(1)
    else:
        receive(connection, EXIT_0)
    connection.outgoing.clear()
    assert connection.stdin_room(1) == 0
    with pytest.raises(ValueError, match="window"):
        connection.send_stdin(1, b"x")
    connection.send_stdin(1, b"")
    connection.send_eof(1)
    assert sent(connection) == []


def test_eof_signal_and_shutdown(connection: Connection) -> None:
    connection.send_eof(1)
    connection.signal(1, 9, SignalFlag.GROUP)
    connection.signal(1, 15)
    connection.shutdown()
    assert sent(connection) == [
        Frame(FrameType.EOF, 1, bytes((0,))),
        Frame(FrameType.SIGNAL, 1, b"\x09\1"),
        Frame(FrameType.SIGNAL, 1, b"\x0f\0"),
        Frame(FrameType.SHUTDOWN, 0),
    ]


@pytest.mark.parametrize("end", [EXIT_0, Frame(FrameType.ERROR, 1)])
def test_nothing_is_sent_to_a_command_that_has_ended(connection: Connection, end: Frame) -> None:
    output, _ = receive(connection, Frame(FrameType.STDOUT, 1, bytes(MAX_DATA)), end)
    assert isinstance(output, Output)
    connection.consumed(output.stream, output.channel, len(output.data))
    connection.signal(1, 15)
    connection.send_eof(1)
    assert sent(connection) == []


# --- From the guest --------------------------------------------------------------------------------------------------


def test_hello() -> None:
    milestones = [struct.pack("<Q", usec) + name for name, usec in ((b"init", 1), (b"ready", 2**64 - 1), (b"", 0))]
    payload = record((Tag.KERNEL, b"6.12"), VERSION_1, *[(Tag.MILESTONE, value) for value in milestones])
    expected = Hello("6.12", (Milestone("init", 1), Milestone("ready", 2**64 - 1), Milestone("", 0)))
    assert receive(Connection(), Frame(FrameType.HELLO, 0, payload)) == [expected]


def test_what_is_said_in_a_pause_waits(connection: Connection) -> None:
    stream = connection.exec(Command((b"cat",)))
    sent(connection)
    connection.pause()
    assert sent(connection) == [Frame(FrameType.PAUSE, 0)]
    assert receive(connection, Frame(FrameType.STDOUT, stream, b"before it")) == [
        Output(stream, Channel.STDOUT, b"before it")
    ]
    (paused,) = receive(connection, Frame(FrameType.PAUSE, 0))
    assert isinstance(paused, Paused)
    connection.send_stdin(stream, b"later")
    connection.signal(stream, 15)
    assert sent(connection) == []
    connection.resume()
    assert [frame.kind for frame in sent(connection)] == [FrameType.RESUME, FrameType.STDIN, FrameType.SIGNAL]
    assert receive(connection, Frame(FrameType.STDOUT, stream, b"x")) == [Output(stream, Channel.STDOUT, b"x")]


@pytest.mark.parametrize(
    "frames",
    [
        [Frame(FrameType.PAUSE, 0, b"x")],
        [Frame(FrameType.PAUSE, 1)],
        [Frame(FrameType.PAUSE, 0), Frame(FrameType.PAUSE, 0)],
        [Frame(FrameType.PAUSE, 0), Frame(FrameType.STDOUT, 1, b"x")],
        [Frame(FrameType.RESUME, 0)],
    ],
)
def test_guest_that_does_not_keep_a_pause(connection: Connection, frames: list[Frame]) -> None:
    with pytest.raises(ProtocolError):
        receive(connection, Frame(FrameType.PAUSE, 0))  # nobody has asked for it
    connection = Connection()
    connection.exec(TRUE)
    receive(connection, HELLO)
    connection.pause()
    with pytest.raises(ProtocolError):
        receive(connection, *frames)


def test_hello_to_a_machine_that_wakes() -> None:
    connection = Connection(Resume(b"seed" * 16, 2**40, "name", ("9p:share0:ro:/a%20b",)))
    (hello,) = sent(connection)
    assert (hello.kind, hello.stream) == (FrameType.HELLO, 0)
    assert dict(decode_record(hello.payload)) == {
        Tag.VERSION: number(1),
        Tag.SEED: b"seed" * 16,
        Tag.CLOCK: (2**40).to_bytes(8, "little"),
        Tag.HOSTNAME: b"name",
        Tag.SHARE: b"9p:share0:ro:/a%20b",
    }
    first, second = Resume.now("a"), Resume.now("a")
    assert first.seed != second.seed
    assert len(first.seed) == 64
    assert first.seed not in repr(first).encode()


def test_failures(connection: Connection) -> None:
    payload = record((Tag.ERRNO, number(2)), (Tag.STAGE, b"exec"), (Tag.TEXT, b"No such file"))
    assert receive(connection, Frame(FrameType.ERROR, 1, payload)) == [Failure(1, 2, "exec", "No such file")]
    assert receive(connection, Frame(FrameType.ERROR, 0, payload)) == [Failure(0, 2, "exec", "No such file")]


def test_failure_of_the_machine_may_come_instead_of_hello() -> None:
    payload = record((Tag.ERRNO, number(19)), (Tag.STAGE, b"mount"), (Tag.TEXT, b"cannot"))
    assert receive(Connection(), Frame(FrameType.ERROR, 0, payload)) == [Failure(0, 19, "mount", "cannot")]


def test_hello_with_a_long_kernel_version() -> None:
    (hello,) = receive(Connection(), Frame(FrameType.HELLO, 0, record(VERSION_1, (Tag.KERNEL, b"k" * 4000))))
    assert hello == Hello("k" * 256, ())


@pytest.mark.parametrize("size", [1, MAX_DATA])
def test_output(connection: Connection, size: int) -> None:
    out, err = os.urandom(size), os.urandom(size)
    assert receive(connection, Frame(FrameType.STDOUT, 1, out), Frame(FrameType.STDERR, 1, err)) == [
        Output(1, Channel.STDOUT, out),
        Output(1, Channel.STDERR, err),
    ]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ((Tag.CODE, number(0)), Exited(1, 0, None)),
        ((Tag.CODE, number(255)), Exited(1, 255, None)),
        ((Tag.SIGNAL, number(1)), Exited(1, None, 1)),
        ((Tag.SIGNAL, number(64)), Exited(1, None, 64)),
    ],
)
def test_exit(connection: Connection, field: tuple[Tag, bytes], expected: Exited) -> None:
    assert receive(connection, Frame(FrameType.EXIT, 1, record(field))) == [expected]


def test_window_of_stdin_grows_again(connection: Connection) -> None:
    connection.send_stdin(1, bytes(WINDOW))
    credit = Frame(FrameType.WINDOW, 1, CREDIT.pack(Channel.STDIN, WINDOW - 1))
    assert kinds(receive(connection, credit)) == kinds([Writable(1)])
    assert connection.stdin_room(1) == WINDOW - 1


BAD_FRAMES: dict[str, Frame | bytes] = {
    "hello twice": HELLO,
    "output of a command that does not run": Frame(FrameType.STDOUT, 2, b"x"),
    "output on stream 0": Frame(FrameType.STDOUT, 0, b"x"),
    "exit of a command that does not run": Frame(FrameType.EXIT, 2, EXIT_0.payload),
    "exit twice": EXIT_0.encode() * 2,
    "error of a command that does not run": Frame(FrameType.ERROR, 2),
    "error after exit": EXIT_0.encode() + Frame(FrameType.ERROR, 1).encode(),
    "output after exit": EXIT_0.encode() + Frame(FrameType.STDOUT, 1, b"x").encode(),
    "window after exit": EXIT_0.encode() + Frame(FrameType.WINDOW, 1, CREDIT.pack(0, 0)).encode(),
    "window of a command that does not run": Frame(FrameType.WINDOW, 2, CREDIT.pack(0, 0)),
    "stdin given back that was not sent": Frame(FrameType.WINDOW, 1, CREDIT.pack(0, 1)),
    "4 GiB of stdin given back": Frame(FrameType.WINDOW, 1, CREDIT.pack(0, 0xFFFFFFFF)),
    "window of stdout": Frame(FrameType.WINDOW, 1, CREDIT.pack(1, 0)),
    "window of channel 3": Frame(FrameType.WINDOW, 1, CREDIT.pack(3, 0)),
    "short window": Frame(FrameType.WINDOW, 1, CREDIT.pack(0, 0)[:-1]),
    "long window": Frame(FrameType.WINDOW, 1, CREDIT.pack(0, 0) + b"\0"),
    "empty output": Frame(FrameType.STDERR, 1),
    "error with a short errno": Frame(FrameType.ERROR, 1, record((Tag.ERRNO, b"\2\0\0"))),
    "error with an errno that is none": Frame(FrameType.ERROR, 0, record((Tag.ERRNO, number(4096)))),
    **{
        f"exit with {name}": Frame(FrameType.EXIT, 1, record(*fields))
        for name, fields in {
            "nothing": [],
            "something else": [(Tag.TEXT, b"x")],
            "code and signal": [(Tag.CODE, number(0)), (Tag.SIGNAL, number(9))],
            "code 256": [(Tag.CODE, number(256))],
            "a short code": [(Tag.CODE, b"\0")],
            "signal 0": [(Tag.SIGNAL, number(0))],
            "signal 65": [(Tag.SIGNAL, number(65))],
        }.items()
    },
    **{
        f"{kind.name} with bad record {index}": Frame(kind, 1, payload)
        for kind in (FrameType.ERROR, FrameType.EXIT)
        for index, payload in enumerate(BAD_RECORDS)
    },
    **{
        f"{name} from the guest": Frame(kind, 1)
        for name, kind in {
            "no type": 0,
            "shutdown": FrameType.SHUTDOWN,
            "exec": FrameType.EXEC,
            "stdin": FrameType.STDIN,
            "end of stdin": FrameType.EOF,
            "signal": FrameType.SIGNAL,
            "unknown type": 12,
            "last type": 255,
        }.items()
    },
    **{
        f"reserved {value:#08x}": Frame(FrameType.STDOUT, 1, b"x").encode(reserved=value)
        for value in (1, 256, 0x800000)
    },
    **{
        f"{kind.name} of {length} bytes": Frame(kind, 1).encode(length=length)
        for kind, limit in {
            FrameType.STDOUT: MAX_DATA,
            FrameType.STDERR: MAX_DATA,
            **dict.fromkeys((FrameType.HELLO, FrameType.ERROR, FrameType.WINDOW, FrameType.EXIT), MAX_CONTROL),
        }.items()
        for length in (limit + 1, 0xFFFFFFFF)  # known from the header alone: nothing of that size is waited for
    },
}


@pytest.mark.parametrize("frame", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_guest_that_breaks_the_protocol(connection: Connection, frame: Frame | bytes) -> None:
    with pytest.raises(ProtocolError):
        receive(connection, frame)


@pytest.mark.parametrize(
    "frame",
    [
        Frame(FrameType.HELLO, 0),
        Frame(FrameType.HELLO, 0, record((Tag.VERSION, number(2)))),
        Frame(FrameType.HELLO, 0, record((Tag.VERSION, b"\1"))),
        Frame(FrameType.HELLO, 0, record(VERSION_1, (Tag.MILESTONE, bytes(7)))),
        Frame(FrameType.HELLO, 1, HELLO.payload),
        *[Frame(FrameType.HELLO, 0, HELLO.payload + payload) for payload in BAD_RECORDS],
        Frame(FrameType.STDOUT, 1, b"x"),
        Frame(FrameType.ERROR, 1),
        Frame(FrameType.WINDOW, 1, CREDIT.pack(0, 0)),
        EXIT_0,
    ],
)
def test_guest_that_does_not_begin_with_a_good_hello(frame: Frame) -> None:
    connection = Connection()
    connection.exec(TRUE)
    with pytest.raises(ProtocolError):
        receive(connection, frame)


@pytest.mark.parametrize("kind", [FrameType.STDOUT, FrameType.STDERR])
def test_output_beyond_its_window(connection: Connection, kind: FrameType) -> None:
    """Each channel has a window of its own."""
    other = FrameType.STDOUT if kind is FrameType.STDERR else FrameType.STDERR
    for _ in range(WINDOW // MAX_DATA):
        receive(connection, Frame(kind, 1, bytes(MAX_DATA)))
    receive(connection, Frame(other, 1, bytes(MAX_DATA)))
    with pytest.raises(ProtocolError, match="more output"):
        receive(connection, Frame(kind, 1, b"x"))


def test_output_without_end_if_it_is_given_back(connection: Connection) -> None:
    for _ in range(5 * WINDOW // MAX_DATA):
        (output,) = receive(connection, Frame(FrameType.STDOUT, 1, bytes(MAX_DATA)))
        assert isinstance(output, Output)
        connection.consumed(output.stream, output.channel, len(output.data))
    assert sent(connection) == [Frame(FrameType.WINDOW, 1, CREDIT.pack(Channel.STDOUT, MAX_DATA))] * 20


def test_frames_before_a_bad_one_count(connection: Connection) -> None:
    """Whoever takes event after event gets what was good."""
    events = connection.receive(Frame(FrameType.STDOUT, 1, b"x").encode() + Frame(0, 0).encode())
    assert next(events) == Output(1, Channel.STDOUT, b"x")
    with pytest.raises(ProtocolError):
        next(events)


def test_events_that_are_not_taken_stay(connection: Connection) -> None:
    """The caller may stop in the middle; the rest comes the next time."""
    frames = [Frame(FrameType.STDOUT, 1, text) for text in (b"a", b"b", b"c")]
    events = connection.receive(b"".join(frame.encode() for frame in frames))
    assert next(events) == Output(1, Channel.STDOUT, b"a")
    events.close()  # type: ignore[attr-defined]
    assert receive(connection) == [Output(1, Channel.STDOUT, b"b"), Output(1, Channel.STDOUT, b"c")]


@given(
    st.text() | st.text(st.characters(max_codepoint=0xA0)) | st.binary().map(lambda raw: raw.decode("utf-8", "replace"))
)
def test_text_of_the_guest_is_plain(text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    connection = Connection()
    milestone = (Tag.MILESTONE, bytes(8) + raw)
    hello, failure = receive(
        connection,
        Frame(FrameType.HELLO, 0, record(VERSION_1, (Tag.KERNEL, raw), milestone)),
        Frame(FrameType.ERROR, 0, record((Tag.STAGE, raw), (Tag.TEXT, raw))),
    )
    assert isinstance(hello, Hello)
    assert isinstance(failure, Failure)
    for clean in (hello.kernel, hello.milestones[0].name, failure.stage, failure.text):
        assert clean.isprintable()
    if text.isprintable():
        assert failure.stage == failure.text == hello.milestones[0].name == text


@pytest.mark.parametrize("bad", ["\x1b[2J", "\n", "\r", "\0", "\x7f", "\x9b", "\u2028", "\u202e"])
def test_text_of_the_guest_cannot_move_a_terminal(connection: Connection, bad: str) -> None:
    payload = record((Tag.TEXT, f"a{bad}b".encode()))
    (failure,) = receive(connection, Frame(FrameType.ERROR, 0, payload))
    assert isinstance(failure, Failure)
    assert failure.text == "a?" + bad[1:] + "b"


def test_text_that_is_not_utf_8(connection: Connection) -> None:
    (failure,) = receive(connection, Frame(FrameType.ERROR, 0, record((Tag.TEXT, b"a\xff\xfeb"))))
    assert isinstance(failure, Failure)
    assert failure.text == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"


# --- Whatever comes --------------------------------------------------------------------------------------------------

COMMANDS = 3


def running() -> Connection:
    connection = Connection()
    for _ in range(COMMANDS):
        connection.send_stdin(connection.exec(TRUE), bytes(1000))
    connection.outgoing.clear()
    return connection


@st.composite
def good_sessions(draw: st.DrawFn) -> tuple[bytes, list[Event]]:
    """All that a guest may say to `running()`, and what it means."""
    alive = set(range(1, COMMANDS + 1))
    unread = Counter(dict.fromkeys(alive, 1000))
    frames = [HELLO]
    said: list[Event] = [Hello("", ())]
    windows = Counter({(stream, channel): WINDOW for stream in alive for channel in (Channel.STDOUT, Channel.STDERR)})
    for _ in range(draw(st.integers(0, 20))):
        if not alive:
            break
        stream = draw(st.sampled_from(sorted(alive)))
        what = draw(st.sampled_from(["output"] * 4 + ["window", "exit", "killed", "error"]))
        if what == "output":
            channel = draw(st.sampled_from([Channel.STDOUT, Channel.STDERR]))
            size = min(draw(st.integers(1, 30) | st.just(MAX_DATA)), windows[stream, channel])
            if size:
                windows[stream, channel] -= size
                data = bytes([draw(st.integers(0, 255))]) * size
                kind = FrameType.STDOUT if channel is Channel.STDOUT else FrameType.STDERR
                frames.append(Frame(kind, stream, data))
                said.append(Output(stream, channel, data))
        elif what == "window":
            size = draw(st.integers(0, unread[stream]))
            unread[stream] -= size
            frames.append(Frame(FrameType.WINDOW, stream, CREDIT.pack(Channel.STDIN, size)))
            said.append(Writable(stream))
        elif what == "error":
            alive.remove(stream)
            frames.append(Frame(FrameType.ERROR, stream, record((Tag.STAGE, b"exec"))))
            said.append(Failure(stream, 0, "exec", ""))
        else:
            alive.remove(stream)
            value = draw(st.integers(1, 64))
            code, signal = (value, None) if what == "exit" else (None, value)
            tag = Tag.CODE if what == "exit" else Tag.SIGNAL
            frames.append(Frame(FrameType.EXIT, stream, record((tag, number(value)))))
            said.append(Exited(stream, code, signal))
    return b"".join(frame.encode() for frame in frames), said


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(at)]


places = st.lists(st.integers(0, 1 << 20) | st.integers(0, 100), max_size=12)


@given(good_sessions(), places)
def test_good_sessions_however_they_are_cut(session: tuple[bytes, list[Event]], at: list[int]) -> None:
    data, expected = session
    connection = running()
    assert kinds(event for piece in cut(data, at) for event in connection.receive(piece)) == kinds(expected)
    assert not connection._in


def test_byte_by_byte() -> None:
    connection = running()
    frames = [HELLO, Frame(FrameType.STDOUT, 2, b"text"), Frame(FrameType.STDERR, 1, b"x"), EXIT_0]
    pieces = [bytes([byte]) for frame in frames for byte in frame.encode()]
    events = [event for piece in pieces for event in connection.receive(piece)]
    assert len(events) == len(frames)
    assert events[1:] == [Output(2, Channel.STDOUT, b"text"), Output(1, Channel.STDERR, b"x"), Exited(1, 0, None)]


@st.composite
def frames_of_a_guest(draw: st.DrawFn) -> bytes:
    """A frame of which anything may be wrong, but most need not be."""
    kind = draw(st.sampled_from([*FrameType, FrameType.STDOUT, FrameType.ERROR, FrameType.EXIT, 0, 12]))
    payloads = [
        st.binary(max_size=40),
        st.builds(CREDIT.pack, st.integers(0, 3), st.integers(0, 1200) | st.just(0xFFFFFFFF)),
        st.lists(st.tuples(st.sampled_from(Tag), st.binary(max_size=10) | st.integers(0, 300).map(number))).map(
            encode_record
        ),
        st.sampled_from([bytes(MAX_DATA), bytes(MAX_CONTROL), HELLO.payload]),
    ]
    payload = draw(st.one_of(payloads))
    stream = draw(st.sampled_from([0, 1, 2, 3, 4, 0xFFFFFFFF]))
    off = draw(st.sampled_from([0] * 10 + [-1, 1, 60000]))
    reserved = draw(st.sampled_from([0] * 20 + [1]))
    return Frame(kind, stream, payload).encode(reserved=reserved, length=max(0, len(payload) + off))


nonsense = st.binary(max_size=300) | st.lists(frames_of_a_guest(), max_size=10).map(b"".join)


@settings(max_examples=500)
@given(st.booleans(), nonsense, places)
def test_nonsense_gives_events_or_a_protocol_error(greeted: bool, data: bytes, at: list[int]) -> None:
    connection = running()
    try:
        for piece in cut((HELLO.encode() if greeted else b"") + data, at):
            for event in connection.receive(piece):
                assert isinstance(event, Event)
                if isinstance(event, Failure):
                    os.strerror(event.errno)
                assert len(connection._in) < HEADER.size + MAX_DATA + len(piece)
            assert len(connection._in) < HEADER.size + MAX_DATA
    except ProtocolError as error:
        assert str(error).isprintable()
    for stream in range(COMMANDS + 2):
        assert 0 <= connection.stdin_room(stream) <= WINDOW
    assert parse(connection.outgoing) == []


@given(
    st.lists(st.tuples(st.sampled_from([Channel.STDOUT, Channel.STDERR]), st.integers(1, MAX_DATA)), max_size=60),
    st.integers(0, 12),
)
def test_no_more_is_given_back_than_was_taken(outputs: list[tuple[Channel, int]], held: int) -> None:
    """The window of a guest that plays by the rules is its half of the sum: what is out, what is owed, what is left."""
    connection = running()
    receive(connection, HELLO)
    left = Counter(dict.fromkeys(Channel, WINDOW))
    taken: Counter[Channel] = Counter()
    given_back: Counter[Channel] = Counter()
    waiting: list[Output] = []
    for channel, wanted in outputs:
        if size := min(wanted, left[channel]):
            left[channel] -= size
            kind = FrameType.STDOUT if channel is Channel.STDOUT else FrameType.STDERR
            (event,) = receive(connection, Frame(kind, 1, bytes(size)))
            assert isinstance(event, Output)
            waiting.append(event)
        while len(waiting) > held:
            output = waiting.pop(0)
            connection.consumed(output.stream, output.channel, len(output.data))
            taken[output.channel] += len(output.data)
        for frame in sent(connection):
            assert (frame.kind, frame.stream) == (FrameType.WINDOW, 1)
            which, credit = CREDIT.unpack(frame.payload)
            given_back[Channel(which)] += credit
            left[Channel(which)] += credit
        for each in (Channel.STDOUT, Channel.STDERR):
            assert given_back[each] <= taken[each]
            assert taken[each] - given_back[each] < WINDOW // 4  # a guest whose output is all taken is never stopped
            assert left[each] <= WINDOW
