"""QEMU's monitor: JSON, a line each (docs/interop/qmp-spec.rst of QEMU)."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from typing import Any

from ..errors import VmmError

ANSWER_SECONDS = 30.0
MAX_LINE = 1 << 20
"""Bytes: more than QEMU ever says."""


class Monitor:
    """One end of the connection to a QEMU's monitor, for one thread.

    Raises, as its methods do:
        VmmError: QEMU has ended, does not answer, or refuses.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.settimeout(ANSWER_SECONDS)
        self._rest = b""
        self._commands = 0
        self._fdset: int | None = None
        """What QEMU calls the file that it has written the devices' state to."""

    def execute(self, command: str, arguments: dict[str, Any] | None = None, fd: int | None = None) -> Any:
        """What QEMU returns for `command`, with which `fd` goes along."""
        if self._commands == 0 and command != "qmp_capabilities":
            self.execute("qmp_capabilities")
        self._commands += 1
        number = self._commands
        words = {"execute": command, "id": number, **({} if arguments is None else {"arguments": arguments})}
        line = json.dumps(words).encode() + b"\n"
        try:
            sent = socket.send_fds(self._connection, [line], [] if fd is None else [fd])
            self._connection.sendall(line[sent:])
        except OSError as error:
            raise VmmError(f"QEMU's monitor does not take {command}: {error}") from error
        end = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < end:
            answer = self._line(command)
            if not isinstance(answer, dict) or answer.get("id") != number:
                continue  # the greeting, an event, or what came too late for an earlier command
            if "return" in answer:
                return answer["return"]
            why = answer.get("error")
            raise VmmError(f"QEMU refuses {command}: {why.get('desc') if isinstance(why, dict) else why}")
        raise VmmError(f"QEMU's monitor does not answer to {command}")

    def save_devices(self, to: int) -> None:
        """Has the machine stand still, and writes the state of its devices to the empty file `to`.

        With the memory as it is then, that is all that `-incoming` takes: a migration stream without its RAM section.
        (The command's name says for whom it was made. A machine that stands still only for it wakes running.)

        Raises:
            OSError: the file is of no use.
        """
        if why := self.execute("query-migrate").get("blocked-reasons"):  # the command below does not look
            raise VmmError(f"QEMU cannot save this machine: {why[0]}")
        self.execute("stop")
        fd = os.open(f"/proc/self/fd/{to}", os.O_WRONLY | os.O_CLOEXEC)  # it has to be open just as QEMU opens it
        try:
            self._fdset = self.execute("add-fd", fd=fd)["fdset-id"]
        finally:
            os.close(fd)
        self.execute("xen-save-devices-state", {"filename": f"/dev/fdset/{self._fdset}", "live": False})

    def go_on(self) -> None:
        """Has a machine that stands still go on."""
        self.execute("cont")
        if self._fdset is not None:  # QEMU lets go of a file only while the machine runs
            fdset, self._fdset = self._fdset, None
            with suppress(VmmError):  # it has gone on, which is what counts
                self.execute("remove-fd", {"fdset-id": fdset})

    def _line(self, command: str) -> Any:
        try:
            while b"\n" not in self._rest:
                data = self._connection.recv(65536)
                if not data:
                    raise VmmError("QEMU has ended")
                self._rest += data
                if len(self._rest) > MAX_LINE:
                    raise VmmError("QEMU's monitor says too much at once")
        except OSError as error:
            raise VmmError(f"QEMU's monitor does not answer to {command}: {error}") from error
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise VmmError("QEMU's monitor does not speak JSON") from error

    def close(self) -> None:
        """Hangs up."""
        self._connection.close()
