"""Where things are: the guest payload that came with vmette, and the user's directories."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from . import homes
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
    """See :func:`vmette.homes.cache`. Not made here.

    Raises:
        ConfigError: this user has no home directory.
    """
    return _there(homes.cache(), "VMETTE_CACHE_DIR")


def state_root() -> Path:
    """See :func:`vmette.homes.state`. Not made here.

    Raises:
        ConfigError: this user has no home directory.
    """
    return _there(homes.state(), "VMETTE_STATE_DIR")


def config_root() -> Path | None:
    """See :func:`vmette.homes.config`. None for a user who has no home."""
    root = homes.config()
    return None if root is None else Path(root)


def _there(root: str | None, variable: str) -> Path:
    if root is None:
        raise ConfigError(f"this user has no home directory; set {variable}")
    return Path(root)


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
