"""A web server for tests, which does as badly as it is told to."""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from vmette.providers import http, remote

Answer = Callable[["Handler"], None]
"""What answers a request."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Site

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers))
        with suppress(OSError):  # the client may go at any time
            self.server.answers[self.path.partition("?")[0]](self)

    def head(self, status: int, **headers: str | int) -> None:
        """Sends the status and headers, which have _ for -."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def reset(self) -> None:
        """Breaks the connection off, as a computer that crashes does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class Site(ThreadingHTTPServer):
    """The server, on a port of its own."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Answer] = {}
        self.requests: list[tuple[str, Message]] = []
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        scheme = "https" if isinstance(self.socket, ssl.SSLSocket) else "http"
        return f"{scheme}://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], (OSError, ValueError)):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def site(certificate: Path | None = None) -> Iterator[Site]:
    """A server, as long as the context lasts; with https if it has a certificate."""
    with Site() as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.stopping.set()
            server.shutdown()
            thread.join()


def etag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()[:16]}"'


def file(data: bytes, *, cuts: list[int] | None = None, ranges: bool = True, tag: str | None = None) -> Answer:
    """A file as good servers have it.

    Args:
        data: Its bytes.
        cuts: After how many bytes each of the first answers is broken off.
        ranges: Whether parts can be asked for.
        tag: Its ETag, "" for none.
    """
    tag = etag(data) if tag is None else tag

    def answer(handler: Handler) -> None:
        headers: dict[str, str | int] = {"ETag": tag} if tag else {}
        if tag and handler.headers.get("If-None-Match") == tag:
            handler.head(304, **headers)
            return
        match = re.fullmatch("bytes=([0-9]+)-", handler.headers.get("Range", ""))
        start, status = 0, 200
        if match and ranges and handler.headers.get("If-Range") == tag:
            start, status = int(match[1]), 206
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        handler.head(status, Content_Length=len(data) - start, **headers)
        if cuts:
            handler.body(data[start : start + cuts.pop(0)])
            # What was sent must have come before the connection breaks: a reset overtakes it.
            handler.server.stopping.wait(0.2)
            handler.reset()
        else:
            handler.body(data[start:])

    return answer


def status(code: int, **headers: str | int) -> Answer:
    """A status without a body."""
    return lambda handler: handler.head(code, Content_Length=0, **headers)


def redirect(location: str, code: int = 302) -> Answer:
    return status(code, Location=location)


def sequence(*answers: Answer) -> Answer:
    """One after the other; the last one for good."""
    left = list(answers)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


def endless(handler: Handler, *, code: int = 200, **headers: str | int) -> None:
    """A body without end."""
    handler.head(code, Transfer_Encoding="chunked", **headers)
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    while not handler.server.stopping.is_set():
        handler.body(chunk)


def drip(start: bytes, interval: float = 0.05) -> Answer:
    """Sends `start`, and then a byte now and then."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(start)
        while not handler.server.stopping.wait(interval):
            handler.body(b"x")

    return answer


# --- What tests of downloads share


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has nobody wait long before he tries again."""
    monkeypatch.setattr(http, "BACKOFF", 0.01)
    monkeypatch.setattr(http, "POLL", 0.01)


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Lets so much time pass."""
    monkeypatch.setattr(remote, "time", SimpleNamespace(time=lambda: time.time() + seconds, time_ns=time.time_ns))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
