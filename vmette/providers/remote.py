"""What the providers of single files share: specs, and what is known of a file so that it is not fetched again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Generic, TypeVar

from ..errors import reason
from ..files import NotRegularError, open_regular, write_atomically
from .base import Cancelled, Context, InvalidSpec, Progress, ProviderIOError, Unreachable
from .layered import store_of

if TYPE_CHECKING:
    from ..images.store import Store
    from .download import Fetched

logger = logging.getLogger(__name__)

TTL_SECONDS = 3600.0
"""How long a URL is taken to have what it had, and a tag to mean what it meant."""
ATTEMPTS_WITH_COPY = 2
"""How often in a row a server is asked in vain if there is a copy that will do."""
SETTLED_NS = 2 * 10**9
"""A file that changed so recently may change again without its times showing it."""
CHUNK = 1 << 20

_DIGEST = re.compile("sha256:[0-9a-f]{64}")
_FRAGMENT = re.compile("sha256=([0-9a-fA-F]{64})")

T = TypeVar("T")


# --- Specs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Location:
    """What a spec names: a URL to fetch from, or a file of the host."""

    name: str
    """The spec for messages: without the URL's query, which may be secret."""
    url: str = ""
    """Without the fragment; of a bare path none."""
    path: Path | None = None
    """The file, if it is one of the host."""
    pin: str | None = None
    """The digest (`sha256:…`) that its bytes must have."""

    @property
    def shown_url(self) -> str:
        """The URL for messages; of a bare path the one that means the same."""
        from urllib.parse import quote

        if not self.url and self.path is not None:
            return f"file://{quote(os.fsencode(self.path.absolute()))}"
        return self.name.partition("#")[0].partition("+")[2]

    @property
    def short(self) -> str:
        """The file's own name, for progress."""
        return (self.path.name if self.path else self.name.partition("#")[0].rstrip("/").rpartition("/")[2]) or "file"


def prefixes(*kinds: str) -> tuple[str, ...]:
    """How the URLs of `kinds` begin: `tar+https://` and its like."""
    return tuple(f"{kind}+{scheme}://" for kind in kinds for scheme in ("http", "https", "file"))


def bare_path(spec: str, wanted: Callable[[str], bool]) -> Path | None:
    """The file that `spec` names as a path does, if it is there, is a regular one, and its name is `wanted`."""
    if not spec.startswith(("/", "./", "../", "~/")) or not wanted(spec.rpartition("/")[2].lower()):
        return None
    home = os.environ.get("HOME")
    if spec.startswith("~/") and home is None:
        return None
    path = Path(home or "/") / spec[2:] if spec.startswith("~/") else Path(spec)
    try:
        return path if stat.S_ISREG(path.stat().st_mode) else None
    except (OSError, ValueError):
        return None


def locate(spec: str, begins: tuple[str, ...], wanted: Callable[[str], bool]) -> Location:
    """What a spec names: KIND+URL[#sha256=HEX], which `begins` so, or a path as :func:`bare_path` takes it.

    Raises:
        InvalidSpec: it is malformed, or there is no such file.
    """
    if not spec.startswith(begins):
        path = bare_path(spec, wanted)
        if path is None:
            raise InvalidSpec(f"{spec} is no regular file of such a name")
        return Location(spec, path=path)
    from .download import file_path
    from .http import check_url, shown

    kind, _, rest = spec.partition("+")
    url, hash_sign, fragment = rest.partition("#")
    name, pin = f"{kind}+{shown(url)}", None
    if hash_sign:
        match = _FRAGMENT.fullmatch(fragment)
        if match is None:
            raise InvalidSpec(f"{name}: after # comes sha256= and 64 hexadecimal digits, nothing else")
        pin = f"sha256:{match[1].lower()}"
        name += f"#sha256={match[1].lower()}"
    if url.startswith("file://"):
        return Location(name, url, file_path(url), pin)
    check_url(url)
    return Location(name, url, None, pin)


def check_pin(location: Location, digest: str) -> None:
    """Refuses bytes whose digest is not the one that the spec says.

    Raises:
        InvalidSpec: it is not.
    """
    if location.pin not in {None, digest}:
        raise InvalidSpec(f"{location.name.partition('#')[0]} has {digest}, and the spec says {location.pin}")


