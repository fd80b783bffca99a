"""Requests over connections that may break.

The servers are taken to be hostile: sizes and times are bounded, and nobody gets credentials that are not meant for it.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urljoin

from .._version import __version__
from .base import Cancelled, InvalidSpec, NetworkError, Unreachable

if TYPE_CHECKING:  # requests takes a tenth of a second to import: only who asks a server pays for it
    from ipaddress import IPv4Address, IPv6Address

    import requests

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 15.0
READ_TIMEOUT = 60.0
"""How long a server may be silent, and how long its answer's headers may take."""
SLOW_WINDOW, SLOW_RATE = 60.0, 1024
"""An attempt that brings less than SLOW_RATE bytes a second over SLOW_WINDOW seconds is broken off."""
ATTEMPTS = 5
"""So many may fail in a row; one that brought at least PROGRESS bytes starts the count anew."""
PROGRESS = 1 << 16
BACKOFF, MAX_BACKOFF = 0.5, 30.0
MAX_RETRY_AFTER = 60.0
POLL = 0.1
"""How long a wait goes on, at most, before `cancelled` is asked again."""
MAX_REDIRECTS = 5
CHUNK = 1 << 18
POOL_SIZE = 16

_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Stricter than any URL parser, so that no two of them find different hosts in it: no user, no backslash, no fragment.
_URL = re.compile(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?(?:[/?][!\"$-\[\]-~]*)?", re.IGNORECASE)
_NO_PROXIES: dict[str, Any] = {"http": None, "https": None, "all": None}

T = TypeVar("T")


# --- URLs ------------------------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """Who answers at a URL."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin | None:
        """Where `url` leads, None if that is not beyond doubt."""
        match = _URL.fullmatch(url)
        if match is None:
            return None
        scheme = match[1].lower()
        port = int(match[3] or {"http": 80, "https": 443}[scheme])
        return cls(scheme, match[2].lower().strip("[]"), port) if 0 < port < 65536 else None

    @property
    def loopback(self) -> bool:
        """Whether it is this computer."""
        address = address_of(self.host)
        return self.host == "localhost" if address is None else address.is_loopback


def address_of(host: str) -> IPv4Address | IPv6Address | None:
    """The IP address that `host` is, if it is one."""
    from ipaddress import ip_address

    try:
        return ip_address(host)
    except ValueError:
        return None


def shown(url: str) -> str:
    """`url` for messages: scheme, host and path. What follows may be secret."""
    scheme, _, rest = url.partition("://")
    authority = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    path = re.split("[?#]", rest[len(authority) :], maxsplit=1)[0]
    return printable(f"{scheme}://{authority.rpartition('@')[2]}{path}")


def printable(text: str) -> str:
    """Another's text for a message: no control characters, and not too much of it."""
    return "".join(character for character in text if character.isprintable())[:200]


def check_url(url: str) -> None:
    """Refuses what is no http(s) URL beyond doubt.

    Raises:
        InvalidSpec: it is none, or there is a user name or password in it.
    """
    if "@" in re.split(r"[/?#\\]", url.partition("://")[2], maxsplit=1)[0]:
        raise InvalidSpec(f"{shown(url)}: a user name or password in a URL is not supported")
    if Origin.of(url) is None:
        raise InvalidSpec(
            f"{shown(url)} is not a URL that vmette can use: http:// or https://, a host, and a path in which blanks "
            "and characters beyond ASCII are written as %XX"
        )


# --- Calls -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Call:
    """Something that is asked of servers, by one thread, in one attempt or several."""

    what: str
    """Its name for messages."""
    cancelled: Callable[[], bool]
    """Whether to give up; is asked from two threads."""
    _guard: _Guard = field(init=False)
    """Of the attempt."""
    drained = 0
    """How many bytes of a redirect's body are read, so that the connection can be used again."""

    # --- what differs between kinds

    @property
    def silence(self) -> str:
        """What a message says of a server that does not answer."""
        return f"the server does not answer within {READ_TIMEOUT:.0f} s"

    def failed(self, host: str = "") -> str:  # noqa: ARG002
        """How a message begins that says why it failed, at `host` if not at the one that is asked first."""
        return self.what

    def permit(self, origin: Origin, target: Origin | None, url: str) -> Origin:
        """The `target` of a redirect from `origin` to `url`.

        Raises:
            NetworkError: it is none, or one that must not be asked.
        """
        raise NotImplementedError

    # --- attempts

    def retry(self, attempt: Callable[[], T], have: Callable[[], int] = lambda: 0, attempts: int | None = None) -> T:
        """The result of `attempt`, which is repeated as long as there is hope.

        Args:
            attempt: May use what is below; fails with Transient if it is to be repeated.
            have: How many bytes there are. What is fetched again is no progress.
            attempts: In place of ATTEMPTS.

        Raises:
            Unreachable: it did not work, however often it was tried.
            NetworkError: there is no hope.
            Cancelled: `cancelled` said so.
        """
        import random

        failures, most = 0, have()
        while True:
            try:
                with _Guard(self) as self._guard:
                    return attempt()
            except Transient as error:
                failures = 1 if have() - most >= PROGRESS else failures + 1
                most = max(most, have())
                if failures >= (ATTEMPTS if attempts is None else attempts):
                    raise Unreachable(f"{error} ({failures} times)" if failures > 1 else str(error)) from None
                delay = error.retry_after
                if delay is None:
                    # Jitter, so that many clients do not come back together.
                    delay = min(BACKOFF * 2 ** (failures - 1), MAX_BACKOFF) * random.uniform(0.5, 1)  # noqa: S311
                logger.info("%s; again in %.1f seconds", error, delay)
            self.wait(delay)

    def check(self) -> None:
        """Raises Cancelled if `cancelled` says so."""
        if self.cancelled():
            raise Cancelled

    def wait(self, seconds: float) -> None:
        """Waits; raises Cancelled as soon as `cancelled` says so."""
        end = time.monotonic() + seconds
        self.check()
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, POLL))
            self.check()

    def send(
        self,
        session: requests.Session,
        method: str,
        url: str,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None = None,
    ) -> tuple[requests.Response, Origin]:
        """Sends a request and follows redirects: the answer, and who gave it.

        Raises:
            NetworkError: there is none.
            Transient: there is none for now.
            Cancelled: `cancelled` said so.
        """
        from urllib3.exceptions import HTTPError

        origin = Origin.of(url)
        assert origin is not None
        for _ in range(MAX_REDIRECTS + 1):
            self.check()
            self._guard.forget()
            try:
                response = session.request(
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
                self._guard.check()
                raise _failure(error, self.failed(origin.host), origin.host) from None
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or location is None:
                return response, origin
            with response:
                if self.drained:
                    self.read(response, self.drained)
            try:
                url = urljoin(url, location).partition("#")[0]
            except ValueError:
                url = ""
            target = self.permit(origin, None if form is not None else Origin.of(url), url)  # a form has a secret in it
            if target != origin:
                headers = {name: text for name, text in headers.items() if name != "Authorization"}
            origin = target
        raise NetworkError(f"{self.failed()}: redirected more than {MAX_REDIRECTS} times")

    def chunks(self, response: requests.Response) -> Iterator[bytes]:
        """The body's bytes as they come. Raises what :meth:`send` does."""
        from urllib3.exceptions import HTTPError

        guard = self._guard
        guard.begin(SLOW_WINDOW, SLOW_RATE)
        while True:
            guard.check()
            try:
                # Not read(), which would wait for all of CHUNK, however slowly it comes.
                chunk = response.raw.read1(CHUNK, decode_content=False)
            except (OSError, ValueError, HTTPError) as error:
                guard.check()
                raise _failure(error, self.failed()) from None
            if not chunk or response.raw.connection is None:
                guard.check()  # a connection that it has shut down has an end as well
                guard.forget()  # or it may be another thread's already
            if not chunk:
                return
            guard.count += len(chunk)
            yield chunk

    def read(self, response: requests.Response, limit: int) -> bytes:
        """The body, or a beginning of it that is longer than `limit`. Raises what :meth:`send` does."""
        body = bytearray()
        for chunk in self.chunks(response):
            body += chunk
            if len(body) > limit:
                self._guard.forget()
                break
        return bytes(body)


class _Guard:
    """Shuts down a connection on which too little comes, or when the caller has asked for an end.

    It is a thread, since a time-out of the connection's own starts anew at every byte, of a header too.
    """

    here = threading.local()
    """`guard`: the thread's own."""

    def __init__(self, call: Call) -> None:
        self.count = 0
        """Of the body's bytes."""
        self._call = call
        self._socket: socket.socket | None = None
        self._window: tuple[float, float, int, int] = (time.monotonic(), READ_TIMEOUT, 0, 0)
        self._slow: str | None = None
        self._stopped = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vmette-download", daemon=True)

    def __enter__(self) -> _Guard:
        self.here.guard = self
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        del self.here.guard
        self._end.set()
        self._thread.join()

    def begin(self, seconds: float, rate: int) -> None:
        """From now on every `seconds` bring `rate` bytes a second."""
        self._window = (time.monotonic(), seconds, rate, self.count)

    def watch(self, connection: object) -> None:
        """From now on an answer is awaited from `connection`."""
        self.begin(READ_TIMEOUT, 0)
        self._socket = connection if isinstance(connection, socket.socket) else None

    def forget(self) -> None:
        """There is no connection for now; that it comes about has another time-out."""
        self._socket = self._slow = None

    def check(self) -> None:
        """Raises what was the reason, if it has shut down the connection."""
        if self._stopped or self._call.cancelled():
            raise Cancelled
        if self._slow is not None:
            raise Transient(f"{self._call.failed()}: {self._slow}")

    def _run(self) -> None:
        while not self._end.wait(min(POLL, self._window[1] / 4)):
            window, connection = self._window, self._socket
            since, seconds, rate, count = window
            elapsed = time.monotonic() - since
            if self._call.cancelled():
                self._stopped = True
            elif elapsed < seconds or connection is None:
                continue
            elif rate and self.count - count >= rate * elapsed:
                if window is self._window:
                    self._window = (time.monotonic(), seconds, rate, self.count)
                continue
            elif rate:
                self._slow = f"it comes too slowly: {self.count - count} bytes in {elapsed:.0f} s"
            else:
                self._slow = self._call.silence
            if connection is not None:
                with suppress(OSError):
                    # Not that of SSLSocket, which forgets the encryption first.
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)


