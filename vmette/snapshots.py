"""Saved machines that a person has asked for, by name or by path; others wake from them, as often as one likes.

A machine that wakes is a copy: it shares the memory of the saved one until it writes to it, and has random numbers, a
clock and names of its own. It needs the QEMU, the guest and the root image that it was saved with.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import assets, saved, staging, vmm
from .config import PARTS, Command, MachineConfig, Saved
from .errors import ConfigError, SandboxTimeout, VmetteError, VmmError, reason
from .files import open_regular
from .providers.base import BlockFs, BlockImage, ImageConfig

if TYPE_CHECKING:
    from .guest import Guest
    from .machine import Machine, MachineOptions

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

OF_THE_MACHINE = (
    *("shares", "disks", "scratch", "net", "vsock", "vsock_port", "guest_vsock_port", "pids", "nofile", "vcpus"),
    *("mem_mib", "rootfs_ro", "kernel", "initramfs", "cmdline", "accel", "arch", "platform", "rootfs_form"),
)
"""Options that are settled when a snapshot is made."""


@dataclass(frozen=True)
class Snapshot:
    """A saved machine."""

    directory: Path
    """Where it is."""
    rootfs: str
    """The spec that it was made from; without a URL's query, which may be secret."""
    created: float
    """A time of `time.time`."""
    warm_up: tuple[str, ...]
    """What was run before."""
    machine: Mapping[str, Any]
    """Fields of its configuration."""
    root: str
    """The root image's path."""
    fstype: str
    image: Mapping[str, Any] | None
    """The image's configuration."""

    @property
    def name(self) -> str:
        """Its name, or the last part of its path."""
        return self.directory.name

    @property
    def bytes(self) -> int:
        """What it takes of the disk."""
        return sum(path.stat().st_blocks * 512 for path in Saved(self.directory).parts)

    @property
    def config(self) -> MachineConfig:
        """A machine that wakes from it.

        Raises:
            VmetteError: something that it needs is gone.
            TypeError, ValueError, KeyError: it has been tampered with.
        """
        fields: dict[str, Any] = {name: self.machine[name] for name in _SAVED_FIELDS}
        fields |= {name: Path(self.machine[name]) for name in _SAVED_PATHS}
        return MachineConfig(BlockImage(Path(self.root), BlockFs(self.fstype)), **fields, saved=Saved(self.directory))


_SAVED_FIELDS = (
    *("vcpus", "mem_mib", "root_read_only", "scratch_mib", "network", "vsock", "guest_helpers", "rosetta", "pids"),
    *("nofile", "cmdline", "arch", "accel"),
)
_SAVED_PATHS = ("kernel", "initramfs")


def create(
    target: str | os.PathLike[str],
    rootfs: str | os.PathLike[str],
    warm_up: Sequence[str] = (),
    *,
    timeout: float | None = None,
    **options: Any,
) -> Snapshot:
    """Boots a machine, runs `warm_up` in it, if that is given, and saves it.

    What the warm-up has left running goes on in each machine that wakes from it.

    Args:
        target: A name; or a path, if it has a `/`, of a directory that is made.
        rootfs: The spec of its root filesystem, which is a block image.
        warm_up: A command.
        timeout: Seconds that it may take.
        options: See :class:`vmette.machine.MachineOptions`.

    Raises:
        ConfigError: the target is no name or taken, or an option is of what no snapshot holds.
        CalledProcessError: the warm-up failed.
        TimeoutExpired: it took longer than `timeout` seconds.
        VmetteError: the machine does not boot, or cannot be saved.
    """
    from .machine import booted, prepare
    from .timings import Stopwatch

    directory = _directory(target)
    for option in ("shares", "disks"):
        if options.get(option):
            raise ConfigError(f"a snapshot holds no {option}: leave that out")
    machine = prepare(rootfs, options)  # type: ignore[arg-type]
    if machine.services is not None:
        raise ConfigError("secrets and ways out are given to the machines that wake from a snapshot, not to it")
    with _staging(directory) as place:
        config = replace(machine.config, savable=True)
        check_savable(config)
        with booted(replace(machine, config=config, template=False), Stopwatch()) as guest:
            guest.turn_until(lambda: guest.kernel is not None)
            if warm_up:
                _run(guest, machine.command(warm_up), timeout)
            return save(guest, machine, place, directory, os.fspath(rootfs), warm_up, last=True)


