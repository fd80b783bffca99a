"""The host's half of the control protocol, and a guest that sends it anything.

Nothing but ProtocolError comes out, and whatever comes: what is held is bounded, and so is every window.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import atheris

from tests.fuzz.atheris_target import fuzz, pieces

with atheris.instrument_imports(include=["vmette"]):
    from vmette.config import Command
    from vmette.errors import ProtocolError
    from vmette.protocol import (
        CREDIT,
        FROM_GUEST,
        HEADER,
        MAX_DATA,
        MAX_ERRNO,
        WINDOW,
        Accepted,
        Channel,
        Connection,
        Event,
        Exited,
        Failure,
        Hello,
        Opened,
        Output,
        Paused,
        Writable,
        decode_record,
        encode_record,
    )

MAX_ANSWERS = 64 << 10
SENT = 100


class Host:
    """A host with two commands, a connection and a listener."""

    def __init__(self) -> None:
        self.connection = Connection()
        command = Command((b"true",))
        self.connection.exec(command)
        self.connection.exec(command, announced=True)
        self.connection.connect("tcp:127.0.0.1:80")
        self.connection.listen("unix:/run/socket")
        self.connection.send_stdin(1, bytes(SENT))
        self.connection.outgoing.clear()
        self.open = {1, 2, 3, 4}
        self.greeted = False
        self.unread: Counter[tuple[int, Channel]] = Counter()

    def take(self, event: Event) -> None:
        if isinstance(event, Hello):
            assert not self.greeted
            self.greeted = True
            assert all(text.isprintable() for text in (event.kernel, *(each.name for each in event.milestones)))
            return
        assert not isinstance(event, Paused)  # which nobody has asked for
        if isinstance(event, Failure):
            assert event.stream == 0 or self.greeted
            assert 0 <= event.errno <= MAX_ERRNO
            assert (event.stage + event.text).isprintable()
        if isinstance(event, Accepted):
            assert event.listener == 4
            assert event.stream & FROM_GUEST
            assert event.stream not in self.open
            assert event.peer.isprintable()
            self.open.add(event.stream)
        assert event.stream in self.open or (isinstance(event, Failure) and event.stream == 0)
        if isinstance(event, Output):
            self.take_output(event)
        if isinstance(event, Writable | Opened):
            assert 0 <= self.connection.stdin_room(event.stream) <= WINDOW
        if isinstance(event, Exited):
            assert (event.code is None) != (event.signal is None)
        if isinstance(event, Exited | Failure):
            self.open.discard(event.stream)

    def take_output(self, event: Output) -> None:
        """Reads every other channel; of the rest there is never more than a window."""
        place = event.stream, event.channel
        assert event.data
        if (event.stream + event.channel) % 2:
            self.connection.consumed(event.stream, event.channel, len(event.data))
        else:
            self.unread[place] += len(event.data)
            assert self.unread[place] <= WINDOW


def one(data: bytes) -> None:
    host = Host()
    with suppress(ProtocolError):
        for piece in pieces(data):
            for event in host.connection.receive(piece):
                host.take(event)
            assert len(host.connection._in) < HEADER.size + MAX_DATA
            assert len(host.connection.outgoing) < MAX_ANSWERS
    with suppress(ProtocolError):
        fields = list(decode_record(data))
        assert encode_record(fields) == data  # type: ignore[arg-type]


def plant() -> None:
    """More of stdin may be given back than was sent."""

    def careless(self: Connection, stream: int, state: object, payload: bytes) -> Writable:
        self._streams[stream].stdin += CREDIT.unpack(payload)[1]
        return Writable(stream)

    Connection._take_window = careless  # type: ignore[method-assign]


if __name__ == "__main__":
    fuzz(one, plant)
