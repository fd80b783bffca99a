"""`alpine:3.20`: an image of a registry, an OCI layout or a Docker archive becomes a root filesystem."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from ...files import write_atomically
from ..base import (
    Artifact,
    Context,
    InvalidSpec,
    OfflineCacheMiss,
    Progress,
    ProviderIOError,
    Unreachable,
)
from ..layered import Layer, Stopped, assemble, limit_of, store_of
from ..remote import TTL_SECONDS, translated
from .local import ARCHIVE, LAYOUT
from .reference import SCHEME, Reference, has_digest, is_digest

if TYPE_CHECKING:
    from .client import RegistryClient
    from .manifest import Descriptor, Image, Platform

logger = logging.getLogger(__name__)

MAX_BYTES = 16 << 30
"""The most decompressed bytes of one layer, unless VMETTE_OCI_MAX_BYTES says otherwise."""


class Source(Protocol):
    """Where an image comes from."""

    what: str
    """What messages call it."""

    def image(self, platform: Platform) -> tuple[Image, bytes]:
        """The manifest for `platform`, and the config."""

    def layer(self, descriptor: Descriptor, stopped: Stopped) -> AbstractContextManager[BinaryIO]:
        """A layer's bytes, which are what the digest says."""


class OciProvider:
    """Images by reference, with or without `oci://`; and `oci-layout:DIR[:TAG]`, `docker-archive:FILE`.

    It claims every bare name: it is registered last.

    Args:
        form: `block` or `directory`, in place of the context's.
    """

    name = "oci"

    def __init__(self, form: str | None = None) -> None:
        self._form = form

    def matches(self, spec: str) -> bool:
        """`oci://…`, a local form, or anything that is neither a path nor a URL."""
        if spec.startswith((SCHEME, LAYOUT, ARCHIVE)):
            return True
        return bool(spec) and spec[0] not in "/.~" and "://" not in spec

    def provide(self, spec: str, context: Context) -> Artifact:
        """The root filesystem of the image `spec`: a block image, or a directory if the context says so.

        Raises:
            InvalidSpec: the reference is malformed, or the image is none that vmette can use.
            OfflineCacheMiss: the network must not be asked, and the cache has not got it.
            NetworkError: the registry did not give it.
            ProviderIOError: the cache cannot be written, or a layer is damaged or hostile.
            Cancelled: the context said so.
        """
        from .manifest import ARCHITECTURES, Platform

        if self._form is not None:
            context = replace(context, form=self._form)
        arch = context.arch or os.uname().machine
        platform = Platform.parse(context.platform or f"linux/{ARCHITECTURES.get(arch, arch)}")
        with translated(spec):
            return self._provide(spec, platform, context)

    def _provide(self, spec: str, platform: Platform, context: Context) -> Artifact:
        from . import local, manifest

        with ExitStack() as stack:
            source: Source
            if spec.startswith(LAYOUT):
                source = local.Layout(spec.removeprefix(LAYOUT))
            elif spec.startswith(ARCHIVE):
                source = local.Archive(spec.removeprefix(ARCHIVE))
            else:
                source = registry = _Registry(Reference.parse(spec), spec, context)
                stack.callback(registry.close)
            image, config = source.image(platform)
            limit = limit_of("VMETTE_OCI_MAX_BYTES", MAX_BYTES)
            if any(layer.size > limit for layer in image.layers):
                raise InvalidSpec(f"{source.what} has a layer of more than {limit} bytes (VMETTE_OCI_MAX_BYTES)")
            return assemble(
                [Layer(layer.digest, layer.short, partial(source.layer, layer)) for layer in image.layers],
                source.what,
                context,
                limit,
                manifest.config(config, source.what),
            )


@dataclass(frozen=True)
class CachedImage:
    """An image that the cache knows, and whose layers it has."""

    reference: str
    platform: str
    manifest: str
    """The digest of the manifest for the platform."""
    asked: float
    """When its registry was last asked, in seconds since 1970."""
    size: int
    """Bytes on the disk; layers that it shares are counted for each image."""


