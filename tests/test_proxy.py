"""The proxy of --allow-host: what passes, and what a hostile guest or a hostile name tries in vain."""

from __future__ import annotations

import http.client
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmette import proxy as module
from vmette.errors import ConfigError
from vmette.proxy import AllowedHost, Proxy, canonical, proxy_environment, public

WAIT = 60.0
"""Seconds after which a test that waits has failed."""
NAME = "allowed.test"


# --- Both ends -------------------------------------------------------------------------------------------------------


class Server:
    """A server on loopback that does with each connection what it is told."""

    def __init__(self, serve: Callable[[socket.socket], None], address: str = "127.0.0.1", port: int = 0) -> None:
        self.accepted = 0
        self.gone = threading.Semaphore(0)
        """Is released when a connection has been served."""
        self._serve = serve
        self._listener = socket.create_server((address, port))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        try:
            with suppress(OSError), connection:
                connection.settimeout(WAIT)
                self._serve(connection)
        finally:
            self.gone.release()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(WAIT)


Serve = Callable[[Callable[[socket.socket], None]], Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[Server] = []

    def make(handle: Callable[[socket.socket], None]) -> Server:
        servers.append(Server(handle))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def head_of(connection: socket.socket) -> bytes:
    """The head of a request, with the empty line."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError(data)
        data += byte
    return data


def rest_of(connection: socket.socket) -> bytes:
    """All until the end."""
    pieces = []
    while piece := connection.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def swallow(connection: socket.socket) -> None:
    """Reads to the end and says nothing."""
    rest_of(connection)


def answering(answer: bytes, seen: list[bytes] | None = None) -> Callable[[socket.socket], None]:
    """Reads the head of a request, without a body, and sends `answer`; what came is in `seen`."""

    def serve(connection: socket.socket) -> None:
        head = head_of(connection)
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        rest = rest_of(connection)
        if seen is not None:
            seen.append(head + rest)

    return serve


def never(name: str, port: int) -> Sequence[str]:
    raise AssertionError(f"{name} is looked up")


def local(name: str, port: int) -> Sequence[str]:
    return ["127.0.0.1"]


def to(port: int, **options: object) -> Proxy:
    """A proxy that reaches NAME, which is the loopback, at `port`."""
    return Proxy([AllowedHost(NAME, port)], allow_private=True, **{"resolve": local, **options})  # type: ignore[arg-type]


def connected(proxy: Proxy) -> socket.socket:
    """The guest's end of a connection to `proxy`."""
    ours, theirs = socket.socketpair()
    proxy.start(theirs)
    ours.settimeout(WAIT)
    return ours


def asked(proxy: Proxy, request: bytes, *, end: bool = False) -> bytes:
    """All that the guest gets for `request`."""
    with connected(proxy) as guest:
        with suppress(BrokenPipeError):
            guest.sendall(request)
        if end:
            guest.shutdown(socket.SHUT_WR)
        return rest_of(guest)


def get(host: str, path: str = "/", *headers: str) -> bytes:
    return "\r\n".join([f"GET http://{host}{path} HTTP/1.1", "Host: whatever", *headers, "", ""]).encode()


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer[9:12])


def body(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


def tunnel(proxy: Proxy, port: int) -> socket.socket:
    guest = connected(proxy)
    guest.sendall(f"CONNECT {NAME}:{port} HTTP/1.1\r\nHost: {NAME}:{port}\r\n\r\n".encode())
    assert head_of(guest) == b"HTTP/1.1 200 Connection established\r\n\r\n"
    return guest


# --- What is allowed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "port"),
    [
        ("example.org", "example.org", None),
        ("*.example.org:443", "*.example.org", 443),
        ("Example.ORG.:8080", "example.org", 8080),
        ("[2001:DB8::1]:443", "2001:db8::1", 443),
        ("[2001:db8:0::1]", "2001:db8::1", None),
        ("2001:db8::1", "2001:db8::1", None),
        ("192.0.2.1", "192.0.2.1", None),
        ("*", "*", None),
        ("*:8080", "*", 8080),
        ("bücher.example", "xn--bcher-kva.example", None),
        ("*.BÜCHER.example:80", "*.xn--bcher-kva.example", 80),
        ("localhost", "localhost", None),
        ("_dmarc.a-b.example", "_dmarc.a-b.example", None),
    ],
)
def test_parse(text: str, name: str, port: int | None) -> None:
    assert AllowedHost.parse(text) == AllowedHost(name, port)
    assert (AllowedHost.parse(text).name, AllowedHost.parse(text).port) == (name, port)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ":80",
            "*.",
            ".",
            "a..b",
            ".example.org",
            "example.org..",
            "-a.example",
            "a-.example",
            "a b",
            "a\n",
            "a\0",
        ),
        *("example.org:", "example.org:0", "example.org:65536", "example.org:http", "http://example.org", "a/b"),
        *(
            "user@example.org",
            "*foo.example",
            "a.*.example",
            "**",
            "*.*",
            "*.192.0.2.1",
            "*.[::1]",
            "a" * 64,
            "%61.example",
        ),
        *("a." * 127 + "example", "1.2.3", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "256.1.1.1", "x.0x7f"),
        *(
            "[example.org]",
            "[]",
            "[::1",
            "::1]",
            "[::1]x",
            "[fe80::1%eth0]",
            "fe80::1%eth0",
            "1::2::3",
            "ex\u2024ample",
        ),
    ],
)
def test_malformed(text: str) -> None:
    with pytest.raises(ConfigError, match="allowed host"):
        AllowedHost.parse(text)


