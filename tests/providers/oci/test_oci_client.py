"""The registry's client, against docker-registry and against servers that misbehave."""

# ruff: noqa: SIM117
# What one server answers often has the address of another in it.

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from tests.images.layout import INDEX as OCI_INDEX
from tests.images.layout import MANIFEST as OCI_MANIFEST
from tests.providers.oci.registry import (
    HTPASSWD,
    PASSWORD,
    USER,
    Exchange,
    Identity,
    Pushed,
    Server,
    basic,
    digest_of,
    docker_registry,
    push,
    serve_tokens,
    write_layout,
)
from vmette.errors import VmetteError
from vmette.providers import InvalidSpec, NetworkError, ProviderIOError, http
from vmette.providers.base import Cancelled
from vmette.providers.oci import client as module
from vmette.providers.oci.auth import Credentials
from vmette.providers.oci.client import MANIFEST_TYPES, Manifest, RegistryClient

BLOB = random.Random(1).randbytes(300_000)
DIGEST = digest_of(BLOB)
SIZE = len(BLOB)
MANIFEST = b'{"schemaVersion": 2}'
KNOWN = Credentials("basic", PASSWORD, USER)
IDENTITY = Credentials("identity", PASSWORD)
HOSTS = ("registry.test", "r.registry.test", "auth.registry.test", "auth.other.test")
SECRETS = (PASSWORD, basic().partition(" ")[2])

