"""What a microVM is made of and what runs in it, checked as it is written down."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from . import assets
from .errors import ConfigError, PayloadError, reason
from .providers.base import Artifact, BlockImage, ImageConfig

ACCELERATORS = ("auto", "kvm", "tcg")
MAX_VCPUS = 16
"""CONFIG_NR_CPUS of the guest kernel."""
MIN_MEM_MIB, MAX_MEM_MIB = 64, 1 << 20
MAX_SHARES = 16
MAX_DISKS = 8
SECTOR = 512
"""Bytes: what the size of a virtio disk is counted in (virtio 1.2, 5.2.4)."""
MIN_SCRATCH_MIB, MAX_SCRATCH_MIB = 16, 16 << 20
"""ext4 with block numbers of 32 bits ends at 16 TiB."""
MIN_PIDS, MAX_PIDS = 1, 1 << 22
"""The kernel's PID_MAX_LIMIT (include/linux/threads.h)."""
MIN_NOFILE, MAX_NOFILE = 16, 1 << 20
"""The kernel's default for fs.nr_open (fs/file.c) is the most that anybody can have."""
HOSTNAME_BYTES = 64
"""HOST_NAME_MAX of Linux."""
TAG_BYTES = 35
"""The tag field of a virtio-fs device has 36 (virtio 1.2, 5.11.4); Virtualization.framework wants fewer than that."""
ROOT_TAG, ROSETTA_TAG = "rootfs", "vmette-rosetta"
"""Ours: no share of a user can have these."""
KERNEL_DIRECTORIES = ("/proc", "/sys", "/dev")
"""Of the guest, and nobody else's."""
CMDLINE_BYTES = 2047
"""COMMAND_LINE_SIZE of both architectures, less the final NUL (arm64's is the smaller one)."""

SIGNALS = (
    *("HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM"),
    *("TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF"),
    *("WINCH", "IO", "PWR", "SYS"),
)
"""Linux's signals on x86 and Arm from number 1 on (signal(7))."""
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOSTNAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
"""RFC 1123, 2.1."""


@dataclass(frozen=True)
class Share:
    """A directory of the host in the guest, at `target` or else at /mnt/`tag`.

    Raises:
        ConfigError: the tag or the target cannot be used, or the path is no directory.
    """

    tag: str
    """Names the device. With a target it may be empty: then the machine finds one."""
    path: Path
    read_only: bool = False
    target: str | None = None
    """An absolute path of the guest, which is made if it is missing."""

    def __post_init__(self) -> None:
        if self.target is not None:
            _check_target(self.target)
        if self.tag or self.target is None:
            _check_tag(self.tag)
        _check_directory(f"share {self.tag}" if self.tag else f"volume {self.target}", self.path)

    @classmethod
    def parse(cls, text: str) -> Share:
        """Reads `TAG=PATH[:ro]` as the command line has it (`:rw`, the default, may be said too)."""
        tag, _, rest = text.partition("=")
        path, read_only = _split_access(rest)
        if not path:  # which Path would take for "."
            raise ConfigError(f"share {text!r} is malformed: it is TAG=PATH or TAG=PATH:ro")
        return cls(tag, Path(path), read_only)

    @classmethod
    def volume(cls, text: str) -> Share:
        """Reads `HOST:GUEST[:ro]` as container engines have it: a directory of the host, its place in the guest."""
        paths, read_only = _split_access(text)
        path, separator, target = paths.rpartition(":/")
        if not path or not separator:
            raise ConfigError(
                f"volume {text!r} is malformed: it is HOST:GUEST or HOST:GUEST:ro, GUEST an absolute path"
            )
        return cls("", Path(path), read_only, f"/{target}")


@dataclass(frozen=True)
class Disk:
    """A raw image, or a block device of the host, as a disk of the guest.

    Disks are /dev/vdb, /dev/vdc, … in their order, or begin at /dev/vda if the root is no disk itself.

    Raises:
        ConfigError: the path is neither, cannot be opened, or has no size that a disk can have.
    """

    path: Path
    read_only: bool = False

    def __post_init__(self) -> None:
        try:
            mode = self.path.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):  # to open a FIFO would be to wait
                raise ConfigError(f"disk {self.path} is neither a regular file nor a block device")
            fd = os.open(self.path, os.O_RDONLY if self.read_only else os.O_RDWR)
            try:
                size = os.lseek(fd, 0, os.SEEK_END)
            finally:
                os.close(fd)
        except (OSError, ValueError) as error:  # ValueError: a NUL in it
            raise ConfigError(f"disk {self.path}: {reason(error)}") from error
        if size == 0 or size % SECTOR:
            raise ConfigError(f"disk {self.path} has {size} bytes; a raw image has a multiple of {SECTOR}")

    @classmethod
    def parse(cls, text: str) -> Disk:
        """Reads `PATH[:ro]` as the command line has it (`:rw`, the default, may be said too)."""
        path, read_only = _split_access(text)
        if not path:  # which Path would take for "."
            raise ConfigError(f"disk {text!r} is malformed: it is PATH or PATH:ro")
        return cls(Path(path), read_only)

    @property
    def is_device(self) -> bool:
        """Whether it is a block device of the host."""
        return stat.S_ISBLK(self.path.stat().st_mode)


