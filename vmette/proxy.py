"""The way out of a guest without a network: an HTTP proxy on the host, to names that were allowed, and to no others.

The guest is hostile. What it asks for is read by h11 and written anew for the server, so nothing passes that the two
could read differently. A name is looked up here, once, and the connection goes to the address that was checked:
one of the internet, not of this computer or of its network, whatever the name's owner says it is.

What is inside a tunnel (CONNECT) is not looked at, neither TLS's server name (SNI) nor what comes after it: who allows
a name allows all that the servers at its addresses serve, and those of a large CDN serve many sites.
"""

from __future__ import annotations

import errno
import logging
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import NamedTuple

import h11

from .errors import ConfigError
from .providers.http import address_of, printable

logger = logging.getLogger(__name__)

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Sequence[str]]
"""The IP addresses of a name, for a connection to a port; an OSError if there are none."""

DEFAULT_PORTS = (80, 443)
MAX_CONNECTIONS = 64
HEAD_BYTES = 1 << 16
"""Of a request or an answer, without its body."""
HEAD_TIMEOUT = 30.0
"""Seconds that the head of a request may take."""
CONNECT_TIMEOUT = 20.0
"""Seconds for all addresses of a name together."""
IDLE_TIMEOUT = 900.0
"""Seconds for which a connection may be silent: answers of models take minutes."""
LINGER, LINGER_BYTES = 2.0, 1 << 20
"""How long, and for how much that nobody wants, a connection stays open after its answer."""
CLOSE_TIMEOUT = 5.0
PIECE, BUFFER = 1 << 16, 1 << 17
"""Bytes that are read at once, and that are held for a side that is slower; there is one buffer for each direction."""
LOG_LINES, LOG_PERIOD = 20, 60.0
"""So many refusals are told in so many seconds."""

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
# As browsers have it (https://url.spec.whatwg.org/#ends-in-a-number-checker): 127.1, 0x7f.0.0.1 and 2130706433 are no
# names, though C libraries find an address in them.
_NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_BARE_CR_OR_LF = re.compile(rb"(?<!\r)\n|\r[^\n]")
_OBS_FOLD = re.compile(rb"\r\n[ \t]")
_AUTHORITY = rb"(?P<host>\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?"
_TARGET_OF_CONNECT = re.compile(_AUTHORITY)
_URL = re.compile(rb"(?i:http)://" + _AUTHORITY + rb"(?P<path>[/?][!\"$-~]*)?")
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})
_HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"te", b"trailer", b"upgrade"})