def cached(context: Context) -> Iterator[CachedImage]:
    """The images that need no network.

    Raises:
        OSError: the cache cannot be read.
    """
    from ...images.prune import size_of
    from . import manifest

    store = store_of(context)
    cache = context.provider_cache("oci")
    for path in (cache / "refs").glob("*.json"):
        known = _known(path)
        if known is None:
            continue
        try:
            data = _blob_path(cache, known.manifest).read_bytes()
            layers = [store.layer_path(layer.digest) for layer in manifest.image(data, known.reference).layers]
        except (OSError, InvalidSpec):
            continue
        image = store.image_path(layers)
        if image.is_file() or all(layer.is_dir() for layer in layers):
            size = sum(size_of(path) for path in {*layers, image} if path.exists())
            yield CachedImage(known.reference, known.platform, known.manifest, known.asked, size)


# --- A registry, and what is known of it -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """What a reference meant when the registry was last asked."""

    reference: str
    platform: str
    answered: str
    """The digest of what the registry answered: an index, or a manifest."""
    manifest: str
    """The digest of the manifest for the platform."""
    config: str
    asked: float
    """Seconds since 1970."""


class _Registry:
    """An image of a registry, of which the cache may know all there is to know."""

    def __init__(self, reference: Reference, spec: str, context: Context) -> None:
        self.what = str(reference)
        self._reference = reference
        self._spec = spec
        self._context = context
        self._cache = context.provider_cache("oci")
        self._store = store_of(context)
        self._client: RegistryClient | None = None
        self._lock = threading.Lock()

    # --- manifests

    def image(self, platform: Platform) -> tuple[Image, bytes]:
        """See :class:`Source`. The registry is asked if the policy says so."""
        known = self._remembered(platform)
        cached = self._read(known) if known is not None else None
        if not self._context.may_ask:
            if cached is not None:
                return cached
            raise self._context.not_cached(self._spec, self.what)
        pinned = self._reference.digest is not None
        if cached is not None and known is not None:
            fresh = pinned or 0 <= time.time() - known.asked < TTL_SECONDS
            if fresh and (pinned or self._context.pull == "missing"):
                return cached
        try:
            return self._asked(platform, known, cached)
        except Unreachable as error:
            if cached is None or self._context.pull == "always":
                raise
            logger.warning("%s; using the cached image", error)
            return cached

    def _asked(
        self, platform: Platform, known: _Known | None, cached: tuple[Image, bytes] | None
    ) -> tuple[Image, bytes]:
        from . import manifest

        repository, selector = self._reference.repository, self._reference.selector
        stopped = self._context.cancelled
        if (
            known is not None
            and cached is not None
            and self.client.head(repository, selector, stopped) == known.answered
        ):
            with suppress(OSError):  # of a cache that may only be read
                self._remember(replace(known, asked=time.time()))
            return cached
        answer = self.client.manifest(repository, selector, stopped)
        top, kind, data = answer.digest, answer.media_type, answer.data
        digest = top
        if manifest.media_type(data, kind, self.what) in manifest.INDEXES:
            chosen = manifest.choose(data, platform, self.what)
            data, digest = self.client.manifest(repository, chosen.digest, stopped).data, chosen.digest
            if manifest.media_type(data, chosen.media_type, self.what) in manifest.INDEXES:
                raise InvalidSpec(f"{self.what} has an index within its index")
        image = manifest.image(data, self.what)
        if image.config.size > manifest.MAX_MANIFEST:
            raise InvalidSpec(f"{self.what} has a config of more than {manifest.MAX_MANIFEST} bytes")
        config = self._fetched(image.config)
        if digest == top:  # an index has said what it is for
            self._check_platform(config, platform)
        self._keep(digest, data)
        self._keep(image.config.digest, config)
        self._remember(_Known(self.what, str(platform), top, digest, image.config.digest, time.time()))
        return image, config

    def _check_platform(self, config: bytes, platform: Platform) -> None:
        """An image that is not in an index is for the platform that its config names."""
        from . import manifest

        document = manifest.json_object(config, self.what)
        architecture = document.get("architecture")
        if architecture and not platform.matches(document):
            where = manifest.shown(f"{document.get('os')}/{architecture}")
            raise InvalidSpec(f"{self.what} is not there for {platform}, but for {where} (choose with --platform)")

    @property
    def client(self) -> RegistryClient:
        """The connection, made when it is first needed."""
        with self._lock:
            if self._client is None:
                from .auth import credentials_for
                from .client import RegistryClient

                host = self._reference.api_host
                self._client = RegistryClient(host, credentials=credentials_for(self._reference.host))
            return self._client

    def close(self) -> None:
        """Ends the connection."""
        if self._client is not None:
            self._client.close()

    # --- small blobs: manifests and configs

    def _read(self, known: _Known) -> tuple[Image, bytes] | None:
        """What the cache has of an image, if it is whole."""
        from . import manifest

        found = []
        for digest in (known.manifest, known.config):
            path = _blob_path(self._cache, digest)
            try:
                data = path.read_bytes()
            except OSError:
                return None
            if not has_digest(data, digest):
                logger.warning("%s is damaged; fetching it again", path)
                return None
            found.append(data)
        return manifest.image(found[0], self.what), found[1]

    def _fetched(self, descriptor: Descriptor) -> bytes:
        path = self._partial(descriptor)
        with self._store.locked(self._store.lock_of(path), self._context.cancelled):
            try:
                self._download(descriptor, path, lambda _: None, self._context.cancelled)
                data = path.read_bytes()
            finally:
                path.unlink(missing_ok=True)
        if not has_digest(data, descriptor.digest):
            raise ProviderIOError(f"{path} has changed while it was read")
        return data

    def _keep(self, digest: str, data: bytes) -> None:
        write_atomically(_blob_path(self._cache, digest), data)

    # --- what a reference meant

    def _note(self, platform: Platform | str) -> Path:
        name = hashlib.sha256(f"{self.what} {platform}".encode()).hexdigest()
        return self._cache / "refs" / f"{name}.json"

    def _remembered(self, platform: Platform) -> _Known | None:
        known = _known(self._note(platform))
        if known is None or (known.reference, known.platform) != (self.what, str(platform)):
            return None
        return known

    def _remember(self, known: _Known) -> None:
        write_atomically(self._note(known.platform), json.dumps(vars(known), indent=1).encode())

    # --- layers

    def _partial(self, descriptor: Descriptor) -> Path:
        directory = self._store.downloads
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory / descriptor.digest.replace(":", "-")

    def _download(self, descriptor: Descriptor, path: Path, advance: Callable[[int], None], stopped: Stopped) -> None:
        self.client.blob(self._reference.repository, descriptor.digest, descriptor.size, path, advance, stopped)

    @contextmanager
    def layer(self, descriptor: Descriptor, stopped: Stopped) -> Iterator[BinaryIO]:
        """See :class:`Source`. Goes on with what an earlier attempt has fetched; the caller holds the layer's lock."""
        if not self._context.may_ask:
            raise OfflineCacheMiss(f"layer {descriptor.short} of {self._spec}")
        path = self._partial(descriptor)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._context.progress(Progress(descriptor.short, "downloading", done, descriptor.size))

        # The layer's own lock keeps others from unpacking it; this one from writing the file, whatever for.
        with self._store.locked(self._store.lock_of(path), stopped):
            self._download(descriptor, path, advance, stopped)
            file = path.open("rb")
            path.unlink()  # it is read to its end or not at all; unpacked, it is in the store
        with file:
            yield file


def _blob_path(cache: Path, digest: str) -> Path:
    """Where a manifest or a config is kept."""
    return cache / "blobs" / digest.replace(":", "-")


def _known(path: Path) -> _Known | None:
    """What the note at `path` says, if it is whole."""
    with suppress(OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        known = _Known(**json.loads(path.read_text()))
        fields = (known.reference, known.platform, known.answered, known.manifest, known.config)
        digests = (known.answered, known.manifest, known.config)
        asked = float(known.asked)
        if all(isinstance(field, str) for field in fields) and all(map(is_digest, digests)) and math.isfinite(asked):
            return replace(known, asked=asked)
    return None