def scratch_size(text: str) -> int:
    """MiB of a scratch disk as the command line has it: `8G`, `512M`, or a number of MiB.

    Raises:
        ConfigError: it is none of these, or too small or too large.
    """
    match = re.fullmatch(r"([0-9]{1,9})([GM]?)", text)
    if match is None:
        raise ConfigError(f"scratch size {text!r} is malformed: it is like 8G, 512M or 64 (MiB)")
    return _check_range(
        int(match[1]) << (10 if match[2] == "G" else 0), "MiB of scratch", MIN_SCRATCH_MIB, MAX_SCRATCH_MIB
    )


def _split_access(text: str) -> tuple[str, bool]:
    """What comes before a final `:ro` or `:rw`, and whether it is `:ro`."""
    read_only = text.endswith(":ro")
    return (text[:-3] if read_only or text.endswith(":rw") else text), read_only


def _check_tag(tag: str) -> None:
    if not _TAG.fullmatch(tag):
        raise ConfigError(f"share tag {tag!r} is malformed: letters, digits, '.', '_' and '-' only")
    if len(tag) > TAG_BYTES:
        raise ConfigError(f"share tag {tag!r} is too long: at most {TAG_BYTES} characters")
    if tag == ROOT_TAG or tag.startswith("vmette"):
        raise ConfigError(f"share tag {tag!r} is reserved; choose another name")


def _check_target(target: str) -> None:
    parts = [part for part in target.split("/") if part not in ("", ".")]
    if not target.startswith("/") or ".." in parts or "\0" in target:
        raise ConfigError(f"volume {target!r}: the place in the guest is an absolute path without '..'")
    try:
        os.fsencode(target)
    except UnicodeEncodeError:
        raise ConfigError(f"volume {target!r}: the place in the guest is no text") from None
    if not parts or f"/{parts[0]}" in KERNEL_DIRECTORIES:
        raise ConfigError(f"volume {target!r}: that place is the guest's own; choose another one")


