"""QEMU's monitor: JSON, a line each (docs/interop/qmp-spec.rst of QEMU)."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from ..errors import VmmError

ANSWER_SECONDS = 30.0
POLL_SECONDS = 0.002


class Monitor:
    """One end of the connection to a QEMU's monitor, for one thread.

    Raises, as its methods do:
        VmmError: QEMU has ended, does not answer, or refuses.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._connection.settimeout(ANSWER_SECONDS)
        self._rest = b""
        self._line()  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: dict[str, Any] | None = None, fd: int | None = None) -> Any:
        """What QEMU returns for `command`; `fd` goes along with it."""
        line = json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n"
        try:
            sent = socket.send_fds(self._connection, [line], [] if fd is None else [fd])
            self._connection.sendall(line[sent:])
            while True:
                answer = self._line()
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    raise VmmError(f"QEMU refuses {command}: {answer['error'].get('desc')}")
        except OSError as error:
            raise VmmError(f"QEMU's monitor does not answer to {command}: {error}") from error

    def save(self, state: int) -> None:
        """Saves the machine, but for its shared memory, to the file `state`. It stands still from then on."""
        self._ignore_shared()
        self.execute("getfd", {"fdname": "state"}, state)
        self.execute("migrate", {"uri": "fd:state"})
        end = time.monotonic() + ANSWER_SECONDS
        while (status := self.execute("query-migrate").get("status")) != "completed":
            if status in {"failed", "cancelled"} or time.monotonic() > end:
                raise VmmError("QEMU cannot save the machine")
            time.sleep(POLL_SECONDS)

    def load(self, state: int) -> None:
        """Has a machine that waits for it go on from what is in the file `state`: soon, not at once."""
        self._ignore_shared()
        self.execute("getfd", {"fdname": "state"}, state)
        self.execute("migrate-incoming", {"uri": "fd:state"})

    def _ignore_shared(self) -> None:
        # (It is no property, that the command line could set, before QEMU 9.)
        self.execute("migrate-set-capabilities", {"capabilities": [{"capability": "x-ignore-shared", "state": True}]})

    def _line(self) -> Any:
        while b"\n" not in self._rest:
            data = self._connection.recv(65536)
            if not data:
                raise VmmError("QEMU has ended")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """Hangs up."""
        self._connection.close()
