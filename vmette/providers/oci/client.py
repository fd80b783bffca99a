"""Speaks to one registry: manifests and blobs, verified, over connections that may break.

Everything that a registry sends is taken to be hostile: sizes and times are bounded, digests are computed, and
credentials go to nobody but the registry and its own token service.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import urlencode, urljoin

from ..._version import __version__
from ..base import Cancelled, InvalidSpec, NetworkError, ProviderIOError
from .auth import Credentials, variable
from .reference import api_host, canonical_host, is_digest, is_repository, is_tag

if TYPE_CHECKING:  # requests takes a tenth of a second to import: only who talks to a registry pays for it
    import requests

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 15.0
READ_TIMEOUT = 60.0
SLOW_WINDOW, SLOW_RATE = 60.0, 1024
"""An attempt that brings less than SLOW_RATE bytes a second over SLOW_WINDOW seconds is broken off."""
ATTEMPTS = 5
"""So many may fail in a row; one that brought at least PROGRESS bytes starts the count anew."""
PROGRESS = 1 << 16
BACKOFF, MAX_BACKOFF = 0.5, 30.0
MAX_RETRY_AFTER = 60
POLL = 0.1
"""How long a wait goes on, at most, before `cancelled` is asked again."""
MAX_REDIRECTS = 5
MAX_MANIFEST = 4 << 20
MAX_ERROR = 1 << 16
MAX_TOKEN = 1 << 20
CHUNK = 1 << 18
POOL_SIZE = 16

MANIFEST_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1+"
_RETRIED = frozenset({429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Stricter than any URL parser, so that no two of them find different hosts in it: no user, no backslash, no escapes.
_URL = re.compile(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?(?:[/?#][!-\[\]-~]*)?", re.IGNORECASE)
_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # noqa: S105 (what RFC 9110 calls one)
_CHALLENGE = re.compile(rf'[\s,]*(?:({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))|({_TOKEN})(?=[\s,]|$))')

_NO_PROXIES: dict[str, Any] = {"http": None, "https": None, "all": None}

T = TypeVar("T")


class _WrongBlob(NetworkError):
    """What has come of a blob cannot become what its digest names."""


class _Transient(Exception):
    """What failed may work if it is tried again. Its text is that of the NetworkError if it does not."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Manifest:
    """A manifest or index, as its bytes; `digest` is of these."""

    media_type: str
    digest: str
    data: bytes


class _Origin(NamedTuple):
    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> _Origin | None:
        """Where `url` leads, None if that is not beyond doubt."""
        match = _URL.fullmatch(url)
        if match is None:
            return None
        scheme = match[1].lower()
        return cls(scheme, match[2].lower().strip("[]"), int(match[3] or {"http": 80, "https": 443}[scheme]))

    @property
    def loopback(self) -> bool:
        if self.host == "localhost":
            return True
        address = _address(self.host)
        return address is not None and (address == "::1" or address.startswith("127."))

    @property
    def plain_http(self) -> bool:
        """Whether http is good enough for this host."""
        listed = {entry.strip().lower() for entry in os.environ.get("VMETTE_OCI_PLAIN_HTTP", "").split(",")}
        names = {self.host, f"[{self.host}]"}
        return self.loopback or bool(listed & (names | {f"{name}:{self.port}" for name in names}))


def _address(host: str) -> str | None:
    """The IP address that `host` is, if it is one."""
    from ipaddress import ip_address

    try:
        return str(ip_address(host))
    except ValueError:
        return None


def _kin(one: str, other: str) -> bool:
    """Whether two hosts are under one roof: the same, or of the same parent, as auth.docker.io and its registry."""
    if one == other:
        return True
    parents = [host.split(".")[-2:] for host in (one, other)]
    return parents[0] == parents[1] and len(parents[0]) == 2 and not any(map(_address, (one, other)))


def _never() -> bool:
    return False


@dataclass(frozen=True)
class _Call:
    """What a public method was called for, and how to know that it need not go on."""

    repository: str
    what: str
    cancelled: Callable[[], bool]

    @property
    def scope(self) -> str:
        return f"repository:{self.repository}:pull"

    def check(self) -> None:
        if self.cancelled():
            raise Cancelled

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.check()
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, POLL))
            self.check()


