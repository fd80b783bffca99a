"""What a microVM is made of and what runs in it, checked as it is written down."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import assets
from .errors import ConfigError, PayloadError, reason
from .providers.base import Artifact, BlockImage, ImageConfig

ACCELERATORS = ("auto", "kvm", "tcg")
MAX_VCPUS = 16
"""CONFIG_NR_CPUS of the guest kernel."""
MIN_MEM_MIB, MAX_MEM_MIB = 64, 1 << 20
MAX_SHARES = 16
TAG_BYTES = 36
"""The tag field of a virtio-fs device (virtio 1.2, 5.11.4)."""
ROOT_TAG = "rootfs"
CMDLINE_BYTES = 2047
"""COMMAND_LINE_SIZE of both architectures, less the final NUL (arm64's is the smaller one)."""

SIGNALS = (
    *("HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM"),
    *("TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF"),
    *("WINCH", "IO", "PWR", "SYS"),
)
"""Linux's signals on x86 and Arm from number 1 on (signal(7))."""
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Share:
    """A directory of the host at /mnt/`tag` in the guest.

    Raises:
        ConfigError: the tag cannot be used, or the path is no directory.
    """

    tag: str
    path: Path
    read_only: bool = False

    def __post_init__(self) -> None:
        if not _TAG.fullmatch(self.tag):
            raise ConfigError(f"share tag {self.tag!r} is malformed: letters, digits, '.', '_' and '-' only")
        if len(self.tag) > TAG_BYTES:
            raise ConfigError(f"share tag {self.tag!r} is too long: at most {TAG_BYTES} characters")
        if self.tag == ROOT_TAG or self.tag.startswith("vmette"):
            raise ConfigError(f"share tag {self.tag!r} is reserved; choose another name")
        try:
            is_directory = stat.S_ISDIR(self.path.stat().st_mode)
        except FileNotFoundError:
            raise ConfigError(f"share {self.tag}: {self.path} does not exist") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in it
            raise ConfigError(f"share {self.tag}: {self.path}: {reason(error)}") from error
        if not is_directory:
            raise ConfigError(f"share {self.tag}: {self.path} is not a directory")

    @classmethod
    def parse(cls, text: str) -> Share:
        """Reads `TAG=PATH[:ro]` as the command line has it (`:rw`, the default, may be said too)."""
        tag, _, path = text.partition("=")
        read_only = path.endswith(":ro")
        if read_only or path.endswith(":rw"):
            path = path[:-3]
        if not path:  # which Path would take for "."
            raise ConfigError(f"share {text!r} is malformed: it is TAG=PATH or TAG=PATH:ro")
        return cls(tag, Path(path), read_only)


@dataclass(frozen=True)
class Command:
    """What the guest is to run. `env` is the whole environment; the guest adds PATH and HOME where they are missing."""

    argv: tuple[bytes, ...]
    env: tuple[bytes, ...] = ()
    cwd: bytes | None = None
    user: bytes | None = None
    stop_signal: int | None = None
    """Sent when the time is over, so that the command can end by itself; None ends it at once."""
    terminal: tuple[int, int] | None = None
    """Run it in a terminal of so many rows and columns."""
    builtin: bool = False
    """`argv` names a function of the guest's agent (csrc/guest/builtins.h), not a program."""
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
    vcpus: int = 1
    mem_mib: int = 512
    root_read_only: bool = False
    kernel: Path | None = None
    initramfs: Path | None = None
    cmdline: str = ""
    """More kernel parameters, after ours."""
    arch: str = field(default_factory=assets.host_arch)
    accel: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "arch", assets.canonical_arch(self.arch))
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise ConfigError(f"{self.vcpus} vcpus: there can be 1 to {MAX_VCPUS}")
        if not MIN_MEM_MIB <= self.mem_mib <= MAX_MEM_MIB:
            raise ConfigError(f"{self.mem_mib} MiB of memory: it can be {MIN_MEM_MIB} to {MAX_MEM_MIB}")
        if self.accel not in ACCELERATORS:
            raise ConfigError(f"accelerator {self.accel!r} is not known; there are {', '.join(ACCELERATORS)}")
        if len(self.shares) > MAX_SHARES:
            raise ConfigError(f"{len(self.shares)} shares: there can be at most {MAX_SHARES}")
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