Answer = Callable[[Exchange], None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """No long waits, and nothing of this computer's configuration."""
    monkeypatch.setattr(http, "BACKOFF", 0.01)
    monkeypatch.setattr(http, "POLL", 0.01)
    for name in tuple(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("VMETTE_"):
            monkeypatch.delenv(name)
    caplog.set_level(logging.DEBUG, "vmette")


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every host below `.test` is this computer, which does not look like loopback then."""
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        return real("127.0.0.1" if str(host).endswith(".test") else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return Identity.make(tmp_path_factory.mktemp("identity"), *HOSTS)


@pytest.fixture
def trusted(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> Identity:
    """One that this computer trusts."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(identity.certificate))
    return identity


class Download:
    """A download of a blob, and what was said while it went on."""

    def __init__(self, path: Path) -> None:
        self.partial = path / "partial"
        self.counts: list[int] = []

    def run(
        self,
        client: RegistryClient,
        digest: str = DIGEST,
        size: int = SIZE,
        name: str = "org/app",
        cancelled: Callable[[], bool] = lambda: False,
    ) -> bytes:
        self.counts.clear()
        client.blob(name, digest, size, self.partial, self.counts.append, cancelled)
        return self.partial.read_bytes()

    def fails(self, client: RegistryClient, *args: Any, **kwargs: Any) -> str:
        with pytest.raises(NetworkError) as caught:
            self.run(client, *args, **kwargs)
        return checked(caught.value)


@pytest.fixture
def download(tmp_path: Path) -> Download:
    return Download(tmp_path)


def checked(error: VmetteError) -> str:
    """The text of an error, which has to be one line, without secrets or the names of others' exceptions."""
    text = str(error)
    assert text.isprintable()
    assert len(text) < 700
    assert not any(secret in text for secret in SECRETS)
    assert not re.search(r"Error\(|urllib3|requests\.|<", text)
    return text


def refused(client: RegistryClient, selector: str = "1", kind: type[VmetteError] = NetworkError) -> str:
    with pytest.raises(kind) as caught:
        client.manifest("org/app", selector)
    return checked(caught.value)


def always(status: int, body: bytes = b"", **headers: object) -> Answer:
    return lambda exchange: exchange.reply(status, body, **headers)


def in_turn(*answers: Answer) -> Answer:
    """The first answer to the first request, and so on; the last goes on."""
    left = list(answers)
    return lambda exchange: (left.pop(0) if len(left) > 1 else left[0])(exchange)


def blob(exchange: Exchange) -> None:
    """Sends BLOB, or what is asked for of it, as it should be."""
    asked = exchange.seen.headers.get("range")
    if asked is None:
        exchange.reply(200, BLOB)
    else:
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        exchange.reply(206, BLOB[start:], Content_Range=f"bytes {start}-{SIZE - 1}/{SIZE}")


def cut(length: int, how: Callable[[Exchange], None]) -> Answer:
    """Sends `length` bytes of what is asked for; then something happens."""

    def answer(exchange: Exchange) -> None:
        asked = exchange.seen.headers.get("range", "bytes=0-")
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        exchange.start(206 if start else 200, Content_Length=SIZE - start, Content_Range=f"bytes {start}-{SIZE}/{SIZE}")
        exchange.wfile.write(BLOB[start : start + length])
        exchange.wfile.flush()
        how(exchange)

    return answer


def hang_up(exchange: Exchange) -> None:
    exchange.close_connection = True


def manifest(exchange: Exchange) -> None:
    exchange.reply(200, MANIFEST, Content_Type=OCI_MANIFEST)


def demanding(challenge: str, wanted: str, answer: Answer = manifest) -> Answer:
    """Wants an Authorization."""

    def ask(exchange: Exchange) -> None:
        if exchange.seen.headers.get("authorization") == wanted:
            answer(exchange)
        else:
            exchange.challenge(challenge)

    return ask


def client_of(server: Server, credentials: Credentials | None = None, name: str = "") -> RegistryClient:
    return RegistryClient(f"{name}:{server.port}" if name else server.host, credentials=credentials)


# --- docker-registry


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Pushed:
    return write_layout(tmp_path_factory.mktemp("layout") / "image", random.Random(2).randbytes(200_000))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, layout: Pushed) -> Iterator[str]:
    """A registry for everybody."""
    with docker_registry(tmp_path_factory.mktemp("plain")) as host:
        push(layout.spec, host, "org/app:1")
        yield host


def test_docker_registry_gives_an_image(plain: str, layout: Pushed, download: Download) -> None:
    digest = digest_of(layout.manifest)
    expected = Manifest(OCI_MANIFEST, digest, layout.manifest)
    with RegistryClient(plain) as client:
        assert client.manifest("org/app", "1") == expected
        assert client.manifest("org/app", digest) == expected
        assert client.head("org/app", "1") == client.head("org/app", digest) == digest
        for data in (layout.config, layout.layer):
            assert download.run(client, digest_of(data), len(data)) == data
            assert sum(download.counts) == len(data)
            download.partial.unlink()


def test_docker_registry_goes_on_with_a_blob(plain: str, layout: Pushed, download: Download) -> None:
    half = len(layout.layer) // 2
    download.partial.write_bytes(layout.layer[:half])
    with RegistryClient(plain) as client:
        assert download.run(client, digest_of(layout.layer), len(layout.layer)) == layout.layer
    assert download.counts[0] == half
    assert sum(download.counts) == len(layout.layer)


def test_docker_registry_lacks_an_image(plain: str, layout: Pushed, download: Download) -> None:
    with RegistryClient(plain) as client:
        assert refused(client, "2") == f"network: {plain} has no org/app:2: manifest unknown"
        assert f"{plain} has no org/app@{DIGEST}: " in refused(client, DIGEST)
        assert f"{plain} has no blob {DIGEST} of org/app" in download.fails(client)
        with pytest.raises(NetworkError, match=f"{plain} has no nobody:1"):
            client.manifest("nobody", "1")
        with pytest.raises(NetworkError, match=f"{plain} has no org/app:2"):
            client.head("org/app", "2")


def test_docker_registry_wants_a_password(tmp_path: Path, layout: Pushed, download: Download) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    auth = {"htpasswd": {"realm": "tests", "path": str(tmp_path / "htpasswd")}}
    with docker_registry(tmp_path, auth) as host:
        push(layout.spec, host, "org/app:1", f"--dest-creds={USER}:{PASSWORD}")
        with RegistryClient(host, credentials=KNOWN) as client:
            assert client.manifest("org/app", "1").data == layout.manifest
            assert download.run(client, digest_of(layout.layer), len(layout.layer)) == layout.layer
        variable = "VMETTE_OCI_AUTH_127_0_0_1_" + host.partition(":")[2]
        with RegistryClient(host) as client:
            message = refused(client)
            assert f"not authorised: {host} does not give org/app:1 without credentials" in message
            assert variable in message
            assert f"docker login {host}" in message
        with RegistryClient(host, credentials=Credentials("basic", "wrong", USER)) as client:
            assert f"not authorised: {host} does not give org/app:1 with the credentials there are" in refused(client)


def test_docker_registry_wants_a_token(tmp_path: Path, identity: Identity, layout: Pushed, download: Download) -> None:
    with Server(serve_tokens(identity)) as tokens:
        realm = f"http://{tokens.host}/token?x=1"
        auth = {"realm": realm, "service": "a registry", "issuer": "tests", "rootcertbundle": str(identity.certificate)}
        with docker_registry(tmp_path, {"token": auth}) as host:
            for name in ("org/app", "public/app"):
                push(layout.spec, host, f"{name}:1", f"--dest-creds={USER}:{PASSWORD}")
            tokens.seen.clear()
            with RegistryClient(host, credentials=KNOWN) as client:
                for _ in range(2):
                    assert client.manifest("org/app", "1").data == layout.manifest
                assert download.run(client, digest_of(layout.layer), len(layout.layer)) == layout.layer
                assert len(tokens.seen) == 1  # it is kept
                assert client.manifest("public/app", "1").data == layout.manifest
            assert tokens.sent("Authorization") == [basic(), basic()]
            assert "scope=repository%3Aorg%2Fapp%3Apull" in tokens.seen[0].path
            assert tokens.seen[0].path.startswith("/token?x=1&service=a+registry&")
            with RegistryClient(host) as client:
                assert client.manifest("public/app", "1").data == layout.manifest
                assert "not authorised" in refused(client)
            with RegistryClient(host, credentials=Credentials("basic", "wrong", USER)) as client:
                assert "not authorised" in refused(client)


# --- manifests


def test_what_is_asked_for_a_manifest() -> None:
    with Server(manifest) as server, client_of(server) as client:
        assert client.manifest("org/app", "1") == Manifest(OCI_MANIFEST, digest_of(MANIFEST), MANIFEST)
        assert client.head("org/app", "1") is None
    get, head = server.seen
    assert (get.method, head.method) == ("GET", "HEAD")
    assert get.path == head.path == "/v2/org/app/manifests/1"
    for seen in (get, head):
        assert seen.headers["accept"] == ", ".join(MANIFEST_TYPES)
        assert seen.headers["accept-encoding"] == "identity"
        assert seen.headers["user-agent"].startswith("vmette/")


@pytest.mark.parametrize("told", ["sha256:x", "md5:" + "a" * 32, "", "x\x80"])
def test_a_digest_that_is_none_is_not_taken_from_head(told: str) -> None:
    with Server(always(200, MANIFEST, Docker_Content_Digest=told)) as server, client_of(server) as client:
        assert client.head("org/app", "1") is None


def test_the_media_type_is_what_the_registry_says() -> None:
    with Server(always(200, MANIFEST, Content_Type=f"{OCI_INDEX.upper()}; charset=x")) as server:
        with client_of(server) as client:
            assert client.manifest("org/app", "1").media_type == OCI_INDEX


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_manifest_has_its_digest(algorithm: str) -> None:
    digest = f"{algorithm}:{hashlib.new(algorithm, MANIFEST).hexdigest()}"
    wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    with Server(manifest) as server, client_of(server) as client:
        assert client.manifest("org/app", digest).digest == digest
        assert f"sends a wrong manifest of org/app@{wrong}: its digest is not {wrong}" in refused(client, wrong)
    assert len(server.seen) == 2  # not tried again
    for told in (wrong, "sha256:x", "nonsense"):
        with Server(always(200, MANIFEST, Docker_Content_Digest=told)) as server, client_of(server) as client:
            assert f"its digest is not {told}" in refused(client, "1")
            assert f"its digest is not {told}" in refused(client, digest)
    with Server(always(200, MANIFEST, Docker_Content_Digest=digest)) as server, client_of(server) as client:
        assert client.manifest("org/app", "1").data == MANIFEST


@pytest.mark.parametrize("chunked", [True, False])
def test_a_manifest_of_more_than_4_mib_is_refused(chunked: bool) -> None:
    sent = 0

    def endless(exchange: Exchange) -> None:
        nonlocal sent
        exchange.start(200, Content_Type=OCI_MANIFEST, **({} if chunked else {"Content_Length": 1 << 40}))
        exchange.close_connection = True
        while True:
            sent += exchange.wfile.write(b" " * 65536)

    with Server(endless) as server, client_of(server) as client:
        assert "the manifest of org/app:1 is larger than 4 MiB" in refused(client)
    assert sent < 20 << 20  # what sockets hold is sent, but no more
    assert len(server.seen) == 1
    exact = b" " * (4 << 20)
    with Server(always(200, exact, Content_Type=OCI_MANIFEST)) as server, client_of(server) as client:
        assert client.manifest("org/app", "1").data == exact


@pytest.mark.parametrize("suffix", ["json", "prettyjws"])
def test_schema_1_is_refused(suffix: str) -> None:
    kind = f"application/vnd.docker.distribution.manifest.v1+{suffix}"
    with Server(always(200, MANIFEST, Content_Type=kind)) as server, client_of(server) as client:
        message = refused(client, kind=InvalidSpec)
    assert f"{server.host} has org/app:1 as a schema 1 manifest only ({kind})" in message


@pytest.mark.parametrize("selector", ["", "../../blobs/x", "a/b", "a?b", "sha256:x", "a\n", f"{DIGEST}?", "a#b", "%2e"])
def test_names_do_not_leave_their_place_in_the_path(download: Download, selector: str) -> None:
    """They come out of manifests, that is from the registry."""
    with Server(manifest) as server, client_of(server) as client:
        for call in (client.manifest, client.head):
            with pytest.raises(InvalidSpec) as caught:
                call("org/app", selector)
            checked(caught.value)
            with pytest.raises(InvalidSpec):
                call(f"org//{selector}", "1")
        for digest in (selector, "latest"):
            with pytest.raises(InvalidSpec):
                download.run(client, digest)
        with pytest.raises(InvalidSpec):
            download.run(client, name=f"org//{selector}")
    assert server.seen == []


@pytest.mark.parametrize("host", ["", "a b", "a/b", "u@h.io", "h.io:x", "h.io\\x", "h.io?", "h.io\n", "ä.io"])
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        RegistryClient(host)
    checked(caught.value)


def test_docker_hub_answers_at_its_other_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def nowhere(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        asked.append((host, port))
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    for host in ("docker.io", "registry-1.docker.io"):
        with RegistryClient(host) as client:
            assert client.host == "docker.io"
            assert "registry-1.docker.io: the request for org/app:1 failed: no computer has that name" in refused(
                client
            )
    assert asked == [("registry-1.docker.io", 443)] * 2  # and it is not tried again


# --- blobs


def test_a_blob_is_appended_to(download: Download) -> None:
    with Server(blob) as server, client_of(server) as client:
        assert download.run(client) == BLOB
        assert sum(download.counts) == SIZE
        assert all(0 < count <= 1 << 20 for count in download.counts)
        for there in (1, SIZE - 1):
            download.partial.write_bytes(BLOB[:there])
            assert download.run(client) == BLOB
            assert sum(download.counts) == SIZE
        assert download.run(client) == BLOB  # there is nothing to ask for
    assert server.sent("Range") == [None, "bytes=1-", f"bytes={SIZE - 1}-"]
    assert server.sent("Accept-Encoding") == ["identity"] * 3


def test_a_blob_of_sha512(download: Download) -> None:
    with Server(blob) as server, client_of(server) as client:
        assert download.run(client, f"sha512:{hashlib.sha512(BLOB).hexdigest()}") == BLOB
        download.partial.unlink()
        assert "sends a wrong blob" in download.fails(client, "sha512:" + "a" * 128)


def test_an_empty_blob_needs_no_registry(download: Download) -> None:
    with Server(always(500)) as server, client_of(server) as client:
        assert download.run(client, digest_of(b""), 0) == b""
        download.fails(client, DIGEST, 0)
    assert server.seen == []
    assert not download.partial.exists()


def test_a_blob_that_is_another(download: Download) -> None:
    with Server(always(200, BLOB[::-1])) as server, client_of(server) as client:
        message = download.fails(client)
    assert f"{server.host} sends a wrong blob {DIGEST} of org/app: its digest is {digest_of(BLOB[::-1])}" in message
    assert not download.partial.exists()
    assert len(server.seen) == 1


@pytest.mark.parametrize("length", [1, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE])
def test_rubbish_that_was_there_is_replaced(download: Download, length: int) -> None:
    download.partial.write_bytes(b"?" * length)
    with Server(blob) as server, client_of(server) as client:
        assert download.run(client) == BLOB
    assert sum(download.counts) == SIZE
    assert server.sent("Range")[-1] is None


def test_rubbish_that_was_there_is_replaced_only_once(download: Download) -> None:
    download.partial.write_bytes(b"?")
    with Server(in_turn(blob, always(200, BLOB[::-1]))) as server, client_of(server) as client:
        download.fails(client)
    assert not download.partial.exists()
    assert server.sent("Range") == ["bytes=1-", None]


@pytest.mark.parametrize("how", [Exchange.reset, hang_up])
def test_a_blob_that_is_cut_off_goes_on_where_it_was(download: Download, how: Callable[[Exchange], None]) -> None:
    with Server(in_turn(cut(100_000, how), blob)) as server, client_of(server) as client:
        assert download.run(client) == BLOB
    first, second = server.sent("Range")
    assert first is None
    assert second is not None
    # A reset may take with it what had not been read.
    assert 0 <= int(second[6:-1]) <= 100_000
    assert how is Exchange.reset or second == "bytes=100000-"
    assert sum(download.counts) == SIZE


def test_progress_makes_the_attempts_count_anew(download: Download) -> None:
    with Server(cut(http.PROGRESS, hang_up)) as server, client_of(server) as client:
        client_attempts = -(-SIZE // http.PROGRESS)
        assert client_attempts == http.ATTEMPTS
        assert download.run(client) == BLOB
    with Server(in_turn(*[cut(20_000, hang_up)] * 9, blob)) as server, client_of(server) as client:
        download.partial.unlink()
        message = download.fails(client)
    assert f"{server.host}: the request for blob {DIGEST} of org/app failed: the connection broke (5 times)" in message
    assert len(server.seen) == http.ATTEMPTS
    assert download.partial.read_bytes() == BLOB[:100_000]  # for the next time


def test_more_attempts_than_are_allowed_in_a_row_may_be_needed(
    download: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "PROGRESS", 10_000)
    with Server(cut(20_000, hang_up)) as server, client_of(server) as client:
        assert download.run(client) == BLOB
    assert len(server.seen) == 15


def test_a_body_that_ends_early_without_a_length(download: Download) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.start(200)
        exchange.close_connection = True
        exchange.wfile.write(BLOB[:-1])

    with Server(in_turn(answer, blob)) as server, client_of(server) as client:
        assert download.run(client) == BLOB
    assert server.sent("Range") == [None, f"bytes={SIZE - 1}-"]
    with Server(always(200, b"")) as server, client_of(server) as client:
        download.partial.unlink()
        assert f"ends blob {DIGEST} of org/app after 0 of {SIZE} bytes (5 times)" in download.fails(client)


def test_a_registry_that_cannot_do_ranges(download: Download) -> None:
    download.partial.write_bytes(BLOB[:1000])
    with Server(always(200, BLOB)) as server, client_of(server) as client:
        assert download.run(client) == BLOB
    assert len(server.seen) == 1
    assert download.counts[:2] == [1000, -1000]
    assert sum(download.counts) == SIZE


def test_a_registry_that_cannot_do_ranges_and_never_gets_to_the_end(download: Download) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.start(200, Content_Length=SIZE)
        exchange.wfile.write(BLOB[:200_000])
        exchange.close_connection = True

    with Server(answer) as server, client_of(server) as client:
        download.fails(client)
    assert len(server.seen) == http.ATTEMPTS


def test_a_registry_that_has_less_than_there_is_here(download: Download) -> None:
    download.partial.write_bytes(b"?" * 1000)
    with Server(in_turn(always(416), blob)) as server, client_of(server) as client:
        assert download.run(client) == BLOB
    assert server.sent("Range") == ["bytes=1000-", None]
    with Server(always(416)) as server, client_of(server) as client:
        download.partial.write_bytes(b"?" * 1000)
        assert "answers 416" in download.fails(client)
    assert server.sent("Range") == ["bytes=1000-", None]


@pytest.mark.parametrize(
    "told", ["bytes 0-299999/300000", "bytes 1001-", "bytes */300000", "", "x", "bytes 9" + "9" * 99]
)
def test_a_part_that_is_not_what_was_asked_for(download: Download, told: str) -> None:
    download.partial.write_bytes(BLOB[:1000])
    with Server(always(206, BLOB[1000:], Content_Range=told)) as server, client_of(server) as client:
        assert "not what follows byte 1000" in download.fails(client)
    assert len(server.seen) == 1
    assert download.partial.read_bytes() == BLOB[:1000]


def test_a_part_that_nobody_asked_for(download: Download) -> None:
    with Server(always(206, BLOB, Content_Range=f"bytes 0-{SIZE - 1}/{SIZE}")) as server, client_of(server) as client:
        assert "answers 206 (Partial Content)" in download.fails(client)


@pytest.mark.parametrize("length", [None, 1 << 40])
def test_a_blob_without_end_is_stopped(download: Download, length: int | None) -> None:
    sent = 0

    def endless(exchange: Exchange) -> None:
        nonlocal sent
        exchange.start(200, **({} if length is None else {"Content_Length": length}))
        exchange.close_connection = True
        exchange.wfile.write(BLOB)
        while True:
            sent += exchange.wfile.write(b"x" * 65536)

    with Server(endless) as server, client_of(server) as client:
        assert f"sends more of blob {DIGEST} of org/app than its {SIZE} bytes" in download.fails(client)
    assert sent < 20 << 20
    assert len(server.seen) == 1
    assert not download.partial.exists()
    assert sum(download.counts) <= SIZE


def test_a_file_that_cannot_be_written(tmp_path: Path, download: Download) -> None:
    download.partial.mkdir()
    with Server(blob) as server, client_of(server) as client, pytest.raises(ProviderIOError, match="Is a directory"):
        download.run(client)
    download.partial = tmp_path / "file"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with Server(blob) as server, client_of(server) as client, pytest.raises(ProviderIOError, match="too large"):
            download.run(client)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(server.seen) == 1


# --- trying again


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(download: Download, status: int) -> None:
    with Server(in_turn(*[always(status, b"{}")] * 4, manifest)) as server, client_of(server) as client:
        assert client.manifest("org/app", "1").data == MANIFEST
    assert len(server.seen) == 5
    with Server(always(status)) as server, client_of(server) as client:
        assert f"{server.host} answers {status} (" in refused(client)
        assert len(server.seen) == http.ATTEMPTS
        assert f"{server.host} answers {status} (" in download.fails(client)
        assert len(server.seen) == 2 * http.ATTEMPTS
        with pytest.raises(NetworkError, match=f"answers {status}"):
            client.head("org/app", "1")


@pytest.mark.parametrize("status", [201, 204, 400, 403, 404, 405, 410, 418, 451, 501, 599, 304, 300])
def test_what_will_not_pass_is_not_tried_again(status: int) -> None:
    with Server(always(status, MANIFEST if status != 204 else b"")) as server, client_of(server) as client:
        message = refused(client)
    assert server.host in message
    assert "org/app:1" in message
    assert str(status) in message or status in {403, 404}
    assert len(server.seen) == 1


@pytest.mark.parametrize("date", [False, True])
def test_a_registry_says_when_to_come_again(date: bool) -> None:
    times = []

    def busy(exchange: Exchange) -> None:
        # A date has whole seconds only: two of them are between one and two.
        exchange.reply(429, Retry_After=formatdate(time.time() + 2, usegmt=True) if date else "1")

    def answer(exchange: Exchange) -> None:
        times.append(time.monotonic())
        (busy if len(times) == 1 else manifest)(exchange)

    with Server(answer) as server, client_of(server) as client:
        client.manifest("org/app", "1")
    assert 0.9 < times[1] - times[0] < 10


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        (" 7 ", 7),
        ("60", 60),
        ("61", 60),
        ("9" * 5000, 60),
        ("0" * 20, 60),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 60),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        *((text, None) for text in ("", "x", "-1", "1.5", "inf", "nan", "1e9", "²", "Fri, 99 Foo", "\0")),
    ],
)
def test_when_to_come_again_is_bounded(text: str, seconds: float | None) -> None:
    assert http.retry_after(text) == seconds


