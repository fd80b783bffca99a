"""One file from a URL, over connections that may break.

The server is taken to be hostile: sizes and times are bounded, and it gets no credentials, of which there are none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from .base import InvalidSpec, NetworkError, ProviderIOError
from .http import Call, Origin, Transient, check_url, printable, refusal, session, shown

if TYPE_CHECKING:
    import requests

MAX_VALIDATOR = 512
"""The longest ETag or Last-Modified that is kept."""


@dataclass(frozen=True)
class Fetched:
    """What the server said of the file."""

    etag: str | None
    last_modified: str | None
    size: int
    """Bytes that were written."""
    not_modified: bool = False
    """Whether the conditions in the headers were met, and nothing was written."""


def fetch(
    url: str,
    target: Path,
    *,
    max_bytes: int,
    limit: str = "",
    headers: Mapping[str, str] | None = None,
    advance: Callable[[int, int | None], None] = lambda done, total: None,  # noqa: ARG005
    cancelled: Callable[[], bool] = lambda: False,
    attempts: int | None = None,
) -> Fetched:
    """Downloads `url` (http or https) to `target`, which is there afterwards only if that worked.

    Args:
        url: Without fragment.
        target: Is overwritten. No two may write to it at once.
        max_bytes: The most that is taken.
        limit: What says so, for messages.
        headers: Conditions: If-None-Match, If-Modified-Since.
        advance: Is told how many bytes there are and how many there will be, if the server says so.
        cancelled: Is asked now and then whether to give up; from two threads.
        attempts: In place of http.ATTEMPTS.

    Raises:
        InvalidSpec: it is no such URL.
        NetworkError: it is not there or not readable, or larger than `max_bytes`.
        ProviderIOError: `target` cannot be written.
        Cancelled: `cancelled` said so.
    """
    check_url(url)
    try:
        with target.open("wb") as file, ExitStack() as stack:
            stack.callback(target.unlink, missing_ok=True)
            download = _Download(shown(url), cancelled, url, file, max_bytes, limit, headers or {}, advance)
            fetched = download.retry(download.attempt, lambda: download.have, attempts)
            file.flush()
            if not fetched.not_modified:
                stack.pop_all()
            return fetched
    except OSError as error:
        raise ProviderIOError(error) from error


@dataclass(eq=False, repr=False)
class _Download(Call):
    """A download, with what there is of it after the attempts so far."""

    url: str
    file: IO[bytes]
    max_bytes: int
    limit: str
    headers: Mapping[str, str]
    advance: Callable[[int, int | None], None]
    have: int = 0
    etag: str | None = None
    """Of what there is, if going on with it is safe."""
    modified: str | None = None

    def permit(self, origin: Origin, target: Origin | None, url: str) -> Origin:
        """Wherever it is, except from https to http."""
        if target is None:
            raise NetworkError(f"{self.what}: {origin.host} redirects to where vmette cannot go")
        if target.scheme == "http" and origin.scheme == "https":
            raise NetworkError(f"{self.what}: {origin.host} redirects from https to {shown(url)}")
        return target

    def attempt(self) -> Fetched:
        """Fetches what is missing."""
        with session() as ours:
            resuming = self.have > 0 and self.etag is not None
            if resuming:
                headers = {"Range": f"bytes={self.have}-", "If-Range": self.etag or ""}
            else:
                self._restart()
                headers = dict(self.headers)
            response, _ = self.send(ours, "GET", self.url, headers)
            with response:
                return self._take(response, resuming, bool(headers))

    def _take(self, response: requests.Response, resuming: bool, conditional: bool) -> Fetched:
        status = response.status_code
        etag, modified = (_validator(response, name) for name in ("ETag", "Last-Modified"))
        if status == 304 and not resuming and conditional:
            return Fetched(etag, modified, 0, True)
        if resuming and status in {412, 416}:
            self._restart()
            raise Transient(f"{self.what}: the server answers {status} to the request for the rest", 0)
        if status == 206 and resuming:
            if (etag or self.etag) != self.etag:
                self._restart()
                raise Transient(f"{self.what} has changed while it was fetched", 0)
            etag, modified = self.etag, self.modified
            total = self._rest(response)
        elif status == 200:
            self._restart()
            total = _length(response)
        else:
            final = shown(response.url or "")
            raise refusal(response, f"{self.what}: {'the server' if final == self.what else final}")
        if total is not None and total > self.max_bytes:
            raise self._too_large(f", namely {total}")
        strong = etag is not None and etag.startswith('"') and response.headers.get("Accept-Ranges") != "none"
        self.etag, self.modified = etag if strong else None, modified
        self.advance(self.have, total)
        for chunk in self.chunks(response):
            if self.have + len(chunk) > self.max_bytes:
                raise self._too_large()
            self.file.write(chunk)
            self.have += len(chunk)
            self.advance(self.have, total)
        if total is not None and self.have != total:
            raise Transient(f"{self.what} ends after {self.have} of {total} bytes")
        return Fetched(etag, modified, self.have)

    def _restart(self) -> None:
        self.have = 0
        self.etag = None
        self.file.seek(0)
        self.file.truncate()

    def _too_large(self, detail: str = "") -> NetworkError:
        limit = f" ({self.limit})" if self.limit else ""
        return NetworkError(f"{self.what} has more than {self.max_bytes} bytes{limit}{detail}")

    def _rest(self, response: requests.Response) -> int | None:
        """How many bytes there will be when the rest has come."""
        told = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19}|\*)", told.strip(), re.IGNORECASE)
        if match is None or int(match[1]) != self.have:
            have = self.have
            self._restart()
            raise Transient(f"{self.what}: the server sends {printable(told)!r}, not what follows byte {have}")
        if match[2] != "*":
            return int(match[2])
        length = _length(response)
        return None if length is None else self.have + length


def _length(response: requests.Response) -> int | None:
    """The body's length, if the server says it."""
    told = response.headers.get("Content-Length", "").strip()
    if "Transfer-Encoding" in response.headers or re.fullmatch("[0-9]{1,19}", told) is None:
        return None
    return int(told)


def _validator(response: requests.Response, name: str) -> str | None:
    """A header that is sent back later, if it is fit for that."""
    told = response.headers.get(name, "").strip()
    return told if re.fullmatch("[ -~]+", told) and len(told) <= MAX_VALIDATOR else None


def file_path(url: str) -> Path:
    """The path that a `file://` URL means.

    Raises:
        InvalidSpec: it has a host, is relative, or is malformed.
    """
    rest = url.partition("://")[2]
    host, slash, path = rest.partition("/")
    if not slash or host.lower() not in {"", "localhost"}:
        raise InvalidSpec(
            f"{shown(url)}: a file URL has an absolute path and no host, file:///path or file://localhost/path"
        )
    if "?" in path:
        raise InvalidSpec(f"{shown(url)}: a file URL has no query; write ? as %3F")
    if re.search("%(?![0-9a-fA-F]{2})", path):
        raise InvalidSpec(f"{shown(url)}: there is a % without two hexadecimal digits after it; write % as %25")
    try:
        decoded = unquote_to_bytes(os.fsencode(path))
    except ValueError:  # half of a surrogate pair
        decoded = b"\0"
    if b"\0" in decoded:
        raise InvalidSpec(f"{shown(url)}: no path has such a character in it")
    return Path("/" + os.fsdecode(decoded))
