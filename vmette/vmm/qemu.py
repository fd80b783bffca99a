"""The VMM for Linux hosts: one QEMU process for each VM."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import assets, headstart
from ..config import ROOT_TAG, MachineConfig, Saved, Share
from ..errors import ConfigError, ProtocolError, VmmError
from ..files import copy_with_holes, write_pieces
from ..headstart import CONSOLE_FD, CONTROL_FD, ENVIRONMENT
from ..providers.base import BlockImage, Directory
from . import probe
from .base import VirtualMachine
from .cmdline import kernel_cmdline, share_tokens
from .spawn import Child, find_program, spawn

if TYPE_CHECKING:
    from ..protocol import Resume
    from . import virtiofsd
    from .qmp import Monitor

logger = logging.getLogger(__name__)

KVM = Path("/dev/kvm")
PROBE_SECONDS = 5.0
PASST_DNS = "169.254.53.53"
"""Where the guest asks for names: passt hands that to the host's resolver, which may listen on the host's loopback
alone."""

QEMU_OUI = (0x52, 0x54, 0x00)
"""How the addresses of QEMU's network cards begin (docs/system/devices/net.rst); each of ours goes on as it likes."""

FIRST_FREE_FD = CONSOLE_FD + 1

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

MACHINES = {"x86_64": "microvm,acpi=on,isa-serial=off,rtc=on", "aarch64": "virt,gic-version=3"}
MAX_DEVICES = {"x86_64": 23, "aarch64": 32}
"""Places for virtio-mmio devices (QEMU's hw/i386/microvm.c and hw/arm/virt.c). microvm has one more, but with that one
taken no guest boots."""
FIRMWARE = {"x86_64": ["-bios", "qboot.rom"], "aarch64": []}
"""qboot does nothing but start a kernel. (With microvm's SeaBIOS our kernel starts under QEMU 7.2 and not under 10.)"""
CPUS = {"x86_64": "max", "aarch64": "max,pauth-impdef=on,sve=off,sme=off"}
"""Under TCG. (Pointer authentication by its own cipher takes a third of an emulated boot, the registers of SVE and SME
nearly a tenth.)"""

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


def cpu(arch: str, accel: str) -> str:
    """The model of a machine's processors."""
    return "host" if accel == "kvm" else CPUS[arch]


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
    from ..protocol import Connection  # a start that asks nothing loads it while the guest boots

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


@dataclass(frozen=True)
class Attached:
    """What a VM gets as open descriptors: their numbers in QEMU."""

    scratch: int | None = None
    passt: int | None = None
    """None if the network is to be QEMU's own."""
    vsock: tuple[int, int] | None = None
    """The context id, and the device's descriptor."""
    monitor: int | None = None
    memory: int | None = None
    """Its memory in a file; of a machine that wakes, that from which it copies what it writes to."""
    incoming: int | None = None
    """Where the state of another machine comes from, with which this one goes on."""


