"""A client as the supervisor sees it: whatever it sends."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmette.config import Command
from vmette.detached import supervisor as module
from vmette.detached import wire
from vmette.detached.machines import State
from vmette.detached.supervisor import KILL_SECONDS, Client, Supervisor, Task
from vmette.guest import STOP_SECONDS
from vmette.machine import Machine
from vmette.protocol import Exited, SignalFlag
from vmette.providers.base import ImageConfig
from vmette.services import Services


class FakeGuest:
    """Takes what a guest is asked to do."""

    def __init__(self) -> None:
        self.watches: dict[int, Callable[[], None]] = {}
        self.did: list[tuple[object, ...]] = []
        self.finished: Callable[[Any], None] = lambda _: None
        self.streams: list[Any] = []

    def watch(self, fd: int, readable: Callable[[], None]) -> None:
        self.watches[fd] = readable

    def unwatch(self, fd: int) -> None:
        self.watches.pop(fd, None)

    def exec(self, command: Command, stdin: Any, stdout: Any, stderr: Any, finished: Callable[[Any], None]) -> Any:
        self.did.append(("exec", command))
        self.finished = finished
        self.streams = [stdin, stdout, stderr]
        return SimpleNamespace(number=5)

    def signal(self, *args: object) -> None:
        self.did.append(("signal", *args))

    def resize(self, *args: object) -> None:
        self.did.append(("resize", *args))


class Line:
    """Both ends of a connection: `other` is the client's, and `turn` lets the supervisor look."""

    def __init__(self) -> None:
        self.guest = FakeGuest()
        self.stops: list[float] = []
        self.supervisor = SimpleNamespace(
            guest=self.guest,
            clients=set(),
            inherited=ImageConfig(env=(("A", "1"), ("B", "2")), user="app", working_dir="/srv"),
            stop=self.stops.append,
            signal=lambda number: self.guest.signal("main", number),
        )
        ours, self.other = socket.socketpair()
        ours.setblocking(False)
        self.fd = ours.fileno()
        self.client = Client(cast(Supervisor, self.supervisor), ours)

    def turn(self) -> None:
        while watch := self.guest.watches.get(self.fd):
            before = len(self.client._buffer), len(self.guest.did)
            watch()
            if before == (len(self.client._buffer), len(self.guest.did)):
                return

    def answer(self) -> wire.Message:
        self.turn()
        data = self.other.recv(65536)
        assert self.other.recv(1) == b""  # closed
        assert self.supervisor.clients == set()
        return wire.decode(data)


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    with line.other:
        yield line
        line.client._close()
        for stream in line.guest.streams:
            stream.end()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(
    "data",
    [
        b"\n",
        b"null\n",
        b"[]\n",
        b"{\n",
        b"\xff\n",
        b"{}\n",
        b'{"do": "dance"}\n',
        b'{"do": ["exec"]}\n',
        b'{"do": "stop"}\n',
        b'{"do": "stop", "patience": -1}\n',
        b'{"do": "stop", "patience": 1e999}\n',
        b'{"do": "stop", "patience": NaN}\n',
        b'{"do": "signal", "signal": 0}\n',
        b'{"do": "signal", "signal": 65}\n',
        b'{"do": "signal", "signal": 1.5}\n',
        b'{"do": "exec"}\n',
        b'{"do": "exec", "argv": []}\n',
        b'{"do": "exec", "argv": [], "env": {}}\n',
        b'{"do": "exec", "argv": ["a"], "env": []}\n',
        b'{"do": "exec", "argv": ["a\\u0000"], "env": {}}\n',
        b'{"do": "exec", "argv": ["a"], "env": {"=": ""}}\n',
        b'{"do": "exec", "argv": ["a"], "env": {}, "cwd": "relative"}\n',
        b'{"do": "exec", "argv": ["a"], "env": {}, "terminal": [1]}\n',
        b'{"do": "exec", "argv": ["a"], "env": {}}\n',  # without descriptors
        b'{"do": "exec", "argv": ["\\ud800"], "env": {}}\n',
        b"[" * 100_000 + b"\n",
        b"1" * 10_000 + b"\n",
    ],
)
def test_hostile_lines(line: Line, data: bytes) -> None:
    before = descriptors()
    line.other.sendall(data)
    answer = line.answer()
    assert isinstance(answer["error"], str)
    assert answer["exit_code"] in {2, 125}
    assert line.guest.did == []
    assert descriptors() < before


