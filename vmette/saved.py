"""What is on the disk of a saved machine, and whether others can wake from it here and now."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from . import __version__, assets
from .config import MachineConfig, Saved
from .errors import VmmError, reason
from .files import checksum, write_atomically
from .providers.base import BlockImage
from .vmm import identity, probe

META = "meta.json"
CHECKED = "checked.json"
"""Says which files were read and found whole, and in which run of this computer."""
FORMAT = 4


def facts(config: MachineConfig) -> dict[str, str]:
    """What a machine that was saved has in its memory, or knows, of this computer: it wakes where they are the same.

    Each by a name for people.

    Raises:
        VmmError, PayloadError: there is nothing here that runs machines.
        OSError: a file is gone.
    """
    assert isinstance(config.root, BlockImage)
    machine = {
        name: getattr(config, name)
        for name in (
            *("arch", "accel", "vcpus", "mem_mib", "root_read_only", "scratch_mib", "network", "vsock", "pids"),
            *("nofile", "guest_helpers", "rosetta", "cmdline"),
        )
    }
    return {
        "vmette": __version__,
        **identity(config),
        "the guest's kernel": probe.identity(config.kernel_path),
        "the guest's initramfs": probe.identity(config.initramfs_path),
        "the root image": f"{config.root.fstype} {_image(config.root.path)}",
        "the machine": json.dumps({**machine, "shares": len(config.shares)}),
    }


def changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Which facts are others now."""
    return [what for what in now if then.get(what) != now[what]]


def _image(path: Path) -> str:
    """What changes when the image at `path` does."""
    path = path.resolve()
    if not path.is_relative_to(assets.cache_root().resolve()):
        return probe.identity(path)
    status = path.stat()  # of the cache, where each use changes the time, and nothing the content
    return f"{path} {status.st_size} {status.st_ino}"


def seal(saved: Saved, config: MachineConfig, about: Mapping[str, Any]) -> None:
    """Ends the making of a saved machine: syncs its files, and writes down what :func:`check` is to find.

    Args:
        saved: The files.
        config: What was saved.
        about: What else there is to say of it.

    Raises:
        OSError: they cannot be read, or it cannot be written.
        VmmError: see :func:`facts`.
    """
    checksums = {}
    for path in saved.parts:
        with _opened(saved, path.name) as file:
            os.fsync(file.fileno())
            checksums[path.name] = checksum(file.fileno())
    meta = {**about, "format": FORMAT, "facts": facts(config), "checksums": checksums}
    write_atomically(saved.directory / META, json.dumps(meta, indent=1).encode())
    _remember(saved)


def read(saved: Saved) -> dict[str, Any]:
    """What :func:`seal` has written down.

    Raises:
        OSError: it cannot be read, or is not to be trusted.
        ValueError: it is something else, or of another version of vmette.
    """
    status = saved.directory.stat()
    if status.st_uid not in {os.geteuid(), 0} or status.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "others can change it", os.fspath(saved.directory))
    meta = json.loads(_content(saved, META))
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError("it is of another version of vmette")
    return meta


def check(saved: Saved, now: Mapping[str, str], meta: Mapping[str, Any]) -> None:
    """Checks that a machine of the facts `now` (see :func:`facts`) wakes from it as the one that was saved.

    The files are read as a whole when they are others than those that were last read, or this computer has been
    started since.

    Raises:
        VmmError: it does not, with the reason.
    """
    try:
        if changed := changes(meta["facts"], now):
            raise VmmError(f"it was made with another version of {changed[0]}")
        if set(meta["checksums"]) != {path.name for path in saved.parts}:
            raise VmmError("it is damaged: a file is missing")
        known = None
        with suppress(OSError, ValueError):
            known = json.loads(_content(saved, CHECKED))
        if known != _state(saved):
            _check_content(saved, meta["checksums"])
            with suppress(OSError):  # it is checked again the next time
                _remember(saved)
    except OSError as error:
        raise VmmError(f"it cannot be read: {reason(error)}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise VmmError("it is damaged") from error


def _opened(saved: Saved, name: str) -> BinaryIO:
    return os.fdopen(saved.open(name), "rb")


def _content(saved: Saved, name: str) -> bytes:
    with _opened(saved, name) as file:
        return file.read() or b""  # which is None of a FIFO that has nothing yet


def _check_content(saved: Saved, checksums: Mapping[str, int]) -> None:
    for path in saved.parts:
        with _opened(saved, path.name) as file:
            if checksum(file.fileno()) != checksums[path.name]:
                raise VmmError(f"it is damaged: {path.name} is not as it was")


def _state(saved: Saved) -> dict[str, Any]:
    """What is as it was if the files are, unless somebody means harm."""
    files = {}
    for path in saved.parts:
        status = path.stat()
        files[path.name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return {"files": files, "boot": probe.boot_id()}


def _remember(saved: Saved) -> None:
    write_atomically(saved.directory / CHECKED, json.dumps(_state(saved)).encode())
