"""Rootfs providers: what turns a spec (`/dir`, `builtin://base`, a third party's own) into a root filesystem.

A provider is any object with `name`, `matches` and `provide` (:class:`RootfsProvider`). A package of its own adds one
to every vmette of its environment with an entry point in the group `vmette.providers`, a callable without arguments::

    [project.entry-points."vmette.providers"]
    echo = "vmette_echo:EchoProvider"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import (
    Artifact,
    BlockFs,
    BlockImage,
    Cancelled,
    Context,
    Directory,
    ImageConfig,
    InvalidSpec,
    NetworkError,
    OfflineCacheMiss,
    Progress,
    ProviderError,
    ProviderIOError,
    RootfsProvider,
)
from .builtin import BuiltinProvider
from .dir import DirProvider
from .inject import inject_guest_helpers
from .registry import Registry, default_registry

if TYPE_CHECKING:
    from .oci.provider import OciProvider
    from .squashfs import SquashfsProvider
    from .tar import TarProvider

_LATE = {"OciProvider": "oci.provider", "SquashfsProvider": "squashfs", "TarProvider": "tar"}

__all__ = [
    "Artifact",
    "BlockFs",
    "BlockImage",
    "BuiltinProvider",
    "Cancelled",
    "Context",
    "DirProvider",
    "Directory",
    "ImageConfig",
    "InvalidSpec",
    "NetworkError",
    "OciProvider",
    "OfflineCacheMiss",
    "Progress",
    "ProviderError",
    "ProviderIOError",
    "Registry",
    "RootfsProvider",
    "SquashfsProvider",
    "TarProvider",
    "default_registry",
    "inject_guest_helpers",
]


def __getattr__(name: str) -> object:
    # What is large, and not needed for every start, is imported when it is first used (PEP 562).
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f".{_LATE[name]}", __name__), name)
    return value