def save_running(guest: Guest, machine: Machine, target: str | os.PathLike[str], rootfs: str) -> Snapshot:
    """Saves a machine that goes on.

    Raises:
        ConfigError: the target is no name or taken, or the machine cannot be saved.
        VmetteError: it could not.
    """
    directory = _directory(target)
    if machine.has_secrets:
        raise ConfigError("a machine with secrets is not saved: they would be on the disk")
    with _staging(directory) as place:
        return save(guest, machine, place, directory, rootfs, ())


def is_savable(config: MachineConfig) -> bool:
    """Whether a machine can be saved in the midst of its life."""
    return isinstance(config.root, BlockImage) and not config.shares and not config.disks


def check_savable(config: MachineConfig) -> None:
    """Does nothing if :func:`is_savable`.

    Raises:
        ConfigError: it is not.
    """
    if not is_savable(config):
        raise ConfigError("a machine with shares or disks, or a directory for its root, cannot be saved")


def save(
    guest: Guest,
    machine: Machine,
    place: Path,
    directory: Path,
    rootfs: str,
    warm_up: Sequence[str],
    *,
    last: bool = False,
) -> Snapshot:
    """Saves the machine of `guest` in `place`, which will be `directory`."""
    config = vmm.settled(guest.config)
    check_savable(config)
    assert isinstance(config.root, BlockImage)
    files = Saved(place)
    if guest.facts is not None and (changed := saved.changes(guest.facts, saved.facts(config))):
        raise VmmError(f"the machine cannot be saved: {changed[0]} is another one now than when it was started")
    try:
        guest.save(files, last=last)
        snapshot = Snapshot(
            directory=directory,
            rootfs=_shown(rootfs),
            created=time.time(),
            warm_up=tuple(warm_up),
            machine={
                **{name: getattr(config, name) for name in _SAVED_FIELDS},
                **{name: os.fspath(getattr(config, name).absolute()) for name in _SAVED_PATHS},
            },
            root=os.fspath(config.root.path.absolute()),
            fstype=config.root.fstype.value,
            image=None if machine.image is None else asdict(machine.image),
        )
        about = {name: value for name, value in asdict(snapshot).items() if name != "directory"}
        saved.seal(files, config, about)
    except OSError as error:
        raise VmetteError(f"cannot write the snapshot {directory}: {reason(error)}") from error
    return snapshot


def _shown(rootfs: str) -> str:
    if "://" not in rootfs:
        return rootfs
    from .providers.http import shown

    return shown(rootfs)


@contextmanager
def _staging(final: Path) -> Iterator[Path]:
    """A directory that becomes the snapshot `final` at the end, and goes if it comes to another one.

    Raises:
        ConfigError: there is such a snapshot, or it is being made.
        VmetteError: there can be none.
    """
    taken = ConfigError(f"there is a snapshot {final.name!r} already: `vmette snapshot rm` removes it")
    with ExitStack() as stack:
        try:
            if final.parent == _root():
                _root().mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.path.lexists(final):
                raise taken
            if any(staging.is_place_of(place, final) for place in staging.sweep(final.parent)):
                raise ConfigError(f"snapshot {final.name!r} is being made")
            place = stack.enter_context(staging.staging(final))
        except OSError as error:
            raise _unkept(final, error) from error
        yield place
        try:
            staging.publish(place, final)
        except OSError as error:
            if error.errno in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}:  # somebody else was faster
                raise taken from None
            raise _unkept(final, error) from error


def _unkept(directory: Path, error: OSError) -> VmetteError:
    return VmetteError(f"cannot keep snapshots in {directory.parent}: {reason(error)}")


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


def snapshots() -> list[Snapshot]:
    """All that have a name, by it. What is no snapshot of this version is passed over."""
    found = []
    for path in sorted(_root().iterdir()) if _root().is_dir() else ():
        if _NAME.fullmatch(path.name):
            try:
                found.append(_read(path, Saved)[0])
            except VmetteError as error:
                logger.info("%s", error)
    return found


def remove(target: str | os.PathLike[str]) -> None:
    """Removes a snapshot. Machines that have woken from it live on.

    Raises:
        ConfigError: there is none of that name, or at that path.
        VmetteError: it cannot be removed.
    """
    path = _directory(target)
    if not (path / saved.META).is_file() or (path.parent != _root() and not _is_snapshot(path)):
        raise _none(path)  # whatever else it is, it stays
    try:
        staging.remove(path)
    except FileNotFoundError:  # somebody else was faster
        raise _none(path) from None
    except OSError as error:
        raise VmetteError(f"cannot remove the snapshot {path}: {reason(error)}") from error


