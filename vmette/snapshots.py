"""Machines that were saved, by name: each is a directory that others of the same kind wake from, as often as one likes.

A machine that wakes is a copy: it shares the memory of the saved one until it writes to it, and has random numbers, a
clock and a host name of its own. It needs the QEMU, the guest and the root image that it was saved with.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import assets
from .config import Command, MachineConfig, Saved
from .errors import ConfigError, SandboxTimeout, VmetteError, VmmError, reason
from .files import write_atomically
from .providers.base import BlockFs, BlockImage, ImageConfig
from .vmm import probe

if TYPE_CHECKING:
    from .guest import Guest
    from .machine import Machine, MachineOptions

logger = logging.getLogger(__name__)

META = "meta.json"
VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

OF_THE_MACHINE = (
    *("shares", "disks", "scratch", "net", "vsock", "vsock_port", "guest_vsock_port", "pids", "nofile", "vcpus"),
    *("mem_mib", "rootfs_ro", "kernel", "initramfs", "cmdline", "accel", "arch", "platform", "rootfs_form"),
)
"""Options that are settled when a snapshot is made."""


@dataclass(frozen=True)
class Snapshot:
    """A saved machine."""

    name: str
    rootfs: str
    """The spec that it was made from."""
    created: float
    """A time of `time.time`."""
    warm_up: tuple[str, ...]
    """What was run before."""
    mem_mib: int
    vcpus: int
    arch: str
    accel: str
    rootfs_ro: bool
    root: str
    """The root image's path."""
    fstype: str
    image: Mapping[str, Any] | None
    """The image's configuration."""
    facts: Mapping[str, str]
    """What must be as it was."""
    ram: tuple[int, int, int]
    """Its memory's size, time of change in nanoseconds and inode."""
    state: int
    """CRC-32 of the state of its devices."""

    @property
    def directory(self) -> Path:
        """Where it is."""
        return _root() / self.name

    @property
    def bytes(self) -> int:
        """What it takes of the disk."""
        with_holes = (self.directory / name for name in ("ram", "state", META))
        return sum(path.stat().st_blocks * 512 for path in with_holes)