def test_waits_grow_and_are_uneven(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module._Call, "wait", lambda _, seconds: waits.append(seconds))
    monkeypatch.setattr(http, "BACKOFF", 1.0)
    with Server(always(503)) as server, client_of(server) as client:
        for _ in range(10):
            refused(client)
    assert len(waits) == 40
    for attempt in range(4):
        ours = waits[attempt::4]
        assert all(2**attempt / 2 <= wait <= 2**attempt for wait in ours)
        assert len(set(ours)) > 1


def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        with RegistryClient(host) as client:
            message = refused(client)
    assert message == "network: 127.0.0.1: the request for org/app:1 failed: Connection refused (5 times)"


@pytest.mark.parametrize("how", [Exchange.reset, hang_up])
def test_a_connection_that_breaks_before_the_answer(how: Answer) -> None:
    with Server(in_turn(how, how, manifest)) as server, client_of(server) as client:
        assert client.manifest("org/app", "1").data == MANIFEST
    with Server(how) as server, client_of(server) as client:
        assert "failed: " in refused(client)
        assert len(server.seen) == http.ATTEMPTS

    def cut_head(exchange: Exchange) -> None:
        exchange.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Ty")
        hang_up(exchange)

    with Server(cut_head) as server, client_of(server) as client:
        assert f"{server.host} sends nothing for org/app:1 (5 times)" in refused(client)
    assert len(server.seen) == http.ATTEMPTS


