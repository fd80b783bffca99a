"""`vmette.providers.download`: one file from a URL, from servers that do what they should not."""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.providers import web
from tests.providers.web import Handler, Site
from vmette.providers import InvalidSpec, NetworkError, ProviderIOError, http
from vmette.providers.base import Cancelled
from vmette.providers.download import Fetched, fetch, file_path
from vmette.providers.http import shown

DATA = bytes(range(256)) * 2048  # half a megabyte


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    web.hurry(monkeypatch)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def get(url: str, target: Path, max_bytes: int = 1 << 20) -> Fetched:
    return fetch(url, target, max_bytes=max_bytes)


def problem(url: str, target: Path, max_bytes: int = 1 << 20) -> str:
    with pytest.raises(NetworkError) as caught:
        get(url, target, max_bytes)
    assert not target.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is right ---------------------------------------------------------------------------------------------------


def test_a_file_is_fetched(site: Site, target: Path) -> None:
    site.answers["/a"] = web.file(DATA)
    seen: list[tuple[int, int | None]] = []
    fetched = fetch(
        f"{site.url}/a", target, max_bytes=len(DATA), advance=lambda done, total: seen.append((done, total))
    )
    assert target.read_bytes() == DATA
    assert fetched == Fetched(web.etag(DATA), None, len(DATA))
    assert seen[0] == (0, len(DATA))
    assert seen[-1] == (len(DATA), len(DATA))
    ((_, headers),) = site.requests
    assert headers["Accept-Encoding"] == "identity"
    assert headers["User-Agent"].startswith("vmette/")
    assert headers["Range"] is None


@pytest.mark.parametrize("chunked", [True, False])
def test_a_file_of_unknown_size_is_fetched(site: Site, target: Path, chunked: bool) -> None:
    def answer(handler: Handler) -> None:
        handler.head(200, **({"Transfer_Encoding": "chunked"} if chunked else {"Connection": "close"}))
        handler.body(b"5\r\nhello\r\n0\r\n\r\n" if chunked else b"hello")
        handler.close_connection = True

    site.answers["/a"] = answer
    assert get(f"{site.url}/a", target).size == 5
    assert target.read_bytes() == b"hello"


def test_an_empty_file_is_fetched(site: Site, target: Path) -> None:
    site.answers["/a"] = web.file(b"")
    assert get(f"{site.url}/a", target).size == 0
    assert target.read_bytes() == b""


def test_what_has_not_changed_is_not_sent(site: Site, target: Path) -> None:
    site.answers["/a"] = web.file(DATA)
    condition = {"If-None-Match": web.etag(DATA)}
    assert fetch(f"{site.url}/a", target, max_bytes=1, headers=condition) == Fetched(web.etag(DATA), None, 0, True)
    assert not target.exists()


def test_nobody_has_asked_whether_it_has_changed(site: Site, target: Path) -> None:
    site.answers["/a"] = web.status(304)
    assert problem(f"{site.url}/a", target).endswith("the server answers 304 (Not Modified)")


def test_what_was_there_before_is_overwritten(site: Site, target: Path) -> None:
    target.write_bytes(DATA * 2)
    site.answers["/a"] = web.file(b"new")
    get(f"{site.url}/a", target)
    assert target.read_bytes() == b"new"


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_connection_that_breaks_is_gone_on_with(site: Site, target: Path) -> None:
    site.answers["/a"] = web.file(DATA, cuts=[100_000, 200_000])
    assert get(f"{site.url}/a", target).etag == web.etag(DATA)
    assert target.read_bytes() == DATA
    assert [headers["Range"] for _, headers in site.requests] == [None, "bytes=100000-", "bytes=300000-"]
    assert [headers["If-Range"] for _, headers in site.requests[1:]] == [web.etag(DATA)] * 2


@pytest.mark.parametrize("kind", ["weak", "none", "no ranges", "refused"])
def test_without_a_strong_etag_or_ranges_it_starts_anew(site: Site, target: Path, kind: str) -> None:
    tag = {"weak": 'W/"1"', "none": ""}.get(kind)
    site.answers["/a"] = web.file(DATA, cuts=[100_000, 50_000], ranges=kind != "no ranges", tag=tag)
    if kind == "refused":
        site.answers["/a"] = web.sequence(
            web.file(DATA, cuts=[10]), web.status(416, Content_Range="bytes */5"), web.file(DATA)
        )
    get(f"{site.url}/a", target)
    assert target.read_bytes() == DATA
    if kind in {"weak", "none"}:
        assert [headers["Range"] for _, headers in site.requests] == [None] * 3