def create(
    name: str,
    rootfs: str | os.PathLike[str],
    warm_up: Sequence[str] = (),
    *,
    timeout: float | None = None,
    **options: Any,
) -> Snapshot:
    """Boots a machine, runs `warm_up` in it, if that is given, and saves it.

    What the warm-up has left running goes on in each machine that wakes from it.

    Raises:
        ConfigError: the name is no name or taken, or an option is of what no snapshot holds.
        CalledProcessError: the warm-up failed.
        TimeoutExpired: it took longer than `timeout` seconds.
        VmetteError: the machine does not boot, or cannot be saved.
    """
    from . import vmm
    from .machine import booted, prepare
    from .timings import Stopwatch

    check_name(name)
    unsaved = [option for option in ("shares", "disks", "scratch", "net", "vsock") if options.get(option)]
    if unsaved:
        raise ConfigError(f"a snapshot holds no {unsaved[0]}: leave that out")
    machine = prepare(rootfs, options)  # type: ignore[arg-type]
    if machine.services is not None:
        raise ConfigError("secrets and ways out are given to the machines that wake from a snapshot, not to it")
    if not isinstance(machine.config.root, BlockImage):
        raise ConfigError("a snapshot holds no directories: its root filesystem is a block image")
    with _staging(name) as staging:
        saved = Saved(staging)
        os.close(os.open(saved.ram, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        config = replace(vmm.settled(machine.config), to_save=saved)
        with booted(replace(machine, config=config), Stopwatch()) as guest:
            guest.turn_until(lambda: guest.kernel is not None)
            if warm_up:
                _run(guest, machine.command(warm_up), timeout)
            guest.save()
        snapshot = _described(name, os.fspath(rootfs), tuple(warm_up), config, machine.image)
        with saved.ram.open("rb") as file:
            os.fsync(file.fileno())
        write_atomically(staging / META, json.dumps({"version": VERSION, **asdict(snapshot)}, indent=1).encode())
    return snapshot


@contextmanager
def _staging(name: str) -> Iterator[Path]:
    """A directory that becomes the snapshot `name` at the end, and goes if it comes to another one.

    Raises:
        ConfigError: there is such a snapshot, or it is being made.
    """
    with _locked() as root:
        staging, final = root / f".{name}.part", root / name
        taken = ConfigError(f"there is a snapshot {name!r} already: `vmette snapshot rm {name}` removes it")
        if final.exists():
            raise taken
        if staging.exists():
            with _held(staging) as ours:
                if not ours:
                    raise ConfigError(f"snapshot {name!r} is being made")
                shutil.rmtree(staging)  # somebody has not come to an end of it
        staging.mkdir(mode=0o700)
        holding = ExitStack()
        holding.enter_context(_held(staging))
    with holding:
        try:
            yield staging
            with _locked():
                if final.exists():
                    raise taken
                staging.rename(final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


@contextmanager
def _held(directory: Path) -> Iterator[bool]:
    """Whether nobody else has it: nobody can, meanwhile."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except BlockingIOError:
            ours = False
        yield ours
    finally:
        os.close(fd)


def _run(guest: Guest, command: Command, timeout: float | None) -> None:
    from .process import Captured
    from .streams import BytesSource

    captured = Captured(command)
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        exited = guest.run(command, BytesSource(b""), *captured.sinks, deadline=deadline)
    except SandboxTimeout:
        assert timeout is not None
        raise captured.timed_out(timeout) from None
    captured.completed(exited).check_returncode()


def _described(
    name: str, rootfs: str, warm_up: tuple[str, ...], config: MachineConfig, image: ImageConfig | None
) -> Snapshot:
    assert isinstance(config.root, BlockImage)
    assert config.to_save is not None
    return Snapshot(
        name=name,
        rootfs=rootfs,
        created=time.time(),
        warm_up=warm_up,
        mem_mib=config.mem_mib,
        vcpus=config.vcpus,
        arch=config.arch,
        accel=config.accel,
        rootfs_ro=config.root_read_only,
        root=str(config.root.path),
        fstype=config.root.fstype.value,
        image=None if image is None else asdict(image),
        facts=_facts(config),
        ram=_identity(config.to_save.ram),
        state=zlib.crc32(config.to_save.state.read_bytes()),
    )


def _facts(config: MachineConfig) -> dict[str, str]:
    """What a machine can wake with alone: it has open, and in memory, what these are."""
    from . import vmm

    assert isinstance(config.root, BlockImage)
    return {
        **vmm.identity(config),
        "the guest's kernel": probe.identity(config.kernel_path),
        "the guest's initramfs": probe.identity(config.initramfs_path),
        "the root image": probe.identity(config.root.path),
    }


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def snapshots() -> list[Snapshot]:
    """All of them, by name. What is no snapshot of this version is passed over."""
    found = []
    for path in sorted(_root().iterdir()) if _root().is_dir() else ():
        if _NAME.fullmatch(path.name):
            try:
                found.append(_read(path.name))
            except VmetteError as error:
                logger.info("%s", error)
    return found


def remove(name: str) -> None:
    """Removes a snapshot. Machines that have woken from it live on.

    Raises:
        ConfigError: there is none of that name.
    """
    with _locked() as root:
        path = root / check_name(name)
        if not path.is_dir():
            raise _none(name)
        gone = root / f".{name}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)  # first, so that nobody finds half of one
        shutil.rmtree(gone)


def machine(name: str, options: MachineOptions) -> Machine:
    """A machine that wakes from the snapshot `name`.

    Raises:
        ConfigError: there is none, or an option is of what was settled when it was made.
        VmmError: something that it needs has changed since, or it is damaged.
    """
    from .machine import Machine, for_image, services

    snapshot = _read(check_name(name))
    settled = [option for option in OF_THE_MACHINE if options.get(option)]
    if settled:
        raise ConfigError(f"{settled[0]} was settled when the snapshot {name!r} was made: leave it out")
    config = MachineConfig(
        BlockImage(Path(snapshot.root), BlockFs(snapshot.fstype)),
        vcpus=snapshot.vcpus,
        mem_mib=snapshot.mem_mib,
        hostname=options.get("hostname", "vmette"),
        root_read_only=snapshot.rootfs_ro,
        arch=snapshot.arch,
        accel=snapshot.accel,
        saved=Saved(snapshot.directory),
    )
    _check(snapshot, config)
    image = None if snapshot.image is None else _image(snapshot.image)
    return Machine(config, image, for_image(services(options), image), options.get("cancelled"))


def _check(snapshot: Snapshot, config: MachineConfig) -> None:
    """Raises VmmError if a machine does not wake from it as the one that was saved."""
    again = f"create it anew: `vmette snapshot rm {snapshot.name}`, then `vmette snapshot create`"
    for what, fact in _facts(config).items():
        if snapshot.facts.get(what) != fact:
            raise VmmError(f"snapshot {snapshot.name!r} was made with another version of {what}: {again}")
    saved = Saved(snapshot.directory)
    try:
        intact = _identity(saved.ram) == tuple(snapshot.ram)
        intact &= zlib.crc32(saved.state.read_bytes()) == snapshot.state
    except OSError as error:
        raise VmmError(f"snapshot {snapshot.name!r} cannot be read: {reason(error)}; {again}") from error
    if not intact:
        raise VmmError(f"snapshot {snapshot.name!r} is damaged: {again}")


def _image(fields: Mapping[str, Any]) -> ImageConfig:
    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return ImageConfig(**{name: frozen(value) for name, value in fields.items()})


def check_name(name: str) -> str:
    """`name`, if a snapshot can have it.

    Raises:
        ConfigError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"snapshot {name!r}: a name is of letters, digits, '.', '_' and '-', at most 63")
    return name


def _read(name: str) -> Snapshot:
    try:
        values = json.loads((_root() / name / META).read_bytes())
        if values.pop("version") != VERSION:
            raise VmmError(f"snapshot {name!r} is of another version of vmette: create it anew")
        return Snapshot(**{**values, "warm_up": tuple(values["warm_up"]), "ram": tuple(values["ram"])})
    except (FileNotFoundError, NotADirectoryError):
        raise _none(name) from None
    except OSError as error:
        raise VmmError(f"snapshot {name!r} cannot be read: {reason(error)}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise VmmError(f"snapshot {name!r} is damaged: create it anew") from error


def _none(name: str) -> ConfigError:
    known = ", ".join(snapshot.name for snapshot in snapshots()) or "none"
    return ConfigError(f"there is no snapshot {name!r}; there are: {known}")


def _root() -> Path:
    return assets.state_root() / "snapshots"


@contextmanager
def _locked() -> Iterator[Path]:
    """The directory of all of them, while nobody else makes or removes any.

    Raises:
        VmetteError: it cannot be written to.
    """
    root = _root()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    except OSError as error:
        raise VmetteError(f"cannot keep snapshots in {root}: {reason(error)}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root