class RegistryClient:
    """A registry's client. Several threads may use it at once; it is also a context manager that closes it."""

    def __init__(
        self, host: str, *, credentials: Credentials | None = None, user_agent: str = f"vmette/{__version__}"
    ) -> None:
        """`host` is that of a reference, with its port if any.

        Raises:
            InvalidSpec: it is no host.
        """
        self.host = canonical_host(host)
        origin = _Origin.of(f"https://{api_host(self.host)}")
        if origin is None or re.search("[/?#]", host):
            raise InvalidSpec(f"{host!r} is not the name of a registry")
        if origin.plain_http:
            origin = _Origin.of(f"http://{api_host(self.host)}") or origin
        self._origin = origin
        self._base = f"{origin.scheme}://{api_host(self.host)}/v2/"
        self._credentials = credentials
        self._initial = f"Bearer {credentials.secret}" if credentials and credentials.kind == "bearer" else None
        self._authorization: dict[str, str] = {}  # by scope
        self._lock = threading.Lock()
        self._session = _session(user_agent)

    def __repr__(self) -> str:
        return f"RegistryClient({self.host!r})"

    def __enter__(self) -> RegistryClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the idle connections."""
        self._session.close()

    def manifest(self, repository: str, selector: str, cancelled: Callable[[], bool] = _never) -> Manifest:
        """The manifest or index that `selector`, a tag or digest, names; of the media type that the registry says.

        Raises:
            InvalidSpec: the registry has it in the old schema 1 only, or a name is malformed.
            NetworkError: it is not there, not readable, larger than 4 MiB, or not what its digest says.
            Cancelled: `cancelled` said so.
        """
        call = _Call(repository, _checked(repository, selector), cancelled)
        return self._retry(lambda: self._manifest(call, selector), call)

    def _manifest(self, call: _Call, selector: str) -> Manifest:
        with self._request("GET", f"manifests/{selector}", call, {"Accept": ", ".join(MANIFEST_TYPES)}) as response:
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if media_type.startswith(_SCHEMA_1):
                raise InvalidSpec(
                    f"{self.host} has {call.what} as a schema 1 manifest only ({_printable(media_type)}), which is "
                    "obsolete and which vmette does not read"
                )
            data = self._read(response, MAX_MANIFEST, call)
            told = response.headers.get("Docker-Content-Digest")
        if len(data) > MAX_MANIFEST:
            raise NetworkError(f"{self.host}: the manifest of {call.what} is larger than {MAX_MANIFEST >> 20} MiB")
        if not data:  # http.client does not see that an answer was cut off in its header
            raise _Transient(f"{self.host} sends nothing for {call.what}")
        digest = selector if is_digest(selector) else _digest("sha256", data)
        for claim in (digest, told or digest):
            actual = _digest(claim.partition(":")[0], data) if is_digest(claim) else digest
            if actual != claim:
                raise NetworkError(
                    f"{self.host} sends a wrong manifest of {call.what}: its digest is not {_printable(claim)}"
                )
        return Manifest(media_type, digest, data)

    def head(self, repository: str, selector: str, cancelled: Callable[[], bool] = _never) -> str | None:
        """The digest that the registry says `selector` has now, None if it says none.

        Raises:
            InvalidSpec: a name is malformed.
            NetworkError: it is not there or not readable.
            Cancelled: `cancelled` said so.
        """
        call = _Call(repository, _checked(repository, selector), cancelled)
        return self._retry(lambda: self._head(call, selector), call)

    def _head(self, call: _Call, selector: str) -> str | None:
        with self._request("HEAD", f"manifests/{selector}", call, {"Accept": ", ".join(MANIFEST_TYPES)}) as response:
            self._read(response, 0, call)  # nothing, but the connection is free then
            digest = response.headers.get("Docker-Content-Digest", "")
        return digest if is_digest(digest) else None

    def blob(
        self,
        repository: str,
        digest: str,
        size: int,
        partial: Path,
        advance: Callable[[int], None],
        cancelled: Callable[[], bool] = _never,
    ) -> None:
        """Downloads a blob of `size` bytes to `partial`, going on from what is there. No two may do so at once.

        `advance` hears of every change in how many bytes there are: of those that were there already first, and of a
        negative number when the download starts anew. What is broken off leaves `partial` for the next time.

        Raises:
            InvalidSpec: a name is malformed.
            NetworkError: it is not there or not readable; or it is larger than `size`, or not what its digest says,
                and `partial` is gone.
            ProviderIOError: `partial` cannot be written.
            Cancelled: `cancelled` said so.
        """
        if not is_digest(digest):
            raise InvalidSpec(f"{_printable(digest)!r} is not a digest")
        _checked(repository, digest)
        call = _Call(repository, f"blob {digest} of {repository}", cancelled)
        try:
            with partial.open("a+b") as raw:
                self._complete(call, digest, size, _Partial(raw, digest, advance, call))
        except OSError as error:
            raise ProviderIOError(error) from error
        except _WrongBlob:
            partial.unlink(missing_ok=True)
            raise

    def _complete(self, call: _Call, digest: str, size: int, file: _Partial) -> None:
        inherited = file.have > 0
        while True:
            if file.have < size:
                self._retry(lambda: self._fetch(call, digest, size, file), call, file)
            actual = file.digest()
            if actual == digest:
                return
            if not inherited:
                raise _WrongBlob(f"{self.host} sends a wrong {call.what}: its digest is {actual}")
            inherited = False  # what an earlier run left may be to blame: it is replaced, once
            file.clear()

    def _fetch(self, call: _Call, digest: str, size: int, file: _Partial) -> None:
        """One attempt to get what is missing in `file`."""
        headers = {"Range": f"bytes={file.have}-"} if file.have else {}
        also = (206, 416) if file.have else ()
        with self._request("GET", f"blobs/{digest}", call, headers, also) as response:
            if response.status_code == 206:
                told = response.headers.get("Content-Range", "")
                match = re.match("bytes ([0-9]{1,19})-", told)
                if match is None or int(match[1]) != file.have:
                    raise NetworkError(
                        f"{self.host} sends {_printable(told)!r} of {call.what}, not what follows byte {file.have}"
                    )
            elif file.have:  # 200: it sends all of it; 416: it has less than there is here
                file.clear()
            if response.status_code == 416:
                raise _Transient(f"{self.host} answers 416 to the request for the rest of {call.what}", 0)
            for chunk in self._chunks(response, call):
                if file.have + len(chunk) > size:
                    raise _WrongBlob(f"{self.host} sends more of {call.what} than its {size} bytes")
                file.append(chunk)
        if file.have < size:
            raise _Transient(f"{self.host} ends {call.what} after {file.have} of {size} bytes")

    @contextmanager
    def _request(
        self, method: str, path: str, call: _Call, headers: Mapping[str, str], also: Collection[int] = ()
    ) -> Iterator[requests.Response]:
        """Asks the registry, authorised as it wants it. The answer's status is 200 or in `also`."""
        url = f"{self._base}{call.repository}/{path}"
        used = self._authorization.get(call.scope, self._initial)
        fresh = False
        while True:
            authorized = {**headers, "Authorization": used} if used else headers
            response, origin = self._send(method, url, authorized, call)
            with response:
                if response.status_code == 401 and origin == self._origin and not fresh:
                    detail = self._detail(response, call)
                    challenges = _challenges(response.headers.get("WWW-Authenticate", ""))
                    used = self._authorize(challenges, used, call, detail)
                    fresh = True
                    continue
                if response.status_code != 200 and response.status_code not in also:
                    self._refuse(response, origin, call)
                yield response
                return

    def _authorize(
        self, challenges: Mapping[str, Mapping[str, str]], used: str | None, call: _Call, detail: str
    ) -> str:
        """The header that answers the challenges to a request that was sent with `used`."""
        while not self._lock.acquire(timeout=POLL):
            call.check()
        try:
            known = self._authorization.get(call.scope)
            if known is not None and known != used:  # another thread was faster
                return known
            credentials = self._credentials
            if "bearer" in challenges and self._initial is None:
                header = f"Bearer {self._token(challenges['bearer'], call)}"
            elif "basic" in challenges and credentials and credentials.kind == "basic":
                header = f"Basic {_basic(credentials)}"
            else:
                self._unauthorized(self.host, call, detail)
            self._authorization[call.scope] = header
            return header
        finally:
            self._lock.release()

    def _token(self, challenge: Mapping[str, str], call: _Call) -> str:
        realm = challenge.get("realm", "").partition("#")[0]
        origin = _Origin.of(realm)
        if origin is None:
            raise NetworkError(f"{self.host} sends for a token to an address that cannot be used")
        if origin.scheme == "http" and not (origin.loopback and self._origin.plain_http):
            raise NetworkError(f"{self.host} sends for a token to {origin.host} by plain http, which is not safe")
        credentials = self._credentials
        if credentials and not _kin(origin.host, self._origin.host):
            logger.warning("%s sends for a token to %s, a stranger: asked without credentials", self.host, origin.host)
            credentials = None
        query = {"service": challenge.get("service", ""), "scope": call.scope}
        if credentials and credentials.kind == "identity":
            form = {**query, "grant_type": "refresh_token", "refresh_token": credentials.secret, "client_id": "vmette"}
            response, origin = self._send("POST", realm, {}, call, form)
        else:
            url = realm + ("&" if "?" in realm else "?") + urlencode({key: text for key, text in query.items() if text})
            headers = {"Authorization": f"Basic {_basic(credentials)}"} if credentials else {}
            response, origin = self._send("GET", url, headers, call)
        with response:
            if response.status_code != 200:
                self._refuse(response, origin, call, token=True)
            body = self._read(response, MAX_TOKEN, call)
        try:
            answer = json.loads(body)
            token = answer.get("token") or answer.get("access_token")
        except (ValueError, RecursionError, AttributeError):
            token = None
        if not isinstance(token, str) or re.fullmatch("[!-~]+", token) is None:
            raise NetworkError(f"{origin.host} sends no usable token for {call.what} of {self.host}")
        return token

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], call: _Call, form: Mapping[str, str] | None = None
    ) -> tuple[requests.Response, _Origin]:
        """Sends a request and follows redirects: the answer, and who gave it."""
        origin = _Origin.of(url)
        assert origin is not None
        for _ in range(MAX_REDIRECTS + 1):
            call.check()
            response = self._exchange(method, url, origin, headers, call, form)
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or location is None:
                return response, origin
            with response:
                self._read(response, MAX_ERROR, call)
            try:
                url = urljoin(url, location).partition("#")[0]
            except ValueError:
                url = ""
            target = _Origin.of(url)
            if target is None or form is not None:  # a form has a secret in it: it goes nowhere else
                raise NetworkError(f"{origin.host} redirects the request for {call.what} to where it cannot go")
            if target.scheme == "http" and (origin.scheme == "https" or not target.plain_http):
                raise NetworkError(
                    f"{origin.host} redirects the request for {call.what} to {target.host} by plain http"
                )
            if target != origin:
                headers = {name: text for name, text in headers.items() if name != "Authorization"}
            origin = target
        raise NetworkError(f"{self.host} redirects the request for {call.what} more than {MAX_REDIRECTS} times")

    def _exchange(
        self,
        method: str,
        url: str,
        origin: _Origin,
        headers: Mapping[str, str],
        call: _Call,
        form: Mapping[str, str] | None,
    ) -> requests.Response:
        from urllib3.exceptions import HTTPError

        try:
            return self._session.request(
                method,
                url,
                headers=dict(headers),
                data=None if form is None else dict(form),
                stream=True,
                allow_redirects=False,
                timeout=(CONNECT_TIMEOUT, READ_TIMEOUT),
                # No proxy of the environment is to see what is meant to stay on this computer.
                proxies=dict(_NO_PROXIES) if origin.loopback else None,
            )
        except (OSError, ValueError, HTTPError) as error:
            raise _failure(error, origin.host, call.what) from None

    def _chunks(self, response: requests.Response, call: _Call) -> Iterator[bytes]:
        """The body's bytes as they come."""
        from urllib3.exceptions import HTTPError

        since, count = time.monotonic(), 0
        while True:
            call.check()
            try:
                # Not read(), which would wait for all of CHUNK, however slowly it comes.
                chunk = response.raw.read1(CHUNK, decode_content=False)
            except (OSError, ValueError, HTTPError) as error:
                raise _failure(error, self.host, call.what) from None
            if not chunk:
                return
            yield chunk
            count += len(chunk)
            elapsed = time.monotonic() - since
            if elapsed >= SLOW_WINDOW:
                if count < SLOW_RATE * elapsed:
                    raise _Transient(f"{self.host} sends {call.what} too slowly: {count} bytes in {elapsed:.0f} s")
                since, count = time.monotonic(), 0

    def _read(self, response: requests.Response, limit: int, call: _Call) -> bytes:
        """The body, or a beginning of it that is longer than `limit`."""
        body = bytearray()
        for chunk in self._chunks(response, call):
            body += chunk
            if len(body) > limit:
                break
        return bytes(body)

    def _refuse(self, response: requests.Response, origin: _Origin, call: _Call, token: bool = False) -> NoReturn:
        """Raises what an answer that is no success means."""
        status = response.status_code
        detail = self._detail(response, call)
        who = self.host if origin == self._origin else f"{origin.host}, where {self.host} sends to,"
        if status in {401, 403} and (token or origin == self._origin):
            self._unauthorized(who, call, detail)
        if status == 404 and not token:
            raise NetworkError(f"{who} has no {call.what}{detail}")
        phrase = f" ({HTTPStatus(status).phrase})" if status in set(HTTPStatus) else ""
        message = f"{who} answers {status}{phrase} to the request for {'a token for ' * token}{call.what}{detail}"
        if status in _RETRIED:
            raise _Transient(message, _retry_after(response.headers.get("Retry-After", "")))
        raise NetworkError(message)

    def _unauthorized(self, who: str, call: _Call, detail: str) -> NoReturn:
        how = "with the credentials there are" if self._credentials else "without credentials"
        raise NetworkError(
            f"not authorised: {who} does not give {call.what} {how}{detail}; set {variable(self.host)}=USER:SECRET, "
            f"or use `docker login {self.host}`"
        )

    def _detail(self, response: requests.Response, call: _Call) -> str:
        """The first message in a registry's error, which is JSON, without our secrets if they come back in it."""
        try:
            message = json.loads(self._read(response, MAX_ERROR, call))["errors"][0]["message"]
        except (_Transient, NetworkError, ValueError, RecursionError, LookupError, TypeError):
            return ""
        if not isinstance(message, str):
            return ""
        secrets = {header.partition(" ")[2] for header in tuple(self._authorization.values())}
        if self._credentials:
            secrets |= {self._credentials.secret, _basic(self._credentials)}
        for secret in sorted(filter(None, secrets), key=len, reverse=True):
            message = message.replace(secret, "***")
        return f": {message}" if (message := _printable(message)) else ""

    def _retry(self, attempt: Callable[[], T], call: _Call, progress: _Partial | None = None) -> T:
        """The result of `attempt`, repeated as long as there is hope."""
        import random

        failures = 0
        while True:
            before = progress.have if progress else 0
            try:
                return attempt()
            except _Transient as error:
                brought = progress.have - before if progress else 0
                failures = 1 if brought >= PROGRESS else failures + 1
                if failures >= ATTEMPTS:
                    raise NetworkError(f"{error} ({failures} times)") from None
                delay = error.retry_after
                if delay is None:
                    # Jitter, so that many clients do not come back together.
                    delay = min(BACKOFF * 2 ** (failures - 1), MAX_BACKOFF) * random.uniform(0.5, 1)  # noqa: S311
                logger.info("%s; again in %.1f seconds", error, delay)
            call.wait(delay)