_NAT64 = ip_network("64:ff9b::/96")
_UNICAST6 = ip_network("2000::/3")
# Of the registries of special addresses (https://www.iana.org/assignments/iana-ipv4-special-registry, and -ipv6-), what
# `is_global` of one Python or another lets pass: protocols' own, 6to4 and its relays, Teredo, documentation.
_SPECIAL = tuple(map(ip_network, ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20")))


# --- What is allowed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AllowedHost:
    """A host that the guest may reach.

    Raises:
        ConfigError: there is no such host.
    """

    name: str
    """A name (kept in lower case and ASCII), `*.NAME`: all below it, but not itself, an IP address, or `*`: all."""
    port: int | None = None
    """None is DEFAULT_PORTS."""

    def __post_init__(self) -> None:
        wildcard = "*." if self.name.startswith("*.") else ""
        try:
            name = "*" if self.name == "*" else canonical(self.name.removeprefix(wildcard))
        except ValueError as error:
            raise ConfigError(f"allowed host {self.name!r}: {error}") from None
        if wildcard and address_of(name) is not None:
            raise ConfigError(f"allowed host {self.name!r}: nothing is below an address")
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"allowed host {self.name!r}: {self.port} is no port")
        object.__setattr__(self, "name", wildcard + name)

    @classmethod
    def parse(cls, text: str) -> AllowedHost:
        """Reads `NAME[:PORT]` as the command line has it; an IPv6 address with a port is in brackets.

        Raises:
            ConfigError: it is malformed.
        """
        match = re.fullmatch(r"(?:\[([^][]*:[^][]*)\]|([^][:]+))(?::([0-9]{1,5}))?", text)
        if match is not None:
            return cls(match[1] or match[2], None if match[3] is None else int(match[3]))
        if isinstance(address_of(text), IPv6Address):
            return cls(text)
        raise ConfigError(f"allowed host {text!r} is malformed: it is NAME, *.NAME or an address, and may end in :PORT")

    @property
    def exact(self) -> bool:
        """Whether it is one host, which somebody has named."""
        return not self.name.startswith("*")

    def matches(self, host: str, port: int) -> bool:
        """Whether it is, or covers, `host` in its canonical spelling and `port`."""
        if port not in (DEFAULT_PORTS if self.port is None else (self.port,)):
            return False
        return host == self.name or self.name == "*" or (not self.exact and host.endswith(self.name[1:]))


def canonical(host: str) -> str:
    """The one spelling of a host that we use: a name in lower case and ASCII, or an IP address.

    Raises:
        ValueError: it is neither.
    """
    if ":" in host:
        if "%" in host or not isinstance(address_of(host), IPv6Address):
            raise ValueError("it is no IPv6 address")
        return str(IPv6Address(host))
    host = host.lower().removesuffix(".")
    if not host.isascii():
        import idna

        try:
            host = idna.encode(host, uts46=True).decode()
        except UnicodeError:
            raise ValueError("it is no name of a host") from None
    if not _NAME.fullmatch(host):
        raise ValueError("it is no name of a host")
    if _NUMERIC.fullmatch(host):
        if address_of(host) is None:
            raise ValueError("it is no IPv4 address as everybody writes them")
        return str(IPv4Address(host))
    return host


def public(address: Address) -> bool:
    """Whether it is one host's address on the internet. An IPv4 address in an IPv6 one is what counts of that."""
    if isinstance(address, IPv6Address):
        inner = IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else address.ipv4_mapped
        if inner is not None:
            return public(inner)
        if address not in _UNICAST6:
            return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _SPECIAL)


def proxy_environment(url: str) -> dict[str, str]:
    """What programs want in their environment to find the proxy at `url`."""
    here = "localhost,127.0.0.1,::1"
    names = {"HTTP_PROXY": url, "HTTPS_PROXY": url, "NO_PROXY": here}
    return names | {name.lower(): value for name, value in names.items()}


# --- The proxy -------------------------------------------------------------------------------------------------------


