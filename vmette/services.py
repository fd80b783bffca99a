"""What a guest is given over the control channel beside its commands: secrets, certificates, and ways in and out.

A service is of one guest and runs in the loop of that guest (:mod:`vmette.guest`).
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .config import Command
from .errors import ConfigError, GuestError, reason
from .linux import strerror
from .protocol import MAX_CONTROL, Exited, Failure, decode_error
from .streams import Buffer, BytesSource, Discard, Limited, SocketSink, SocketSource

if TYPE_CHECKING:
    from .guest import Ending, Guest
    from .proxy import AllowedHost
    from .vmm.base import VsockDevice

logger = logging.getLogger(__name__)

PROXY_PORT = 3128
"""Where the guest finds the proxy, on its own loopback: the port that Squid made usual."""
MAX_CONNECTIONS = 64
"""Open at once, of one published port or of the proxy. One more waits."""
ANY_CID = 0xFFFFFFFF
"""vsock(7)."""
MAX_LINE = 4096
MAX_LOGGED = 10_000
"""Lines of a guest that are logged."""
MAX_VSOCK_PORT = 0xFFFFFFFE
RANDOM_VSOCK_PORTS = range(50_000, 60_000)
MAX_CA_BYTES = 4 << 20
MAX_SECRET_BYTES = 1 << 20
SECRET_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\s.*?\s-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True)
class Publication:
    """A TCP port of the host that leads into the guest, to its loopback."""

    host: str
    port: int
    """0: any that is free."""
    guest_port: int

    @classmethod
    def parse(cls, text: str) -> Publication:
        """Reads `[HOST_IP:]PORT:PORT`; an IPv6 address is in brackets. Without an address it is 127.0.0.1.

        Raises:
            ConfigError: it is malformed.
        """
        match = re.fullmatch(r"(?:(\[[0-9A-Fa-f:.]+\]|[0-9.]+):)?([0-9]{1,5}):([0-9]{1,5})", text)
        if match is None or int(match[2]) > 65535 or not 1 <= int(match[3]) <= 65535:
            raise ConfigError(f"published port {text!r} is malformed: it is [HOST_IP:]PORT:GUEST_PORT")
        return cls((match[1] or "127.0.0.1").strip("[]"), int(match[2]), int(match[3]))


@dataclass(frozen=True)
class Services:
    """What a guest is to be given."""

    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Files in /run/secrets, by name."""
    secrets_user: str | None = None
    """Who can read them; None is root."""
    ca_certs: bytes = b""
    """PEM certificates that the guest is to trust."""
    allow_hosts: tuple[AllowedHost, ...] = ()
    """What the guest can reach over HTTP(S), through a proxy of this side."""
    publish: tuple[Publication, ...] = ()
    vsock_port: int | None = None
    """Where what the guest sends is logged, and sent back."""
    guest_vsock_port: int | None = None
    """Where the guest is told to listen."""

    def __post_init__(self) -> None:
        for name, value in self.secrets.items():
            if not SECRET_NAME.fullmatch(name):
                raise ConfigError(f"secret {name!r}: a name is letters, digits, '_', '.' and '-'")
            if len(value) > MAX_SECRET_BYTES:
                raise ConfigError(f"secret {name!r} is larger than {MAX_SECRET_BYTES} bytes")
        if self.vsock_port == 0:
            object.__setattr__(self, "vsock_port", secrets.choice(RANDOM_VSOCK_PORTS))
        for port in (self.vsock_port, self.guest_vsock_port):
            if port is not None:
                check_vsock_port(port)

    @property
    def env(self) -> dict[str, str]:
        """What a command's environment says of them."""
        ports = {"VMETTE_VSOCK_PORT": self.vsock_port, "VMETTE_GUEST_VSOCK_PORT": self.guest_vsock_port}
        env = {name: str(port) for name, port in ports.items() if port is not None}
        if self.allow_hosts:
            from .proxy import proxy_environment

            env |= proxy_environment(f"http://127.0.0.1:{PROXY_PORT}")
        return env


def check_vsock_port(port: int) -> None:
    """Does nothing if `port` is a vsock port.

    Raises:
        ConfigError: it is not.
    """
    if not 1 <= port <= MAX_VSOCK_PORT:
        raise ConfigError(f"vsock port {port}: there are 1 to {MAX_VSOCK_PORT}")