def _check_directory(what: str, path: Path) -> None:
    try:
        is_directory = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        raise ConfigError(f"{what}: {path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        raise ConfigError(f"{what}: {path}: {reason(error)}") from error
    if not is_directory:
        raise ConfigError(f"{what}: {path} is not a directory")


def _check_range(value: int, what: str, least: int, most: int) -> int:
    if not least <= value <= most:
        raise ConfigError(f"{value} {what}: there can be {least} to {most}")
    return value


@dataclass(frozen=True)
class Command:
    """What the guest is to run. `env` is the whole environment; the guest adds PATH and HOME where they are missing."""

    argv: tuple[bytes, ...]
    env: tuple[bytes, ...] = field(default=(), repr=False)
    cwd: bytes | None = None
    user: bytes | None = None
    stop_signal: int | None = None
    """Sent when the time is over, so that the command can end by itself; None ends it at once."""
    terminal: tuple[int, int] | None = None
    """Run it in a terminal of so many rows and columns."""
    builtin: bool = False
    """`argv` names a function of the guest's agent (csrc/guest/builtins.h), not a program."""
    background: bool = False
    """While it alone runs, the machine is idle."""
    init: bool = False
    """Run it as PID 1 of a PID namespace of its own, in which all later commands run too."""

    @classmethod
    def of(
        cls,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        *,
        image: ImageConfig | None = None,
        entrypoint: Sequence[str] | None = None,
    ) -> Command:
        """The command that these words ask for, and `image` where they say nothing, as Docker has it.

        Args:
            argv: The program and its arguments; after an entrypoint, arguments only. Empty is the image's Cmd.
            env: Added to the image's.
            cwd: In place of the image's WorkingDir.
            user: In place of the image's User.
            image: What the image says.
            entrypoint: In place of the image's Entrypoint, and of its Cmd too; empty is none.

        Raises:
            ConfigError: it cannot be asked for.
        """
        if isinstance(argv, str):
            raise ConfigError("the command is one string; give a list: a program and its arguments")
        if image is not None:
            argv = argv or (image.cmd if entrypoint is None else ())
            argv = [*(image.entrypoint if entrypoint is None else entrypoint), *argv]
            env = {**dict(image.env), **(env or {})}
            cwd = cwd or (image.working_dir and f"/{image.working_dir.lstrip('/')}")
            user = user or image.user
        elif entrypoint:
            argv = [*entrypoint, *argv]
        entries = tuple(f"{name}={value}" for name, value in (env or {}).items())
        for name in env or {}:
            if not name or "=" in name:
                raise ConfigError(f"environment variable {name!r}: a name is not empty and has no '='")
        if not argv or not argv[0]:
            raise ConfigError("there is no command to run; give a program and its arguments")
        if cwd is not None and not cwd.startswith("/"):
            raise ConfigError(f"working directory {cwd!r} is no absolute path of the guest")
        if any("\0" in text for text in (*argv, *entries, cwd or "", user or "")):
            raise ConfigError("the command, its environment, directory or user has a NUL byte")
        try:
            return cls(
                tuple(map(os.fsencode, argv)),
                tuple(map(os.fsencode, entries)),
                None if cwd is None else os.fsencode(cwd),
                None if user is None else os.fsencode(user),
                signal_number(image.stop_signal) if image is not None and image.stop_signal else None,
            )
        except UnicodeEncodeError:
            raise ConfigError("the command, its environment, directory or user is no text") from None


def signal_number(text: str) -> int:
    """The guest's number of a signal, which is Linux's, whatever the host is: `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`.

    Raises:
        ConfigError: there is no such signal.
    """
    name = text.upper().removeprefix("SIG")
    first_realtime, last = 34, 64  # of glibc and musl; 32 and 33 are their own
    if name in SIGNALS:
        return SIGNALS.index(name) + 1
    if match := re.fullmatch(r"RTMIN(?:\+([0-9]{1,2}))?", name):
        number = first_realtime + int(match[1] or 0)
    else:
        number = int(text) if re.fullmatch("[0-9]{1,2}", text) else 0
    if not 1 <= number <= last:
        raise ConfigError(f"signal {text!r} is not known")
    return number


PARTS = ("ram", "state", "scratch", "identifier")
"""Of a saved machine: its memory, with holes; the state of its devices (with Virtualization.framework, and its memory);
its scratch disk; and, with that framework, who the machine is. What a machine has not is not there."""


@dataclass(frozen=True)
class Saved:
    """Where a machine has been saved, or is to be: a directory with a file for each of :data:`PARTS`."""

    directory: Path

    def path(self, part: str) -> Path:
        """The file of a part."""
        return self.directory / part

    @property
    def parts(self) -> list[Path]:
        """The files that are there."""
        return [path for path in map(self.path, PARTS) if path.exists()]

    def create(self, part: str) -> int:
        """A descriptor of a new, empty file for a part, which is the caller's to close.

        Raises:
            OSError: it cannot be made.
        """
        return os.open(self.path(part), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def open(self, part: str) -> int:
        """A descriptor to read a part, which is the caller's to close. A FIFO there does not hold us up.

        Raises:
            OSError: it cannot be opened.
        """
        return os.open(self.path(part), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


class SavedInMemory(Saved):
    """A machine that is saved in files without names (memfd_create(2)), which are gone when nobody has them open."""

    def __init__(self) -> None:
        super().__init__(Path("/proc/self/fd"))
        self._fds: dict[str, int] = {}

    def path(self, part: str) -> Path:
        """See :meth:`Saved.path`."""
        return self.directory / str(self._fds.get(part, "none"))

    def create(self, part: str) -> int:
        """See :meth:`Saved.create`."""
        self._fds[part] = os.memfd_create(f"vmette-{part}", os.MFD_CLOEXEC)
        return os.dup(self._fds[part])

    def open(self, part: str) -> int:
        """See :meth:`Saved.open`."""
        return os.open(self.path(part), os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Lets go of them."""
        while self._fds:
            os.close(self._fds.popitem()[1])


@dataclass(frozen=True)
class MachineConfig:
    """One microVM.

    Raises:
        ConfigError: a value is out of range.
        PayloadError: the kernel or the initramfs is missing, unreadable or something else.
    """

    root: Artifact | None
    """None boots to the point where the guest says that it has no root: the probe for an accelerator does."""
    shares: tuple[Share, ...] = ()
    disks: tuple[Disk, ...] = ()
    scratch_mib: int | None = None
    """MiB of a disk that lives as long as the VM, in place of memory, for what is written to the root and to /tmp."""
    network: bool = False
    """A network card, and through it the networks that the host is in; without it there is none."""
    vsock: bool = False
    """A vsock device, which leads to the host, if this host has any to give."""
    rosetta: bool = False
    """Programs for x86_64 run in a machine for aarch64, by Apple's Rosetta."""
    guest_helpers: bool = False
    """vsock-send and vsock-runner in /usr/local/bin of the guest, whatever its root is."""
    vcpus: int = 1
    mem_mib: int = 512
    pids: int | None = None
    """The most processes and threads of all commands together; None is what suits the memory, at most 4,096."""
    nofile: int | None = None
    """The most files that a process of a command may have open; None is 1,024, which it can raise to 4,096."""
    hostname: str = "vmette"
    root_read_only: bool = False
    kernel: Path | None = None
    initramfs: Path | None = None
    cmdline: str = ""
    """More kernel parameters, after ours."""
    savable: bool = False
    """It may be saved."""
    shares_later: bool = False
    """It is to be saved before it has mounted its shares: what wakes from it has others."""
    saved: Saved | None = None
    """Go on from there, in a copy, in place of a boot."""
    arch: str = field(default_factory=assets.host_arch)
    accel: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "arch", assets.canonical_arch(self.arch))
        _check_range(self.vcpus, "vcpus", 1, MAX_VCPUS)
        if not MIN_MEM_MIB <= self.mem_mib <= MAX_MEM_MIB:
            raise ConfigError(f"{self.mem_mib} MiB of memory: it can be {MIN_MEM_MIB} to {MAX_MEM_MIB}")
        if self.accel not in ACCELERATORS:
            raise ConfigError(f"accelerator {self.accel!r} is not known; there are {', '.join(ACCELERATORS)}")
        if len(self.shares) > MAX_SHARES:
            raise ConfigError(f"{len(self.shares)} shares: there can be at most {MAX_SHARES}")
        if len(self.disks) > MAX_DISKS:
            raise ConfigError(f"{len(self.disks)} disks: there can be at most {MAX_DISKS}")
        if self.scratch_mib is not None:
            _check_range(self.scratch_mib, "MiB of scratch", MIN_SCRATCH_MIB, MAX_SCRATCH_MIB)
            if self.root_read_only:
                raise ConfigError("a scratch disk is for writing to the root filesystem, which is to be read-only")
        if self.pids is not None:
            _check_range(self.pids, "processes", MIN_PIDS, MAX_PIDS)
        if self.nofile is not None:
            _check_range(self.nofile, "open files", MIN_NOFILE, MAX_NOFILE)
        if not _HOSTNAME.fullmatch(self.hostname) or len(self.hostname) > HOSTNAME_BYTES:
            raise ConfigError(
                f"{self.hostname!r} is no host name: letters, digits, '-' and '.', at most {HOSTNAME_BYTES}"
            )
        object.__setattr__(self, "shares", _named(self.shares))
        tags = [share.tag for share in self.shares]
        for tag in tags:
            if tags.count(tag) > 1:
                raise ConfigError(f"share tag {tag!r} is used twice")
        if "\0" in self.cmdline or "\n" in self.cmdline:
            raise ConfigError("the kernel command line must be one line")
        object.__setattr__(self, "kernel", self.kernel or assets.kernel(self.arch))
        object.__setattr__(self, "initramfs", self.initramfs or assets.initramfs(self.arch))
        _check_kernel(self.kernel_path, self.arch)
        _read_start(self.initramfs_path, "initramfs")
        if isinstance(self.root, BlockImage):
            _read_start(self.root.path, "root image")

    @property
    def kernel_path(self) -> Path:
        """The kernel that is booted."""
        assert self.kernel is not None
        return self.kernel

    @property
    def initramfs_path(self) -> Path:
        """The initramfs that is booted."""
        assert self.initramfs is not None
        return self.initramfs


def _named(shares: tuple[Share, ...]) -> tuple[Share, ...]:
    """`shares`, with tags for those that have none."""
    taken = {share.tag for share in shares}
    free = (tag for tag in map("volume{}".format, count()) if tag not in taken)
    return tuple(share if share.tag else replace(share, tag=next(free)) for share in shares)


def _read_start(path: Path, what: str) -> bytes:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # to open a FIFO would be to wait
            raise PayloadError(f"cannot read the {what} {path}: it is no regular file")
        with path.open("rb") as file:
            return file.read(1024)
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        raise PayloadError(f"cannot read the {what} {path}: {reason(error)}") from error


def _check_kernel(path: Path, arch: str) -> None:
    """Says early, in words, what QEMU would say late or not at all."""
    start = _read_start(path, "kernel")
    # ELF; or "HdrS" of a bzImage (Documentation/arch/x86/boot.rst); or "ARM\x64" (Documentation/arch/arm64/booting.rst)
    good = start[56:60] == b"ARM\x64" if arch == "aarch64" else start[:4] == b"\x7fELF" or start[514:518] == b"HdrS"
    if not good:
        raise PayloadError(f"{path} is no {arch} Linux kernel")