# --- Files -----------------------------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The regular file at `path`, open for reading. Something else there does not hold us up.

    Raises:
        InvalidSpec: there is none, or it cannot be opened.
    """
    try:
        file = open_regular(path)
    except NotRegularError:
        raise InvalidSpec(f"{path} is not a regular file") from None
    except (OSError, ValueError) as error:
        raise InvalidSpec(f"{path}: {reason(error)}") from error
    with file:
        yield file


def hashed(file: BinaryIO, cancelled: Callable[[], bool]) -> str:
    """The digest of all of `file`, which is at its start afterwards.

    Raises:
        InterruptedError: `cancelled` said so.
    """
    sha256 = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(CHUNK):
        if cancelled():
            raise InterruptedError
        sha256.update(chunk)
    file.seek(0)
    return f"sha256:{sha256.hexdigest()}"


@dataclass(frozen=True)
class _Seen:
    """What a file of the host was when its digest was taken."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    digest: str

    @classmethod
    def of(cls, path: str, status: os.stat_result, digest: str) -> _Seen:
        times = status.st_mtime_ns, status.st_ctime_ns
        return cls(path, status.st_dev, status.st_ino, status.st_size, *times, digest)


def digest_of(file: BinaryIO, path: Path, cache: Path, cancelled: Callable[[], bool]) -> str:
    """The digest of the file of the host open as `file`, which is not read if it is what it was the last time.

    Raises:
        InterruptedError: `cancelled` said so.
    """
    # Of the path: a link that is set to another file leads to a file with another inode.
    name = os.path.abspath(path)  # noqa: PTH100
    status = os.fstat(file.fileno())
    note = _note_path(cache, f"file:{name}")
    with suppress(TypeError):
        seen = _Seen(**_read(note))  # type: ignore[arg-type]
        if _DIGEST.fullmatch(seen.digest) and seen == _Seen.of(name, status, seen.digest):
            return seen.digest
    digest = hashed(file, cancelled)
    if status.st_ctime_ns < time.time_ns() - SETTLED_NS:
        _write(note, _Seen.of(name, status, digest))
    return digest


# --- Notes -----------------------------------------------------------------------------------------------------------


def _note_path(cache: Path, key: str) -> Path:
    return cache / "refs" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()}.json"


def _read(path: Path) -> dict[str, object]:
    """The note at `path`; nothing if it is missing or damaged."""
    with suppress(OSError, ValueError, RecursionError):
        note = json.loads(path.read_text())
        if isinstance(note, dict):
            return note
    return {}


def _write(path: Path, note: _Seen | Known) -> None:
    write_atomically(path, json.dumps(asdict(note), indent=1).encode())


@dataclass(frozen=True)
class Known:
    """What a URL had when the server was last asked."""

    url: str
    etag: str | None
    last_modified: str | None
    digest: str
    size: int
    asked: float
    """Seconds since 1970."""

    @classmethod
    def read(cls, path: Path, url: str) -> Known | None:
        """The note at `path`, if it is one of `url` and makes sense."""
        try:
            known = cls(**_read(path))  # type: ignore[arg-type]
        except TypeError:
            return None
        texts = all(isinstance(text, (str, type(None))) for text in (known.etag, known.last_modified))
        numbers = isinstance(known.size, int) and isinstance(known.asked, (int, float))
        if known.url != url or not texts or not numbers or not isinstance(known.digest, str):
            return None
        return known if _DIGEST.fullmatch(known.digest) else None

    @property
    def conditions(self) -> dict[str, str]:
        """The headers that ask only for something else than this."""
        pairs = {"If-None-Match": self.etag, "If-Modified-Since": self.last_modified}
        return {name: value for name, value in pairs.items() if value}


# --- URLs ------------------------------------------------------------------------------------------------------------


