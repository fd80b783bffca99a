"""The VMM for macOS: one process of vmette-vz, our signed host program, for each VM.

It drives Apple's Virtualization.framework (csrc/vz_shim.h). csrc/vmm_main.c says how it is told what to do. With
$VMETTE_VZ, another program is run in its place: the tests have one that runs QEMU.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from .. import assets
from ..config import ROOT_TAG, ROSETTA_TAG, SECTOR, MachineConfig, Saved
from ..errors import ConfigError, VmmError
from ..files import copy_with_holes
from ..providers.base import BlockImage, Directory
from . import probe
from .base import VirtualMachine
from .cmdline import kernel_cmdline
from .scratch import Named
from .spawn import Child, spawn
from .vz_link import Answer, FrameworkError, Link, Request, VzVsock

logger = logging.getLogger(__name__)

MIN_MACOS = (13, 0)
"""Named console ports are of macOS 13."""
ANSWER_SECONDS = 30.0
SAVE_SECONDS = 600.0
"""All of a machine's memory goes to the disk."""
CODESIGN = Path("/usr/bin/codesign")
"""Part of macOS."""
ENTITLEMENTS = Path(__file__).with_name("vmette-vz.entitlements")
QUARANTINE = "com.apple.quarantine"
"""The attribute of what a browser has fetched, which macOS does not run."""

NUMBERS = ("supported", "entitled", "save_restore", "min_cpus", "max_cpus", "min_memory", "max_memory")
"""What it says of this computer, beside the names of Rosetta's state and of the system's version."""

# Descriptors of the process.
CONFIG_FD, CONNECTION_FD, CONTROL_FD, CONSOLE_FD = 3, 4, 5, 6

# --- This computer, and the program


@dataclass(frozen=True)
class Program:
    """A vmette-vz, and what it says of this computer."""

    path: Path
    supported: bool
    entitled: bool
    save_restore: bool
    rosetta: str
    """`installed`, `not-installed` or `not-supported`."""
    macos: str
    cpus: tuple[int, int]
    """The fewest and the most of a machine."""
    memory: tuple[int, int]
    """Bytes, likewise."""

    @classmethod
    def ask(cls, path: Path) -> Program:
        """What `path` says, which is remembered until it or the system changes.

        Raises:
            VmmError: it cannot be run, or says something else.
        """
        said = probe.recalled("vz-capabilities", _facts(path), lambda: _capabilities(path), dict)
        try:
            return cls(
                path,
                said["supported"] == "1",
                said["entitled"] == "1",
                said["save_restore"] == "1",
                said["rosetta"],
                said["macos"],
                (int(said["min_cpus"]), int(said["max_cpus"])),
                (int(said["min_memory"]), int(said["max_memory"])),
            )
        except (KeyError, ValueError) as error:
            raise VmmError(f"{path} does not say what this computer can do: install vmette anew") from error


def _facts(path: Path) -> dict[str, str]:
    host = os.uname()
    # (The release says more than that of macOS, and changes with each update.)
    return {"program": probe.identity(path), "host": f"{host.sysname} {host.version}", **_stand_ins()}