@pytest.mark.parametrize(
    ("allowed", "host", "port", "matches"),
    [
        ("example.org", "example.org", 80, True),
        ("example.org", "example.org", 443, True),
        ("example.org", "example.org", 8080, False),
        ("example.org:8080", "example.org", 8080, True),
        ("example.org:8080", "example.org", 80, False),
        ("example.org", "www.example.org", 80, False),
        ("example.org", "notexample.org", 80, False),
        ("example.org", "example.org.evil.test", 80, False),
        ("*.example.org", "www.example.org", 80, True),
        ("*.example.org", "a.b.c.example.org", 443, True),
        ("*.example.org", "example.org", 80, False),
        ("*.example.org", "evilexample.org", 80, False),
        ("*.example.org:8443", "www.example.org", 443, False),
        ("*", "anything.test", 443, True),
        ("*", "192.0.2.1", 80, True),
        ("*", "anything.test", 22, False),
        ("*:22", "anything.test", 22, True),
        ("[2001:db8::1]", "2001:db8::1", 80, True),
        ("192.0.2.1", "192.0.2.10", 80, False),
    ],
)
def test_matches(allowed: str, host: str, port: int, matches: bool) -> None:
    assert AllowedHost.parse(allowed).matches(host, port) is matches


@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "93.184.215.14", "198.17.255.255", "198.20.0.1", "100.63.255.255", "100.128.0.1", "172.32.0.1"),
        *("2606:4700::1111", "2a00:1450:4001::200e", "::ffff:1.1.1.1", "64:ff9b::101:101"),
    ],
)
def test_public(address: str) -> None:
    assert public(ip_address(address))


