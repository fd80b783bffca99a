"""Registries to test against: Debian's docker-registry, and a server that does what a test tells it to."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.images.layout import Layout, member, tar

USER, PASSWORD = "tester", "s3cret-pass"
# Of PASSWORD; bcrypt is the only hash that docker-registry takes, and Python has none. By `htpasswd -nbB -C 5`.
HTPASSWD = "tester:$2y$05$abcdefghijklmnopqrstuuV7fpPozvyqJfnY19y0802WTlXUm6Rjy\n"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def basic(user: str = USER, password: str = PASSWORD) -> str:
    """The header for a user."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


# --- an image


@dataclass(frozen=True)
class Pushed:
    """An image with one layer, in a layout of its own."""

    spec: str
    manifest: bytes
    config: bytes
    layer: bytes


def write_layout(path: Path, content: bytes = b"hello\n", architecture: str = "amd64") -> Pushed:
    """Makes an image with one file, /hello."""
    layout = Layout(path)
    described = layout.manifest([tar([member("hello", content)])], architecture=architecture)
    manifest = layout.read(described)
    parts = json.loads(manifest)
    return Pushed(
        layout.tag("latest", described), manifest, layout.read(parts["config"]), layout.read(parts["layers"][0])
    )


def push(spec: str, host: str, name: str, *options: str) -> None:
    """Has skopeo push the image `spec` (`oci-layout:DIR:TAG`) as `name`."""
    copy = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", *options]
    subprocess.run(
        [*copy, "oci:" + spec.removeprefix("oci-layout:"), f"docker://{host}/{name}"], check=True, timeout=60
    )


# --- Debian's docker-registry