@pytest.mark.parametrize(
    "line", [b"nonsense\r\n\r\n", b"HTTP/1.1 x\r\n\r\n", b"\0" * 100_000, b"HTTP/1.1 200 OK\r\n" * 200]
)
def test_what_is_no_http(line: bytes) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.wfile.write(line)
        exchange.close_connection = True

    with Server(answer) as server, client_of(server) as client:
        assert server.host.partition(":")[0] in refused(client)


# --- slowness


def test_silence_is_broken_off(monkeypatch: pytest.MonkeyPatch, download: Download) -> None:
    monkeypatch.setattr(http, "READ_TIMEOUT", 0.1)
    monkeypatch.setattr(http, "ATTEMPTS", 2)

    def silent(exchange: Exchange) -> None:
        exchange.server.over.wait(5)

    for answer in (silent, cut(10, silent)):
        with Server(answer) as server, client_of(server) as client:
            assert f"the request for blob {DIGEST} of org/app failed: time-out (2 times)" in download.fails(client)
        assert len(server.seen) == 2


def drip_head(exchange: Exchange) -> None:
    exchange.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    exchange.drip()


def drip_body(exchange: Exchange) -> None:
    exchange.start(200, Content_Length=SIZE)
    exchange.drip()


def drip_chunks(exchange: Exchange) -> None:
    exchange.start(200, Transfer_Encoding="chunked")
    exchange.wfile.write(b"40000\r\n")
    exchange.drip()


