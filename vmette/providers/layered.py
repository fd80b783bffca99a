"""From layers, wherever they come from, to an artifact: what the providers of archives and of images share."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

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
    from ..images.layers import Limits
    from ..images.store import Store

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
    """Opens the archive, whose bytes have the digest then."""


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
    from ..images.layers import Limits

    store, helpers = store_of(context), _helpers(context)
    # What is named .plain has been read without heed to whiteouts.
    names = [layer.digest if oci else f"{layer.digest}.plain" for layer in layers]
    sources = [store.layer_path(name) for name in names]
    as_directory = context.form == "directory"
    path = (store.directory_path if as_directory else store.image_path)(sources, helpers)
    if not store.used(path.parent if as_directory else path):
        limits = Limits(max_bytes)
        with ExitStack() as stack:
            for fd in _unpacked(dict(zip(names, layers, strict=True)), what, context, limits, oci=oci):
                stack.callback(os.close, fd)
            try:
                (store.directory if as_directory else store.image)(sources, limits, helpers)
            except ArchiveError as error:
                raise ProviderIOError(f"{what}: {error}") from error
        limit = cache_limit()
        if limit is not None:
            from ..images.prune import prune

            prune(store, max_bytes=limit)
    return Directory(path, config=config) if as_directory else BlockImage(path, BlockFs.EROFS, config)


def _unpacked(layers: Mapping[str, Layer], what: str, context: Context, limits: Limits, *, oci: bool) -> list[int]:
    """Has the store have `layers`, by the names it knows them by; descriptors that keep them there."""
    from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

    from ..images.archive import ArchiveError
    from ..images.layers import convert

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
                try:
                    convert(archive, directory, limits, whiteouts=oci, cancelled=stopped)
                except ArchiveError as error:
                    raise ProviderIOError(f"{what}, layer {layer.name}: {error}") from error
            context.progress(Progress(layer.name, "ready"))

        return held(store.layer(name, fill, stopped) / "data")

    futures: list[Future[int]] = []
    with ThreadPoolExecutor(PARALLEL, "vmette-layer") as pool:
        try:
            futures += [pool.submit(unpack, name, layer) for name, layer in layers.items()]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # a failure, or Ctrl-C: the others end soon
            if any(not future.done() or future.exception() for future in futures):
                stop.set()
                pool.shutdown(cancel_futures=True)
    failed = [error for future in futures if not future.cancelled() and (error := future.exception())]
    if failed:
        for future in futures:
            if not future.cancelled() and not future.exception():
                os.close(future.result())
        # What was stopped because of another failure is not the one to tell of.
        raise next((error for error in failed if not isinstance(error, (InterruptedError, Cancelled))), failed[0])
    return [future.result() for future in futures]


def _helpers(context: Context) -> list[Path]:
    """The guest's helpers that there are."""
    if context.guest_helpers_dir is None:
        return []
    paths = [Path(context.guest_helpers_dir) / helper for helper in HELPERS]
    return [path for path in paths if path.is_file()]