def allowed_hosts(names: Iterable[str]) -> tuple[AllowedHost, ...]:
    """Reads `NAME[:PORT]`, `*.NAME[:PORT]`.

    Raises:
        ConfigError: one is malformed.
    """
    if not names:
        return ()
    from .proxy import AllowedHost

    return tuple(map(AllowedHost.parse, names))


def read_ca_certs(directory: Path) -> bytes:
    """The PEM certificates in the files of `directory`, one after the other.

    Raises:
        ConfigError: it cannot be read, holds no certificate, or more than 4 MiB of them.
    """
    found: list[bytes] = []
    try:
        for path in sorted(directory.iterdir()):
            if path.suffix in {".pem", ".crt", ".cer"} and path.is_file():
                with path.open("rb") as file:
                    found += _PEM.findall(file.read(MAX_CA_BYTES + 1))
    except OSError as error:
        raise ConfigError(f"CA certificates {directory}: {reason(error)}") from error
    if not found:
        raise ConfigError(f"CA certificates {directory}: there is no PEM certificate in its .pem, .crt or .cer files")
    data = b"\n".join([*dict.fromkeys(found), b""])
    if len(data) > MAX_CA_BYTES:
        raise ConfigError(f"CA certificates {directory}: there are more than {MAX_CA_BYTES} bytes of them")
    return data


@contextmanager
def running(
    guest: Guest, services: Services, vsock: VsockDevice | None = None, deadline: float | None = None
) -> Iterator[None]:
    """Gives `guest` its services, which are there for its first command, and takes them away at the end.

    `vsock` is its vsock device, if it has one.

    Raises:
        SandboxTimeout: `deadline`, a time of `time.monotonic`, passed before they were there.
        ConfigError: a port of the host cannot be published.
        GuestError: the guest cannot take what it is given.
    """
    with ExitStack() as stack:
        for name, value in services.secrets.items():
            argv = (b"secret", name.encode(), os.fsencode(services.secrets_user or "0"))
            _call(guest, f"secret {name}", argv, value, deadline)
        if services.ca_certs:
            _call(guest, "CA certificates", (b"ca-certs",), services.ca_certs, deadline)
        if services.allow_hosts:
            from .proxy import Proxy

            proxy = Proxy(services.allow_hosts)
            stack.callback(proxy.close)
            _listen(guest, f"tcp:127.0.0.1:{PROXY_PORT}", proxy.start, deadline)
        for publication in services.publish:
            stack.enter_context(_published(guest, publication))
        if services.vsock_port is not None:
            echo = Echo()
            stack.callback(echo.close)
            if vsock is None:
                _listen(guest, f"vsock:{ANY_CID}:{services.vsock_port}", echo.start, deadline)
            else:
                stack.enter_context(listening_on_host(guest, vsock, services.vsock_port, echo.start))
        yield


def _call(guest: Guest, what: str, argv: tuple[bytes, ...], data: bytes, deadline: float | None) -> None:
    """Has the guest's agent run one of its functions with `data` for stdin."""
    said = Buffer()
    exited = guest.run(
        Command(argv, builtin=True), BytesSource(data), Discard(), Limited(said, MAX_CONTROL), deadline=deadline
    )
    if exited.code != 0:
        failure = decode_error(0, bytes(said.data))
        raise GuestError(f"the guest cannot take its {what}: {failure.stage}: {failure.text}")


def _listen(guest: Guest, address: str, serve: Callable[[socket.socket], None], deadline: float | None) -> None:
    """Has the guest listen at `address`; `serve` gets this side's end of each connection, which is its to close."""
    state: list[Ending | None] = []
    guest.listen(address, acceptor(guest, serve), state.append, lambda: state.append(None))
    guest.turn_until(lambda: bool(state), deadline)
    if isinstance(failure := state[0], Failure):
        raise GuestError(f"the guest cannot listen at {address}: {strerror(failure.errno)}")


