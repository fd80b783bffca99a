"""Sockets between the host and a guest that programs there reach by AF_VSOCK (`vsock(7)`).

Where the machine has a vsock device (Linux hosts with /dev/vhost-vsock, and Macs), these are sockets of that. Where it
has none, the guest's agent stands in: it listens and connects on the guest's own vsock loopback, and the bytes go
over the control channel. `vsock-send` and `vsock-runner` behave the same either way; so does what listens in the guest.
"""

from __future__ import annotations

import queue
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING

from .errors import ConfigError, GuestError, VmetteError
from .protocol import Failure
from .services import ANY_CID, acceptor, check_vsock_port, listening_on_host, relay
from .streams import SocketSink, SocketSource

if TYPE_CHECKING:
    from .guest import Ending, Guest
    from .sandbox import Session
    from .vmm.base import VsockDevice

LOOPBACK_CID = 1
BACKLOG = 128
"""Connections that wait to be accepted."""
ANSWER_SECONDS = 30.0
"""What a guest has to answer."""


class Listener:
    """Where the guest's programs connect to, as `vsock-send` does. A context manager, which closes it."""

    def __init__(self, port: int, close: Callable[[], None]) -> None:
        self.port = port
        self._close = close
        self._closed = False
        self._accepted: queue.SimpleQueue[socket.socket | None] = queue.SimpleQueue()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def accept(self, timeout: float | None = None) -> socket.socket:
        """The next connection: a stream socket, which is the caller's to close.

        Raises:
            TimeoutError: there was none for `timeout` seconds.
            GuestError: the listener is closed, or the guest is gone.
        """
        try:
            connection = self._accepted.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"nobody connected to vsock port {self.port} for {timeout:g} seconds") from None
        if connection is None:
            self._accepted.put(None)  # for all who wait
            raise GuestError(f"nobody listens at vsock port {self.port} any more")
        return connection

    def add(self, connection: socket.socket | None) -> None:
        """Takes a connection, or the end: for those who serve it. One more than can wait is closed."""
        if connection is not None and (self._closed or self._accepted.qsize() >= BACKLOG):
            connection.close()
        else:
            self._accepted.put(connection)

    def close(self) -> None:
        """Takes no more connections, and closes those that wait. Those that were accepted live on."""
        self._closed = True
        self._close()
        with suppress(queue.Empty):
            while True:
                if (connection := self._accepted.get_nowait()) is not None:
                    connection.close()
        self.add(None)


class Vsock:
    """The vsock ports of a sandbox: `sandbox.vsock`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._device = session.guest.vsock

    def listen(self, port: int) -> Listener:
        """Listens at `port` for the guest's programs, which connect to CID 2, the host.

        Raises:
            ConfigError: the port is no port.
            GuestError: it is in use.
            SandboxClosed: the VM has ended.
        """
        check_vsock_port(port)
        return self._listen_in_guest(port) if self._device is None else self._listen_on_host(port, self._device)

    def connect(self, port: int, timeout: float = ANSWER_SECONDS) -> socket.socket:
        """A stream socket to what listens at `port` in the guest; the caller's to close.

        Raises:
            ConfigError: the port is no port.
            ConnectionError: nothing listens there.
            TimeoutError: the guest has not said within `timeout` seconds.
            SandboxClosed: the VM has ended.
        """
        check_vsock_port(port)
        if self._device is not None:
            return self._device.connect(port, timeout)
        ours, theirs = socket.socketpair()
        result: queue.SimpleQueue[Ending | None] = queue.SimpleQueue()

        numbers: list[int] = []

        def attach(guest: Guest, source: SocketSource, sink: SocketSink, finished: Callable[[Ending], None]) -> None:
            def ended(ending: Ending) -> None:
                result.put(ending)
                finished(ending)

            opened = partial(result.put, None)
            numbers.append(guest.connect(f"vsock:{LOOPBACK_CID}:{port}", source, sink, ended, opened).number)

        def connect(guest: Guest) -> None:
            relay(theirs, partial(attach, guest))

        def give_up(guest: Guest, _: object = None) -> None:
            for number in numbers:
                guest.signal(number, signal.SIGKILL)

        try:
            self._session.call(connect, give_up)
            ending = result.get(timeout=timeout)
        except BaseException as error:
            ours.close()
            if not numbers:  # no stream has it that would close it
                theirs.close()
            self._session.post_if_open(lambda: give_up(self._session.guest))
            if isinstance(error, queue.Empty):
                raise TimeoutError(f"the guest has not connected to its vsock port {port} in {timeout:g} s") from None
            raise
        if ending is None:
            return ours
        ours.close()
        if isinstance(ending, VmetteError):
            raise ending
        raise ConnectionRefusedError(f"nothing listens at vsock port {port} of the guest")

    def _listen_in_guest(self, port: int) -> Listener:
        result: queue.SimpleQueue[Ending | None] = queue.SimpleQueue()
        session = self._session

        def ended(ending: Ending) -> None:
            result.put(ending)
            listener.add(None)

        def start(guest: Guest) -> int:
            return guest.listen(
                f"vsock:{ANY_CID}:{port}", acceptor(guest, listener.add), ended, lambda: result.put(None)
            ).number

        def close() -> None:
            session.post_if_open(lambda: session.guest.signal(number, signal.SIGKILL))

        listener = Listener(port, close)
        number = session.call(start, lambda guest, number: guest.signal(number, signal.SIGKILL))
        try:
            ending = result.get(timeout=ANSWER_SECONDS)
        except BaseException as error:
            close()
            if isinstance(error, queue.Empty):
                raise GuestError(f"the guest has not listened at vsock port {port} in {ANSWER_SECONDS:g} s") from None
            raise
        if isinstance(ending, Failure):
            raise GuestError(f"cannot listen at vsock port {port}: {ending.text}")
        if ending is not None:
            raise ending if isinstance(ending, Exception) else GuestError(f"cannot listen at vsock port {port}")
        return listener

    def _listen_on_host(self, port: int, device: VsockDevice) -> Listener:
        session = self._session
        services = ExitStack()

        def close() -> None:
            session.post_if_open(services.close)

        listener = Listener(port, close)

        def start(guest: Guest) -> None:
            guest.at_end(partial(listener.add, None))
            services.enter_context(listening_on_host(guest, device, port, listener.add))

        try:
            session.call(start, lambda _guest, _none: services.close())
        except ConfigError as error:
            raise GuestError(str(error)) from error
        return listener