@pytest.mark.parametrize("answer", [drip_head, drip_body, drip_chunks])
@pytest.mark.parametrize("what", ["blob", "manifest"])
def test_a_slow_loris_is_broken_off(
    monkeypatch: pytest.MonkeyPatch, download: Download, answer: Answer, what: str
) -> None:
    """Each byte comes in time; all of them never would."""
    monkeypatch.setattr(http, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(http, "SLOW_WINDOW", 0.2)
    monkeypatch.setattr(http, "ATTEMPTS", 2)
    start = time.monotonic()
    with Server(answer) as server, client_of(server) as client:
        message = download.fails(client) if what == "blob" else refused(client)
    assert time.monotonic() - start < 10
    assert ("time-out" if answer is drip_head else "too slowly") in message
    assert len(server.seen) == 2


@pytest.mark.parametrize("status", [b"401", b"404", b"302"])
def test_a_head_that_is_broken_off_is_no_answer(monkeypatch: pytest.MonkeyPatch, status: bytes) -> None:
    monkeypatch.setattr(http, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(http, "ATTEMPTS", 2)

    def answer(exchange: Exchange) -> None:
        exchange.wfile.write(b"HTTP/1.1 " + status + b" So it is\r\nLocation: /x\r\nX: ")
        exchange.drip()

    with Server(answer) as server, client_of(server) as client:
        assert "the request for org/app:1 failed: time-out (2 times)" in refused(client)
    assert len(server.seen) == 2


def test_a_name_that_no_computer_can_have_is_not_tried_again() -> None:
    for host in (f"{'a' * 64}.test", "a..test"):
        with RegistryClient(host) as client:
            message = refused(client)
        assert "times" not in message
        assert host in message


def test_what_is_slow_but_not_too_slow_arrives(monkeypatch: pytest.MonkeyPatch, download: Download) -> None:
    monkeypatch.setattr(http, "SLOW_WINDOW", 0.05)

    def answer(exchange: Exchange) -> None:
        exchange.start(200, Content_Length=SIZE)
        for start in range(0, SIZE, 20_000):
            exchange.wfile.write(BLOB[start : start + 20_000])
            time.sleep(0.02)

    with Server(answer) as server, client_of(server) as client:
        assert download.run(client) == BLOB
    assert len(server.seen) == 1


# --- cancelling


def test_cancelled_while_bytes_come(download: Download) -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return sum(download.counts) >= 1000

    def answer(exchange: Exchange) -> None:
        exchange.start(200, Content_Length=1 << 40)
        while True:
            exchange.wfile.write(BLOB[:1000])
            time.sleep(0.001)

    with Server(answer) as server, client_of(server) as client, pytest.raises(Cancelled):
        download.run(client, size=1 << 40, cancelled=cancelled)
    assert download.partial.stat().st_size >= 1000  # kept
    assert asked > 1


@pytest.mark.parametrize("call", ["manifest", "head", "blob"])
def test_cancelled_while_waiting(download: Download, call: str) -> None:
    over = threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.reply(503, Retry_After=60)
        threading.Timer(0.1, over.set).start()

    start = time.monotonic()
    with Server(answer) as server, client_of(server) as client, pytest.raises(Cancelled):
        if call == "blob":
            download.run(client, cancelled=over.is_set)
        else:
            getattr(client, call)("org/app", "1", over.is_set)
    assert time.monotonic() - start < 10
    assert len(server.seen) == 1


def test_cancelled_before_it_begins(download: Download) -> None:
    download.partial.write_bytes(BLOB[:1000])
    with Server(blob) as server, client_of(server) as client, pytest.raises(Cancelled):
        download.run(client, cancelled=lambda: True)
    assert server.seen == []


# --- authorisation

BEARER = "Bearer good"


def token(exchange: Exchange) -> None:
    exchange.reply(200, b'{"token": "good"}')


def test_an_endless_401_ends(download: Download) -> None:
    with Server(token) as tokens, Server(lambda e: e.challenge(f'Bearer realm="http://{tokens.host}/"')) as server:
        with client_of(server, KNOWN) as client:
            assert "not authorised" in refused(client)
            assert "not authorised" in download.fails(client)
            with pytest.raises(NetworkError, match="not authorised"):
                client.head("org/app", "1")
    assert server.sent("Authorization")[:2] == [None, BEARER]
    assert len(server.seen) == 6
    assert len(tokens.seen) == 3
    with Server(lambda exchange: exchange.challenge("Basic")) as server, client_of(server, KNOWN) as client:
        assert "not authorised" in refused(client)
    assert server.sent("Authorization") == [None, basic()]


@pytest.mark.parametrize(
    "challenge", ["", "Negotiate", "Basic", 'Basic realm="x"', "Digest x=y", ",,,", '"', "Basic" + " " * 60000]
)
def test_401_without_a_way_to_go(challenge: str) -> None:
    with Server(lambda exchange: exchange.challenge(challenge)) as server, client_of(server) as client:
        assert f"not authorised: {server.host} does not give org/app:1 without credentials" in refused(client)
    assert len(server.seen) == 1


def test_a_token_that_has_run_out_is_replaced() -> None:
    issued = 0

    def tokens(exchange: Exchange) -> None:
        nonlocal issued
        issued += 1
        exchange.reply(200, json.dumps({"access_token": f"t{issued}"}).encode())

    with Server(tokens) as service:
        challenge = f'Bearer realm="http://{service.host}/t"'
        wanted = iter(["Bearer t1", "Bearer t1", "Bearer t2"])

        def answer(exchange: Exchange) -> None:
            sent = exchange.seen.headers.get("authorization")
            if sent is None or sent != next(wanted):
                exchange.challenge(challenge)
            else:
                manifest(exchange)

        with Server(answer) as server, client_of(server) as client:
            client.manifest("org/app", "1")
            client.manifest("org/app", "1")
            next(wanted)
            wanted = iter(["none", "Bearer t2", "Bearer t2"])
            client.manifest("org/app", "1")
            client.manifest("org/app", "1")
    assert server.sent("Authorization") == [None, "Bearer t1", "Bearer t1", "Bearer t1", "Bearer t2", "Bearer t2"]


def test_threads_share_a_token(tmp_path: Path) -> None:
    with Server(token) as tokens:
        with Server(demanding(f'Bearer realm="http://{tokens.host}/"', BEARER, blob)) as server:
            with client_of(server) as client:
                downloads = [Download(tmp_path / str(number)) for number in range(8)]
                threads = [threading.Thread(target=download.run, args=(client,)) for download in downloads]
                for download in downloads:
                    download.partial.parent.mkdir()
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
    assert all(download.partial.read_bytes() == BLOB for download in downloads)
    assert len(tokens.seen) == 1


def test_several_challenges_in_a_header() -> None:
    with Server(token) as tokens:
        first = 'Negotiate abc==, Basic realm="a, Bearer realm=\\"x\\""'
        challenge = f'{first}, BEARER  Realm = "http://{tokens.host}/" ,service=s'
        with Server(demanding(challenge, BEARER)) as server, client_of(server, KNOWN) as client:
            assert client.manifest("org/app", "1").data == MANIFEST
    assert tokens.seen[0].path == "/?service=s&scope=repository%3Aorg%2Fapp%3Apull"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", {}),
        ("Basic", {"basic": {}}),
        ('bearer realm="r",scope="a,b"', {"bearer": {"realm": "r", "scope": "a,b"}}),
        ('Basic realm="q\\"\\\\", Bearer a=b', {"basic": {"realm": 'q"\\'}, "bearer": {"a": "b"}}),
        ("Bearer a=1, Bearer a=2", {"bearer": {"a": "1"}}),
        ("Bearer a=1, a=2", {"bearer": {"a": "1"}}),
        ('Bearer realm="unfinished', {"bearer": {"realm": ""}}),
        ("a=b", {}),
    ],
)
def test_challenges(header: str, expected: dict[str, dict[str, str]]) -> None:
    assert module._challenges(header) == expected


