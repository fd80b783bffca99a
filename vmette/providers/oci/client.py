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
import threading
from base64 import b64encode
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn
from urllib.parse import urlencode

from .. import http
from ..base import InvalidSpec, NetworkError, ProviderIOError
from ..http import Origin, Transient, address_of, printable, refusal
from .auth import Credentials, variable
from .manifest import DOCKER_INDEX, DOCKER_MANIFEST, MAX_MANIFEST, OCI_INDEX, OCI_MANIFEST, SCHEMA_1
from .reference import api_host, canonical_host, digest_of, is_digest, is_repository, is_tag

if TYPE_CHECKING:
    import requests

logger = logging.getLogger(__name__)

MAX_ERROR = 1 << 16
MAX_TOKEN = 1 << 20

MANIFEST_TYPES = (OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST)
_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # noqa: S105 (what RFC 9110 calls one)
_CHALLENGE = re.compile(rf'[\s,]*(?:({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))|({_TOKEN})(?=[\s,]|$))')


class _WrongBlob(NetworkError):
    """What has come of a blob cannot become what its digest names."""


@dataclass(frozen=True)
class Manifest:
    """A manifest or index, as its bytes; `digest` is of these."""

    media_type: str
    digest: str
    data: bytes


def _plain_http(origin: Origin) -> bool:
    """Whether http is good enough for this host."""
    listed = {entry.strip().lower() for entry in os.environ.get("VMETTE_OCI_PLAIN_HTTP", "").split(",")}
    names = {origin.host, f"[{origin.host}]"}
    return origin.loopback or bool(listed & (names | {f"{name}:{origin.port}" for name in names}))


def _kin(one: str, other: str) -> bool:
    """Whether two hosts are under one roof: the same, or of the same parent, as auth.docker.io and its registry."""
    if one == other:
        return True
    parents = [host.split(".")[-2:] for host in (one, other)]
    return parents[0] == parents[1] and len(parents[0]) == 2 and not any(map(address_of, (one, other)))


@dataclass(eq=False, repr=False)
class _Call(http.Call):
    """A public method's call."""

    host: str
    repository: str
    drained = MAX_ERROR
    silence = "time-out"

    @property
    def scope(self) -> str:
        return f"repository:{self.repository}:pull"

    def failed(self, host: str = "") -> str:
        return f"{host or self.host}: the request for {self.what} failed"

    def permit(self, origin: Origin, target: Origin | None, url: str) -> Origin:  # noqa: ARG002
        """Not plain http where it is not good enough, and never after https."""
        if target is None:
            raise NetworkError(f"{origin.host} redirects the request for {self.what} to where it cannot go")
        if target.scheme == "http" and (origin.scheme == "https" or not _plain_http(target)):
            raise NetworkError(f"{origin.host} redirects the request for {self.what} to {target.host} by plain http")
        return target


