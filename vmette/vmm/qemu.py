"""The VMM for Linux hosts: one QEMU process for each VM."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import assets
from ..config import ROOT_TAG, MachineConfig, Share
from ..errors import ProtocolError, VmmError
from ..protocol import Connection
from ..providers.base import BlockImage, Directory
from . import probe
from .cmdline import kernel_cmdline
from .spawn import Child, find_program, spawn

if TYPE_CHECKING:
    from . import virtiofsd

logger = logging.getLogger(__name__)

KVM = Path("/dev/kvm")
PROBE_SECONDS = 5.0

# Descriptors of the QEMU process.
CONTROL_FD, CONSOLE_FD, FIRST_SHARE_FD = 3, 4, 5

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

MACHINES = {"x86_64": "microvm,acpi=on,isa-serial=off,rtc=on", "aarch64": "virt,gic-version=3"}
FIRMWARE = {"x86_64": ["-bios", "qboot.rom"], "aarch64": []}
"""qboot does nothing but start a kernel. (With microvm's SeaBIOS our kernel starts under QEMU 7.2 and not under 10.)"""
CPUS = {"x86_64": "max", "aarch64": "max,pauth-impdef=on"}
"""Under TCG. (Pointer authentication by its own cipher takes a third of an emulated boot.)"""

PACKAGES = {
    "apt-get": {"x86_64": "apt-get install qemu-system-x86", "aarch64": "apt-get install qemu-system-arm"},
    "dnf": {"x86_64": "dnf install qemu-system-x86-core", "aarch64": "dnf install qemu-system-aarch64-core"},
    "brew": {"x86_64": "brew install qemu", "aarch64": "brew install qemu"},
}
"""The command that installs QEMU, by package manager and guest architecture."""


def binary(arch: str) -> Path:
    """QEMU for guests of `arch`.

    Raises:
        VmmError: it is not installed.
    """
    name = f"qemu-system-{arch}"
    found = find_program(name)
    if found is None:
        commands = [command[arch] for manager, command in PACKAGES.items() if find_program(manager)]
        hint = commands[0] if commands else " or ".join(command[arch] for command in PACKAGES.values())
        raise VmmError(f"{name} is not installed: {hint}")
    return found


def choose_accel(config: MachineConfig) -> str:
    """`kvm` or `tcg`: what the configuration asks for, or KVM where it boots this guest kernel.

    Raises:
        VmmError: KVM is asked for and is not there.
    """
    if config.accel != "auto":
        if config.accel == "kvm" and (problem := kvm_problem(config.arch)):
            raise VmmError(f"KVM cannot be used: {problem}")
        return config.accel
    if problem := kvm_problem(config.arch):
        logger.debug("no KVM: %s", problem)
        return "tcg"
    facts = {
        "host": os.uname().release,
        "qemu": probe.identity(binary(config.arch)),
        "kernel": probe.identity(config.kernel_path),
        "initramfs": probe.identity(config.initramfs_path),
    }

    def boots() -> bool:
        logger.warning("finding out, once, whether KVM boots the guest's kernel here (up to %g s)", PROBE_SECONDS)
        return kvm_boots(config)

    return "kvm" if probe.remembered("kvm-boots", facts, boots) else "tcg"


def kvm_problem(arch: str) -> str | None:
    """Why KVM is out of the question, or None."""
    if arch != assets.host_arch():
        return f"this host cannot run {arch} code"
    if not KVM.exists():
        return f"{KVM} does not exist; is virtualization on in the firmware, and the kernel module loaded?"
    if not os.access(KVM, os.R_OK | os.W_OK):
        return f"{KVM} is not yours to open; become a member of the group kvm"
    return None


def kvm_boots(config: MachineConfig) -> bool:
    """Boots the kernel under KVM without a root: a guest that gets to say that it lacks one is a good sign."""
    bare = MachineConfig(None, kernel=config.kernel, initramfs=config.initramfs, arch=config.arch)
    try:
        with QemuMachine(bare, "kvm") as machine:
            machine.control.settimeout(PROBE_SECONDS)
            connection = Connection()
            while data := machine.control.recv(65536):
                if any(True for _ in connection.receive(data)):
                    return True
    except (OSError, VmmError, ProtocolError) as error:
        logger.info("KVM does not boot the guest's kernel: %s", error or "it hangs")
    return False


def file_server(accel: str) -> virtiofsd.Virtiofsd | None:
    """The virtiofsd for a VM under `accel`; None where 9p, which is QEMU's own, has to do.

    A vhost-user device writes to the guest's memory behind QEMU's back. An emulating QEMU keeps translations of the
    code that it has run from a page, and does not learn that the page now holds other code: programs read over
    virtio-fs then crash, reproducibly with QEMU 10 (with a translation cache too small to keep much, they do not).
    """
    if accel != "kvm":
        return None
    from . import virtiofsd

    return virtiofsd.find()


class QemuMachine:
    """A running VM: its control port, its console, QEMU's own complaints, and an end.

    Raises:
        VmmError: QEMU or a virtiofsd does not start.
        ConfigError: the kernel command line is too long.
    """

    def __init__(self, config: MachineConfig, accel: str) -> None:
        self.config = config
        self.accel = accel
        self._daemons: list[virtiofsd.Daemon] = []
        with ExitStack() as undo:
            undo.callback(self._end_daemons)
            self.control, control = socket.socketpair()
            undo.callback(self.control.close)
            self.console, console = socket.socketpair()
            undo.callback(self.console.close)
            self.errors, errors = os.pipe()
            undo.callback(os.close, self.errors)
            null = os.open(os.devnull, os.O_RDONLY)
            with control, console:
                try:
                    argv = command_line(config, accel, partial(self._serve, errors=errors))
                    fds = {0: null, 1: errors, 2: errors, CONTROL_FD: control.fileno(), CONSOLE_FD: console.fileno()}
                    for number, daemon in enumerate(self._daemons, FIRST_SHARE_FD):
                        fds[number] = daemon.connection.fileno()
                    logger.debug("%s", argv)
                    self.child: Child = spawn(argv, fds, {"PATH": "/usr/bin:/bin"})
                finally:
                    os.close(null)
                    os.close(errors)
            for daemon in self._daemons:
                daemon.connection.close()
            undo.pop_all()

    def __enter__(self) -> QemuMachine:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the VM, now, and lets go of all that belongs to it."""
        self.child.kill()
        self._end_daemons()
        self.control.close()
        self.console.close()
        if self.errors >= 0:
            os.close(self.errors)
            self.errors = -1

    def _end_daemons(self) -> None:
        while self._daemons:
            self._daemons.pop().close()

    @property
    def ends(self) -> list[int]:
        """Descriptors that become readable when a program ends that the VM cannot do without."""
        return [daemon.ended for daemon in self._daemons]

    def _serve(self, path: Path, tag: str, read_only: bool, errors: int) -> tuple[str, list[str]]:
        """See `Serve`. What is read-only is so on this side of the device."""
        program = file_server(self.accel)
        if program is not None and program.can_serve(path, read_only=read_only):
            number = FIRST_SHARE_FD + len(self._daemons)
            self._daemons.append(program.serve(path, read_only=read_only, stderr=errors))
            name = f"fs{number}"
            device = f"vhost-user-fs-device,chardev={name},tag={tag},queue-size=1024"
            return "virtiofs", [*_serial(number, name), "-device", device]
        name = f"share-{tag}"
        # Owners and modes are the host's own; a user who may not set an owner gets the file as his.
        security = "passthrough" if os.geteuid() == 0 else "none"
        fsdev = f"local,id={name},path={_comma(path.absolute())},security_model={security},multidevs=remap"
        if read_only:
            fsdev += ",readonly=on"
        return "9p", ["-fsdev", fsdev, "-device", f"virtio-9p-device,fsdev={name},mount_tag={tag}"]


Serve = Callable[[Path, str, bool], "tuple[str, list[str]]"]
"""Makes a directory ready to be shared by a tag, read-only or not: the kind of share and QEMU's arguments for it."""


def command_line(config: MachineConfig, accel: str, serve: Serve) -> list[str]:
    """QEMU's command line for `config`.

    Raises:
        VmmError: QEMU is not installed.
        ConfigError: the kernel command line is too long.
    """
    argv = [str(binary(config.arch)), "-accel", accel, "-cpu", "host" if accel == "kvm" else CPUS[config.arch]]
    argv += ["-m", f"{config.mem_mib}M", "-smp", str(config.vcpus)]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-sandbox", SANDBOX]
    # Virtio 1.0: vhost-user devices know nothing older, and virtio-mmio is older unless told otherwise.
    argv += ["-global", "virtio-mmio.force-legacy=false"]
    argv += [*_serial(CONTROL_FD, "control"), *_serial(CONSOLE_FD, "console")]
    argv += ["-device", "virtio-serial-device,max_ports=4"]
    argv += ["-device", "virtconsole,chardev=console"]
    argv += ["-device", "virtserialport,chardev=control,name=vmette.control"]
    argv += ["-object", "rng-builtin,id=rng", "-device", "virtio-rng-device,rng=rng"]
    root_type = ""
    if isinstance(config.root, BlockImage):
        argv += _disk(config.root.path, "root")
    elif isinstance(config.root, Directory):
        root_type, arguments = serve(config.root.path, ROOT_TAG, True)
        argv += arguments
    shares: list[tuple[Share, str]] = []
    for share in config.shares:
        kind, arguments = serve(share.path, share.tag, share.read_only)
        argv += arguments
        shares.append((share, kind))
    machine = MACHINES[config.arch]
    if "virtiofs" in {root_type, *(kind for _, kind in shares)}:  # virtiofsd answers in the guest's own memory
        argv += ["-object", f"memory-backend-memfd,id=memory,size={config.mem_mib}M,share=on"]
        machine += ",memory-backend=memory"
    argv += ["-M", machine, *FIRMWARE[config.arch]]
    argv += ["-kernel", str(config.kernel_path), "-initrd", str(config.initramfs_path)]
    return [*argv, "-append", kernel_cmdline(config, accel, root_type, shares)]


def _comma(path: Path) -> str:
    """`path` within a QEMU option, where a comma is doubled."""
    return str(path).replace(",", ",,")


def _serial(fd: int, name: str) -> tuple[str, str]:
    return "-chardev", f"socket,id={name},fd={fd}"


def _disk(path: Path, name: str) -> list[str]:
    file = {"driver": "file", "filename": str(path.absolute()), "read-only": True}
    node = {"driver": "raw", "node-name": name, "read-only": True, "file": file}
    return ["-blockdev", json.dumps(node, ensure_ascii=False), "-device", f"virtio-blk-device,drive={name}"]
