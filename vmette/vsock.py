"""Sockets between the host and a guest that programs there reach by AF_VSOCK (`vsock(7)`).

Where the machine has a vsock device (Linux hosts with /dev/vhost-vsock), these are AF_VSOCK sockets of the host. Where
it has none, the guest's agent stands in: it listens and connects on the guest's own vsock loopback, and the bytes go
over the control channel. `vsock-send` and `vsock-runner` behave the same either way; so does what listens in the guest.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from .errors import ConfigError, GuestError, VmetteError
from .protocol import Failure
from .services import ANY_CID, HOST_CID, MAX_VSOCK_PORT, relay
from .streams import SocketSink, SocketSource

if TYPE_CHECKING:
    from .guest import Ending, Guest
    from .sandbox import Session

LOOPBACK_CID = 1
BACKLOG = 128


def check_port(port: int) -> int:
    """`port`, if it is one.

    Raises:
        ConfigError: it is not.
    """
    if not 1 <= port <= MAX_VSOCK_PORT:
        raise ConfigError(f"vsock port {port}: there are 1 to {MAX_VSOCK_PORT}")
    return port


class Listener:
    """Where the guest's programs connect to, as `vsock-send` does. A context manager, which closes it."""

    def __init__(self, port: int, close: Callable[[], None]) -> None:
        self.port = port
        self._close = close
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
        """Takes a connection, or the end: for those who serve it."""
        self._accepted.put(connection)

    def close(self) -> None:
        """Takes no more connections. Those that were taken live on."""
        self._close()
        self.add(None)


class Vsock:
    """The vsock ports of a sandbox: `sandbox.vsock`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._cid = session.vsock_cid

    def listen(self, port: int) -> Listener:
        """Listens at `port` for the guest's programs, which connect to CID 2, the host.

        Raises:
            ConfigError: the port is no port.
            GuestError: it is in use.
            SandboxClosed: the VM has ended.
        """
        check_port(port)
        return self._listen_on_host(port, self._cid) if self._cid is not None else self._listen_in_guest(port)

    def connect(self, port: int) -> socket.socket:
        """A stream socket to what listens at `port` in the guest; the caller's to close.

        Raises:
            ConfigError: the port is no port.
            ConnectionError: nothing listens there.
            SandboxClosed: the VM has ended.
        """
        check_port(port)
        if self._cid is not None:
            connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            try:
                connection.connect((self._cid, port))
            except BaseException:
                connection.close()
                raise
            return connection
        ours, theirs = socket.socketpair()
        result: queue.SimpleQueue[Ending | None] = queue.SimpleQueue()

        def attach(guest: Guest, source: SocketSource, sink: SocketSink, finished: Callable[[Ending], None]) -> None:
            def ended(ending: Ending) -> None:
                result.put(ending)
                finished(ending)

            guest.connect(f"vsock:{LOOPBACK_CID}:{port}", source, sink, ended, lambda: result.put(None))

        def connect(guest: Guest) -> None:
            relay(theirs, partial(attach, guest))

        try:
            self._session.call(connect)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        ending = result.get()
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
            def accept(number: int, peer: str) -> None:  # noqa: ARG001
                ours, theirs = socket.socketpair()
                relay(theirs, partial(guest.accepted, number))
                listener.add(ours)

            return guest.listen(f"vsock:{ANY_CID}:{port}", accept, ended, lambda: result.put(None)).number

        def close() -> None:
            session.post_if_open(lambda: session.guest.signal(number, 9))

        listener = Listener(port, close)
        number = session.call(start)
        ending = result.get()
        if isinstance(ending, Failure):
            raise GuestError(f"cannot listen at vsock port {port}: {ending.text}")
        if ending is not None:
            raise ending if isinstance(ending, Exception) else GuestError(f"cannot listen at vsock port {port}")
        return listener

    def _listen_on_host(self, port: int, cid: int) -> Listener:
        server = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            server.bind((HOST_CID, port))
            server.listen(BACKLOG)
        except OSError as error:
            server.close()
            raise GuestError(f"cannot listen at vsock port {port}: {error.strerror}") from error

        def accept() -> None:
            while True:
                try:
                    connection, (peer, _) = server.accept()
                except OSError:  # it has been closed
                    return
                if peer == cid:
                    listener.add(connection)
                else:  # another VM of this host
                    connection.close()

        def close() -> None:
            server.shutdown(socket.SHUT_RDWR)  # which wakes the thread
            server.close()

        listener = Listener(port, close)
        threading.Thread(target=accept, name="vmette-vsock", daemon=True).start()
        return listener