def test_a_file_that_changes_meanwhile_is_not_mixed(site: Site, target: Path) -> None:
    site.answers["/a"] = web.sequence(web.file(DATA, cuts=[100_000]), web.file(DATA[::-1]))
    assert get(f"{site.url}/a", target).etag == web.etag(DATA[::-1])
    assert target.read_bytes() == DATA[::-1]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Range": f"bytes 5-{len(DATA) - 1}/{len(DATA)}"},
        {"Content_Range": "nonsense"},
        {},
        {"Content_Range": f"bytes 100000-{len(DATA) - 1}/{len(DATA)}", "ETag": '"another"'},
    ],
)
def test_a_part_that_is_another_one_is_not_appended(site: Site, target: Path, headers: dict[str, str]) -> None:
    def wrong(handler: Handler) -> None:
        handler.head(206, Content_Length=4, **headers)
        handler.body(b"evil")

    site.answers["/a"] = web.sequence(web.file(DATA, cuts=[100_000]), wrong, web.file(DATA))
    get(f"{site.url}/a", target)
    assert target.read_bytes() == DATA
    assert site.requests[2][1]["Range"] is None


def test_parts_in_small_pieces(site: Site, target: Path) -> None:
    """A server that gives no more than 100000 bytes at a time."""

    def answer(handler: Handler) -> None:
        match = re.fullmatch("bytes=([0-9]+)-", handler.headers.get("Range", "bytes=0-"))
        assert match is not None
        start = int(match[1])
        piece = DATA[start : start + 100_000]
        if start == 0:
            web.file(DATA, cuts=[100_000])(handler)
            return
        where = f"bytes {start}-{start + len(piece) - 1}/{len(DATA)}"
        handler.head(206, Content_Length=len(piece), ETag=web.etag(DATA), Content_Range=where)
        handler.body(piece)

    site.answers["/a"] = answer
    get(f"{site.url}/a", target)
    assert target.read_bytes() == DATA
    assert len(site.requests) == 6


def test_a_truncated_file_is_an_error(site: Site, target: Path) -> None:
    def answer(handler: Handler) -> None:
        handler.head(200, Content_Length=1000)
        handler.body(b"x" * 10)
        handler.close_connection = True

    site.answers["/a"] = answer
    assert re.search(r"/a: .* \(5 times\)$", problem(f"{site.url}/a", target))
    assert len(site.requests) == 5


def test_a_chunked_body_that_is_cut_is_an_error(site: Site, target: Path) -> None:
    def answer(handler: Handler) -> None:
        handler.head(200, Transfer_Encoding="chunked")
        handler.body(b"a\r\n0123456789\r\n")
        handler.close_connection = True

    site.answers["/a"] = answer
    problem(f"{site.url}/a", target)


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(site: Site, target: Path, code: int) -> None:
    site.answers["/a"] = web.sequence(web.status(code), web.status(code, Retry_After=0), web.file(DATA))
    get(f"{site.url}/a", target)
    assert target.read_bytes() == DATA


def test_retry_after_is_heeded(site: Site, target: Path) -> None:
    site.answers["/a"] = web.sequence(web.status(429, Retry_After=1), web.file(DATA))
    before = time.monotonic()
    get(f"{site.url}/a", target)
    assert 1 <= time.monotonic() - before < 5


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("0", 0), ("7", 7), ("3600", 60), ("9" * 5000, 60), ("-1", None), ("", None), ("soon", None), ("1.5", None)),
        (formatdate(time.time() + 86400, usegmt=True), 60),
        (formatdate(0, usegmt=True), 0),
    ],
)
def test_retry_after_is_capped(text: str, seconds: float | None) -> None:
    assert http.retry_after(text) == seconds