PRIVATE = (
    *("127.0.0.1", "127.8.9.10", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "100.127.255.255", "224.0.0.1", "239.255.255.250", "240.0.0.1"),
    *("255.255.255.255", "192.0.2.1", "198.51.100.7", "203.0.113.9", "198.18.0.1", "198.19.255.255", "192.0.0.8"),
    *("192.0.0.170", "192.88.99.1", "::", "::1", "fe80::1", "fe80::1%1", "fec0::1", "fc00::1", "fd12:3456::1"),
    *("ff02::1", "ff0e::1", "2001:db8::1", "3fff::1", "100::1", "2001::1", "2001:10::1", "2001:20::1", "4000::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "::10.0.0.1", "::1.1.1.1"),
    *("2002:7f00:1::1", "2002:a00:1::1", "2001:0:7f00:1::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::a00:1"),
    *("64:ff9b:1::a00:1", "fe80::5efe:a00:1", "fd00:ec2::254"),
)


@pytest.mark.parametrize("address", PRIVATE)
def test_not_public(address: str) -> None:
    assert not public(ip_address(address))


def test_environment() -> None:
    url, here = "http://127.0.0.1:3128", "localhost,127.0.0.1,::1"
    found = proxy_environment(url)
    assert {found.pop(name) for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")} == {url}
    assert found == {"NO_PROXY": here, "no_proxy": here}


# --- Requests pass ---------------------------------------------------------------------------------------------------


def test_a_request_is_written_anew(serve: Serve) -> None:
    seen: list[bytes] = []
    server = serve(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", seen))
    headers = [
        *("accept: */*", "Cookie: a=b", "Cookie: c=d", "Authorization: Basic eDp5", "X-Secret-Hop: 1", "tE: trailers"),
        *("Proxy-Authorization: Basic eDp5", "Proxy-Connection: keep-alive", "Keep-Alive: timeout=5", "Upgrade: h2c"),
        *("Connection: keep-alive, x-secret-hop, Upgrade", "Trailer: x"),
    ]
    with closing(to(server.port)) as proxy:
        answer = asked(proxy, get(f"ALLOWED.test.:{server.port}", "/a%20b?c=d|e", *headers))
    assert answer == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"
    assert server.gone.acquire(timeout=WAIT)
    expected = [
        *("GET /a%20b?c=d|e HTTP/1.1", f"Host: {NAME}:{server.port}", "accept: */*", "Cookie: a=b", "Cookie: c=d"),
        *("Authorization: Basic eDp5", "Connection: close", "", ""),
    ]
    assert seen == ["\r\n".join(expected).encode()]


@pytest.mark.parametrize(("path", "sent"), [("", "/"), ("?q", "/?q"), ("//evil.test/", "//evil.test/")])
def test_paths(serve: Serve, path: str, sent: str) -> None:
    seen: list[bytes] = []
    server = serve(answering(b"HTTP/1.1 204 No Content\r\n\r\n", seen))
    with closing(to(server.port)) as proxy:
        assert status(asked(proxy, get(f"{NAME}:{server.port}", path))) == 204
    assert server.gone.acquire(timeout=WAIT)
    assert seen[0].startswith(f"GET {sent} HTTP/1.1\r\n".encode())


def test_the_default_port_is_not_in_the_host_header() -> None:
    request = h11.Request(method="GET", target="http://allowed.test/", headers=[("Host", "x")])
    assert module._Target.of(request).header == b"allowed.test"
    request = h11.Request(method="GET", target="http://[2606:4700::0]:81/", headers=[("Host", "x")])
    assert module._Target.of(request).header == b"[2606:4700::]:81"


class Echo(BaseHTTPRequestHandler):
    """Answers with what it was sent, in chunks if it was asked to."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, len(data), 10000):
                piece = data[start : start + 10000]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
        elif self.path == "/until-close":
            self.end_headers()
            self.wfile.write(data)
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.mark.parametrize("path", ["/length", "/chunked", "/until-close"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [0, 1, 3_000_001])
def test_bodies_both_ways(path: str, chunked: bool, size: int) -> None:
    data = os.urandom(size)
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with closing(to(server.server_port)) as proxy:
            client = http.client.HTTPConnection(NAME)
            client.sock = connected(proxy)
            pieces = (data[start : start + 7000] for start in range(0, size, 7000))
            client.request(
                "POST",
                f"http://{NAME}:{server.server_port}{path}",
                body=pieces if chunked else data,
                headers={} if chunked else {"Content-Length": str(size)},
                encode_chunked=chunked,
            )
            with closing(client), client.getresponse() as response:
                assert response.status == 200
                assert response.read() == data
                assert response.will_close
        server.shutdown()


def test_a_guest_of_http_1_0_gets_no_chunks(serve: Serve) -> None:
    answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
    server = serve(answering(answer))
    with closing(to(server.port)) as proxy:
        assert body(asked(proxy, f"GET http://{NAME}:{server.port}/ HTTP/1.0\r\n\r\n".encode())) == b"hi"


def test_heads_of_answers_without_bodies(serve: Serve) -> None:
    server = serve(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\nKeep-Alive: max=3\r\n\r\n"))
    with closing(to(server.port)) as proxy:
        answer = asked(proxy, get(f"{NAME}:{server.port}").replace(b"GET", b"HEAD", 1))
    assert answer == b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\nConnection: close\r\n\r\n"


def test_continue_is_awaited(serve: Serve) -> None:
    def handle(connection: socket.socket) -> None:
        assert b"Expect: 100-continue" in head_of(connection)
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        data = connection.recv(5, socket.MSG_WAITALL)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + data)

    server = serve(handle)
    with closing(to(server.port)) as proxy, connected(proxy) as guest:
        head = get(f"{NAME}:{server.port}", "/", "Expect: 100-continue", "Content-Length: 5").replace(b"GET", b"PUT", 1)
        guest.sendall(head)
        assert head_of(guest).startswith(b"HTTP/1.1 100 ")
        guest.sendall(b"hello")
        assert body(rest_of(guest)) == b"hello"


def test_an_answer_that_does_not_wait_for_the_body(serve: Serve) -> None:
    answer = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno"
    released = threading.Event()

    def handle(connection: socket.socket) -> None:
        head_of(connection)
        connection.sendall(answer)
        released.wait(WAIT)

    server = serve(handle)
    with closing(to(server.port)) as proxy, connected(proxy) as guest:
        guest.sendall(get(f"{NAME}:{server.port}", "/", "Content-Length: 1000000").replace(b"GET", b"POST", 1))
        got = rest_of(guest)
        released.set()
    assert status(got) == 413
    assert body(got) == b"no"


def test_only_one_request_of_a_connection_is_served(serve: Serve) -> None:
    seen: list[bytes] = []
    server = serve(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", seen))
    one = get(f"{NAME}:{server.port}")
    with closing(to(server.port)) as proxy:
        assert asked(proxy, one + get(f"{NAME}:{server.port}", "/second")).count(b"HTTP/1.1") == 1
    assert server.gone.acquire(timeout=WAIT)
    assert server.accepted == 1
    assert b"second" not in seen[0]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\nx\r\n",
    ],
)
def test_an_answer_that_is_cut_off_is_not_made_whole(serve: Serve, answer: bytes) -> None:
    sent, read = answer[: answer.index(b"hi") + 2], threading.Event()

    def handle(connection: socket.socket) -> None:
        head_of(connection)
        connection.sendall(sent)
        read.wait(WAIT)  # once the guest has some of it there is no other answer any more
        connection.sendall(answer[len(sent) :])

    server = serve(handle)
    with closing(to(server.port)) as proxy, connected(proxy) as guest:
        guest.sendall(get(f"{NAME}:{server.port}"))
        response = http.client.HTTPResponse(guest)
        response.begin()
        assert response.read(2) == b"hi"
        read.set()
        with closing(response), pytest.raises(http.client.IncompleteRead):
            response.read()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 17),
    ],
    ids=["nothing", "another protocol", "cut off", "bad length", "switch", "endless head"],
)
def test_an_answer_that_is_none(serve: Serve, answer: bytes) -> None:
    server = serve(answering(answer))
    with closing(to(server.port)) as proxy:
        got = asked(proxy, get(f"{NAME}:{server.port}"))
    assert status(got) == 502
    assert body(got) == f"vmette: {NAME}:{server.port}: the answer is malformed or cut off\n".encode()


def test_a_server_that_breaks_off(serve: Serve) -> None:
    def handle(connection: socket.socket) -> None:
        head_of(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    server = serve(handle)
    with closing(to(server.port)) as proxy:
        assert status(asked(proxy, get(f"{NAME}:{server.port}"))) == 502


def test_a_guest_that_goes_takes_the_servers_connection_along(serve: Serve) -> None:
    arrived = threading.Event()

    def handle(connection: socket.socket) -> None:
        head_of(connection)
        arrived.set()
        rest_of(connection)

    server = serve(handle)
    with closing(to(server.port)) as proxy:
        with connected(proxy) as guest:
            guest.sendall(get(f"{NAME}:{server.port}"))
            assert arrived.wait(WAIT)
        assert server.gone.acquire(timeout=WAIT)


# --- Tunnels ---------------------------------------------------------------------------------------------------------


def test_a_tunnel_ends_one_half_at_a_time(serve: Serve) -> None:
    def handle(connection: socket.socket) -> None:
        data = rest_of(connection)  # the guest has ended its half
        connection.sendall(data[::-1])

    server = serve(handle)
    with closing(to(server.port)) as proxy, tunnel(proxy, server.port) as guest:
        guest.sendall(b"\0\r\n\xff any bytes")
        guest.shutdown(socket.SHUT_WR)
        assert rest_of(guest) == b"\0\r\n\xff any bytes"[::-1]


def test_the_server_may_end_its_half_first(serve: Serve) -> None:
    got: list[bytes] = []

    def handle(connection: socket.socket) -> None:
        connection.sendall(b"first")
        connection.shutdown(socket.SHUT_WR)
        got.append(rest_of(connection))

    server = serve(handle)
    with closing(to(server.port)) as proxy:
        with tunnel(proxy, server.port) as guest:
            assert rest_of(guest) == b"first"
            guest.sendall(b"then")
        assert server.gone.acquire(timeout=WAIT)
    assert got == [b"then"]


def test_what_comes_with_connect_passes(serve: Serve) -> None:
    server = serve(lambda connection: connection.sendall(rest_of(connection)))
    request = f"CONNECT {NAME}:{server.port} HTTP/1.1\r\nHost: x\r\n\r\nearly\n".encode()
    with closing(to(server.port)) as proxy:
        assert body(asked(proxy, request, end=True)) == b"early\n"


def test_much_passes_both_ways_at_once(serve: Serve) -> None:
    """Through buffers of bounded size: each side writes all before it reads."""
    data = os.urandom(4_000_000)
    got: list[bytes] = []

    def handle(connection: socket.socket) -> None:
        def send() -> None:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        got.append(rest_of(connection))
        sender.join(WAIT)

    server = serve(handle)
    with closing(to(server.port)) as proxy:
        with tunnel(proxy, server.port) as guest:

            def send() -> None:
                guest.sendall(data)
                guest.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            received = rest_of(guest)
            sender.join(WAIT)
        assert server.gone.acquire(timeout=WAIT)
    assert received == data
    assert got == [data]


def test_a_guest_that_does_not_read_stops_the_server(serve: Serve) -> None:
    """No more is held than buffers are large."""
    stuck = threading.Event()
    sent = 0

    def handle(connection: socket.socket) -> None:
        nonlocal sent
        connection.settimeout(1)
        with suppress(TimeoutError):
            while sent < 1 << 28:
                sent += connection.send(bytes(1 << 16))
        stuck.set()

    server = serve(handle)
    with closing(to(server.port)) as proxy, tunnel(proxy, server.port):
        assert stuck.wait(WAIT)
    assert sent < 1 << 27


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        get("other.test"),
        get(f"{NAME}:8080"),
        get(f"{NAME}.other.test"),
        get(f"x{NAME}"),
        get(f"sub.{NAME}"),
        get("xn--llowed-qta.test"),
        get("127.0.0.1"),
        get("[::1]"),
        b"CONNECT other.test:443 HTTP/1.1\r\nHost: allowed.test\r\n\r\n",
        b"CONNECT allowed.test:22 HTTP/1.1\r\nHost: allowed.test\r\n\r\n",
        b"CONNECT [::1]:443 HTTP/1.1\r\nHost: allowed.test\r\n\r\n",
        get("other.test", "/", "X-Forwarded-Host: allowed.test"),
        get("other.test", "/@allowed.test"),
        get("other.test", "?http://allowed.test/"),
    ],
)
def test_what_is_not_allowed_is_not_even_looked_up(request_: bytes) -> None:
    with closing(Proxy([AllowedHost(NAME)], allow_private=True, resolve=never)) as proxy:
        answer = asked(proxy, request_)
    assert status(answer) == 403
    assert body(answer).endswith(b" is not among the allowed hosts\n")
    assert body(answer).count(b"\n") == 1


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_with_an_address_that_is_not_public(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, or among good ones; to the name itself or through a wildcard."""
    monkeypatch.setattr(module, "_dial", never)
    told: list[str] = []
    for addresses in ([address], ["1.1.1.1", address]):
        for allowed in (NAME, "*.test", "*"):
            proxy = Proxy([AllowedHost(allowed)], resolve=lambda *_, found=addresses: found, on_refused=told.append)
            answer = asked(proxy, get(NAME))
            assert status(answer) == 403
            assert body(answer) == b"vmette: allowed.test:80 has an address that is none of the internet at large\n"
            proxy.close()
    assert len(told) == 6
    assert all(line.endswith(f": {ip_address(address)}") for line in told)


@pytest.mark.parametrize("address", [address for address in PRIVATE if "%" not in address])
def test_a_literal_address_that_is_not_public(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_dial", never)
    host = f"[{address}]" if ":" in address else address
    for allowed in ("*", host):
        with closing(Proxy([AllowedHost.parse(allowed)], resolve=never)) as proxy:
            assert status(asked(proxy, get(host))) == 403


@pytest.mark.parametrize(
    "host",
    [
        *("2130706433", "0x7f000001", "017700000001", "127.1", "127.0.1", "0177.0.0.1", "0x7f.0.0.1", "127.0.0.01"),
        *("127.0.0.1.5", "1.1.1.256", "999999999999", "0x", "a.0x7f", "a.1", "127.0.0.1..", "[::ffff:127.0.0.1"),
        *("[127.0.0.1]", "[fe80::1%25eth0]", "[::1]x", "::1", "127。0。0。1", "①②⑦.0.0.1"),
    ],
)
def test_addresses_in_odd_notations(host: str) -> None:
    with closing(Proxy([AllowedHost("*")], allow_private=True, resolve=never)) as proxy:
        assert status(asked(proxy, get(host))) == 400


def test_a_dot_more_is_the_same_address() -> None:
    assert canonical("127.0.0.1.") == "127.0.0.1"
    with closing(Proxy([AllowedHost("*")], resolve=never)) as proxy:
        assert status(asked(proxy, get("127.0.0.1."))) == 403


def test_private_hosts_only_by_their_own_names(serve: Serve) -> None:
    server = serve(answering(b"HTTP/1.1 204 No Content\r\n\r\n"))
    request = get(f"{NAME}:{server.port}")
    for allowed, expected in (([NAME], 204), (["*.test"], 403), (["*"], 403), (["*", NAME], 204)):
        hosts = [AllowedHost(name, server.port) for name in allowed]
        with closing(Proxy(hosts, allow_private=True, resolve=local)) as proxy:
            assert status(asked(proxy, request)) == expected
        with closing(Proxy(hosts, resolve=local)) as proxy:
            assert status(asked(proxy, request)) == 403


def test_the_address_that_is_dialled_is_the_one_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the name has a good address first and a bad one, a moment later."""
    good, bad = "127.0.0.2", "127.0.0.1"
    monkeypatch.setattr(module, "public", lambda address: str(address) == good)
    monkeypatch.setattr(module, "_is_ours", lambda address: False)
    answers = [[good], [bad], [bad]]
    with (
        closing(Server(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood"), good)) as server,
        closing(Server(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad"), bad, server.port)) as other,
        closing(Proxy([AllowedHost(NAME, server.port)], resolve=lambda *_: answers.pop(0))) as proxy,
    ):
        assert body(asked(proxy, get(f"{NAME}:{server.port}"))) == b"good"
        assert len(answers) == 2
        assert other.accepted == 0
        assert status(asked(proxy, get(f"{NAME}:{server.port}"))) == 403


def test_this_computers_own_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """One may be public, and what listens there is behind a firewall for everybody else."""
    assert module._is_ours(ip_address("127.0.0.1"))
    assert not module._is_ours(ip_address("192.0.2.1"))
    monkeypatch.setattr(module, "public", lambda address: True)
    monkeypatch.setattr(module, "_dial", never)
    with closing(Proxy([AllowedHost(NAME)], resolve=local)) as proxy:
        assert status(asked(proxy, get(NAME))) == 403


# --- What is no request ----------------------------------------------------------------------------------------------

GOOD = b"GET http://allowed.test/ HTTP/1.1\r\nHost: allowed.test\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        get("allowed.test@evil.test"),
        get("user:pw@allowed.test"),
        get("allowed.test\\@evil.test"),
        get("allowed.test#@evil.test"),
        get("allowed.test", "/#fragment"),
        get("allowed%2etest"),
        get("allowed.test\0.evil.test"),
        get("allowed.test\r\nHost: evil.test\r\n\r\n"),
        get("allowed.test evil.test"),
        get("allowed.test\tevil.test"),
        get("allowed..test"),
        get(""),
        get(":80"),
        get("allowed.test:"),
        get("allowed.test:0"),
        get("allowed.test:65536"),
        get("allowed.test:+80"),
        get("allowed.test:80:80"),
        get("ällowed.test"),
        get("a" * 64 + ".test"),
        get("allowed.test").replace(b"http:", b"https:"),
        get("allowed.test").replace(b"http:", b"file:"),
        b"GET / HTTP/1.1\r\nHost: allowed.test\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: allowed.test\r\n\r\n",
        b"GET //allowed.test/ HTTP/1.1\r\nHost: allowed.test\r\n\r\n",
        b"CONNECT allowed.test HTTP/1.1\r\nHost: allowed.test\r\n\r\n",
        b"CONNECT http://allowed.test:80 HTTP/1.1\r\nHost: allowed.test\r\n\r\n",
        b"CONNECT allowed.test:443/ HTTP/1.1\r\nHost: allowed.test\r\n\r\n",
        b"CONNECT evil@allowed.test:443 HTTP/1.1\r\nHost: allowed.test\r\n\r\n",
        b"CONNECT allowed.test:443 HTTP/1.1\r\nHost: allowed.test\r\nContent-Length: 5\r\n\r\n",
        b"CONNECT allowed.test:443 HTTP/1.1\r\nHost: allowed.test\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET http://allowed.test/ HTTP/1.1\r\n\r\n",
        b"GET http://allowed.test/\r\n\r\n",
        b"GET http://allowed.test/ http/1.1\r\nHost: allowed.test\r\n\r\n",
        b"GET  http://allowed.test/ HTTP/1.1\r\nHost: allowed.test\r\n\r\n",
        b"\r\n" + GOOD + b"\r\n",
        b"\r\n\r\n",
        GOOD + b"Host: evil.test\r\n\r\n",
        GOOD + b"X: a\r\n b\r\n\r\n",
        GOOD + b"X: a\r\n\tTransfer-Encoding: chunked\r\n\r\n",
        GOOD.replace(b"\r\n", b"\n") + b"\n",
        GOOD + b"X: a\nY: b\r\n\r\n",
        GOOD + b"X: a\rY: b\r\n\r\n",
        GOOD + b"X: a\n\r\n\r\n",
        GOOD + b"X: a\0b\r\n\r\n",
        GOOD + b"X : a\r\n\r\n",
        GOOD + b" X: a\r\n\r\n",
        GOOD + b"X\xe9: a\r\n\r\n",
        GOOD + b": a\r\n\r\n",
        GOOD + b"no colon\r\n\r\n",
        GOOD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        GOOD + b"transfer-encoding: chunked\r\ncontent-length: 0\r\n\r\n0\r\n\r\n",
        GOOD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        GOOD + b"Content-Length: 5, 6\r\n\r\nhello",
        GOOD + b"Content-Length: +5\r\n\r\nhello",
        GOOD + b"Content-Length: -5\r\n\r\nhello",
        GOOD + b"Content-Length: 0x5\r\n\r\nhello",
        GOOD + b"Content-Length: 5 5\r\n\r\nhello",
        GOOD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nhello",
        GOOD + b"Content-Length:\r\n\r\n",
        GOOD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_request_beyond_doubt(request_: bytes) -> None:
    with closing(Proxy([AllowedHost("*"), AllowedHost(NAME)], allow_private=True, resolve=never)) as proxy:
        answer = asked(proxy, request_)
    assert status(answer) == 400
    assert body(answer).startswith(b"vmette: ")
    assert body(answer).count(b"\n") == 1


@pytest.mark.parametrize(
    "coding", ["gzip, chunked", "chunked, chunked", "xchunked", "identity", "chunked\r\nTransfer-Encoding: x"]
)
def test_transfer_codings_that_are_not_understood(coding: str) -> None:
    with closing(Proxy([AllowedHost(NAME)], resolve=never)) as proxy:
        assert status(asked(proxy, GOOD + f"Transfer-Encoding: {coding}\r\n\r\n0\r\n\r\n".encode())) == 501


@pytest.mark.parametrize(
    "chunks",
    [b"x\r\n", b"-1\r\n", b"0x5\r\nhello\r\n", b"5\r\nhelloX\r\n", b"5\nhello\n0\n\n" + b"x" * (1 << 17), b"1" * 21],
)
def test_chunks_that_are_malformed(serve: Serve, chunks: bytes) -> None:
    server = serve(swallow)
    request = get(f"{NAME}:{server.port}", "/", "Transfer-Encoding: chunked").replace(b"GET", b"POST", 1)
    with closing(to(server.port)) as proxy:
        assert status(asked(proxy, request + chunks + b"\r\n" * 3, end=True)) == 400


def test_chunks_are_written_anew(serve: Serve) -> None:
    """Extensions and trailers, which others have read as more requests, are left out."""
    seen: list[bytes] = []

    def handle(connection: socket.socket) -> None:
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += connection.recv(1 << 16)
        seen.append(data)
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    server = serve(handle)
    chunks = b"3;GET /x\r\nabc\r\n0002\r\nde\r\n0;x\r\nX-Trailer: GET /x\r\nContent-Length: 3\r\n\r\n"
    request = get(f"{NAME}:{server.port}", "/", "Transfer-Encoding: chunked", "Connection: transfer-encoding")
    request = request.replace(b"GET", b"POST", 1) + chunks + get(f"{NAME}:{server.port}", "/smuggled")
    with closing(to(server.port)) as proxy:
        assert status(asked(proxy, request)) == 204
    head, _, rest = seen[0].partition(b"\r\n\r\n")
    assert head.count(b"\r\n") == 3
    assert head.endswith(b"\r\nTransfer-Encoding: chunked\r\nConnection: close")
    assert rest == b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_a_head_that_is_too_large(end: bytes) -> None:
    with closing(Proxy([AllowedHost(NAME)], resolve=never)) as proxy:
        assert status(asked(proxy, GOOD + b"X: " + b"x" * module.HEAD_BYTES + end)) == 431


@pytest.mark.parametrize("version", ["2.0", "1.2", "0.9"])
def test_other_versions(version: str) -> None:
    with closing(Proxy([AllowedHost(NAME)], resolve=never)) as proxy:
        assert status(asked(proxy, get(NAME).replace(b"HTTP/1.1", f"HTTP/{version}".encode()))) == 505


def test_a_head_that_comes_in_pieces(serve: Serve) -> None:
    server = serve(answering(b"HTTP/1.1 204 No Content\r\n\r\n"))
    with closing(to(server.port)) as proxy, connected(proxy) as guest:
        for byte in get(f"{NAME}:{server.port}", "/", "Accept: */*"):
            guest.sendall(bytes([byte]))
        assert status(rest_of(guest)) == 204


def test_a_head_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often there is one more byte."""
    monkeypatch.setattr(module, "HEAD_TIMEOUT", 0.3)
    with closing(Proxy([AllowedHost(NAME)], resolve=never)) as proxy, connected(proxy) as guest:
        guest.sendall(b"GET http://allowed.test/ HTTP/1.1\r\nX: ")
        over = threading.Event()

        def drip() -> None:
            with suppress(OSError):
                while not over.wait(0.02):
                    guest.sendall(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        head = head_of(guest)
        over.set()
        dripping.join(WAIT)
    assert status(head) == 408


VERBS = [b"GET ", b"POST ", b"CONNECT ", b"http://", b"allowed.test", b":80", b"/", b" HTTP/1.1", b" HTTP/1.0"]
PIECES = [
    *VERBS,
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b"Host: a",
    b"Content-Length: 3",
    b"Transfer-Encoding: chunked",
    b"0\r\n\r\n",
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=8), max_size=25).map(b"".join), st.booleans())
def test_any_bytes_get_an_answer_or_an_end(data: bytes, good_start: bool) -> None:
    def unknown(name: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall((GOOD if good_start else b"") + data)
        ours.shutdown(socket.SHUT_WR)
        Proxy([AllowedHost("*")], resolve=unknown).serve(theirs)
        answer = rest_of(ours)
    assert theirs.fileno() == -1
    assert not answer or status(answer) in {400, 403, 431, 501, 502, 505}


# --- What does not work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [socket.gaierror(socket.EAI_NONAME, "x"), OSError("x"), UnicodeError("x"), None])
def test_a_name_that_nobody_has(error: Exception | None) -> None:
    def resolve(name: str, port: int) -> Sequence[str]:
        if error is not None:
            raise error
        return []

    with closing(Proxy([AllowedHost(NAME)], resolve=resolve)) as proxy:
        answer = asked(proxy, get(NAME))
    assert status(answer) == 502
    assert body(answer) == b"vmette: allowed.test:80: the name cannot be resolved\n"


def test_the_computers_own_resolver(serve: Serve) -> None:
    server = serve(answering(b"HTTP/1.1 204 No Content\r\n\r\n"))
    with closing(Proxy([AllowedHost("localhost", server.port)], allow_private=True)) as proxy:
        assert status(asked(proxy, get(f"localhost:{server.port}"))) == 204
    with closing(Proxy([AllowedHost("localhost", server.port)])) as proxy:
        assert status(asked(proxy, get(f"localhost:{server.port}"))) == 403


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with closing(to(port)) as proxy:
        answer = asked(proxy, get(f"{NAME}:{port}"))
    assert status(answer) == 502
    assert body(answer) == f"vmette: {NAME}:{port} cannot be reached: Connection refused\n".encode()


def test_the_next_address_is_tried(serve: Serve) -> None:
    server = serve(answering(b"HTTP/1.1 204 No Content\r\n\r\n"))
    with closing(to(server.port, resolve=lambda *_: ["127.0.0.77", "127.0.0.1"])) as proxy:
        assert status(asked(proxy, get(f"{NAME}:{server.port}"))) == 204


def test_a_server_that_takes_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(connection: socket.socket, address: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(socket.socket, "connect", connect)
    with closing(to(1234)) as proxy:
        assert status(asked(proxy, get(f"{NAME}:1234"))) == 504


def test_a_server_that_does_not_answer(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_TIMEOUT", 0.2)
    server = serve(swallow)
    with closing(to(server.port)) as proxy:
        assert status(asked(proxy, get(f"{NAME}:{server.port}"))) == 504
        with tunnel(proxy, server.port) as guest:
            assert rest_of(guest) == b""


# --- Limits ----------------------------------------------------------------------------------------------------------


def test_too_many_connections_and_an_end_to_all(serve: Serve) -> None:
    server = serve(swallow)
    proxy = to(server.port, max_connections=3)
    guests = [tunnel(proxy, server.port) for _ in range(3)]
    assert status(asked(proxy, b"")) == 503
    guests[0].close()
    assert server.gone.acquire(timeout=WAIT)
    proxy.close()
    for guest in guests[1:]:
        assert rest_of(guest) == b""
        guest.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "vmette-proxy"]
    assert status(asked(proxy, get(NAME))) == 503  # it is closed


def test_closing_ends_a_request_that_is_not_finished() -> None:
    proxy = Proxy([AllowedHost(NAME)], resolve=never)
    with connected(proxy) as guest:
        guest.sendall(b"GET ")
        proxy.close()
        assert rest_of(guest) == b""


def test_no_descriptor_and_no_thread_is_left(serve: Serve) -> None:
    fds = Path("/proc/self/fd")
    if not fds.is_dir():
        pytest.skip("no /proc")
    server = serve(answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"))
    with closing(to(server.port, max_connections=8)) as proxy:
        good = get(f"{NAME}:{server.port}")
        requests = [
            good,
            get("other.test"),
            get(f"{NAME}:1"),
            b"x\r\n\r\n",
            b"",
            good[:20],
            good.replace(b"GET", b"PUT", 1),
        ]
        asked(proxy, good)
        before = len(list(fds.iterdir()))
        for _ in range(10):
            for request in requests:
                asked(proxy, request, end=True)
            with connected(proxy) as guest:  # which does not wait for anything
                guest.sendall(good)
    for _ in range(server.accepted):
        assert server.gone.acquire(timeout=WAIT)
    end = time.monotonic() + WAIT
    while len(list(fds.iterdir())) > before:  # the server's threads are about to close theirs
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not [thread for thread in threading.enumerate() if thread.name == "vmette-proxy"]


def test_refusals_do_not_fill_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "vmette.proxy")
    told: list[str] = []
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    refusals = module._Refusals(told.append)
    for number in range(module.LOG_LINES + 30):
        refusals.tell(f"{number}")
    assert told == [f"refused to the guest: {number}" for number in range(module.LOG_LINES)]
    now += module.LOG_PERIOD
    refusals.tell("later")
    refusals.end()
    refusals.end()
    assert told[module.LOG_LINES :] == ["refused to the guest: 30 more requests", "refused to the guest: later"]
    assert [record.getMessage() for record in caplog.records] == told


def test_a_refusal_is_one_clean_line(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    with closing(Proxy([AllowedHost(NAME)], resolve=never, on_refused=told.append)) as proxy:
        assert status(asked(proxy, get("evil.test", "/\x1b[31m"))) == 400
        assert status(asked(proxy, get("EVIL.test", "/secret?token=x", "Cookie: secret"))) == 403
        assert status(asked(proxy, get(f"{'a.' * 100}evil.test"))) == 403
    assert told[0] == "refused to the guest: evil.test:80 is not among the allowed hosts"
    assert len(told) == 2
    assert all(line.isprintable() and len(line) < 300 for line in told)
    assert [record.getMessage() for record in caplog.records if record.name == "vmette.proxy"] == told