def test_reading_challenges_takes_no_time() -> None:
    start = time.monotonic()
    for header in ('a="' + "\\" * 65000, "a=" * 30000, 'Bearer a="' * 6000, " ," * 30000, "a " * 30000, "a" * 65000):
        module._challenges(header)
    assert time.monotonic() - start < 5


def test_a_bearer_token_is_sent_as_it_is() -> None:
    with Server(demanding("Basic", f"Bearer {PASSWORD}")) as server:
        with client_of(server, Credentials("bearer", PASSWORD)) as client:
            client.manifest("org/app", "1")
    assert len(server.seen) == 1
    with Server(token) as tokens, Server(lambda e: e.challenge(f'Bearer realm="http://{tokens.host}/"')) as server:
        with client_of(server, Credentials("bearer", PASSWORD)) as client:
            assert "not authorised" in refused(client)
    assert tokens.seen == []


def test_an_identity_token_buys_tokens() -> None:
    with Server(token) as tokens:
        challenge = f'Bearer realm="http://{tokens.host}/t",service="a b"'
        with Server(demanding(challenge, BEARER)) as server, client_of(server, IDENTITY) as client:
            client.manifest("org/app", "1")
    (seen,) = tokens.seen
    assert (seen.method, seen.path) == ("POST", "/t")
    assert "authorization" not in seen.headers
    assert set(seen.body.decode().split("&")) == {
        "grant_type=refresh_token",
        f"refresh_token={PASSWORD}",
        "service=a+b",
        "scope=repository%3Aorg%2Fapp%3Apull",
        "client_id=vmette",
    }


def test_an_identity_token_does_not_follow_a_redirect() -> None:
    with Server(token) as thief, Server(always(307, Location=f"http://{thief.host}/")) as tokens:
        with Server(demanding(f'Bearer realm="http://{tokens.host}/"', BEARER)) as server:
            with client_of(server, IDENTITY) as client:
                assert "where it cannot go" in refused(client)
    assert thief.seen == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"5", b'{"token": 5}', b'{"token": ""}', b'{"token": "a\\r\\nX: y"}', b"[" * 9999]
)
def test_a_token_that_is_none(body: bytes) -> None:
    with Server(always(200, body)) as tokens:
        with Server(demanding(f'Bearer realm="http://{tokens.host}/"', BEARER)) as server, client_of(server) as client:
            assert "127.0.0.1 sends no usable token for org/app:1" in refused(client)
    assert len(server.seen) == 1


def test_a_token_service_that_is_busy_and_one_that_refuses() -> None:
    with Server(in_turn(always(503), token)) as tokens:
        with Server(demanding(f'Bearer realm="http://{tokens.host}/"', BEARER)) as server, client_of(server) as client:
            client.manifest("org/app", "1")
    for status in (401, 403):
        with Server(always(status, WWW_Authenticate="Basic")) as tokens:
            with Server(demanding(f'Bearer realm="http://{tokens.host}/"', BEARER)) as server:
                with client_of(server, KNOWN) as client:
                    assert "not authorised" in refused(client)
        assert len(tokens.seen) == 1
    with Server(always(404)) as tokens:
        with Server(demanding(f'Bearer realm="http://{tokens.host}/"', BEARER)) as server, client_of(server) as client:
            assert "answers 404 (Not Found) to the request for a token for org/app:1" in refused(client)


@pytest.mark.parametrize(
    ("registry", "realm", "told"),
    [
        ("registry.test", "auth.registry.test", True),
        ("r.registry.test", "auth.registry.test", True),
        ("r.registry.test", "r.registry.test", True),
        ("r.registry.test", "auth.other.test", False),
        ("registry.test", "registry.test", True),
    ],
)
@pytest.mark.parametrize("credentials", [KNOWN, IDENTITY])
def test_who_is_told_the_credentials(
    trusted: Identity,
    caplog: pytest.LogCaptureFixture,
    registry: str,
    realm: str,
    told: bool,
    credentials: Credentials,
) -> None:
    with Server(token, trusted) as tokens:
        challenge = f'Bearer realm="https://{realm}:{tokens.port}/"'
        with Server(demanding(challenge, BEARER), trusted) as server:
            with client_of(server, credentials, registry) as client:
                client.manifest("org/app", "1")
    (seen,) = tokens.seen
    assert (PASSWORD in seen.body.decode() or seen.headers.get("authorization") == basic()) is told
    assert ("asked without credentials" in caplog.text) is not told
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize(
    ("one", "other", "kin"),
    [
        ("registry-1.docker.io", "auth.docker.io", True),
        ("registry.gitlab.com", "gitlab.com", True),
        ("ghcr.io", "ghcr.io", True),
        ("ghcr.io", "quay.io", False),
        ("a.example", "a.example.evil", False),
        ("xdocker.io", "docker.io", False),
        ("10.0.0.1", "10.9.0.1", False),
        ("10.0.0.1", "10.0.0.1", True),
        ("localhost", "io", False),
        ("localhost", "localhost", True),
        ("::1", "::2", False),
    ],
)
def test_kinship(one: str, other: str, kin: bool) -> None:
    assert module._kin(one, other) is kin
    assert module._kin(other, one) is kin