def test_hope_ends(site: Site, target: Path) -> None:
    site.answers["/a"] = web.status(503)
    message = f"network: {site.url}/a: the server answers 503 (Service Unavailable) (5 times)"
    assert problem(f"{site.url}/a", target) == message
    site.requests.clear()
    with pytest.raises(NetworkError, match=r"\(Service Unavailable\)$"):
        fetch(f"{site.url}/a", target, max_bytes=1, attempts=1)
    assert len(site.requests) == 1


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 418, 501, 599, 206, 204])
def test_what_does_not_pass_is_not_tried_again(site: Site, target: Path, code: int) -> None:
    site.answers["/a"] = web.status(code)
    assert f"{site.url}/a: the server answers {code}" in problem(f"{site.url}/a", target)
    assert len(site.requests) == 1


def test_nobody_listens(target: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert problem(f"{url}/a", target) == f"network: {url}/a: Connection refused (5 times)"


def test_nobody_has_that_name(target: Path) -> None:
    message = problem("http://vmette.invalid/a", target)
    assert message.startswith("network: http://vmette.invalid/a: ")


@pytest.mark.parametrize("host", ["..", "a..b", "-", "_", f"{'a' * 64}.invalid", "*"])
def test_hosts_that_cannot_be(target: Path, host: str) -> None:
    with pytest.raises((NetworkError, InvalidSpec)) as caught:
        get(f"http://{host}/a", target)
    assert "times" not in str(caught.value)


def test_no_http_at_all(target: Path, site: Site) -> None:
    site.answers["/a"] = lambda handler: handler.body(b"SSH-2.0-OpenSSH_9.2\r\n")
    problem(f"{site.url}/a", target)


# --- sizes and times -------------------------------------------------------------------------------------------------


def test_a_size_above_the_limit_is_refused_at_once(site: Site, target: Path) -> None:
    def answer(handler: Handler) -> None:
        handler.head(200, Content_Length=1 << 40)
        handler.server.stopping.wait(20)

    site.answers["/a"] = answer
    before = time.monotonic()
    message = problem(f"{site.url}/a", target)
    assert message == f"network: {site.url}/a has more than {1 << 20} bytes, namely {1 << 40}"
    assert time.monotonic() - before < 5


def test_a_body_without_end_is_cut(site: Site, target: Path) -> None:
    site.answers["/a"] = web.endless
    assert problem(f"{site.url}/a", target) == f"network: {site.url}/a has more than {1 << 20} bytes"
    assert len(site.requests) == 1


def test_the_limit_itself_is_allowed(site: Site, target: Path) -> None:
    site.answers["/a"] = web.file(DATA)
    assert get(f"{site.url}/a", target, len(DATA)).size == len(DATA)
    problem(f"{site.url}/a", target, len(DATA) - 1)


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;",
        b"HTTP/1.1 200 OK\r\nX-Header: ",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
    ids=["body", "chunk extension", "header", "until the end"],
)
def test_a_slow_server_is_left(
    site: Site, target: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(http, "SLOW_WINDOW", 0.3)
    monkeypatch.setattr(http, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(http, "ATTEMPTS", 2)
    site.answers["/a"] = web.drip(start)
    message = problem(f"{site.url}/a", target)
    assert re.search(r"too slowly|does not answer within", message)
    assert message.endswith("(2 times)")


def test_a_silent_server_is_left(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "READ_TIMEOUT", 0.2)
    monkeypatch.setattr(http, "ATTEMPTS", 1)

    def answer(handler: Handler) -> None:
        handler.server.stopping.wait(20)

    site.answers["/a"] = answer
    problem(f"{site.url}/a", target)


def test_a_server_that_is_fast_enough_is_not_left(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SLOW_WINDOW", 0.1)

    def answer(handler: Handler) -> None:
        handler.head(200, Content_Length=8000)
        for _ in range(8):
            handler.body(b"x" * 1000)
            time.sleep(0.08)

    site.answers["/a"] = answer
    assert get(f"{site.url}/a", target).size == 8000
    assert len(site.requests) == 1


# --- cancelling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [web.status(429, Retry_After=60), web.drip(b"HTTP/1.1 200 OK\r\n\r\n", 30), web.drip(b"HTTP/1.1 200", 30)],
    ids=["waiting", "in the body", "in the headers"],
)
def test_it_is_cancelled_soon(site: Site, target: Path, answer: web.Answer) -> None:
    site.answers["/a"] = answer
    cancelled = threading.Event()
    timer = threading.Timer(0.5, cancelled.set)
    timer.start()
    before = time.monotonic()
    with pytest.raises(Cancelled):
        fetch(f"{site.url}/a", target, max_bytes=1 << 20, cancelled=cancelled.is_set)
    assert time.monotonic() - before < 3
    assert not target.exists()
    timer.join()


def test_no_thread_is_left(site: Site, target: Path) -> None:
    site.answers["/a"] = web.file(DATA)
    get(f"{site.url}/a", target)
    assert not [thread for thread in threading.enumerate() if thread.name == "vmette-download"]


# --- redirects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(site: Site, target: Path, code: int) -> None:
    site.answers["/a"] = web.redirect("/b?x=1#fragment", code)
    site.answers["/b"] = web.redirect(f"{site.url}/c/../d", code)
    site.answers["/d"] = site.answers["/c/../d"] = web.file(DATA)
    get(f"{site.url}/a", target)
    assert target.read_bytes() == DATA


def test_a_circle_of_redirects_ends(site: Site, target: Path) -> None:
    site.answers["/a"] = web.redirect("/a")
    assert problem(f"{site.url}/a", target) == f"network: {site.url}/a: redirected more than 5 times"
    assert len(site.requests) == 6


def test_a_redirect_with_a_body_without_end(site: Site, target: Path) -> None:
    """requests would read all of it."""
    site.answers["/a"] = lambda handler: web.endless(handler, code=302, Location="/b")
    site.answers["/b"] = web.file(DATA)
    get(f"{site.url}/a", target)
    assert target.read_bytes() == DATA


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://host/a",
        "http://user:secret@host/a",
        "http://[::1/a",
        "//host:99999/a",
        "http://host\\@other/",
        "//h\xf6st/a",
        "mailto:a@b",
    ],
)
def test_redirects_to_what_is_no_web_server(site: Site, target: Path, location: str) -> None:
    site.answers["/a"] = web.redirect(location)
    message = problem(f"{site.url}/a", target)
    assert message == f"network: {site.url}/a: 127.0.0.1 redirects to where vmette cannot go"
    assert "secret" not in message


