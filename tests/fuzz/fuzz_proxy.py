"""The proxy of allowed hosts, and a guest that asks it for anything.

The guest gets an answer, and nothing else happens; a server that is not allowed hears nothing, and an allowed one hears
one request, to itself.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Sequence
from contextlib import suppress

import atheris

from tests.fuzz.atheris_target import fuzz

with atheris.instrument_imports(include=["vmette", "h11"]):
    import h11

    from vmette import proxy as module
    from vmette.proxy import AllowedHost, Proxy

logging.disable()

PUBLIC = "1.1.1.1"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
ALLOWED = AllowedHost("allowed.test"), AllowedHost("*.wild.test", 80), AllowedHost("2001:db8::1", 8080)
NAMES = re.compile(r"allowed\.test|.+\.wild\.test|2001:db8::1")
MAX_REQUEST = 4096
SMALLEST_PIECE = 32
"""Bytes. All is in one thread, and the server listens only afterwards: a socket has to hold so many pieces."""


class Server:
    """Takes the place of the internet: one connection, to a server that has answered before it was asked."""

    def __init__(self) -> None:
        self.ours: socket.socket | None = None
        self.target = ""

    def dial(self, addresses: Sequence[object], target: module._Target) -> socket.socket:
        assert self.ours is None, "one request makes two connections"
        assert NAMES.fullmatch(target.host), f"{target} is reached"
        self.target = target.header.decode()
        self.ours, theirs = socket.socketpair()
        self.ours.sendall(ANSWER)
        self.ours.shutdown(socket.SHUT_WR)
        return theirs

    def heard(self) -> bytes:
        assert self.ours is not None
        with self.ours, suppress(ConnectionResetError):
            return read(self.ours)
        return b""


def read(connection: socket.socket) -> bytes:
    pieces = []
    while piece := connection.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def check_forwarded(request: bytes, target: str) -> None:
    """What the server hears is one request, or a part of one, to `target`."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(request)
    server.receive_data(b"")
    events: list[object] = []
    with suppress(h11.RemoteProtocolError):  # the guest sent only a part of the body
        while not events or type(events[-1]) is not h11.EndOfMessage:
            events.append(server.next_event())
        assert server.trailing_data[0] == b""
    head = events[0]
    assert isinstance(head, h11.Request)
    assert [value.decode() for name, value in head.headers if name == b"host"] == [target]
    assert head.target.startswith(b"/")


def one(data: bytes) -> None:
    """The first byte says how much is read at once."""
    module.PIECE = SMALLEST_PIECE + (data[0] if data else 0)
    request = data[1 : 1 + MAX_REQUEST]
    server = Server()
    module._dial = server.dial
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(request)
        ours.shutdown(socket.SHUT_WR)
        Proxy(ALLOWED, resolve=lambda *_: [PUBLIC]).serve(theirs)
        assert theirs.fileno() == -1
        answer = b""
        with suppress(ConnectionResetError):
            answer = read(ours)
    assert not answer or answer.startswith(b"HTTP/1.1 ")
    assert answer or b"\r\n\r\n" not in request or server.ours, "a whole head gets no answer"
    if server.ours is not None:
        heard = server.heard()
        if not answer.startswith(b"HTTP/1.1 200 Connection established"):
            assert not heard or heard.startswith(request[: heard.index(b" ")])
            if b"\r\n\r\n" in heard:
                check_forwarded(heard, server.target)


def plant() -> None:
    """A name is allowed that only begins like an allowed one."""
    AllowedHost.matches = lambda self, host, port: host.startswith("a")  # type: ignore[method-assign]


if __name__ == "__main__":
    fuzz(one, plant)