@pytest.mark.parametrize(
    "realm",
    [
        *(
            "",
            "x",
            "/token",
            "ftp://127.0.0.1/",
            "file:///etc/passwd",
            "https://u:p@127.0.0.1/",
            "https://127.0.0.1\\@x/",
        ),
        *(
            "https://",
            "https:///x",
            "//127.0.0.1/",
            "https://a b/",
            "https://ä.test/",
            "https://x.test:999999/",
            "https://[x/",
        ),
    ],
)
def test_a_realm_that_cannot_be_asked(realm: str) -> None:
    challenge = f'Bearer realm="{realm}"'.encode().decode("latin-1").replace("\\", "\\\\")
    with Server(lambda exchange: exchange.challenge(challenge)) as server, client_of(server, KNOWN) as client:
        message = refused(client)
    assert "to an address that cannot be used" in message
    assert len(server.seen) == 1


def test_a_realm_of_plain_http_must_be_on_this_computer(monkeypatch: pytest.MonkeyPatch, trusted: Identity) -> None:
    with Server(token) as tokens:
        for realm in (f"http://auth.test:{tokens.port}/", "http://10.0.0.1/", "http://127.0.0.1.test/"):
            with Server(demanding(f'Bearer realm="{realm}"', BEARER)) as server, client_of(server, KNOWN) as client:
                assert "by plain http, which is not safe" in refused(client)
        # A registry that is elsewhere does not get to ask this computer's services.
        with Server(demanding(f'Bearer realm="http://{tokens.host}/"', BEARER), trusted) as server:
            with client_of(server, KNOWN, "registry.test") as client:
                assert "by plain http, which is not safe" in refused(client)
        assert tokens.seen == []
        # But one that is spoken to by http has been declared to be near.
        monkeypatch.setenv("VMETTE_OCI_PLAIN_HTTP", "x.test, registry.test")
        with Server(demanding(f'Bearer realm="http://{tokens.host}/"', BEARER)) as server:
            with client_of(server, KNOWN, "registry.test") as client:
                client.manifest("org/app", "1")
    assert tokens.sent("Authorization") == [None]


def test_netrc_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with Server(token) as tokens:
        with Server(demanding(f'Bearer realm="http://{tokens.host}/"', BEARER)) as server, client_of(server) as client:
            client.manifest("org/app", "1")
    assert server.sent("Authorization") == [None, BEARER]
    assert tokens.sent("Authorization") == [None]


def test_cookies_are_not_kept() -> None:
    with Server(always(200, MANIFEST, Set_Cookie="a=b; Path=/")) as server, client_of(server) as client:
        client.manifest("org/app", "1")
        client.manifest("org/app", "1")
    assert server.sent("Cookie") == [None, None]


# --- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_without_authorization(download: Download, status: int) -> None:
    with Server(blob) as storage:
        redirect = always(status, b"there", Location=f"http://{storage.host}/x?signature=1#f")
        with Server(demanding("Basic", basic(), redirect)) as server, client_of(server, KNOWN) as client:
            download.partial.write_bytes(BLOB[:10])
            assert download.run(client) == BLOB
    assert storage.sent("Authorization") == [None]
    assert storage.sent("Range") == ["bytes=10-"]
    assert storage.seen[0].path == "/x?signature=1"
    assert server.sent("Authorization") == [None, basic()]


@pytest.mark.parametrize(("first", "second"), [("127.0.0.1", "localhost"), ("localhost", "127.0.0.1")])
def test_authorization_is_not_sent_to_another_name_of_a_computer(download: Download, first: str, second: str) -> None:
    def answer(exchange: Exchange) -> None:
        if exchange.path == "/x":
            blob(exchange)
        else:
            exchange.reply(302, Location=f"http://{second}:{server.port}/x")

    with Server(demanding("Basic", basic(), answer)) as server, client_of(server, KNOWN, first) as client:
        message = download.fails(client)
    assert f"{second}, where {first}:{server.port} sends to, answers 401 (Unauthorized)" in message
    assert server.sent("Authorization") == [None, basic(), None]


def test_a_challenge_from_elsewhere_is_not_answered(download: Download) -> None:
    with Server(token) as tokens, Server(lambda e: e.challenge(f'Bearer realm="http://{tokens.host}/"')) as storage:
        with Server(always(302, Location=f"http://{storage.host}/")) as server, client_of(server, KNOWN) as client:
            assert f"127.0.0.1, where {server.host} sends to, answers 401" in download.fails(client)
    assert tokens.seen == []
    assert len(server.seen) == len(storage.seen) == 1


def test_a_redirect_within_the_registry_keeps_authorization(download: Download) -> None:
    def answer(exchange: Exchange) -> None:
        (blob if exchange.path == "/x" else always(307, Location="/x"))(exchange)

    with Server(demanding("Basic", basic(), answer)) as server, client_of(server, KNOWN) as client:
        assert download.run(client) == BLOB
    assert server.sent("Authorization") == [None, basic(), basic()]


def test_authorization_does_not_come_back_after_a_detour(download: Download) -> None:
    with Server(lambda exchange: exchange.reply(307, Location=f"http://{server.host}/x")) as other:
        with Server(demanding("Basic", basic(), always(307, Location=f"http://{other.host}/"))) as server:
            with client_of(server, KNOWN) as client:
                assert "not authorised" in download.fails(client)
    assert [(seen.path, seen.headers.get("authorization")) for seen in server.seen][2] == ("/x", None)


def test_a_redirect_with_a_body_without_end(download: Download) -> None:
    """requests reads all of it, even if it does not follow."""

    def answer(exchange: Exchange) -> None:
        exchange.start(302, Location=f"http://{storage.host}/", Content_Length=1 << 40)
        exchange.close_connection = True
        while True:
            exchange.wfile.write(b"x" * 65536)

    with Server(blob) as storage, Server(answer) as server, client_of(server) as client:
        assert download.run(client) == BLOB


def test_redirects_have_an_end(download: Download) -> None:
    with (
        Server(lambda exchange: exchange.reply(302, Location=f"{exchange.path}x")) as server,
        client_of(server) as client,
    ):
        assert "more than 5 times" in download.fails(client)
    assert len(server.seen) == http.MAX_REDIRECTS + 1

    def five(exchange: Exchange) -> None:
        hops = len(exchange.path) - len(exchange.path.rstrip("x"))
        (blob if hops == 5 else always(302, Location=f"{exchange.path}x"))(exchange)

    digest = f"sha512:{hashlib.sha512(BLOB).hexdigest()}"
    with Server(five) as server, client_of(server) as client:
        assert download.run(client, digest) == BLOB


@pytest.mark.parametrize("location", ["http://{}/", "HTTP://{}/", "http:{}"])
def test_https_does_not_become_http(trusted: Identity, download: Download, location: str) -> None:
    with Server(blob) as storage:
        with Server(always(302, Location=location.format(storage.host)), trusted) as server:
            with client_of(server, None, "registry.test") as client:
                message = download.fails(client)
    assert "by plain http" in message or "where it cannot go" in message
    assert storage.seen == []


def test_http_on_this_computer_does_not_become_http_elsewhere(download: Download) -> None:
    with Server(blob) as storage, Server(always(302, Location=f"http://storage.test:{storage.port}/")) as server:
        with client_of(server) as client:
            assert "redirects the request for blob" in download.fails(client)
    assert storage.seen == []


