"""The contract between providers and the rest: artifacts, errors, context, and what a provider is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol, runtime_checkable

from ..errors import ConfigError, VmetteError


class BlockFs(Enum):
    """The filesystem of a block image; its value is the kernel's name for it."""

    SQUASHFS = "squashfs"
    EROFS = "erofs"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class ImageConfig:
    """What an image says about running it (the `config` of OCI's image-spec, config.md)."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    user: str | None = None
    """`user[:group]`, names of the image's own files or numbers."""
    working_dir: str | None = None
    stop_signal: str | None = None


@dataclass(frozen=True)
class Directory:
    """A directory of the host that becomes the root filesystem, shared over virtio-fs or 9p."""

    path: Path
    read_only: bool = False
    config: ImageConfig | None = None


@dataclass(frozen=True)
class BlockImage:
    """An image file that becomes the read-only lower layer of the root filesystem, as a virtio disk."""

    path: Path
    fstype: BlockFs
    config: ImageConfig | None = None


Artifact = Directory | BlockImage


class ProviderError(VmetteError):
    """A spec could not be resolved."""


class InvalidSpec(ProviderError):
    """The spec is malformed, or nothing of that name is there."""

    def __init__(self, message: str) -> None:
        super().__init__(f"invalid spec: {message}")


class OfflineCacheMiss(ProviderError):
    """Offline mode is on and the cache does not have it."""

    def __init__(self, spec: str) -> None:
        super().__init__(f"offline mode: {spec} not in cache")


class NetworkError(ProviderError):
    """Name look-up, TLS, HTTP status or registry failure."""

    def __init__(self, message: str) -> None:
        super().__init__(f"network: {message}")


class Unreachable(NetworkError):
    """The server gave no answer. What it may have answered earlier is still the best that there is."""


class ProviderIOError(ProviderError):
    """A file system failed while a cache was read or an image written."""

    def __init__(self, error: OSError | str) -> None:
        super().__init__(f"io: {error}")


class Cancelled(ProviderError):
    """The caller has asked for an end."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("cancelled")


@dataclass(frozen=True)
class Progress:
    """How far a provider is with one part of its work."""

    part: str
    """Names the part among those of this spec: the first digits of a layer's digest."""
    state: str
    """`downloading`, `unpacking`, `ready`, or `cached`."""
    done: int = 0
    total: int | None = None
    """Bytes; None if nobody knows."""


PULL_POLICIES = ("missing", "always", "never")
FORMS = ("block", "directory")


@dataclass(frozen=True)
class Context:
    """What a provider is told of its surroundings."""

    cache_root: Path
    offline: bool = False
    guest_helpers_dir: Path | None = None
    """Where `vsock-send` and `vsock-runner` for the guest lie."""
    arch: str | None = None
    """The guest's architecture; None is the host's."""
    pull: str = "missing"
    """When the network is asked for an image: `missing` (what is not cached, or was fetched too long ago), `always`,
    `never`."""
    platform: str | None = None
    """Of an image for several platforms, `os/arch[/variant]`; None is linux on `arch`."""
    form: str = "block"
    """What layers become: a `block` image, or a `directory`."""
    progress: Callable[[Progress], None] = lambda _: None
    """Is told how long work goes; from several threads."""
    cancelled: Callable[[], bool] = lambda: False
    """Is asked now and then whether to give up."""

    @property
    def may_ask(self) -> bool:
        """Whether the network may be asked."""
        return not self.offline and self.pull != "never"

    def not_cached(self, spec: str, name: str | None = None) -> ProviderError:
        """The error if the cache has not got `spec` (called `name` in messages) and the network may not be asked."""
        if self.offline:
            return OfflineCacheMiss(spec)
        return InvalidSpec(f"{name or spec} is not in the cache, and it may not be pulled (--pull never)")

    def __post_init__(self) -> None:
        if self.pull not in PULL_POLICIES:
            raise ConfigError(f"pull policy {self.pull!r} is not known; there are {', '.join(PULL_POLICIES)}")
        if self.form not in FORMS:
            raise ConfigError(f"rootfs form {self.form!r} is not known; there are {', '.join(FORMS)}")

    def provider_cache(self, name: str) -> Path:
        """The provider's own directory below `cache_root`, made if it is missing.

        Raises:
            ProviderIOError: it cannot be made.
        """
        directory = Path(self.cache_root) / name
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ProviderIOError(error) from error
        return directory


@runtime_checkable
class RootfsProvider(Protocol):
    """A source of root filesystems. Stateless between calls: its state is in its cache directory."""

    @property
    def name(self) -> str:
        """A short ASCII name, also that of the cache directory."""

    def matches(self, spec: str) -> bool:
        """Whether this provider answers for `spec`. Cheap, and never raises; the first provider that says yes wins."""

    def provide(self, spec: str, context: Context) -> Artifact:
        """Resolves `spec`. Doing it again gives the same artifact.

        Raises:
            ProviderError: it cannot be resolved.
        """
