"""`tar+https://host/rootfs.tar.gz`, `./rootfs.tar.zst`: an archive becomes a root filesystem."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .base import Artifact, Context, ProviderError, ProviderIOError
from .layered import Layer, Stopped, assemble, limit_of
from .remote import Location, Remote, bare_path, check_pin, digest_of, locate, opened, prefixes, translated

LIMIT = "VMETTE_TAR_MAX_BYTES"
MAX_BYTES = 4 << 30
"""The most decompressed bytes, unless the environment variable LIMIT says otherwise."""
PREFIXES = prefixes("tar")


def _wanted(name: str) -> bool:
    return "tar" in name.split(".")[1:] or name.endswith((".tgz", ".txz", ".tbz2", ".tzst"))


class TarProvider:
    """Archives by URL, `#sha256=HEX` behind it if it is to be that one and no other; and those of the host by path."""

    name = "tar"

    def matches(self, spec: str) -> bool:
        """A URL that begins with `tar+`, or the path of an existing file whose name says that it is an archive."""
        return spec.startswith(PREFIXES) or bare_path(spec, _wanted) is not None

    def provide(self, spec: str, context: Context) -> Artifact:
        """The root filesystem that is in the archive: a block image, or a directory if the context says so.

        Raises:
            InvalidSpec: the spec is malformed, or there is no such file, or another than the spec says.
            OfflineCacheMiss: the network must not be asked, and the cache has not got it.
            NetworkError: the server did not give it.
            ProviderIOError: the cache cannot be written, or the archive is damaged or hostile.
            Cancelled: the context said so.
        """
        location = locate(spec, PREFIXES, _wanted)
        with translated(location.name):
            return _Archive(location, context).artifact()


class _Missing(ProviderError):
    """The cache has not got it."""


class _Archive:
    def __init__(self, location: Location, context: Context) -> None:
        self._location = location
        self._context = context
        self._cache = context.provider_cache("tar")
        self._max_bytes = limit_of(LIMIT, MAX_BYTES)

    def artifact(self) -> Artifact:
        location, context = self._location, self._context
        if location.path is None:
            return Remote(location, context, self._cache, self._max_bytes, LIMIT, self._cached, self._take).get()
        with opened(location.path) as file:
            source = _Source(file, str(location.path))
            digest = digest_of(file, location.path, self._cache, context.cancelled)
            check_pin(location, digest)
            return self._assemble(digest, source)

    def _assemble(self, digest: str, source: _Source | None) -> Artifact:
        @contextmanager
        def archive(stopped: Stopped) -> Iterator[BinaryIO]:  # noqa: ARG001
            if source is None:
                raise _Missing
            with source.opened() as file:
                yield file

        layer = Layer(digest, self._location.short, archive)
        return assemble([layer], self._location.name, self._context, self._max_bytes, None, oci=False)

    def _cached(self, digest: str, size: int | None) -> Artifact | None:  # noqa: ARG002
        try:
            return self._assemble(digest, None)
        except _Missing:
            return None

    def _take(self, path: Path, digest: str) -> Artifact:
        with path.open("rb") as file:
            return self._assemble(digest, _Source(file, self._location.name))


class _Source:
    """An archive that must not change from when this is made until it is unpacked."""

    def __init__(self, file: BinaryIO, what: str) -> None:
        self._file = file
        self._what = what
        self._status = os.fstat(file.fileno())

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The archive from its start."""
        self._file.seek(0)
        try:
            yield self._file
        except ProviderIOError as error:
            if self._touched():
                raise self._changed() from error  # this is why it seems damaged
            raise
        if self._touched():
            raise self._changed()

    def _touched(self) -> bool:
        before, after = self._status, os.fstat(self._file.fileno())
        return (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)

    def _changed(self) -> ProviderIOError:
        return ProviderIOError(f"{self._what} has changed while it was read")