@pytest.mark.parametrize(
    "location",
    ["ftp://x/", "http://[x", "http://a@b/", "https://a\\@b/", "javascript:x", "file:///x", "http://a:99999999/"],
)
def test_a_redirect_to_nowhere(download: Download, location: str) -> None:
    with Server(always(302, Location=location)) as server, client_of(server) as client:
        assert "where it cannot go" in download.fails(client)


def test_a_manifest_may_be_elsewhere() -> None:
    with Server(manifest) as storage, Server(always(307, Location=f"http://{storage.host}/m")) as server:
        with client_of(server) as client:
            assert client.manifest("org/app", "1").data == MANIFEST


def test_storage_that_lacks_it_is_named(download: Download) -> None:
    with Server(always(404)) as storage, Server(always(307, Location=f"http://{storage.host}/?signature=s")) as server:
        with client_of(server) as client:
            message = download.fails(client)
    assert f"127.0.0.1, where {server.host} sends to, has no blob" in message
    assert "signature" not in message


# --- https, http and proxies


def test_https_with_a_certificate_that_is_trusted(trusted: Identity, download: Download) -> None:
    with Server(blob, trusted) as server, client_of(server, None, "registry.test") as client:
        assert download.run(client) == BLOB


def test_https_with_a_certificate_that_is_not_trusted(identity: Identity, trusted: Identity) -> None:
    with Server(manifest, identity) as server:
        with client_of(server, None, "a.b.c.test") as client:
            message = refused(client)
    assert "a.b.c.test: the request for org/app:1 failed: its certificate is not trusted: " in message
    assert "times" not in message  # it will not be another one soon
    assert server.seen == []


def test_https_where_the_certificate_is_nobodys(identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    with Server(manifest, identity) as server, client_of(server, None, "registry.test") as client:
        assert "its certificate is not trusted" in refused(client)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent")
    with Server(manifest, identity) as server, client_of(server, None, "registry.test") as client:
        assert "/nonexistent" in refused(client)


@pytest.mark.parametrize("listed", ["", "other.test", "registry.test:1", "test", "xregistry.test", "*"])
def test_plain_http_is_for_hosts_that_are_listed(monkeypatch: pytest.MonkeyPatch, listed: str) -> None:
    monkeypatch.setattr(http, "ATTEMPTS", 1)
    monkeypatch.setenv("VMETTE_OCI_PLAIN_HTTP", listed)
    with Server(manifest) as server, client_of(server, KNOWN, "registry.test") as client:
        refused(client)
    assert server.seen == []


@pytest.mark.parametrize("listed", ["registry.test", "other.test, REGISTRY.test", "registry.test:{}"])
def test_plain_http_may_be_allowed(monkeypatch: pytest.MonkeyPatch, listed: str) -> None:
    with Server(manifest) as server:
        monkeypatch.setenv("VMETTE_OCI_PLAIN_HTTP", listed.format(server.port))
        with client_of(server, None, "registry.test") as client:
            assert client.manifest("org/app", "1").data == MANIFEST


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *((host, True) for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1", "0:0::1")),
        *(
            (host, False)
            for host in ("127.1", "128.0.0.1", "0.0.0.0", "::", "127.0.0.1.test", "localhost.test", "x.localhost")
        ),
    ],
)
def test_what_is_loopback(host: str, loopback: bool) -> None:
    url_host = f"[{host}]" if ":" in host else host
    origin = http.Origin.of(f"http://{url_host}:5000/")
    assert origin is not None
    assert origin.loopback is module._plain_http(origin) is loopback


def test_a_proxy_of_the_environment_is_used_but_not_for_this_computer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMETTE_OCI_PLAIN_HTTP", "registry.test")
    with Server(manifest) as proxy, Server(manifest) as server:
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://{proxy.host}")
        with RegistryClient("registry.test") as client:
            client.manifest("org/app", "1")
        with client_of(server) as client:
            client.manifest("org/app", "1")
    assert [seen.path for seen in proxy.seen] == ["http://registry.test/v2/org/app/manifests/1"]
    assert len(server.seen) == 1


def test_connections_are_used_again(download: Download) -> None:
    ports = []

    def answer(exchange: Exchange) -> None:
        ports.append(exchange.client_address)
        (blob if "/blobs/" in exchange.path else manifest)(exchange)

    with Server(demanding("Basic", basic(), answer)) as server, client_of(server, KNOWN) as client:
        client.manifest("org/app", "1")
        client.head("org/app", "1")
        download.run(client)
        client.manifest("org/app", "1")
    assert len(ports) == 4
    assert len(set(ports)) == 1


# --- what is said


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b'{"errors": [{"code": "X", "message": "so it is"}, {"message": "not this"}]}', ": so it is"),
        ('{"errors": [{"message": "a\\u001b[31m\\nb\\u202e\\u2028ä"}]}'.encode(), ": a[31mbä"),
        (json.dumps({"errors": [{"message": "x" * 500}]}).encode(), ": " + "x" * 200),
        *((body, "") for body in (b"", b"{", b"[]", b"{}", b'{"errors": []}', b'{"errors": [{"message": 5}]}')),
        *(
            (body, "")
            for body in (b'{"errors": 5}', b'{"errors": [{"message": "\\n"}]}', b"<html>", b"\xff", b"[" * 9999)
        ),
        (b'{"errors": [{"message": "' + b"x" * 1_000_000 + b'"}]}', ""),
    ],
)
def test_what_a_registry_says_of_an_error(body: bytes, detail: str) -> None:
    with Server(always(400, body)) as server, client_of(server) as client:
        assert (
            refused(client) == f"network: {server.host} answers 400 (Bad Request) to the request for org/app:1{detail}"
        )


@pytest.mark.parametrize("credentials", [KNOWN, IDENTITY, Credentials("bearer", PASSWORD)])
@pytest.mark.parametrize("status", [400, 401, 404, 503])
def test_no_secret_comes_back_in_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, credentials: Credentials, status: int
) -> None:
    def answer(exchange: Exchange) -> None:
        sent = exchange.seen.headers.get("authorization")
        if sent is None:
            exchange.challenge(f'Basic, Bearer realm="http://{tokens.host}/"' if credentials is IDENTITY else "Basic")
        else:
            body = json.dumps({"errors": [{"message": f"no: {sent} {PASSWORD}"}]}).encode()
            exchange.reply(status, body)

    with Server(token) as tokens, Server(answer) as server, client_of(server, credentials) as client:
        message = refused(client)
        assert PASSWORD not in repr(client)
    assert ": no: " in message
    assert "***" in message
    assert "Bearer good" not in message
    assert not any(secret in caplog.text for secret in SECRETS)


def test_importing_it_does_not_import_requests() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from vmette.providers.oci import auth, client, reference;"
        "sys.exit(any(name in sys.modules for name in ('requests', 'urllib3', 'ssl')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