class _Partial:
    """What there is of a blob: a file that is appended to, and its hash."""

    def __init__(self, file: IO[bytes], digest: str, advance: Callable[[int], None], call: _Call) -> None:
        self.have = 0
        self._file = file
        self._algorithm = digest.partition(":")[0]
        self._hash = hashlib.new(self._algorithm)
        self._advance = advance
        file.seek(0)
        while chunk := file.read(CHUNK):
            call.check()
            self._count(chunk)

    def append(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._count(chunk)

    def clear(self) -> None:
        self._file.truncate(0)
        self._hash = hashlib.new(self._algorithm)
        gone, self.have = self.have, 0
        self._advance(-gone)

    def digest(self) -> str:
        return f"{self._algorithm}:{self._hash.hexdigest()}"

    def _count(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self.have += len(chunk)
        self._advance(len(chunk))


def _session(user_agent: str) -> requests.Session:
    from http.cookiejar import DefaultCookiePolicy

    import requests
    from requests.adapters import HTTPAdapter
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager
    from urllib3.connection import HTTPConnection, HTTPSConnection

    class Connection(HTTPConnection):
        def getresponse(self) -> Any:
            with _deadline(self.sock):
                return super().getresponse()

    class SecureConnection(HTTPSConnection):
        def getresponse(self) -> Any:
            with _deadline(self.sock):
                return super().getresponse()

    class Pool(HTTPConnectionPool):
        ConnectionCls = Connection

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = SecureConnection

    def guarded(manager: PoolManager) -> PoolManager:
        manager.pool_classes_by_scheme = {"http": Pool, "https": SecurePool}
        return manager

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            guarded(self.poolmanager)

        def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
            return guarded(super().proxy_manager_for(*args, **kwargs))

    class Session(requests.Session):
        def get_redirect_target(self, resp: requests.Response) -> None:
            """None: even if it is not to follow a redirect, requests would read all of its body, however long."""

    session = Session()
    adapter = Adapter(pool_connections=POOL_SIZE, pool_maxsize=POOL_SIZE, max_retries=0)
    for scheme in ("http://", "https://"):
        session.mount(scheme, adapter)
    session.headers.clear()
    session.headers.update({"User-Agent": user_agent, "Accept": "*/*", "Accept-Encoding": "identity"})
    session.auth = lambda request: request  # any: without one, requests sends what ~/.netrc has
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return session


@contextmanager
def _deadline(sock: socket.socket) -> Iterator[None]:
    """Ends a connection whose answer does not begin within twice READ_TIMEOUT, which starts anew at every byte.

    Raises:
        TimeoutError: so it came.
    """
    over = threading.Event()

    def end() -> None:
        over.set()
        with suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not SSLSocket's, which would go on without encryption

    timer = threading.Timer(2 * READ_TIMEOUT, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if over.is_set():  # http.client takes the end of a connection for the end of the header, too
            raise TimeoutError("no answer in time")


def _failure(error: Exception, host: str, what: str) -> Exception:
    """What to raise for an error of requests or urllib3. Their texts have URLs in them, which may hold secrets."""
    import ssl

    import requests
    from urllib3.exceptions import HTTPError

    via = " through the proxy" if isinstance(error, requests.exceptions.ProxyError) else ""
    message = f"{host}: the request for {what}{via} failed"
    why = "the connection broke"
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return NetworkError(f"{message}: its certificate is not trusted: {_printable(cause.verify_message)}")
        if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
            return NetworkError(f"{message}: no computer has that name")
        if isinstance(cause, TimeoutError):
            why = "time-out"
            break
        if isinstance(cause, OSError) and cause.errno and cause.strerror:
            why = cause.strerror
    if isinstance(error, (requests.ConnectionError, requests.Timeout, HTTPError)):
        return _Transient(f"{message}: {why}")
    if type(error) is OSError:  # requests does not find $REQUESTS_CA_BUNDLE, for example
        why = _printable(str(error))
    return NetworkError(f"{message}: {why}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and all that it has inside."""
    queue, seen = [error], set()
    while queue:
        cause = queue.pop(0)
        if id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            inner = (cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args)
            queue += [each for each in inner if isinstance(each, BaseException)]


def _challenges(header: str) -> dict[str, dict[str, str]]:
    """The first challenge of each scheme, in lower case, with its parameters."""
    found: dict[str, dict[str, str]] = {}
    parameters: dict[str, str] = {}
    position = 0
    while match := _CHALLENGE.match(header, position):
        position = match.end()
        name, quoted, plain, scheme = match.groups()
        if scheme:
            parameters = {}
            found.setdefault(scheme.lower(), parameters)
        else:
            parameters.setdefault(name.lower(), plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted))
    return found


def _retry_after(text: str) -> float | None:
    """How many seconds the header asks for, at most MAX_RETRY_AFTER; None if it does not say."""
    text = text.strip()
    if re.fullmatch("[0-9]+", text):
        return min(int(text[-9:]) if len(text) < 10 else MAX_RETRY_AFTER, MAX_RETRY_AFTER)
    from email.utils import parsedate_to_datetime

    try:
        seconds = parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def _checked(repository: str, selector: str) -> str:
    """The image's name for messages. What a manifest names comes from the registry: it must not leave the path."""
    if not is_repository(repository):
        raise InvalidSpec(f"{_printable(repository)!r} is not the name of a repository")
    if is_digest(selector):
        return f"{repository}@{selector}"
    if not is_tag(selector):
        raise InvalidSpec(f"{_printable(selector)!r} is neither a tag nor a digest")
    return f"{repository}:{selector}"


def _digest(algorithm: str, data: bytes) -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def _basic(credentials: Credentials) -> str:
    return b64encode(f"{credentials.user}:{credentials.secret}".encode()).decode()


def _printable(text: str) -> str:
    """Another's text for a message: no control characters, and not too much of it."""
    return "".join(character for character in text if character.isprintable())[:200]