class Proxy:
    """A proxy for one guest, whose connections come as sockets that are connected already. Safe for threads.

    Each connection is one request. The guest is told in the answer why it gets nothing: 403 what is not allowed, 400
    and the like what is not understood, 502 and 504 what does not work, 503 what is too much.
    """

    def __init__(
        self,
        allowed: Sequence[AllowedHost],
        *,
        allow_private: bool = False,
        resolve: Resolve | None = None,
        max_connections: int = MAX_CONNECTIONS,
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        """Makes it.

        Args:
            allowed: Where the guest may go.
            allow_private: Hosts that are allowed by their own name, not through a wildcard, may have any address.
            resolve: In place of the computer's own resolver.
            max_connections: At once, of :meth:`start`.
            on_refused: Is told in a line what was refused, by any thread, as the log is: not more often than a person
                would want to know.
        """
        self._allowed = tuple(allowed)
        self._allow_private = allow_private
        self._resolve = resolve or _resolve
        self._max = max_connections
        self._refusals = _Refusals(on_refused)
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def start(self, connection: socket.socket) -> None:
        """Serves `connection` in a thread of its own, or says that there are too many. Does not wait."""
        thread = threading.Thread(target=self._run, args=(connection,), name="vmette-proxy", daemon=True)
        with self._lock:
            accepted = not self._closed and len(self._threads) < self._max
            if accepted:
                self._threads.add(thread)
        if accepted:
            try:
                thread.start()
                return
            except RuntimeError:  # the system has no more threads
                with self._lock:
                    self._threads.discard(thread)
        with connection, suppress(OSError):
            connection.setblocking(False)
            connection.send(_Failed(HTTPStatus.SERVICE_UNAVAILABLE, "there are too many connections").answer())
            connection.recv(PIECE)  # or the guest's end would be broken off, not ended

    def serve(self, connection: socket.socket) -> None:
        """Serves `connection` to its end, and closes it."""
        with suppress(OSError), self._open(connection):  # the guest may go at any time, or we are to close
            try:
                self._exchange(connection)
            except _Failed as failure:
                if failure.status is HTTPStatus.FORBIDDEN:
                    self._refusals.tell(f"{failure}{failure.privately}")
                else:
                    logger.debug("%s", failure)
                connection.settimeout(LINGER)
                connection.sendall(failure.answer())
            _linger(connection)

    def close(self) -> None:
        """Ends all connections. A thread that waits for a resolver or a server ends with its wait."""
        with self._lock:
            self._closed = True
            threads = tuple(self._threads)
            for each in self._sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for thread in threads:
            with suppress(RuntimeError):  # it has not started yet
                thread.join(max(deadline - time.monotonic(), 0))
        self._refusals.end()

    def _run(self, connection: socket.socket) -> None:
        try:
            self.serve(connection)
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    @contextmanager
    def _open(self, connection: socket.socket) -> Iterator[None]:
        """Has :meth:`close` know of `connection`, which is closed at the end.

        Raises:
            OSError: the proxy is closed.
        """
        with connection:
            with self._lock:
                if self._closed:
                    raise OSError("the proxy is closed")
                self._sockets.add(connection)
            try:
                yield
            finally:
                with self._lock:
                    self._sockets.discard(connection)

    def _exchange(self, connection: socket.socket) -> None:
        """Does what the guest asks for.

        Raises:
            _Failed: it cannot be done.
        """
        guest, request = _read_request(connection)
        target = _Target.of(request)
        server = _dial(self._addresses(target), target)
        with self._open(server):
            connection.setblocking(False)
            server.setblocking(False)
            if request.method == b"CONNECT":
                _tunnel(connection, server, guest.trailing_data[0])
            else:
                _forward(connection, server, guest, request, target)

    def _addresses(self, target: _Target) -> list[Address]:
        """Where the target is, if the guest may go there.

        Raises:
            _Failed: it may not, or there is no such target.
        """
        allowed = [each for each in self._allowed if each.matches(target.host, target.port)]
        if not allowed:
            raise _Failed(HTTPStatus.FORBIDDEN, f"{target} is not among the allowed hosts")
        literal = address_of(target.host)
        try:
            found = [literal] if literal else list(map(ip_address, self._resolve(target.host, target.port)))
        except (OSError, ValueError):  # UnicodeError is a ValueError
            found = []
        if not found:
            raise _Failed(HTTPStatus.BAD_GATEWAY, f"{target}: the name cannot be resolved")
        if not (self._allow_private and any(each.exact for each in allowed)):
            for address in found:
                if not public(address) or _is_ours(address):
                    line = f"{target} has an address that is none of the internet at large"
                    raise _Failed(HTTPStatus.FORBIDDEN, line, f": {address}")  # which the guest need not learn
        return found


class _Refusals:
    """Tells what was refused, but not all of it: the guest must not be able to fill a log."""

    def __init__(self, tell: Callable[[str], None] | None) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._until = 0.0
        self._left = 0
        self._dropped = 0

    def tell(self, line: str) -> None:
        """Tells of one, or counts it."""
        with self._lock:
            now = time.monotonic()
            if now >= self._until:
                self._until, self._left = now + LOG_PERIOD, LOG_LINES
            if not self._left:
                self._dropped += 1
                return
            self._left -= 1
        self.end()
        self._say(f"refused to the guest: {line}")

    def end(self) -> None:
        """Tells of those that were only counted."""
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            self._say(f"refused to the guest: {dropped} more requests")

    def _say(self, line: str) -> None:
        logger.warning("%s", line)
        if self._tell is not None:
            self._tell(line)


class _Failed(Exception):
    """The guest gets an answer of ours; the text is its only line. `privately` is what the host is told beside it."""

    def __init__(self, status: HTTPStatus, line: str, privately: str = "") -> None:
        super().__init__(printable(line))
        self.status = status
        self.privately = printable(privately)

    def answer(self) -> bytes:
        """Head and body."""
        body = f"vmette: {self}\n".encode()
        head = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}",
            "Content-Type: text/plain; charset=utf-8",
            f"Content-Length: {len(body)}",
            "Connection: close",
        )
        return "".join(f"{line}\r\n" for line in (*head, "")).encode() + body