# --- https -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A site with https, whose certificate is trusted."""
    certificate = tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-subj", "/CN=vmette", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing")
    subprocess.run([*command, "-keyout", certificate, "-out", f"{certificate}.2"], check=True, capture_output=True)
    with certificate.open("a") as file:
        file.write(Path(f"{certificate}.2").read_text())
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with web.site(certificate) as server:
        yield server


def test_https(secure: Site, target: Path) -> None:
    secure.answers["/a"] = web.file(DATA, cuts=[100_000])
    assert get(f"{secure.url}/a", target).size == len(DATA)
    assert target.read_bytes() == DATA


def test_a_certificate_that_is_not_trusted(secure: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    secure.answers["/a"] = web.file(DATA)
    message = problem(f"{secure.url}/a?secret", target)
    assert message.startswith(f"network: {secure.url}/a: the certificate of 127.0.0.1 is not trusted: ")
    assert secure.requests == []
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/missing")
    assert "/missing" in problem(f"{secure.url}/a", target)


def test_https_is_not_left_for_http(secure: Site, site: Site, target: Path) -> None:
    secure.answers["/a"] = web.redirect(f"{site.url}/b?secret")
    secure.answers["/c"] = web.redirect("/d")
    site.answers["/a"] = web.redirect(f"{secure.url}/c")
    site.answers["/b"] = secure.answers["/d"] = web.file(DATA)
    message = f"network: {secure.url}/a: 127.0.0.1 redirects from https to {site.url}/b"
    assert problem(f"{secure.url}/a", target) == message
    assert site.requests == []
    get(f"{site.url}/a", target)  # the other way is welcome
    secure.answers["/c"] = web.redirect(f"{site.url}/b")
    problem(f"{site.url}/a", target)  # and there is no way back


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Header: "])
def test_a_slow_server_with_https(secure: Site, target: Path, monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(http, "SLOW_WINDOW", 0.3)
    monkeypatch.setattr(http, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(http, "ATTEMPTS", 1)
    secure.answers["/a"] = web.drip(start)
    assert re.search(r"too slowly|does not answer within", problem(f"{secure.url}/a", target))


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_netrc_and_cookies_are_not_sent(
    site: Site, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    site.answers["/a"] = web.status(302, Location="/b", Set_Cookie="a=b; path=/")
    site.answers["/b"] = web.file(DATA)
    get(f"{site.url}/a", target)
    for _, headers in site.requests:
        assert headers["Authorization"] is None
        assert headers["Cookie"] is None


def test_a_proxy_does_not_see_what_stays_here(site: Site, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    site.answers["/a"] = web.file(DATA)
    get(f"{site.url}/a", target)


def test_the_query_is_sent_but_not_shown(site: Site, target: Path) -> None:
    site.answers["/a"] = web.sequence(web.status(404), web.redirect("/b?token=secret"))
    site.answers["/b"] = web.status(404)
    assert problem(f"{site.url}/a?token=secret", target).endswith("/a: the server answers 404 (Not Found)")
    assert site.requests[0][0] == "/a?token=secret"
    message = problem(f"{site.url}/a?token=secret", target)
    assert message == f"network: {site.url}/a: {site.url}/b answers 404 (Not Found)"


@pytest.mark.parametrize("url", ["http://user:secret@host/a", "https://secret@host", "http://a@b:secret@host?x"])
def test_credentials_in_a_url_are_refused(target: Path, url: str) -> None:
    with pytest.raises(InvalidSpec, match="a user name or password in a URL is not supported") as caught:
        get(url, target)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        *("", "http:/a", "http://", "http:///a", "ftp://host/a", "http://h st/a", "http://host/a b", "http://host/\n"),
        *("http://h\xf6st/", "http://host:port/", "http://host:0/", "http://host:65536/", "http://[::1/", "//host/a"),
        *(
            "http://host\\a",
            "http://host/a\\b",
            "http://host/#a",
            "http://host/\xf6",
            "file:///etc/passwd",
            "a" * 10000,
        ),
    ],
)
def test_what_is_no_url_is_refused(target: Path, url: str) -> None:
    with pytest.raises(InvalidSpec, match="is not a URL that vmette can use"):
        get(url, target)
    assert not target.exists()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("https://host:8443/a/b?token=secret#fragment", "https://host:8443/a/b"),
        ("http://user:secret@host/a@b", "http://host/a@b"),
        ("http://host?secret", "http://host"),
        ("http://host/\x1b[31m", "http://host/[31m"),
    ],
)
def test_a_url_is_shown_without_secrets(url: str, text: str) -> None:
    assert shown(url) == text


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///a/b.tar", "/a/b.tar"),
        ("file://localhost/a", "/a"),
        ("file://LOCALHOST/a", "/a"),
        ("file:///a%20b%23%3f%25.tar", "/a b#?%.tar"),
        ("file:///%e4%b8%ad", "/中"),
        ("file:///中", "/中"),
        ("file:///%ff", os.fsdecode(b"/\xff")),
        ("file:///a+b", "/a+b"),
    ],
)
def test_file_urls(url: str, path: str) -> None:
    assert file_path(url) == Path(path)


@pytest.mark.parametrize(
    "url",
    [
        *("file://", "file://a", "file://host/a", "file://./a", "file:///a?b", "file:///%zz", "file:///100%"),
        *("file:///%0", "file:///a%00b", "file:///\0", "file:///\ud800", "file://127.0.0.1/a"),
    ],
)
def test_file_urls_that_are_refused(url: str) -> None:
    with pytest.raises(InvalidSpec):
        file_path(url)


def test_a_target_that_cannot_be_written(site: Site, tmp_path: Path) -> None:
    site.answers["/a"] = web.file(DATA)
    with pytest.raises(ProviderIOError, match="No such file or directory"):
        get(f"{site.url}/a", tmp_path / "missing/target")
    (tmp_path / "directory").mkdir()
    with pytest.raises(ProviderIOError, match="Is a directory"):
        get(f"{site.url}/a", tmp_path / "directory")
    assert site.requests == []


def test_a_disk_that_is_full(site: Site, target: Path) -> None:
    site.answers["/a"] = web.file(DATA)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ProviderIOError, match="File too large"):
            get(f"{site.url}/a", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not target.exists()