class Remote(Generic[T]):
    """A file that a URL names, and what is made of it and kept in a cache.

    Args:
        location: With a URL to fetch from.
        context: When the server may be asked, and must be.
        cache: The provider's directory.
        max_bytes: The most bytes of the file.
        limit: What says so, for messages.
        cached: What there is of a file with that digest and, if known, size; None if there is nothing.
        take: Makes it of the file at that path, which it may take away, with that digest.
    """

    def __init__(
        self,
        location: Location,
        context: Context,
        cache: Path,
        max_bytes: int,
        limit: str,
        cached: Callable[[str, int | None], T | None],
        take: Callable[[Path, str], T],
    ) -> None:
        self._location = location
        self._context = context
        self._cache = cache
        self._max_bytes = max_bytes
        self._limit = limit
        self._cached = cached
        self._take = take
        self._note = _note_path(cache, location.url)
        self._began = time.time()

    def get(self) -> T:
        """What is made of the file, fetched if it must be. Processes that want the same URL fetch it once.

        Raises:
            InvalidSpec: the file has another digest than the spec says, or it must not be fetched (`--pull never`).
            OfflineCacheMiss: there is nothing in the cache, and no network.
            NetworkError: it cannot be fetched, and there is nothing in the cache that would do.
            ProviderError: what `cached` and `take` raise.
            InterruptedError: the context said so.
            OSError: the cache cannot be read or written.
        """
        known, value = self._look()
        if value is not None and self._will_do(known):
            return value
        if not self._context.may_ask:
            raise self._context.not_cached(self._location.name)
        store = store_of(self._context)
        with store.locked(self._note.stem, self._context.cancelled):
            known, value = self._look()  # somebody else may have fetched it meanwhile
            if value is not None and self._will_do(known):
                return value
            try:
                return self._ask(store, known, value)
            except Unreachable as error:
                if value is None or self._context.pull == "always":
                    raise
                logger.warning("%s; using the cached copy", error)
                return value

    def _look(self) -> tuple[Known | None, T | None]:
        """What is known of the URL, and what the cache has of what it had, or of what the spec pins."""
        known, pin = Known.read(self._note, self._location.url), self._location.pin
        if pin is not None:
            return known, self._cached(pin, known.size if known and known.digest == pin else None)
        return known, self._cached(known.digest, known.size) if known else None

    def _will_do(self, known: Known | None) -> bool:
        """Whether what is cached need not be compared with what the server has."""
        if self._location.pin or not self._context.may_ask or known is None:
            return True
        now = time.time()
        if self._began <= known.asked <= now:  # while we waited: as good as if it had been for us
            return True
        return self._context.pull == "missing" and 0 <= now - known.asked < TTL_SECONDS

    def _ask(self, store: Store, known: Known | None, value: T | None) -> T:
        if known is None or value is None:
            fetched, made = self._fetch(store, {}, None)
        else:
            fetched, made = self._fetch(store, known.conditions, ATTEMPTS_WITH_COPY)
        if made is None:
            assert known is not None and value is not None
            known = replace(
                known,
                etag=fetched.etag or known.etag,
                last_modified=fetched.last_modified or known.last_modified,
                asked=time.time(),
            )
            _write(self._note, known)
            return value
        digest, value = made
        known = Known(self._location.url, fetched.etag, fetched.last_modified, digest, fetched.size, time.time())
        _write(self._note, known)
        return value

    def _fetch(
        self, store: Store, conditions: Mapping[str, str], attempts: int | None
    ) -> tuple[Fetched, tuple[str, T] | None]:
        """What the server says, and what is made of what it sends: None if it says that nothing has changed."""
        from .download import fetch

        part, context = self._location.short, self._context
        # Under the name of the lock: so `prune` removes what a process left that died.
        store.staging.mkdir(mode=0o700, exist_ok=True)
        path = store.staging / self._note.stem
        try:
            fetched = fetch(
                self._location.url,
                path,
                max_bytes=self._max_bytes,
                limit=self._limit,
                headers=conditions,
                advance=lambda done, total: context.progress(Progress(part, "downloading", done, total)),
                cancelled=context.cancelled,
                attempts=attempts,
            )
            if fetched.not_modified:
                return fetched, None
            with path.open("rb") as file:
                digest = hashed(file, context.cancelled)
            check_pin(self._location, digest)
            return fetched, (digest, self._take(path, digest))
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def translated(name: str) -> Iterator[None]:
    """Makes provider errors of what else may be raised while the spec `name` is resolved."""
    try:
        yield
    except InterruptedError:
        raise Cancelled from None
    except OSError as error:
        raise ProviderIOError(f"{error.filename or name}: {reason(error)}") from error