def _bad(line: str) -> _Failed:
    return _Failed(HTTPStatus.BAD_REQUEST, line)


# --- What the guest asks for -----------------------------------------------------------------------------------------


class _Target(NamedTuple):
    """Where a request is to go."""

    host: str
    port: int
    path: bytes

    @classmethod
    def of(cls, request: h11.Request) -> _Target:
        """Reads what a request says of it. Only that counts, not the Host header.

        Raises:
            _Failed: it is not beyond doubt.
        """
        connect = request.method == b"CONNECT"
        match = (_TARGET_OF_CONNECT if connect else _URL).fullmatch(request.target)
        if match is None or (connect and match["port"] is None):
            raise _bad("this is a proxy for CONNECT host:port and for http:// URLs (without a user name)")
        try:
            host = canonical(match["host"].decode().strip("[]"))
        except ValueError as error:
            raise _bad(f"{match['host'].decode()}: {error}") from None
        port = int(match["port"] or 80)
        if not 1 <= port <= 65535:
            raise _bad(f"{host}: {port} is no port")
        path = b"" if connect else match["path"] or b"/"
        return cls(host, port, path if path.startswith(b"/") else b"/" + path)

    def __str__(self) -> str:
        return f"{self._bracketed}:{self.port}"

    @property
    def _bracketed(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def header(self) -> bytes:
        """What the Host header says."""
        return (self._bracketed if self.port == 80 else str(self)).encode()


def _read_request(connection: socket.socket) -> tuple[h11.Connection, h11.Request]:
    """The request, and what reads its body. h11 is more lenient than we are with lines and lengths.

    Raises:
        _Failed: it is not one beyond doubt, or does not come.
        OSError: the guest has gone.
    """
    deadline = time.monotonic() + HEAD_TIMEOUT
    head, end = bytearray(), -1
    while end < 0:
        if len(head) > HEAD_BYTES:
            raise _Failed(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the head of the request is too large")
        try:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            data = connection.recv(PIECE)
        except TimeoutError:
            raise _Failed(HTTPStatus.REQUEST_TIMEOUT, "the head of the request did not come in time") from None
        if not data:
            raise ConnectionError("the guest has gone")
        seen = max(len(head) - 3, 0)
        head += data
        end = head.find(b"\r\n\r\n", seen)
        if _BARE_CR_OR_LF.search(head, seen, len(head) if end < 0 else end + 4):
            raise _bad("a line of the request does not end in CR and LF")
    if end + 4 > HEAD_BYTES:
        raise _Failed(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the head of the request is too large")
    if _OBS_FOLD.search(head, 0, end):
        raise _bad("a header of the request goes on in another line")
    guest = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
    guest.receive_data(bytes(head))
    try:
        request = guest.next_event()
    except h11.RemoteProtocolError as error:
        raise _Failed(HTTPStatus(error.error_status_hint), f"the request is malformed: {error}") from None
    assert isinstance(request, h11.Request)
    framing = _FRAMING.intersection(name for name, _ in request.headers)
    if len(framing) > 1:
        raise _bad("the request has both Content-Length and Transfer-Encoding")
    if framing and request.method == b"CONNECT":
        raise _bad("a CONNECT request has no body")
    if request.http_version not in {b"1.0", b"1.1"}:
        raise _Failed(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "the request is neither of HTTP/1.0 nor of HTTP/1.1")
    if b"transfer-encoding" in framing and request.http_version == b"1.0":
        raise _bad("a request of HTTP/1.0 has no Transfer-Encoding")
    return guest, request


# --- The server ------------------------------------------------------------------------------------------------------


def _resolve(name: str, port: int) -> list[str]:
    """The addresses that this computer finds for `name`, the best first."""
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for _, _, _, _, address in found))


def _family(address: Address) -> socket.AddressFamily:
    return socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6


def _is_ours(address: Address) -> bool:
    """Whether it is this computer's own, where a firewall would let us pass: it is its own source then.

    No packet is sent.
    """
    try:
        with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))
            return ip_address(probe.getsockname()[0]) == address
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:  # then nobody knows
            raise
        return False  # there is no way to it


