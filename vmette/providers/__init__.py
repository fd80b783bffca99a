"""Rootfs providers: what turns a spec (`/dir`, `builtin://base`, a third party's own) into a root filesystem.

A provider is any object with `name`, `matches` and `provide` (:class:`RootfsProvider`). A package of its own adds one
to every vmette of its environment with an entry point in the group `vmette.providers`, a callable without arguments::

    [project.entry-points."vmette.providers"]
    echo = "vmette_echo:EchoProvider"
"""

from __future__ import annotations

from .base import (
    Artifact,
    BlockFs,
    BlockImage,
    Context,
    Directory,
    InvalidSpec,
    NetworkError,
    OfflineCacheMiss,
    ProviderError,
    ProviderIOError,
    RootfsProvider,
)
from .builtin import BuiltinProvider
from .dir import DirProvider
from .inject import inject_guest_helpers
from .registry import Registry, default_registry

__all__ = [
    "Artifact",
    "BlockFs",
    "BlockImage",
    "BuiltinProvider",
    "Context",
    "DirProvider",
    "Directory",
    "InvalidSpec",
    "NetworkError",
    "OfflineCacheMiss",
    "ProviderError",
    "ProviderIOError",
    "Registry",
    "RootfsProvider",
    "default_registry",
    "inject_guest_helpers",
]