def test_a_line_without_end(line: Line) -> None:
    line.other.setblocking(False)
    sent = 0
    with suppress(ConnectionError):
        while sent < 4 * wire.MAX_LINE:
            with suppress(BlockingIOError):
                sent += line.other.send(b"x" * 65536)
            line.turn()
    assert wire.MAX_LINE < sent < 2 * wire.MAX_LINE
    assert line.supervisor.clients == set()


def test_a_client_that_says_nothing_and_goes(line: Line) -> None:
    line.other.close()
    line.turn()
    assert line.supervisor.clients == set()


def start(line: Line, **fields: object) -> None:
    with Path(os.devnull).open("r+b") as null:
        fds = [null.fileno()] * 3
        wire.send(line.other, {"do": "exec", "argv": ["a", "b"], "env": {"B": "3"}, **fields}, fds)
    line.turn()


def test_a_command_has_what_the_main_one_has(line: Line) -> None:
    start(line, terminal=[24, 80])
    command = Command((b"a", b"b"), (b"A=1", b"B=3"), b"/srv", b"app", terminal=(24, 80))
    assert line.guest.did == [("exec", command)]
    line.guest.finished(Exited(5, None, 9))
    assert line.answer() == {"exit_code": 137}


def test_a_function_of_the_agent_has_nothing_of_the_main_command(line: Line) -> None:
    start(line, builtin=True)
    assert line.guest.did == [("exec", Command((b"a", b"b"), builtin=True))]


def test_what_follows_a_command(line: Line) -> None:
    start(line)
    wire.send(line.other, {"resize": [1, 2]})
    wire.send(line.other, {"signal": 15})
    line.turn()
    assert line.guest.did[1:] == [("resize", 5, 1, 2), ("signal", 5, 15, SignalFlag.GROUP)]
    line.other.sendall(b"garbage\n")
    assert "error" in line.answer()
    assert line.guest.did[3:] == [("signal", 5, 9, SignalFlag.ALL)]
    line.guest.finished(Exited(5, None, 9))  # of no interest any more


def test_a_command_whose_client_goes_is_killed(line: Line) -> None:
    start(line)
    line.other.close()
    line.turn()
    assert line.guest.did[1:] == [("signal", 5, 9, SignalFlag.ALL)]
    assert line.supervisor.clients == set()
    line.guest.finished(Exited(5, None, 9))


def test_more_descriptors_than_there_are_streams_are_closed(line: Line) -> None:
    before = descriptors()
    with Path(os.devnull).open("r+b") as null:
        socket.send_fds(line.other, [b"{"], [null.fileno()] * 20)
    line.turn()
    socket.send_fds(line.other, [b"x\n"], [0, 1, 2])
    assert "error" in line.answer()
    assert descriptors() < before


def test_stop(line: Line) -> None:
    wire.send(line.other, {"do": "stop", "patience": 2.5})
    assert line.answer() == {}
    assert line.stops == [2.5]


# --- time


def task(directory: Path, **fields: Any) -> Task:
    machine = Machine(cast(Any, None), services=Services(secrets={"key": b"hush"}))
    values = {"timeout": None, "max_output": None, "debug": False, "idle": True, **fields}
    return Task(directory, -1, -1, State("box", "x", 1.0), machine, Command((b"a",), (b"KEY=hush",)), **values)


@pytest.mark.parametrize(
    ("timeout", "patience", "kill"),
    [
        (None, [10, 1000], 10),  # who asks again does not prolong it
        (None, [1000, 10], 10),
        (30, [1000], 30 + STOP_SECONDS),  # the lifetime is what it was
        (30, [30 + STOP_SECONDS / 2], 30 + STOP_SECONDS / 2),
        (30, [10], 10),
    ],
)
def test_the_earlier_end_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout: float | None, patience: list[float], kill: float
) -> None:
    now, did = 0.0, []

    class Clocked(FakeGuest):
        def turn(self, until: float | None) -> None:
            nonlocal now
            assert until is not None
            now = until

        def signal(self, *args: object) -> None:
            did.append((now, args[1]))

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    supervisor = Supervisor(task(tmp_path, timeout=timeout), cast(Any, None))
    supervisor.guest = cast(Any, Clocked())
    supervisor._start()
    supervisor.main = cast(Any, SimpleNamespace(number=1))
    for seconds in patience:
        supervisor.stop(seconds)
    supervisor._serve()
    supervisor._log.close()
    assert next(when for when, number in did if number == signal.SIGKILL) == kill
    assert kill <= now <= kill + KILL_SECONDS


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    secretive = task(tmp_path)
    for shown in (secretive, secretive.machine, secretive.command):
        assert "hush" not in repr(shown)