def _dial(addresses: Sequence[Address], target: _Target) -> socket.socket:
    """A connection to one of `addresses`, which nobody looks up again.

    Raises:
        _Failed: there is none.
    """
    deadline = time.monotonic() + CONNECT_TIMEOUT
    failure = _Failed(HTTPStatus.BAD_GATEWAY, f"{target} cannot be reached")
    for index, address in enumerate(addresses):
        share = (deadline - time.monotonic()) / (len(addresses) - index)
        server = None
        try:
            server = socket.socket(_family(address), socket.SOCK_STREAM)
            server.settimeout(max(share, 0.001))
            server.connect((str(address), target.port))
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return server
        except OSError as error:
            if server is not None:
                server.close()
            if isinstance(error, TimeoutError):
                failure = _Failed(HTTPStatus.GATEWAY_TIMEOUT, f"{target} did not answer in time")
            else:
                failure = _Failed(HTTPStatus.BAD_GATEWAY, f"{target} cannot be reached: {error.strerror}")
    raise failure


# --- Bytes both ways -------------------------------------------------------------------------------------------------


class _Flow:
    """Bytes on their way from one non-blocking socket to another."""

    def __init__(self, source: socket.socket, sink: socket.socket, pending: bytes = b"") -> None:
        self.source = source
        self.sink = sink
        self.pending = bytearray(pending)
        self.more = True
        """Whether the source is to be read on."""
        self.moved = False
        """Whether any have reached the sink."""

    @property
    def hungry(self) -> bool:
        """Whether the source is to be read now."""
        return self.more and len(self.pending) < BUFFER

    @property
    def over(self) -> bool:
        """Whether nothing moves any more."""
        return not self.more and not self.pending

    def pull(self) -> None:
        """Reads from the source."""
        try:
            data = self.source.recv(PIECE)
        except BlockingIOError:
            return
        except OSError:
            self.broken()
        else:
            self.take(data)

    def push(self) -> None:
        """Writes to the sink."""
        try:
            sent = self.sink.send(self.pending)
        except BlockingIOError:
            return
        except OSError:
            self.abandon()
            return
        del self.pending[:sent]
        self.moved = True

    def abandon(self) -> None:
        """Nobody reads at the other end."""
        self.more = False
        self.pending.clear()

    def take(self, data: bytes) -> None:
        """Is given what the source had; nothing at its end."""
        self.pending += data
        self.more = bool(data)

    def broken(self) -> None:
        """The source broke off. What came before that still goes out."""
        self.more = False

    def end(self) -> None:
        """Tells the sink, when it is over."""
        with suppress(OSError):
            self.sink.shutdown(socket.SHUT_WR)


class _Message(_Flow):
    """A request's body or an answer: one side of h11 reads it and another writes it anew."""

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        reader: h11.Connection,
        writer: h11.Connection,
        malformed: _Failed,
    ) -> None:
        super().__init__(source, sink)
        self._reader = reader
        self._writer = writer
        self._malformed = malformed

    def take(self, data: bytes) -> None:
        """Is given what the source had; nothing at its end.

        Raises:
            _Failed: it is malformed, or has not all come.
        """
        self._reader.receive_data(data)
        self.convert()

    def convert(self) -> None:
        """Writes what can be read. Raises what :meth:`take` does."""
        try:
            while self.more and (event := self._reader.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.InformationalResponse):
                    if self._writer.their_http_version == b"1.0":  # which knows of none
                        continue
                    event = h11.InformationalResponse(
                        status_code=event.status_code, headers=_end_to_end(event), reason=event.reason
                    )
                elif isinstance(event, h11.Response):
                    headers = [*_end_to_end(event), (b"Connection", b"close")]
                    event = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
                elif isinstance(event, h11.EndOfMessage):
                    event = h11.EndOfMessage()  # trailers may be left out (RFC 9110, 6.5.1)
                    self.more = False
                assert isinstance(event, h11.Event)
                self.pending += self._writer.send(event) or b""
        except h11.ProtocolError:
            self.broken()

    def broken(self) -> None:
        """The source broke off, or cannot be understood. Raises what :meth:`take` does."""
        raise self._malformed

    def end(self) -> None:
        """Nothing to tell: a message has its end in it."""


