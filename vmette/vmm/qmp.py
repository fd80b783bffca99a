"""QEMU's monitor: JSON, a line each (docs/interop/qmp-spec.rst of QEMU)."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from ..errors import VmmError

ANSWER_SECONDS = 30.0
POLL_SECONDS = 0.001
BANDWIDTH = 1 << 40
"""Bytes a second, more than there are: QEMU sends 128 MiB unless told otherwise."""


class Monitor:
    """One end of the connection to a QEMU's monitor, for one thread.

    Raises, as its methods do:
        VmmError: QEMU has ended, does not answer, or refuses.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.settimeout(ANSWER_SECONDS)
        self._rest = b""
        self._asked: list[str] = []
        """Commands whose answers nobody has looked at."""
        self.ask("qmp_capabilities")

    def move_to(self, connection: socket.socket) -> None:
        """Goes on with a QEMU that has been asked the same by somebody else."""
        self._connection.close()
        self._connection = connection
        self._connection.settimeout(ANSWER_SECONDS)

    def ask(self, command: str, arguments: dict[str, Any] | None = None, fd: int | None = None) -> None:
        """Has QEMU execute `command`, in its turn; `fd` goes along with it."""
        words = {"execute": command, **({} if arguments is None else {"arguments": arguments})}
        line = json.dumps(words, separators=(",", ":")).encode() + b"\n"  # short: QEMU reads it byte by byte
        try:
            sent = socket.send_fds(self._connection, [line], [] if fd is None else [fd])
            self._connection.sendall(line[sent:])
        except OSError as error:
            raise VmmError(f"QEMU's monitor does not take {command}: {error}") from error
        self._asked.append(command)

    def settle(self) -> Any:
        """Waits until QEMU has done all that it was asked to do; returns what the last command returns."""
        result = None
        while self._asked:
            command = self._asked[0]
            answer = self._line(command)
            if "return" in answer:
                result = answer["return"]
            elif "error" in answer:
                raise VmmError(f"QEMU refuses {command}: {answer['error'].get('desc')}")
            else:
                continue  # the greeting, or an event
            del self._asked[0]
        return result

    def execute(self, command: str, arguments: dict[str, Any] | None = None, fd: int | None = None) -> Any:
        """What QEMU returns for `command`."""
        self.ask(command, arguments, fd)
        return self.settle()

    def send(self, to: int, *, memory: bool) -> None:
        """Sends the machine's state to the file or socket `to`, with its memory or without. It stands still then."""
        self._tell_what(memory=memory)
        self.ask("migrate-set-parameters", {"max-bandwidth": BANDWIDTH})
        self.ask("getfd", {"fdname": "state"}, to)
        self.execute("migrate", {"uri": "fd:state"})
        end = time.monotonic() + ANSWER_SECONDS
        while (status := self.execute("query-migrate").get("status")) != "completed":
            if status in {"failed", "cancelled"} or time.monotonic() > end:
                raise VmmError("QEMU cannot save the machine")
            time.sleep(POLL_SECONDS)

    def receive(self, source: int, *, memory: bool) -> None:
        """Has a machine that waits for it go on from what comes from a file or socket: soon, not at once.

        `source` is its descriptor in QEMU's process.
        """
        self._tell_what(memory=memory)
        self.ask("migrate-incoming", {"uri": f"fd:{source}"})

    def wait_until_received(self) -> None:
        """Waits until all has come of what :meth:`receive` is about."""
        end = time.monotonic() + ANSWER_SECONDS
        while self.execute("query-status")["status"] == "inmigrate":
            if time.monotonic() > end:
                raise VmmError("QEMU does not get the machine's state")
            time.sleep(POLL_SECONDS)

    def _tell_what(self, *, memory: bool) -> None:
        # (It is no property, that the command line could set, before QEMU 9.)
        capabilities = [{"capability": "x-ignore-shared", "state": not memory}]
        self.ask("migrate-set-capabilities", {"capabilities": capabilities})

    def _line(self, command: str) -> Any:
        try:
            while b"\n" not in self._rest:
                data = self._connection.recv(65536)
                if not data:
                    raise VmmError("QEMU has ended")
                self._rest += data
        except OSError as error:
            raise VmmError(f"QEMU's monitor does not answer to {command}: {error}") from error
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            return json.loads(line)
        except ValueError as error:
            raise VmmError("QEMU's monitor does not speak JSON") from error

    def close(self) -> None:
        """Hangs up."""
        self._connection.close()
