"""QEMU's monitor, played by the test."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vmette.errors import VmmError
from vmette.vmm import qmp
from vmette.vmm.qmp import Monitor


class Qemu:
    """The other end."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.lines = connection.makefile("rb")

    def say(self, data: bytes | dict[str, Any]) -> None:
        self.connection.sendall(data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        heard: dict[str, Any] = json.loads(self.lines.readline())
        return heard


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Monitor, Qemu]]:
    monkeypatch.setattr(qmp, "ANSWER_SECONDS", 0.5)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        qemu = Qemu(theirs)
        qemu.say({"QMP": {}})
        qemu.say({"return": {}, "id": 1})  # to qmp_capabilities
        yield Monitor(ours), qemu
        qemu.lines.close()


def test_answers_are_those_of_their_command(ends: tuple[Monitor, Qemu]) -> None:
    """What comes too late is nobody's."""
    monitor, qemu = ends
    with pytest.raises(VmmError, match="does not answer to stop"):
        monitor.execute("stop")
    qemu.say({"event": "STOP"})
    qemu.say({"return": "of stop", "id": 2})
    qemu.say({"return": {"fdset-id": 7}, "id": 3})
    assert monitor.execute("add-fd") == {"fdset-id": 7}
    assert [qemu.hear()["id"] for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b'{"error": {"class": "GenericError", "desc": "no"}, "id": 2}\n', "QEMU refuses stop: no"),
        (b'{"id": 2}\n', "QEMU refuses stop: None"),
        (b"{\n", "does not speak JSON"),
        (b"[" * 100_000 + b"\n", "does not speak JSON"),
        (b"[]\n1\nnull\n", "does not answer to stop"),
        (b"x" * (qmp.MAX_LINE + 1), "says too much at once"),
    ],
)
def test_answers_that_are_none(ends: tuple[Monitor, Qemu], said: bytes, message: str) -> None:
    monitor, qemu = ends
    with ThreadPoolExecutor(1) as pool:
        saying = pool.submit(qemu.say, said)
        with pytest.raises(VmmError, match=message):
            monitor.execute("stop")
        monitor.close()
        saying.exception()


def test_events_without_end_are_no_answer(ends: tuple[Monitor, Qemu]) -> None:
    monitor, qemu = ends

    def chatter() -> None:
        while True:
            qemu.say({"event": "RTC_CHANGE"})

    with ThreadPoolExecutor(1) as pool:
        talking = pool.submit(chatter)
        with pytest.raises(VmmError, match="does not answer to stop"):
            monitor.execute("stop")
        monitor.close()
        assert isinstance(talking.exception(), OSError)


def test_an_end(ends: tuple[Monitor, Qemu]) -> None:
    monitor, qemu = ends
    qemu.connection.shutdown(socket.SHUT_WR)
    with pytest.raises(VmmError, match="QEMU has ended"):
        monitor.execute("stop")


def test_a_machine_that_cannot_be_saved_does_not_stand_still(ends: tuple[Monitor, Qemu], tmp_path: Path) -> None:
    monitor, qemu = ends
    qemu.say({"return": {"blocked-reasons": ["State blocked by its CPU"]}, "id": 2})
    with (tmp_path / "state").open("wb") as state, pytest.raises(VmmError, match="State blocked by its CPU"):
        monitor.save_devices(state.fileno())
    assert [qemu.hear()["execute"] for _ in range(2)] == ["qmp_capabilities", "query-migrate"]


def test_a_file_that_is_not_let_go_of_is_no_failure(ends: tuple[Monitor, Qemu]) -> None:
    monitor, qemu = ends
    monitor._fdset = 5
    qemu.say({"return": {}, "id": 2})
    qemu.say({"error": {"desc": "not found"}, "id": 3})
    monitor.go_on()
    assert [qemu.hear()["execute"] for _ in range(3)] == ["qmp_capabilities", "cont", "remove-fd"]
