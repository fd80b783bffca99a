"""Where things are: the guest payload that came with vmette, and the user's directories."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .errors import ConfigError, PayloadError

ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
"""What `uname -m` and people say, and our name for it."""

PAYLOAD = Path(__file__).parent / "_payload"
"""What came with vmette. $VMETTE_ASSETS_DIR goes first, for what runs in the guest."""

KERNELS = {"x86_64": "vmlinux", "aarch64": "Image"}


def host_arch() -> str:
    """The host machine's architecture, by our name.

    Raises:
        ConfigError: it is neither x86_64 nor aarch64.
    """
    return canonical_arch(os.uname().machine)


def canonical_arch(name: str) -> str:
    """Our name for the architecture `name`.

    Raises:
        ConfigError: there is no guest for it.
    """
    try:
        return ARCHITECTURES[name]
    except KeyError:
        raise ConfigError(f"architecture {name!r} is not supported; there are x86_64 and aarch64") from None


def cache_root() -> Path:
    """$VMETTE_CACHE_DIR, or `vmette` in the user's cache directory (of macOS: ~/Library/Caches). Not made here.

    Raises:
        ConfigError: this user has no home directory.
    """
    return _root("VMETTE_CACHE_DIR", "XDG_CACHE_HOME", ".cache", "Library/Caches")


def state_root() -> Path:
    """$VMETTE_STATE_DIR, or `vmette` in the user's directory for state (of macOS: ~/Library/Application Support).

    Not made here.

    Raises:
        ConfigError: this user has no home directory.
    """
    return _root("VMETTE_STATE_DIR", "XDG_STATE_HOME", ".local/state", "Library/Application Support")


def config_root() -> Path | None:
    """`vmette` in the user's directory for configuration (of macOS: ~/Library/Application Support).

    None for a user who has no home.
    """
    return _users("XDG_CONFIG_HOME", ".config", "Library/Application Support")


def _root(ours: str, variable: str, xdg: str, apple: str) -> Path:
    """What our own variable says, or else :func:`_users`."""
    if explicit := os.environ.get(ours):
        return Path(explicit)
    found = _users(variable, xdg, apple)
    if found is None:
        raise ConfigError(f"this user has no home directory; set {ours}")
    return found


def _users(variable: str, xdg: str, apple: str) -> Path | None:
    """`vmette` in one of the directories of the XDG specification, which has a relative one ignored, or in Apple's."""
    explicit = Path(os.environ.get(variable, ""))
    if explicit.is_absolute():
        return explicit / "vmette"
    try:
        return Path.home() / (apple if sys.platform == "darwin" else xdg) / "vmette"
    except RuntimeError:
        return None


def _payload(arch: str, name: str) -> Path:
    root = os.environ.get("VMETTE_ASSETS_DIR")
    path = (Path(root) if root else PAYLOAD) / arch / name
    try:
        there = path.is_file()
    except OSError as error:  # before Python 3.14: a directory on the way is not ours to search
        raise PayloadError(f"cannot read {path}: {error.strerror}") from error
    if not there:
        if sys.platform == "darwin":  # where no kernel can be built
            how = "install vmette's wheel for macOS"
        else:
            how = f"run `make payload{'' if arch == host_arch() else f'-{arch}'}` in a checkout"
        raise PayloadError(f"{path} is missing: {how}, or set VMETTE_ASSETS_DIR to a directory that has it")
    return path


def kernel(arch: str) -> Path:
    """The guest kernel for `arch`.

    Raises:
        PayloadError: it is missing.
    """
    return _payload(arch, KERNELS[arch])


def initramfs(arch: str) -> Path:
    """The initramfs with the guest agent for `arch`.

    Raises:
        PayloadError: it is missing.
    """
    return _payload(arch, "initramfs.cpio")


def base_image(arch: str | None = None) -> Path:
    """The squashfs image of `builtin://base`, for this machine's architecture unless told otherwise.

    Raises:
        PayloadError: it is missing.
    """
    return _payload(arch or host_arch(), "base.squashfs")


def vz_program() -> Path:
    """vmette-vz, the host program that runs machines on macOS: $VMETTE_VZ, or what came with vmette.

    Raises:
        PayloadError: it is missing.
    """
    path = Path(os.environ.get("VMETTE_VZ") or PAYLOAD / "macos" / "vmette-vz")
    if not path.is_file():
        raise PayloadError(f"{path} is missing: install vmette's wheel for macOS, or set VMETTE_VZ to the program")
    return path