class QemuMachine(VirtualMachine):
    """A VM that QEMU runs.

    Raises:
        VmmError: QEMU or a virtiofsd does not start.
        ConfigError: the kernel command line is too long.
    """

    vmm = "QEMU"

    def __enter__(self) -> QemuMachine:
        return self

    def __init__(self, config: MachineConfig, accel: str) -> None:
        self.config = config
        self.accel = accel
        self._daemons: list[virtiofsd.Daemon] = []
        self._passt: Child | None = None
        self._monitor: Monitor | None = None
        self._parts: dict[str, int] = {}
        """Of one that can be saved, the files that it has in use, which are open here, too."""
        with ExitStack() as undo, ExitStack() as theirs:
            undo.callback(self._end_helpers)
            self.control, control = socket.socketpair()
            undo.callback(lambda: self.control.close())
            self.console, console = socket.socketpair()
            undo.callback(lambda: self.console.close())
            self.errors, errors = os.pipe()
            undo.callback(lambda: os.close(self.errors))
            theirs.callback(os.close, errors)
            null = os.open(os.devnull, os.O_RDONLY)
            theirs.callback(os.close, null)
            self._fds = {0: null, 1: errors, 2: errors}
            self._fds[CONTROL_FD] = theirs.enter_context(control).fileno()
            self._fds[CONSOLE_FD] = theirs.enter_context(console).fileno()
            attached = self._attach(theirs)
            argv = command_line(config, accel, partial(self._serve, errors=errors), attached)
            logger.debug("%s", argv)
            started = self._take_head_start(argv, attached)
            if started is None and (incoming := attached.incoming) is not None:
                self._fds[incoming] = headstart.piped(self._fds[incoming])
                theirs.callback(os.close, self._fds[incoming])
            self.child: Child = spawn(argv, self._fds, ENVIRONMENT) if started is None else Child(started)
            undo.callback(self.child.kill)
            for daemon in self._daemons:
                daemon.connection.close()
            theirs.close()  # or a QEMU that has ended would be waited for
            if config.saved is not None and self.resume is None:
                self.resume = self._told()
            undo.pop_all()

    def _take_head_start(self, argv: Sequence[str], attached: Attached) -> int | None:
        """A QEMU that runs already, just like this one: see :mod:`vmette.headstart`."""
        head = headstart.current
        if head is None:
            return None
        fixed = attached == Attached(memory=attached.memory, incoming=attached.incoming)
        if not fixed or self._daemons or self.config.network:  # nor is there one that is savable, with its monitor
            head.drop()
            return None
        start = headstart.Start(argv)
        if self.config.saved is not None:
            from ..protocol import Connection

            assert attached.memory is not None and attached.incoming is not None
            files = {}
            for number, kind in ((attached.memory, "file"), (attached.incoming, "pipe")):
                fd = self._fds[number]  # by the path that the kernel has: a snapshot's is that of an open directory
                files[number] = str(Path(f"/proc/self/fd/{fd}").readlink()), headstart.stamp(fd), kind
            self.resume = self._told()
            hello = bytes(Connection(self.resume).outgoing)
            start = headstart.Start(argv, files, hello)
        if (started := head.take(start)) is None:
            return None
        logger.debug("a head start: it runs already")
        self.greeted = bool(start.hello)
        for end in (self.control, self.console):
            end.close()
        os.close(self.errors)
        self.control, self.console = (socket.socket(fileno=started.ends[fd]) for fd in (CONTROL_FD, CONSOLE_FD))
        self.errors = started.errors
        for fd in started.files.values():
            os.close(fd)
        return started.pid

    def _told(self) -> Resume:
        """What the guest is to be told when it wakes."""
        from ..protocol import Resume

        shares = share_tokens([(share, "9p") for share in placed(self.config)])
        return Resume.now(self.config.hostname, shares)

    def save(self, to: Saved) -> None:
        """See :meth:`VirtualMachine.save`."""
        assert self._monitor is not None
        with _closing(to.create("state")) as state:
            self._monitor.save_devices(state)
        for part, fd in self._parts.items():
            with _closing(to.create(part)) as copy:
                copy_with_holes(fd, copy)
                if part == "ram" and self.config.saved is not None:
                    from .memory import own_pieces

                    write_pieces(copy, own_pieces(self.child.pid, self.config.mem_mib << 20))

    def go_on(self) -> None:
        """See :meth:`VirtualMachine.go_on`."""
        assert self._monitor is not None
        self._monitor.go_on()

    def close(self) -> None:
        """See :meth:`VirtualMachine.close`."""
        self.child.kill()
        self._end_helpers()
        self._close_ends()

    def _end_helpers(self) -> None:
        while self._daemons:
            self._daemons.pop().close()
        if self._passt is not None:
            self._passt.kill()
        if self._monitor is not None:
            self._monitor.close()
        while self._parts:
            os.close(self._parts.popitem()[1])

    def _pass_on(self, fd: int) -> int:
        """Has QEMU inherit a descriptor; returns its number there."""
        number = max(self._fds.keys() | {FIRST_FREE_FD - 1}) + 1
        self._fds[number] = fd
        return number

    def _attach(self, theirs: ExitStack) -> Attached:
        """Makes ready what the VM gets as descriptors; ours of them are closed with `theirs`."""

        def own(fd: int) -> int:
            theirs.callback(os.close, fd)
            return self._pass_on(fd)

        def in_use(part: str, fd: int) -> int:
            if not self.config.savable:
                return own(fd)
            self._parts[part] = fd
            return self._pass_on(fd)

        saved = self.config.saved
        scratch = network = vsock = monitor = memory = incoming = None
        if self.config.savable:
            from .qmp import Monitor

            ours, connection = socket.socketpair()
            self._monitor = Monitor(ours)
            monitor = self._pass_on(theirs.enter_context(connection).fileno())
        if saved is not None:
            memory = in_use("ram", saved.open("ram"))
            incoming = own(saved.open("state"))
        elif self.config.savable:
            memory = in_use("ram", os.memfd_create("vmette-memory", os.MFD_CLOEXEC))
            os.ftruncate(self._parts["ram"], self.config.mem_mib << 20)
        if self.config.scratch_mib is not None:
            from .scratch import unnamed

            like = None if saved is None else saved.path("scratch")
            scratch = in_use("scratch", unnamed(self.config.scratch_mib, like))
        if self.config.network:
            from . import passt

            if (program := passt.find()) is not None:
                self._passt, connection = passt.start(program, PASST_DNS)
                network = self._pass_on(theirs.enter_context(connection).fileno())
        if self.config.vsock:
            from . import vhost_vsock

            if vhost_vsock.available():
                cid = vhost_vsock.new_cid()
                self.vsock = vhost_vsock.VhostVsock(cid)
                vsock = cid, own(vhost_vsock.open_device())
        return Attached(scratch, network, vsock, monitor, memory, incoming)

    @property
    def ends(self) -> list[int]:
        """See :attr:`VirtualMachine.ends`."""
        return [daemon.ended for daemon in self._daemons]

    def complaint(self, said: Sequence[str]) -> str:
        """QEMU's last message, which may have several lines."""
        last = max((at for at, line in enumerate(said) if line.startswith("qemu")), default=len(said))
        return " ".join(said[last:])

    def _serve(self, path: Path, tag: str, read_only: bool, errors: int) -> tuple[str, list[str]]:
        """See `Serve`. What is read-only is so on this side of the device."""
        program = file_server(self.accel)
        if program is not None and program.can_serve(path, read_only=read_only):
            daemon = program.serve(path, read_only=read_only, stderr=errors)
            self._daemons.append(daemon)
            number = self._pass_on(daemon.connection.fileno())
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


@contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def placed(config: MachineConfig) -> tuple[Share, ...]:
    """The shares, by names that say only which is which if the guest mounts them when it has woken."""
    if config.saved is None and not config.shares_later:
        return config.shares
    return tuple(
        replace(share, tag=f"share{number}", target=share.target or f"/mnt/{share.tag}")
        for number, share in enumerate(config.shares)
    )


Serve = Callable[[Path, str, bool], "tuple[str, list[str]]"]
"""Makes a directory ready to be shared by a tag, read-only or not: the kind of share and QEMU's arguments for it."""


def command_line(config: MachineConfig, accel: str, serve: Serve, attached: Attached | None = None) -> list[str]:
    """QEMU's command line for `config`.

    Raises:
        VmmError: QEMU is not installed.
        ConfigError: the kernel command line is too long, or there are more devices than places for them.
    """
    attached = attached or Attached()
    argv = [str(binary(config.arch)), "-accel", accel, "-cpu", cpu(config.arch, accel)]
    argv += ["-m", f"{config.mem_mib}M", "-smp", str(config.vcpus)]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-sandbox", SANDBOX]
    # Virtio 1.0: vhost-user devices know nothing older, and virtio-mmio is older unless told otherwise.
    argv += ["-global", "virtio-mmio.force-legacy=false"]
    argv += [*_serial(CONTROL_FD, "control"), *_serial(CONSOLE_FD, "console")]
    argv += ["-device", "virtio-serial-device,max_ports=4"]
    argv += ["-device", "virtconsole,chardev=console"]
    argv += ["-device", "virtserialport,chardev=control,name=vmette.control"]
    if accel == "kvm" or config.arch != "x86_64":  # an emulated x86 has an instruction for it
        argv += ["-object", "rng-builtin,id=rng", "-device", "virtio-rng-device,rng=rng"]
    root_type = ""
    disks: list[list[str]] = []
    if isinstance(config.root, BlockImage):
        file = {"driver": "file", "filename": str(config.root.path.absolute())}
        disks.append(_disk("root", file, read_only=True))
    elif isinstance(config.root, Directory):
        root_type, arguments = serve(config.root.path, ROOT_TAG, True)
        argv += arguments
    for number, disk in enumerate(config.disks):
        file = {"driver": "host_device" if disk.is_device else "file", "filename": str(disk.path.absolute())}
        disks.append(_disk(f"disk{number}", file, read_only=disk.read_only))
    if attached.scratch is not None:
        argv += ["-add-fd", f"fd={attached.scratch},set=1"]
        disks.append(_disk("scratch", {"driver": "file", "filename": "/dev/fdset/1"}, flush=False))
    # The kernel names disks as it finds them, which on Arm's machine is backwards.
    for arguments in reversed(disks) if config.arch == "aarch64" else disks:
        argv += arguments
    network = ""
    if config.network:
        network = "dhcp" if attached.passt is None else f"dhcp,{PASST_DNS}"
        backend = "user,ipv6=off" if attached.passt is None else f"socket,fd={attached.passt}"
        address = ":".join(f"{byte:02x}" for byte in (*QEMU_OUI, *os.urandom(3)))
        # One that wakes would be told to announce the address that it had, while it takes another one, and may hang.
        device = f"virtio-net-device,netdev=net,mac={address},guest_announce=off"
        argv += ["-netdev", f"{backend},id=net", "-device", device]
    if attached.vsock is not None:
        cid, fd = attached.vsock
        argv += ["-device", f"vhost-vsock-device,guest-cid={cid},vhostfd={fd}"]
    shares: list[tuple[Share, str]] = []
    for share in placed(config):
        kind, arguments = serve(share.path, share.tag, share.read_only)
        argv += arguments
        shares.append((share, kind))
    # Each device has a place of its own but for the two ports, which are of virtio-serial.
    devices = argv.count("-device") - 2
    if devices > MAX_DEVICES[config.arch]:
        raise ConfigError(f"{devices} shares, disks and other devices: there is room for {MAX_DEVICES[config.arch]}")
    machine = MACHINES[config.arch]
    if attached.monitor is not None:
        argv += [*_serial(attached.monitor, "monitor"), "-mon", "chardev=monitor,mode=control"]
    if attached.memory is not None:
        backing = f"mem-path=/proc/self/fd/{attached.memory},share={'on' if config.saved is None else 'off'}"
        argv += ["-object", f"memory-backend-file,id=memory,size={config.mem_mib}M,{backing}"]
        machine += ",memory-backend=memory"
    if attached.incoming is not None:
        argv += ["-incoming", f"fd:{attached.incoming}"]
    if attached.incoming is not None or attached.monitor is not None:
        # A state of devices alone has nothing about the machine as a whole at its begin, nor a description at its end.
        argv += ["-global", "migration.send-configuration=off"]
        machine += ",suppress-vmdesc=on"
    if "virtiofs" in {root_type, *(kind for _, kind in shares)}:  # virtiofsd answers in the guest's own memory
        argv += ["-object", f"memory-backend-memfd,id=memory,size={config.mem_mib}M,share=on"]
        machine += ",memory-backend=memory"
    argv += ["-M", machine, *FIRMWARE[config.arch]]
    argv += ["-kernel", str(config.kernel_path), "-initrd", str(config.initramfs_path)]
    return [*argv, "-append", kernel_cmdline(config, accel, root_type, shares, network)]


def _comma(path: Path) -> str:
    """`path` within a QEMU option, where a comma is doubled."""
    return str(path).replace(",", ",,")


def _serial(fd: int, name: str) -> tuple[str, str]:
    return "-chardev", f"socket,id={name},fd={fd}"


def _disk(name: str, file: dict[str, Any], *, read_only: bool = False, flush: bool = True) -> list[str]:
    """A virtio disk from QEMU's block node for a `file`.

    A host without room for what the guest writes is told to the guest: QEMU would rather stop it until there is room.
    What the guest discards is given back. Without `flush` nothing is ever forced out to the host's disk.
    """
    options: dict[str, Any] = {"read-only": read_only}
    if not read_only:
        options["discard"] = "unmap"
    if not flush:
        options["cache"] = {"no-flush": True}
    node = {"driver": "raw", "node-name": name, **options, "file": {**file, **options}}
    device = f"virtio-blk-device,drive={name}{'' if read_only else ',werror=report'}"
    return ["-blockdev", json.dumps(node, ensure_ascii=False), "-device", device]
