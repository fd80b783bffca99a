"""The supervisor of a detached machine, and a client that sends it anything: it is answered, and nothing stays open."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import cast

import atheris

from tests.fuzz.atheris_target import fuzz, pieces

with atheris.instrument_imports(include=["vmette"]):
    from vmette.config import Command
    from vmette.detached import wire
    from vmette.detached.supervisor import Client, Supervisor
    from vmette.errors import VmetteError
    from vmette.protocol import Connection
    from vmette.providers.base import ImageConfig
    from vmette.streams import FdSink, FdSource

FILES = "/proc/self/fd"


class Guest:
    """A guest for as long as a client is connected: the protocol is the real one, and nothing runs."""

    def __init__(self) -> None:
        self.connection = Connection()
        self.watched = False
        self.owned: list[FdSource | FdSink] = []
        self.signal = self.connection.signal
        self.resize = self.connection.resize

    def watch(self, fd: int, ready: Callable[[], None]) -> None:
        self.watched = True

    def unwatch(self, fd: int) -> None:
        self.watched = False

    def exec(self, command: Command, stdin: FdSource, stdout: FdSink, stderr: FdSink, done: object) -> SimpleNamespace:
        self.owned += [stdin, stdout, stderr]
        return SimpleNamespace(number=self.connection.exec(command))


class Machine:
    """As much of a supervisor as a client sees."""

    def __init__(self) -> None:
        self.guest = Guest()
        self.clients: set[Client] = set()
        self.inherited = ImageConfig()

    def stop(self, patience: float) -> None:
        assert 0 <= patience <= 1e9

    def signal(self, number: int) -> None:
        assert type(number) is int
        assert 1 <= number <= 64


def one(data: bytes) -> None:
    """The first byte says how much comes at once, and whether there are descriptors with it."""
    before = os.listdir(FILES)  # noqa: PTH208 (it is done ten thousand times a second)
    machine = Machine()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    with ours:
        client = Client(cast(Supervisor, machine), theirs)
        for index, piece in enumerate(pieces(data)):
            if not machine.guest.watched:
                break
            descriptors = [ours.fileno()] * (data[0] % 5) if index == 0 else []
            socket.send_fds(ours, [piece], descriptors)
            client._readable()
        ours.shutdown(socket.SHUT_WR)
        client._readable()
        assert not machine.guest.watched
        assert not machine.clients
        with suppress(BlockingIOError, ConnectionResetError):
            answer = ours.recv(1 << 16)
            assert not answer or isinstance(wire.decode(answer), dict)
            assert answer.count(b"\n") <= 1
    for each in machine.guest.owned:
        each.end()
    assert os.listdir(FILES) == before, "descriptors are left open"  # noqa: PTH208


def plant() -> None:
    """A message may be anything that is JSON."""

    def careless(line: bytes) -> wire.Message:
        try:
            return cast(wire.Message, json.loads(line))
        except (ValueError, RecursionError):
            raise VmetteError("no message") from None

    wire.decode = careless


if __name__ == "__main__":
    fuzz(one, plant)