class RegistryClient:
    """A registry's client. Several threads may use it at once; it is also a context manager that closes it."""

    def __init__(self, host: str, *, credentials: Credentials | None = None) -> None:
        """`host` is that of a reference, with its port if any.

        Raises:
            InvalidSpec: it is no host.
        """
        self.host = canonical_host(host)
        origin = Origin.of(f"https://{api_host(self.host)}")
        if origin is None or re.search("[/?#]", host):
            raise InvalidSpec(f"{host!r} is not the name of a registry")
        if _plain_http(origin):
            origin = Origin.of(f"http://{api_host(self.host)}") or origin
        self._origin = origin
        self._base = f"{origin.scheme}://{api_host(self.host)}/v2/"
        self._credentials = credentials
        self._initial = f"Bearer {credentials.secret}" if credentials and credentials.kind == "bearer" else None
        self._authorization: dict[str, str] = {}  # by scope
        self._lock = threading.Lock()
        self._session = http.session()

    def __repr__(self) -> str:
        return f"RegistryClient({self.host!r})"

    def __enter__(self) -> RegistryClient:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the idle connections."""
        self._session.close()

    def manifest(self, repository: str, selector: str, cancelled: Callable[[], bool] = lambda: False) -> Manifest:
        """The manifest or index that `selector`, a tag or digest, names; of the media type that the registry says.

        Raises:
            InvalidSpec: the registry has it in the old schema 1 only, or a name is malformed.
            NetworkError: it is not there, not readable, larger than 4 MiB, or not what its digest says.
            Cancelled: `cancelled` said so.
        """
        call = _Call(_checked(repository, selector), cancelled, self.host, repository)
        return call.retry(lambda: self._manifest(call, selector))

    def _manifest(self, call: _Call, selector: str) -> Manifest:
        with self._request("GET", f"manifests/{selector}", call, {"Accept": ", ".join(MANIFEST_TYPES)}) as response:
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if media_type.startswith(f"{SCHEMA_1}+"):
                raise InvalidSpec(
                    f"{self.host} has {call.what} as a schema 1 manifest only ({printable(media_type)}), which is "
                    "obsolete and which vmette does not read"
                )
            data = call.read(response, MAX_MANIFEST)
            told = response.headers.get("Docker-Content-Digest")
        if len(data) > MAX_MANIFEST:
            raise NetworkError(f"{self.host}: the manifest of {call.what} is larger than {MAX_MANIFEST >> 20} MiB")
        if not data:  # http.client does not see that an answer was cut off in its header
            raise Transient(f"{self.host} sends nothing for {call.what}")
        digest = selector if is_digest(selector) else digest_of(data)
        for claim in (digest, told or digest):
            actual = digest_of(data, claim.partition(":")[0]) if is_digest(claim) else digest
            if actual != claim:
                raise NetworkError(
                    f"{self.host} sends a wrong manifest of {call.what}: its digest is not {printable(claim)}"
                )
        return Manifest(media_type, digest, data)

    def head(self, repository: str, selector: str, cancelled: Callable[[], bool] = lambda: False) -> str | None:
        """The digest that the registry says `selector` has now, None if it says none.

        Raises:
            InvalidSpec: a name is malformed.
            NetworkError: it is not there or not readable.
            Cancelled: `cancelled` said so.
        """
        call = _Call(_checked(repository, selector), cancelled, self.host, repository)
        return call.retry(lambda: self._head(call, selector))

    def _head(self, call: _Call, selector: str) -> str | None:
        with self._request("HEAD", f"manifests/{selector}", call, {"Accept": ", ".join(MANIFEST_TYPES)}) as response:
            call.read(response, 0)  # nothing, but the connection is free then
            digest = response.headers.get("Docker-Content-Digest", "")
        return digest if is_digest(digest) else None

    def blob(
        self,
        repository: str,
        digest: str,
        size: int,
        partial: Path,
        advance: Callable[[int], None],
        cancelled: Callable[[], bool] = lambda: False,
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
            raise InvalidSpec(f"{printable(digest)!r} is not a digest")
        _checked(repository, digest)
        call = _Call(f"blob {digest} of {repository}", cancelled, self.host, repository)
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
                call.retry(lambda: self._fetch(call, digest, size, file), lambda: file.have)
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
                        f"{self.host} sends {printable(told)!r} of {call.what}, not what follows byte {file.have}"
                    )
            elif file.have:  # 200: it sends all of it; 416: it has less than there is here
                file.clear()
            if response.status_code == 416:
                raise Transient(f"{self.host} answers 416 to the request for the rest of {call.what}", 0)
            for chunk in call.chunks(response):
                if file.have + len(chunk) > size:
                    raise _WrongBlob(f"{self.host} sends more of {call.what} than its {size} bytes")
                file.append(chunk)
        if file.have < size:
            raise Transient(f"{self.host} ends {call.what} after {file.have} of {size} bytes")

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
            response, origin = call.send(self._session, method, url, authorized)
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
        while not self._lock.acquire(timeout=http.POLL):
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
        origin = Origin.of(realm)
        if origin is None:
            raise NetworkError(f"{self.host} sends for a token to an address that cannot be used")
        if origin.scheme == "http" and not (origin.loopback and _plain_http(self._origin)):
            raise NetworkError(f"{self.host} sends for a token to {origin.host} by plain http, which is not safe")
        credentials = self._credentials
        if credentials and not _kin(origin.host, self._origin.host):
            logger.warning("%s sends for a token to %s, a stranger: asked without credentials", self.host, origin.host)
            credentials = None
        query = {"service": challenge.get("service", ""), "scope": call.scope}
        if credentials and credentials.kind == "identity":
            form = {**query, "grant_type": "refresh_token", "refresh_token": credentials.secret, "client_id": "vmette"}
            response, origin = call.send(self._session, "POST", realm, {}, form)
        else:
            url = realm + ("&" if "?" in realm else "?") + urlencode({key: text for key, text in query.items() if text})
            headers = {"Authorization": f"Basic {_basic(credentials)}"} if credentials else {}
            response, origin = call.send(self._session, "GET", url, headers)
        with response:
            if response.status_code != 200:
                self._refuse(response, origin, call, token=True)
            body = call.read(response, MAX_TOKEN)
        try:
            answer = json.loads(body)
            token = answer.get("token") or answer.get("access_token")
        except (ValueError, RecursionError, AttributeError):
            token = None
        if not isinstance(token, str) or re.fullmatch("[!-~]+", token) is None:
            raise NetworkError(f"{origin.host} sends no usable token for {call.what} of {self.host}")
        return token

    def _refuse(self, response: requests.Response, origin: Origin, call: _Call, token: bool = False) -> NoReturn:
        """Raises what an answer that is no success means."""
        status = response.status_code
        detail = self._detail(response, call)
        who = self.host if origin == self._origin else f"{origin.host}, where {self.host} sends to,"
        if status in {401, 403} and (token or origin == self._origin):
            self._unauthorized(who, call, detail)
        if status == 404 and not token:
            raise NetworkError(f"{who} has no {call.what}{detail}")
        raise refusal(response, who, f" to the request for {'a token for ' * token}{call.what}{detail}")

    def _unauthorized(self, who: str, call: _Call, detail: str) -> NoReturn:
        how = "with the credentials there are" if self._credentials else "without credentials"
        raise NetworkError(
            f"not authorised: {who} does not give {call.what} {how}{detail}; set {variable(self.host)}=USER:SECRET, "
            f"or use `docker login {self.host}`"
        )

    def _detail(self, response: requests.Response, call: _Call) -> str:
        """The first message in a registry's error, which is JSON, without our secrets if they come back in it."""
        try:
            message = json.loads(call.read(response, MAX_ERROR))["errors"][0]["message"]
        except (Transient, NetworkError, ValueError, RecursionError, LookupError, TypeError):
            return ""
        if not isinstance(message, str):
            return ""
        secrets = {header.partition(" ")[2] for header in tuple(self._authorization.values())}
        if self._credentials:
            secrets |= {self._credentials.secret, _basic(self._credentials)}
        for secret in sorted(filter(None, secrets), key=len, reverse=True):
            message = message.replace(secret, "***")
        return f": {message}" if (message := printable(message)) else ""


class _Partial:
    """What there is of a blob: a file that is appended to, and its hash."""

    def __init__(self, file: IO[bytes], digest: str, advance: Callable[[int], None], call: _Call) -> None:
        self.have = 0
        self._file = file
        self._algorithm = digest.partition(":")[0]
        self._hash = hashlib.new(self._algorithm)
        self._advance = advance
        file.seek(0)
        while chunk := file.read(http.CHUNK):
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


def _checked(repository: str, selector: str) -> str:
    """The image's name for messages. What a manifest names comes from the registry: it must not leave the path."""
    if not is_repository(repository):
        raise InvalidSpec(f"{printable(repository)!r} is not the name of a repository")
    if is_digest(selector):
        return f"{repository}@{selector}"
    if not is_tag(selector):
        raise InvalidSpec(f"{printable(selector)!r} is neither a tag nor a digest")
    return f"{repository}:{selector}"


def _basic(credentials: Credentials) -> str:
    return b64encode(f"{credentials.user}:{credentials.secret}".encode()).decode()