def session() -> requests.Session:
    """A session for calls, of several threads too, that has nobody's credentials."""
    from http.cookiejar import DefaultCookiePolicy

    import requests
    from requests.adapters import HTTPAdapter
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool

    def watched(kind: Any) -> Any:
        """A kind of pool like `kind`, whose connections are watched from when an answer is awaited."""
        plain = kind.ConnectionCls

        def getresponse(connection: Any) -> Any:
            guard = _Guard.here.guard
            guard.watch(connection.sock)
            answer = plain.getresponse(connection)
            try:
                guard.check()  # http.client takes the end of a connection for the end of the header, too
            except BaseException:
                answer.close()
                raise
            return answer

        return type("Pool", (kind,), {"ConnectionCls": type("Connection", (plain,), {"getresponse": getresponse})})

    pools = {"http": watched(HTTPConnectionPool), "https": watched(HTTPSConnectionPool)}

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = pools

        def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
            manager = super().proxy_manager_for(*args, **kwargs)
            manager.pool_classes_by_scheme = pools
            return manager

    class Session(requests.Session):
        def get_redirect_target(self, resp: requests.Response) -> None:
            """None: or requests reads all of the body of a redirect, however long, before anybody can look at it."""

    made = Session()
    adapter = Adapter(pool_connections=POOL_SIZE, pool_maxsize=POOL_SIZE, max_retries=0)
    for scheme in ("http://", "https://"):
        made.mount(scheme, adapter)
    made.headers.clear()
    made.headers.update({"User-Agent": f"vmette/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"})
    made.auth = lambda request: request  # any: without one, requests sends what ~/.netrc has
    made.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return made