def _end_to_end(event: h11.Request | h11.InformationalResponse | h11.Response) -> list[tuple[bytes, bytes]]:
    """The headers that are not for us (RFC 9110, 7.6.1), and those that say how long the body is."""
    listed = b",".join(value for name, value in event.headers if name == b"connection").lower().split(b",")
    dropped = (_HOP_BY_HOP | {name.strip() for name in listed}) - _FRAMING
    return [
        (name, value)
        for name, value in event.headers.raw_items()
        if name.lower() not in dropped and not name.lower().startswith(b"proxy-")
    ]


def _forward(
    connection: socket.socket, server: socket.socket, guest: h11.Connection, request: h11.Request, target: _Target
) -> None:
    """Passes the request on and the answer back.

    Raises:
        _Failed: it cannot be done, and the guest has had nothing yet. Else it sees that the answer is cut off.
    """
    remote = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES)
    up = _Message(connection, server, guest, remote, _bad("the body of the request is malformed"))
    what = f"{target}: the answer is malformed or cut off"
    down = _Message(server, connection, remote, guest, _Failed(HTTPStatus.BAD_GATEWAY, what))
    headers = [each for each in _end_to_end(request) if each[0].lower() != b"host"]
    headers = [(b"Host", target.header), *headers, (b"Connection", b"close")]
    try:
        up.pending += remote.send(h11.Request(method=request.method, target=target.path, headers=headers))
        up.convert()
        _relay(up, down, {down})
    except (_Failed, TimeoutError) as error:
        if down.moved:
            return
        if isinstance(error, TimeoutError):
            raise _Failed(HTTPStatus.GATEWAY_TIMEOUT, f"{target} did not answer in time") from None
        raise


def _tunnel(connection: socket.socket, server: socket.socket, early: bytes) -> None:
    """Passes bytes both ways, `early` ones first, until both sides have ended or are silent for too long."""
    up = _Flow(connection, server, early)
    down = _Flow(server, connection, b"HTTP/1.1 200 Connection established\r\n\r\n")
    with suppress(TimeoutError):
        _relay(up, down, {up, down})


def _relay(up: _Flow, down: _Flow, until: set[_Flow]) -> None:
    """Moves both, which are opposite, until those of `until` are over.

    Raises:
        TimeoutError: nothing has moved for IDLE_TIMEOUT.
        _Failed: a message is malformed.
    """
    running = {up, down}
    while not running.isdisjoint(until):
        poll = select.poll()
        for into, out in ((up, down), (down, up)):  # of the server's socket, and of the guest's
            events = select.POLLIN * out.hungry | select.POLLOUT * bool(into.pending)
            if events or not into.over:  # without events, only that it has gone is told
                poll.register(into.sink, events)
        ready = dict(poll.poll(int(IDLE_TIMEOUT * 1000)))
        if not ready:
            raise TimeoutError
        for into, out in ((up, down), (down, up)):
            event = ready.get(into.sink.fileno(), 0)
            gone = event & (select.POLLHUP | select.POLLERR)
            if out.hungry and (gone or event & select.POLLIN):
                out.pull()
            if event & select.POLLOUT and into.pending:
                into.push()
            elif gone:
                into.abandon()
        for flow in [flow for flow in running if flow.over]:
            running.remove(flow)
            flow.end()


def _linger(connection: socket.socket) -> None:
    """Ends `connection` when the guest has read all: one that is closed with bytes unread is broken off instead."""
    connection.shutdown(socket.SHUT_WR)
    deadline, rest = time.monotonic() + LINGER, LINGER_BYTES
    while rest > 0 and (left := deadline - time.monotonic()) > 0:
        connection.settimeout(left)
        data = connection.recv(PIECE)
        if not data:
            return
        rest -= len(data)
