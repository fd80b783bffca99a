"""From layers, wherever they come from, to an artifact: what the providers of archives and of images share."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from ..errors import ConfigError
from ..locks import held
from .base import (
    Artifact,
    BlockFs,
    BlockImage,
    Cancelled,
    Context,
    Directory,
    ImageConfig,
    Progress,
    ProviderIOError,
)
from .inject import HELPERS

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ..images.layers import Limits
    from ..images.store import Store

logger = logging.getLogger(__name__)

PARALLEL = 4
"""Layers that are fetched and unpacked at once."""

Stopped = Callable[[], bool]
"""Whether to give up."""


@dataclass(frozen=True)
class Layer:
    """One layer of what is to become a root filesystem."""

    digest: str
    """Of the archive's bytes: what they are cached by."""
    name: str
    """For people."""
    open: Callable[[Stopped], AbstractContextManager[BinaryIO]]
    """Opens the archive. That its bytes have the digest is checked as they are read."""


def store_of(context: Context) -> Store:
    """The cache of layers and images, which all providers share."""
    from ..images.store import Store

    return Store(context.provider_cache("store"))


def cache_limit() -> int | None:
    """VMETTE_CACHE_MAX_BYTES, above which what was used least recently goes; None is no limit.

    Raises:
        ConfigError: it is no positive number.
    """
    return limit_of("VMETTE_CACHE_MAX_BYTES", 0) or None


def limit_of(variable: str, default: int) -> int:
    """The number of bytes that the environment variable says, or `default`.

    Raises:
        ConfigError: it is no positive number.
    """
    text = os.environ.get(variable)
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"{variable}={text!r} is no number of bytes")
    return int(text)


def evict(store: Store) -> None:
    """Keeps the cache within VMETTE_CACHE_MAX_BYTES. What cannot be removed is logged: the artifact is there."""
    limit = cache_limit()
    if limit is None:
        return
    from ..images.prune import prune

    try:
        prune(store, max_bytes=limit)
    except OSError as error:
        logger.warning("cannot clear the cache: %s", error)


NOTES = ("oci/refs", "oci/blobs", "tar/refs", "squashfs/refs")
"""What providers remember of references and URLs; without it they ask again."""


def forget(context: Context) -> None:
    """Removes all notes: what is of use with the cache's entries only.

    Raises:
        OSError: one cannot be removed.
    """
    for name in NOTES:
        directory = context.cache_root / name
        if directory.is_dir():
            for path in directory.iterdir():
                path.unlink(missing_ok=True)


def assemble(
    layers: Sequence[Layer],
    what: str,
    context: Context,
    max_bytes: int,
    config: ImageConfig | None,
    *,
    oci: bool = True,
) -> Artifact:
    """Unpacks what the cache has not got of `layers`, the lowest first, and makes them one root filesystem.

    Args:
        layers: What it is made of.
        what: What messages call it.
        context: Where the cache is, and what becomes of the layers.
        max_bytes: The most decompressed bytes of one layer.
        config: What goes with the artifact.
        oci: Whether the layers have whiteouts.

    Raises:
        ProviderError: a layer cannot be had, is damaged or hostile, or the cache cannot be written.
    """
    from ..images.archive import ArchiveError
    from ..images.layers import DamagedLayer, Limits

    store, helpers = store_of(context), _helpers(context)
    # What is named .plain has been read without heed to whiteouts.
    names = [layer.digest if oci else f"{layer.digest}.plain" for layer in layers]
    sources = [store.layer_path(name) for name in names]
    as_directory = context.form == "directory"
    path = (store.directory_path if as_directory else store.image_path)(sources, helpers)
    limits, damaged = Limits(max_bytes), 0
    while not store.used(path.parent if as_directory else path):
        with ExitStack() as stack:
            try:
                for fd in _unpacked(dict(zip(names, layers, strict=True)), what, context, limits, oci=oci):
                    stack.callback(os.close, fd)
                (store.directory if as_directory else store.image)(sources, limits, helpers)
            except ArchiveError as error:
                raise ProviderIOError(f"{what}: {error}") from error
            except DamagedLayer as error:
                damaged += 1
                if damaged > len(sources):
                    raise
                logger.warning("%s is damaged and is made anew", error.directory)
                store.discard(error.directory)
                continue
            stack.callback(os.close, held(path))
            evict(store)
    return Directory(path, config=config) if as_directory else BlockImage(path, BlockFs.EROFS, config)


def _unpacked(layers: Mapping[str, Layer], what: str, context: Context, limits: Limits, *, oci: bool) -> list[int]:
    """Has the store have `layers`, by the names it knows them by; descriptors that keep them there."""
    from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

    from ..images.archive import ArchiveError
    from ..images.layers import DamagedLayer, convert

    store = store_of(context)
    stop = threading.Event()

    def stopped() -> bool:
        return stop.is_set() or context.cancelled()

    def unpack(name: str, layer: Layer) -> int:
        if store.layer_path(name).is_dir():
            context.progress(Progress(layer.name, "cached"))

        def fill(directory: Path) -> None:
            with layer.open(stopped) as archive:
                context.progress(Progress(layer.name, "unpacking"))
                checked = _Hashed(archive, layer.digest)
                try:
                    convert(cast("BinaryIO", checked), directory, limits, whiteouts=oci, cancelled=stopped)
                except ArchiveError as error:
                    raise ProviderIOError(f"{what}, layer {layer.name}: {error}") from error
                # Whoever found out what digest the archive has did so at another time.
                if not checked.right():
                    raise ProviderIOError(f"{what}, layer {layer.name}: it has changed while it was read")
            context.progress(Progress(layer.name, "ready"))

        path = store.layer(name, fill, stopped)
        try:
            return held(path / "data")
        except FileNotFoundError:
            raise DamagedLayer(path) from None

    futures: list[Future[int]] = []
    with ThreadPoolExecutor(PARALLEL, "vmette-layer") as pool:
        try:
            for name, layer in layers.items():
                futures.append(pool.submit(unpack, name, layer))
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # Ctrl-C: the threads end soon
            stop.set()
            for future in futures:
                future.add_done_callback(_let_go)
            raise
        finally:
            if any(not future.done() or future.exception() for future in futures):
                stop.set()
                pool.shutdown(cancel_futures=True)
    failed = [error for future in futures if not future.cancelled() and (error := future.exception())]
    if failed:
        for future in futures:
            _let_go(future)
        # What was stopped because of another failure is not the one to tell of.
        raise next((error for error in failed if not isinstance(error, (InterruptedError, Cancelled))), failed[0])
    return [future.result() for future in futures]


def _let_go(future: Future[int]) -> None:
    if not future.cancelled() and not future.exception():
        os.close(future.result())


class _Hashed:
    """A file to be read once that finds out what its digest is."""

    def __init__(self, file: BinaryIO, digest: str) -> None:
        self._file = file
        algorithm, _, self._digits = digest.partition(":")
        self._hash = hashlib.new(algorithm)

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def right(self) -> bool:
        """Whether the digest is the one that was said, what has not been read yet included."""
        while self.read(1 << 20):
            pass
        return self._hash.hexdigest() == self._digits


def _helpers(context: Context) -> list[Path]:
    """The guest's helpers that there are."""
    if context.guest_helpers_dir is None:
        return []
    found = []
    for helper in HELPERS:
        path = Path(context.guest_helpers_dir) / helper
        if path.is_file():
            found.append(path)
        else:
            logger.warning("guest helper %s is missing, left out", path)
    return found