# --- What goes wrong -------------------------------------------------------------------------------------------------


class Transient(Exception):
    """What failed may work if it is tried again. Its text is that of the NetworkError if it does not."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def refusal(response: requests.Response, before: str, after: str = "") -> Exception:
    """What to raise for an answer that is no success; its status goes between `before` and `after`."""
    status = response.status_code
    phrase = f" ({HTTPStatus(status).phrase})" if status in set(HTTPStatus) else ""
    message = f"{before} answers {status}{phrase}{after}"
    if status in _RETRIED:
        return Transient(message, retry_after(response.headers.get("Retry-After", "")))
    return NetworkError(message)


def retry_after(text: str) -> float | None:
    """How many seconds the header asks for, at most MAX_RETRY_AFTER; None if it does not say."""
    text = text.strip()
    if re.fullmatch("[0-9]+", text):
        return min(float(text), MAX_RETRY_AFTER) if len(text) < 10 else MAX_RETRY_AFTER
    from email.utils import parsedate_to_datetime

    try:
        seconds = parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def _failure(error: Exception, message: str, host: str = "") -> Exception:
    """What to raise for an error of requests or urllib3, whose texts have URLs in them, which may hold secrets.

    `message` is how it begins; `host` is who was asked.
    """
    import ssl

    import requests
    from urllib3.exceptions import HTTPError, LocationValueError

    named = message.startswith(host)
    why = "the connection broke"
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            whose = "its certificate" if named else f"the certificate of {host}"
            return NetworkError(f"{message}: {whose} is not trusted: {printable(cause.verify_message)}")
        if isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME:
            return Unreachable(f"{message}: no computer has {'that name' if named else f'the name {host}'}")
        if isinstance(cause, TimeoutError):
            why = "time-out"
            break
        if isinstance(cause, OSError) and cause.errno and cause.strerror:
            why = cause.strerror
    if isinstance(error, (requests.exceptions.InvalidURL, LocationValueError)):
        return NetworkError(f"{message}: {host} is no name of a computer")
    if isinstance(error, requests.exceptions.ProxyError):
        why = f"through the proxy: {why}"
    if isinstance(error, (requests.ConnectionError, requests.Timeout, HTTPError)):
        return Transient(f"{message}: {why}")
    if type(error) is OSError:  # requests does not find $REQUESTS_CA_BUNDLE, for example
        why = printable(str(error))
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