def _is_snapshot(path: Path) -> bool:
    """Whether a directory is a snapshot, of whatever version, and nothing else is in it."""
    try:
        names = {each.name for each in path.iterdir() if not each.name.startswith(".")}
        with open_regular(path / saved.META) as file:
            meta = json.loads(file.read())
    except (OSError, ValueError):
        return False
    return isinstance(meta, dict) and "checksums" in meta and names <= {saved.META, saved.CHECKED, *PARTS}


def machine(target: str, options: MachineOptions) -> Machine:
    """A machine that wakes from the snapshot `target`.

    Raises:
        ConfigError: there is none, or an option is of what was settled when it was made.
        VmmError: something that it needs has changed since, or it is damaged.
    """
    from .machine import Machine, for_image, services

    snapshot, meta, files = _read(_directory(target), _kept_open)
    settled = [option for option in OF_THE_MACHINE if options.get(option)]
    if settled:
        raise ConfigError(f"{settled[0]} was settled when the snapshot {snapshot.name!r} was made: leave it out")
    try:
        config = replace(snapshot.config, hostname=options.get("hostname", "vmette"), saved=files)
        saved.check(files, saved.facts(config), meta)
    except VmetteError as error:
        raise _useless(snapshot.directory, error) from error
    except OSError as error:
        raise _useless(snapshot.directory, f"it cannot be read: {reason(error)}") from error
    except (TypeError, ValueError, KeyError) as error:
        raise _useless(snapshot.directory, "it is damaged") from error
    image = None if snapshot.image is None else _image(snapshot.image)
    return Machine(config, image, for_image(services(options), image), options.get("cancelled"), template=False)


def _useless(directory: Path, why: object) -> VmmError:
    return VmmError(
        f"snapshot {directory.name!r}: {why}; create it anew: `vmette snapshot rm`, then `vmette snapshot create`"
    )


def _image(fields: Mapping[str, Any]) -> ImageConfig:
    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return ImageConfig(**{name: frozen(value) for name, value in fields.items()})


def _directory(target: str | os.PathLike[str]) -> Path:
    """Where the snapshot of that name or path is, or would be.

    Raises:
        ConfigError: it can have no such name.
    """
    text = os.fspath(target)
    if "/" in text or not isinstance(target, str):
        path = Path(text).absolute()
        if "\0" in text or path.name in {"", ".."}:
            raise ConfigError(f"snapshot {text!r}: this is no path of a directory that could be made")
        return path
    if not _NAME.fullmatch(text):
        raise ConfigError(
            f"snapshot {text!r}: a name is of letters, digits, '.', '_' and '-', at most 63; a path has a '/'"
        )
    return _root() / text


class _KeptOpen(Saved):
    """One whose files are those of the directory that was there, whatever is at its path by now.

    It has a descriptor, which is closed when nobody has it any more.
    """

    def __init__(self, directory: Path) -> None:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        super().__init__(Path(f"/proc/self/fd/{fd}"))
        weakref.finalize(self, os.close, fd)

    def __reduce__(self) -> tuple[object, ...]:
        # For the process that a machine stays with: this one waits for it, and has the directory open meanwhile.
        return _KeptOpen, (Path(f"/proc/{os.getpid()}/fd/{self.directory.name}"),)


def _kept_open(directory: Path) -> Saved:
    """The files of a snapshot, to be checked and then used."""
    return Saved(directory) if vmm.name() == "vz" else _KeptOpen(directory)  # that program is told their paths


def _read(directory: Path, find: Callable[[Path], Saved]) -> tuple[Snapshot, Mapping[str, Any], Saved]:
    """The snapshot there, what was written down when it was sealed, and its files as `find` has them."""
    try:
        files = find(directory)
        meta = saved.read(files)
        values = {name: meta[name] for name in ("rootfs", "created", "machine", "root", "fstype", "image")}
        return Snapshot(directory=directory, warm_up=tuple(meta["warm_up"]), **values), meta, files
    except (FileNotFoundError, NotADirectoryError):
        raise _none(directory) from None
    except OSError as error:
        raise _useless(directory, f"it cannot be read: {reason(error)}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise _useless(directory, "it is damaged, or of another version of vmette") from error


def _none(directory: Path) -> ConfigError:
    if directory.parent != _root():
        return ConfigError(f"there is no snapshot in {directory}")
    known = ", ".join(snapshot.name for snapshot in snapshots()) or "none"
    return ConfigError(f"there is no snapshot {directory.name!r}; there are: {known}")


def _root() -> Path:
    return assets.state_root() / "snapshots"