class Echo:
    """Logs each line that comes over a connection, cleaned, and sends all back: what `--vsock-port` serves."""

    def __init__(self) -> None:
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._lines = 0

    def start(self, connection: socket.socket) -> None:
        """Serves `connection` in a thread of its own; one of too many is closed."""
        with self._lock:
            if len(self._open) >= MAX_CONNECTIONS:
                connection.close()
                return
            self._open.add(connection)
        try:
            threading.Thread(target=self._serve, args=(connection,), name="vmette-vsock", daemon=True).start()
        except RuntimeError:  # there can be no more threads
            self._forget(connection)

    def close(self) -> None:
        """Ends all."""
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _serve(self, connection: socket.socket) -> None:
        rest = b""
        with suppress(OSError), connection:
            while data := connection.recv(MAX_LINE):
                *lines, rest = (rest + data).split(b"\n")
                if len(rest) > MAX_LINE:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._log(line)
                connection.sendall(data)
            if rest:
                self._log(rest)
        self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.discard(connection)
        connection.close()

    def _log(self, line: bytes) -> None:
        with self._lock:
            self._lines += 1
            if self._lines == MAX_LOGGED:
                logger.warning("vsock: there were %d lines; no more are logged", MAX_LOGGED)
            if self._lines >= MAX_LOGGED:
                return
        logger.warning("vsock: %s", "".join(c if c.isprintable() else "?" for c in line.decode(errors="replace")))


@contextmanager
def listening_on_host(
    guest: Guest, vsock: VsockDevice, port: int, serve: Callable[[socket.socket], None]
) -> Iterator[None]:
    """Has `serve` called with each connection that the guest makes to a vsock port of this host."""
    try:
        listener = vsock.listen(port)
    except OSError as error:
        raise ConfigError(f"cannot listen at vsock port {port}: {reason(error)}") from error

    def accept() -> None:
        if (connection := listener.accept()) is not None:
            serve(connection)

    fd = listener.fileno()
    guest.watch(fd, accept)
    try:
        yield
    finally:
        guest.unwatch(fd)
        listener.close()


def acceptor(guest: Guest, serve: Callable[[socket.socket], None]) -> Callable[[int, str], None]:
    """For :meth:`vmette.guest.Guest.listen`: `serve` gets this side's end of each connection, which is its to close."""

    def accept(number: int, peer: str) -> None:  # noqa: ARG001
        try:
            ours, theirs = socket.socketpair()
        except OSError:  # there are no descriptors left
            guest.reject(number)
            return
        relay(ours, partial(guest.accepted, number))
        serve(theirs)

    return accept


def relay(
    connection: socket.socket,
    attach: Callable[[SocketSource, SocketSink, Callable[[Ending], None]], object],
    finished: Callable[[], None] = lambda: None,
) -> None:
    """Joins `connection` to a stream of the guest, which `attach` opens or takes; closes it at the stream's end."""
    connection.setblocking(False)

    def end(ending: Ending) -> None:
        if not isinstance(ending, Exited) or ending.signal is not None:  # as hard as it ended there
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # on, with no time
        connection.close()
        finished()

    attach(SocketSource(connection), SocketSink(connection), end)


@contextmanager
def _published(guest: Guest, publication: Publication) -> Iterator[None]:
    family = socket.AF_INET6 if ":" in publication.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((publication.host, publication.port))
            listener.listen(128)
        except OSError as error:
            raise ConfigError(
                f"cannot publish port {publication.port} of {publication.host}: {reason(error)}"
            ) from error
        listener.setblocking(False)
        address = "{}:{}".format(*listener.getsockname())
        logger.info("port %s leads to port %d of the guest", address, publication.guest_port)
        open_now = 0

        def accept() -> None:
            nonlocal open_now
            try:
                connection, _ = listener.accept()
            except OSError as error:  # it has gone again; or there are no descriptors left, and one more try is no help
                if error.errno in {errno.EMFILE, errno.ENFILE} and open_now:
                    guest.unwatch(listener.fileno())
                return
            open_now += 1
            if open_now >= MAX_CONNECTIONS:
                guest.unwatch(listener.fileno())
            to = f"tcp:127.0.0.1:{publication.guest_port}"
            relay(connection, partial(guest.connect, to), closed)

        def closed() -> None:
            nonlocal open_now
            open_now -= 1
            if listener.fileno() >= 0:
                guest.watch(listener.fileno(), accept)

        guest.watch(listener.fileno(), accept)
        try:
            yield
        finally:
            guest.unwatch(listener.fileno())