def _capabilities(path: Path) -> dict[str, str]:
    if quarantined(path):  # not to be run: macOS would ask a person about it
        return {**dict.fromkeys(NUMBERS, "0"), "rosetta": "not-supported", "macos": ""}
    try:
        done = subprocess.run([path, "--capabilities"], capture_output=True, timeout=ANSWER_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise VmmError(f"{path} does not run: {error}") from error
    lines = done.stdout.decode(errors="replace").splitlines()
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def quarantined(path: Path) -> bool:
    """Whether macOS distrusts the file for where it came from."""
    import xattr

    try:
        return QUARANTINE in xattr.listxattr(path)
    except OSError:
        return False


def host_problem() -> str | None:
    """Why this computer runs no machines of ours, or None."""
    if sys.platform != "darwin":  # where a stand-in runs them
        return None
    import platform

    version = platform.mac_ver()[0]
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < MIN_MACOS:
        return f"this Mac has macOS {version}, and vmette needs {'.'.join(map(str, MIN_MACOS))} or later: update it"
    if os.uname().machine != "arm64":
        if _translated():
            return "this Python is one for Intel Macs, run by Rosetta: use one for Apple silicon"
        return "this is an Intel Mac, and vmette runs on Apple silicon only"
    return None


def _translated() -> bool:
    """Whether this process is run by Rosetta."""
    query = ["/usr/sbin/sysctl", "-n", "sysctl.proc_translated"]
    return subprocess.run(query, capture_output=True, check=False).stdout.strip() == b"1"


def program() -> Program:
    """A vmette-vz that can run machines here: the one that came with vmette, or a copy of it that is signed anew.

    Raises:
        VmmError: this computer cannot, or the program may not.
        PayloadError: there is none.
    """
    if problem := host_problem():
        raise VmmError(problem)
    path = assets.vz_program()
    found = Program.ask(path)
    if not found.entitled:
        found = Program.ask(signed_copy(path))
    if not found.supported:
        raise VmmError("this Mac cannot virtualize: in a virtual machine, it takes an M3 and macOS 15 around it")
    if not found.entitled:
        raise VmmError(f"{found.path} may not run virtual machines: codesign has not given it the entitlement")
    return found


def signed_copy(path: Path) -> Path:
    """A copy of the program in the cache directory, without quarantine, signed here with its entitlement.

    Raises:
        VmmError: it cannot be made.
    """
    import fcntl
    import hashlib
    import shutil

    directory = assets.cache_root() / "vmm"
    try:
        data = path.read_bytes()
        kept = directory / f"vmette-vz-{hashlib.sha256(data + ENTITLEMENTS.read_bytes()).hexdigest()[:16]}"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if kept.exists():
                return kept
            logger.warning("signing vmette-vz anew, once, so that it may run virtual machines")
            staging = kept.with_suffix(".part")
            shutil.copyfile(path, staging)
            staging.chmod(0o700)
            _unquarantine(staging)
            command = [str(CODESIGN), "--sign", "-", "--force", "--entitlements", str(ENTITLEMENTS), str(staging)]
            subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True)
            with staging.open("rb") as file:
                os.fsync(file.fileno())
            staging.replace(kept)
            return kept
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split())
        raise VmmError(f"codesign does not sign {staging}: {said}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise VmmError(f"vmette-vz has no entitlement, and cannot be signed in {directory}: {error}") from error


def _unquarantine(path: Path) -> None:
    import xattr

    with suppress(OSError):
        xattr.removexattr(path, QUARANTINE)


# --- What a machine is made of


def check(config: MachineConfig, helper: Program) -> None:
    """Says early, in words, what the framework would say late, or in other ones.

    Raises:
        ConfigError: this computer has no such machine.
    """
    if config.accel != "auto":
        raise ConfigError(f"accelerator {config.accel!r} is QEMU's; Virtualization.framework has no choice of them")
    if config.arch != assets.host_arch():
        raise ConfigError(
            f"this computer runs {assets.host_arch()} machines, and none of {config.arch}; "
            "--platform linux/amd64 runs amd64 programs in one, by Rosetta"
        )
    least, most = helper.cpus
    if not least <= config.vcpus <= most:
        raise ConfigError(f"{config.vcpus} vcpus: a machine of this Mac can have {least} to {most}")
    least, most = (amount >> 20 for amount in helper.memory)
    if not least <= config.mem_mib <= most:
        raise ConfigError(f"{config.mem_mib} MiB of memory: a machine of this Mac can have {least} to {most}")
    for disk in config.disks:
        if disk.is_device:
            raise ConfigError(f"disk {disk.path} is a block device; on macOS a disk is a raw image")
    if config.rosetta and helper.rosetta != "installed":
        if helper.rosetta == "not-installed":
            raise ConfigError("amd64 programs need Rosetta, which is not installed: softwareupdate --install-rosetta")
        raise ConfigError("amd64 programs need Rosetta, which this computer has not")


def records(config: MachineConfig, root: Path | None, scratch: Path | None) -> Iterator[tuple[str, str]]:
    """What vmette-vz is told of the machine; `root` is the root's image as it is given to it.

    Raises:
        ConfigError: the kernel command line is too long.
    """
    shares = [(share, "virtiofs") for share in config.shares]
    yield "kernel", str(config.kernel_path.absolute())
    yield "initrd", str(config.initramfs_path.absolute())
    yield "cmdline", kernel_cmdline(config, "vz", "virtiofs", shares, "dhcp" if config.network else "")
    yield "cpus", str(config.vcpus)
    yield "memory", str(config.mem_mib << 20)
    yield "console", str(CONSOLE_FD)
    yield "port", f"{CONTROL_FD}:vmette.control"
    yield "entropy", ""
    if root is not None:
        yield "disk", f"ro:{root.absolute()}"
    for disk in config.disks:
        yield "disk", f"{'ro' if disk.read_only else 'kept'}:{disk.path.absolute()}"
    if scratch is not None:
        yield "disk", f"rw:{scratch.absolute()}"
    if isinstance(config.root, Directory):
        yield "share", f"ro:{ROOT_TAG}:{config.root.path.absolute()}"
    for share in config.shares:
        yield "share", f"{'ro' if share.read_only else 'rw'}:{share.tag}:{share.path.absolute()}"
    if config.rosetta:
        yield "rosetta", ROSETTA_TAG
    if config.saved is not None:
        yield "identifier", config.saved.path("identifier").read_bytes().hex()
    if config.network:
        yield "network", ""
    if config.vsock:
        yield "vsock", ""


def encode(pairs: Iterable[tuple[str, str]]) -> bytes:
    """The records as bytes.

    Raises:
        ConfigError: a path has a NUL byte.
    """
    encoded = bytearray()
    for name, value in pairs:
        if "\0" in value:
            raise ConfigError(f"{name} has a NUL byte")
        encoded += os.fsencode(f"{name}={value}") + b"\0"
    return bytes(encoded)


# --- A machine


class VzMachine(VirtualMachine):
    """A VM that Virtualization.framework runs.

    Raises:
        VmmError: vmette-vz does not start.
        ConfigError: this computer has no such machine.
    """

    vmm = "vmette-vz"

    def __init__(self, config: MachineConfig, helper: Program) -> None:
        check(config, helper)
        self.config = config
        self._files: list[Named] = []
        self._scratch: Named | None = None
        self._problem: FrameworkError | None = None
        with ExitStack() as undo, ExitStack() as theirs:
            undo.callback(self._remove_files)
            root = scratch = None
            if isinstance(config.root, BlockImage):
                root = config.root.path
                if root.stat().st_size % SECTOR:
                    root = self._keep(Named.padded(root, SECTOR))
            if config.scratch_mib is not None:
                made = config.saved and Named.copy(config.saved.path("scratch"))
                self._scratch = made or Named.scratch(config.scratch_mib)
                scratch = self._keep(self._scratch)
            described = encode(records(config, root, scratch))
            self.control, control = socket.socketpair()
            undo.callback(self.control.close)
            self.console, console = socket.socketpair()
            undo.callback(self.console.close)
            ours, connection = socket.socketpair()
            undo.enter_context(ours)
            self.errors, errors = os.pipe()
            undo.callback(os.close, self.errors)
            theirs.callback(os.close, errors)
            reader, writer = os.pipe()
            with os.fdopen(writer, "wb", buffering=0) as file:
                theirs.callback(os.close, reader)
                null = os.open(os.devnull, os.O_RDONLY)
                theirs.callback(os.close, null)
                fds = {0: null, 1: errors, 2: errors, CONFIG_FD: reader}
                fds[CONNECTION_FD] = theirs.enter_context(connection).fileno()
                fds[CONTROL_FD] = theirs.enter_context(control).fileno()
                fds[CONSOLE_FD] = theirs.enter_context(console).fileno()
                argv = [str(helper.path), str(CONFIG_FD), str(CONNECTION_FD)]
                logger.debug("%s %s", argv, described)
                environment = {"PATH": "/usr/bin:/bin", **_stand_ins()}
                self.child: Child = spawn(argv, fds, environment)
                undo.callback(self.child.kill)
                theirs.close()  # or a child that has died would be waited for
                with suppress(BrokenPipeError):  # it has ended, and says why
                    file.write(described)
            self._link = Link(ours, self._ended)
            undo.callback(self._link.close)
            if config.vsock:
                self.vsock = VzVsock(self._link)
            if config.saved is None:
                self._link.post(Request.START, answered=self._started)
            else:
                self._wake(config.saved)
            undo.pop_all()

    def _wake(self, saved: Saved) -> None:
        from ..protocol import Resume

        self._link.post(Request.RESTORE, os.fsencode(saved.path("state").absolute()), answered=self._refused)
        self._link.post(Request.RESUME, answered=self._started)
        self.resume = Resume.now(self.config.hostname)

    def save(self, to: Saved) -> None:
        """See :meth:`VirtualMachine.save`."""
        with os.fdopen(to.create("identifier"), "wb") as identifier:
            identifier.write(self._link.request(Request.IDENTIFIER).payload)
        self._link.request(Request.PAUSE)
        self._link.request(Request.SAVE, os.fsencode(to.path("state").absolute()), SAVE_SECONDS)
        if self._scratch is not None:
            with os.fdopen(to.create("scratch"), "wb") as scratch:
                copy_with_holes(self._scratch.fd, scratch.fileno())

    def go_on(self) -> None:
        """See :meth:`VirtualMachine.go_on`."""
        self._link.request(Request.RESUME)

    def close(self) -> None:
        """See :meth:`VirtualMachine.close`."""
        self.child.kill()
        self._link.close()
        self._remove_files()
        self._close_ends()

    def failure(self, said: Sequence[str]) -> VmmError | None:
        """See :meth:`VirtualMachine.failure`."""
        self._link.join()
        return self._problem or super().failure(said)

    def _keep(self, file: Named) -> Path:
        self._files.append(file)
        return file.path

    def _remove_files(self) -> None:
        while self._files:
            self._files.pop().close()

    def _refused(self, answer: Answer) -> bool:
        """Ends the program if it could not do it: the first thing that it could not do is why."""
        if isinstance(answer.error, FrameworkError):
            self._problem = self._problem or answer.error
            self._link.hang_up()
        return answer.error is not None

    def _started(self, answer: Answer) -> None:
        if not self._refused(answer):
            for file in self._files:  # it has them open
                file.forget_name()

    def _ended(self, problem: FrameworkError | None) -> None:
        self._problem = self._problem or problem


def _stand_ins() -> Mapping[str, str]:
    """What a stand-in for vmette-vz is told by the environment. The real one wants nothing."""
    return {name: value for name, value in os.environ.items() if name.startswith("FAKE_VZ_")}