@contextmanager
def docker_registry(directory: Path, auth: dict[str, Any] | None = None) -> Iterator[str]:
    """Runs docker-registry with what `auth` configures: its host and port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(directory / "storage")}},
        "http": {"addr": host, "secret": "of the tests"},
        "auth": auth,
    }
    path = directory / "config.yml"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))  # JSON is YAML
    # setpriv: the kernel ends it if the tests die.
    with (
        (directory / "log").open("wb") as log,
        subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "docker-registry", "serve", str(path)], stdout=log, stderr=log
        ) as process,
    ):
        try:
            _await(host, process, directory / "log")
            yield host
        finally:
            process.kill()


def _await(host: str, process: subprocess.Popen[bytes], log: Path) -> None:
    address, _, port = host.partition(":")
    end = time.monotonic() + 30
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        with suppress(OSError), socket.create_connection((address, int(port)), 5):
            return
        time.sleep(0.02)
    raise AssertionError(f"docker-registry does not answer: {log.read_text()}")


# --- certificates and tokens


@dataclass(frozen=True)
class Identity:
    """A key, and a certificate of it that it signed itself."""

    key: Path
    certificate: Path

    @classmethod
    def make(cls, directory: Path, *names: str) -> Identity:
        key, certificate, config = directory / "key.pem", directory / "cert.pem", directory / "openssl.cnf"
        alternatives = ",".join(f"DNS:{name}" for name in names or ("tokens.test",))
        config.write_text(
            "[req]\nprompt = no\ndistinguished_name = dn\nx509_extensions = ext\n[dn]\nCN = vmette's tests\n"
            "[ext]\nbasicConstraints = critical, CA:TRUE\nsubjectKeyIdentifier = hash\n"
            f"keyUsage = critical, digitalSignature, keyCertSign\nsubjectAltName = {alternatives}\n"
        )
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-config", str(config)),
                *("-keyout", str(key), "-out", str(certificate)),
            ],
            check=True,
            capture_output=True,
        )
        return cls(key, certificate)

    def token(self, service: str, access: list[dict[str, Any]]) -> str:
        """A JSON Web Token that docker-registry accepts."""
        now = int(time.time())
        certificate = ssl.PEM_cert_to_DER_cert(self.certificate.read_text())
        header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(certificate).decode()]}
        claims = {"iss": "tests", "sub": "", "aud": service, "nbf": now - 10, "exp": now + 300, "access": access}
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(self.key)],
            input=signed.encode(),
            check=True,
            capture_output=True,
        ).stdout
        return f"{signed}.{_base64url(signature)}"


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def serve_tokens(identity: Identity) -> Callable[[Exchange], None]:
    """A token service: USER may do everything, others may read what is below `public/`."""

    def answer(exchange: Exchange) -> None:
        query = parse_qs(urlsplit(exchange.path).query)
        known = exchange.seen.headers.get("authorization")
        if known not in (None, basic()):
            exchange.reply(401, b"{}")
            return
        access = []
        for scope in query.get("scope", []):
            kind, name, actions = scope.split(":")
            if known or (name.startswith("public/") and actions == "pull"):
                access.append({"type": kind, "name": name, "actions": actions.split(",")})
        exchange.reply(200, json.dumps({"token": identity.token(query["service"][0], access)}).encode())

    return answer


# --- a server that does what it is told


@dataclass(frozen=True)
class Seen:
    """A request that came."""

    method: str
    path: str
    headers: dict[str, str]
    """Their names are in lower case."""
    body: bytes


class Exchange(BaseHTTPRequestHandler):
    """A request, and the means to answer it."""

    protocol_version = "HTTP/1.1"
    server: _HTTPServer
    seen: Seen

    def setup(self) -> None:
        context = self.server.tls
        if context is not None:
            self.request = context.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self) -> None:
        super().finish()
        if self.server.tls is not None:
            self.connection.close()  # socketserver knows the socket below only

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): text for name, text in self.headers.items()}
        self.seen = Seen(self.command, self.path, headers, body)
        self.server.seen.append(self.seen)
        self.server.answer(self)

    do_GET = do_HEAD = do_POST = _handle  # noqa: N815

    def reply(self, status: int = 200, body: bytes = b"", **headers: object) -> None:
        """Answers. `Retry_After=1` is a header; Content-Length is that of `body` unless it is among them."""
        self.start(status, **({"Content_Length": len(body)} | headers))
        if self.command != "HEAD":
            self.wfile.write(body)

    def start(self, status: int = 200, **headers: object) -> None:
        """The head of an answer only."""
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()

    def challenge(self, text: str, **headers: object) -> None:
        """401."""
        self.reply(401, b"{}", WWW_Authenticate=text, **headers)

    def reset(self) -> None:
        """Breaks the connection in the hardest way."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.connection.close()

    def drip(self, interval: float = 0.01, byte: bytes = b"x") -> None:
        """Sends a byte now and then until the other side has enough."""
        while not self.server.over.wait(interval):
            self.wfile.write(byte)

    def log_message(self, *args: object) -> None:
        pass


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    seen: list[Seen]
    answer: Callable[[Exchange], None]
    tls: ssl.SSLContext | None
    over: threading.Event

    def handle_error(self, *args: object) -> None:
        pass  # the client has gone, as a rule


class Server:
    """Answers with `answer` on a port of 127.0.0.1 while it is entered. `seen` are the requests."""

    def __init__(self, answer: Callable[[Exchange], None], identity: Identity | None = None) -> None:
        self._http = _HTTPServer(("127.0.0.1", 0), Exchange)
        self._http.answer = answer
        self.seen: list[Seen] = []
        self._http.seen = self.seen
        self._http.over = threading.Event()
        self._http.tls = None
        if identity is not None:
            self._http.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._http.tls.load_cert_chain(identity.certificate, identity.key)
        self.port = self._http.server_port
        self.host = f"127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self._http.over.set()
        self._http.shutdown()
        self._http.server_close()

    def sent(self, header: str) -> list[str | None]:
        """What came in a header, request by request."""
        return [seen.headers.get(header.lower()) for seen in self.seen]
