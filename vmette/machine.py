"""A microVM as a caller asks for it, and its start: what `vmette.run`, `vmette.Sandbox` and the command line share."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from . import assets
from .config import Command, Disk, MachineConfig, Share, scratch_size
from .errors import ConfigError, GuestError, ProtocolError, SandboxTimeout, VmmError
from .locks import held
from .providers.base import Context, ImageConfig, Progress
from .timings import Stopwatch

if TYPE_CHECKING:
    from .guest import Guest, Stream
    from .protocol import Exited
    from .providers.registry import Registry
    from .services import Services
    from .streams import Sink, Source
    from .templates import Template

logger = logging.getLogger(__name__)

WAKE_SECONDS = 10.0
"""A machine that has not woken by then never will: that takes a tenth of a second."""
SNAPSHOT = "snapshot:"
"""How the spec of a saved machine begins: see :mod:`vmette.snapshots`."""

SERVICES = ("secrets", "secrets_user", "ca_certs", "allow_hosts", "publish", "vsock_port", "guest_vsock_port")
"""The options that are given over the control channel: see :mod:`vmette.services`."""


class RootfsOptions(TypedDict, total=False):
    """How a root filesystem is found."""

    offline: bool
    """Providers use what their caches hold and no network."""
    pull: str
    """When a registry is asked: `missing` (the cache has it not, or checked it over an hour ago), `always`, `never`."""
    platform: str | None
    """Of the image, `os/arch[/variant]`; linux on `arch` by default. It also says which machine it takes."""
    rootfs_form: str
    """What layers are made into: a `block` image, or a `directory`."""
    arch: str | None
    """`x86_64` or `aarch64`; by default that of `platform`, or the host's."""
    progress: Callable[[Progress], None] | None
    """Is told how long work goes, from several threads."""
    cancelled: Callable[[], bool]
    """Is asked now and then, until the machine is up, whether to give up: with :class:`vmette.providers.Cancelled`."""
    registry: Registry | None
    """Other providers than the default ones."""


class MachineOptions(RootfsOptions, total=False):
    """All that can be said of a machine."""

    shares: Iterable[Share]
    """Directories of the host in the guest: at /mnt/TAG, or where they say."""
    disks: Iterable[Disk]
    """Raw images and block devices of the host as disks of the guest."""
    scratch: int | str | None
    """The size of a disk for all that is written, which otherwise is in memory: MiB, or `512M`, `8G`. It goes with the
    VM."""
    net: bool
    """A network card behind NAT: the guest reaches what this computer reaches."""
    hostname: str
    """The guest's; `vmette` by default."""
    vsock: bool
    """vsock ports: :attr:`vmette.Sandbox.vsock`, and `vsock-send` and `vsock-runner` in the guest."""
    vsock_port: int
    """A vsock port where each line that the guest sends is logged, and sent back; 0 is one of 50,000 to 59,999. The
    guest finds it in VMETTE_VSOCK_PORT. Implies `vsock`."""
    guest_vsock_port: int
    """Is told the guest in VMETTE_GUEST_VSOCK_PORT: where it is to listen."""
    pids: int | None
    """The most processes and threads of all commands together."""
    nofile: int | None
    """The most files that a process may have open."""
    vcpus: int
    """Virtual processors; 1 by default."""
    mem_mib: int
    """Memory in MiB; 512 by default."""
    rootfs_ro: bool
    """The root filesystem cannot be written to. (What is written otherwise goes with the VM.)"""
    kernel: str | os.PathLike[str] | None
    """Another kernel."""
    initramfs: str | os.PathLike[str] | None
    """Another initramfs."""
    secrets: Mapping[str, str | bytes]
    """What only the image's user can read, in files of the guest's memory: /run/secrets/NAME."""
    secrets_user: str | None
    """Who can read them, in place of the image's user."""
    ca_certs: str | os.PathLike[str] | None
    """A directory of PEM certificates that the guest is to trust; by default what VMETTE_CA_CERTS names, or
    ~/.config/vmette/certs if that is there."""
    allow_hosts: Iterable[str]
    """What the guest can reach over HTTP and HTTPS, without a network: `NAME[:PORT]`, `*.NAME[:PORT]`."""
    publish: Iterable[str]
    """Ports of the host that lead to the guest's loopback: `[HOST_IP:]PORT:GUEST_PORT`."""
    cmdline: str
    """More kernel parameters."""
    accel: str
    """`auto`, `kvm` or `tcg`."""
    template: bool
    """Wake from a machine that was saved at the end of its boot, or else boot and have one made: the default."""


def cancellable(options: MachineOptions, given_up: Callable[[], bool]) -> MachineOptions:
    """`options` with one more reason to give up."""
    asked = options.get("cancelled", lambda: False)
    return {**options, "cancelled": lambda: given_up() or asked()}


@dataclass(frozen=True)
class Machine:
    """A microVM that can be started: its devices, and what the image of its root says."""

    config: MachineConfig
    image: ImageConfig | None = None
    services: Services | None = None
    cancelled: Callable[[], bool] | None = None
    template: bool = True
    """It may wake from a template (:mod:`vmette.templates`)."""
    copied_secrets: bool = False
    """It is a copy of a machine that has secrets, and so has its memory."""

    @property
    def has_secrets(self) -> bool:
        """Whether there is something in its memory that is to be on no disk."""
        return self.copied_secrets or (self.services is not None and bool(self.services.secrets))

    def command(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        entrypoint: Sequence[str] | None = None,
        *,
        terminal: tuple[int, int] | None = None,
        switch_root: bool = False,
    ) -> Command:
        """What a caller asks to be run, and the image where the caller says nothing. See :meth:`Command.of`."""
        if self.services is not None:
            env = {**self.services.env, **(env or {})}
        command = Command.of(argv, env, cwd, user, image=self.image, entrypoint=entrypoint)
        return replace(command, terminal=terminal, init=switch_root)


def prepare(rootfs: str | os.PathLike[str], options: MachineOptions) -> Machine:
    """Finds the root filesystem, fetching it if need be, and checks all the rest.

    Raises:
        ConfigError, PayloadError: the options cannot be used.
        ProviderError: there is no such root filesystem.
    """
    from .providers.registry import default_registry

    if os.fspath(rootfs).startswith(SNAPSHOT):
        from .snapshots import machine

        return machine(os.fspath(rootfs).removeprefix(SNAPSHOT), options)
    options = options.copy()
    if "vsock_port" in options or "guest_vsock_port" in options:
        options["vsock"] = True
    cancelled = options.pop("cancelled", None)
    platform = options.pop("platform", None)
    arch, rosetta = architecture(options.pop("arch", None), platform)
    context = Context(
        assets.cache_root(),
        options.pop("offline", False),
        arch=arch,
        pull=options.pop("pull", "missing"),
        platform=platform,
        form=options.pop("rootfs_form", "block"),
        progress=options.pop("progress", None) or (lambda _: None),
        cancelled=cancelled or (lambda: False),
    )
    template = options.pop("template", True)
    registry = options.pop("registry", None) or default_registry()
    # What is wrong with these is said before anything is fetched.
    given = services(options)
    config = _config(arch, rosetta=rosetta, **{name: value for name, value in options.items() if name not in SERVICES})  # type: ignore[arg-type]
    artifact = registry.resolve(os.fspath(rootfs), context)
    given = for_image(given, artifact.config)
    return Machine(replace(config, root=artifact), artifact.config, given, cancelled, template)


def services(options: MachineOptions) -> Services | None:
    """The services that are asked for.

    Raises:
        ConfigError: they cannot be had.
    """
    return _services(**{name: value for name, value in options.items() if name in SERVICES})  # type: ignore[arg-type]


def for_image(services: Services | None, image: ImageConfig | None) -> Services | None:
    """The same, where the image says who may read the secrets unless somebody else does."""
    if services is None or services.secrets_user is not None or image is None:
        return services
    return replace(services, secrets_user=image.user)


def architecture(arch: str | None, platform: str | None) -> tuple[str, bool]:
    """The architecture of a machine that is asked for by its own, its image's platform or neither; and if by Rosetta.

    An image of another architecture than this computer's runs in a machine of that, which is emulated. On a Mac, one
    for x86_64 runs in a machine of the Mac's own, by Rosetta.

    Raises:
        ConfigError: there is no such machine, or it would not run the image.
    """
    from . import vmm

    machine = None if arch is None else assets.canonical_arch(arch)
    _, _, rest = (platform or "").partition("/")
    if not rest:  # a malformed one is the provider's to refuse
        return machine or assets.host_arch(), False
    wanted = assets.ARCHITECTURES.get(rest.partition("/")[0])
    if wanted is None:
        raise ConfigError(f"no machine here runs images for {platform}: there are linux/amd64 and linux/arm64")
    if wanted == "x86_64" and (machine or assets.host_arch()) == "aarch64" and vmm.name() == "vz":
        return "aarch64", True
    if machine not in {None, wanted}:
        raise ConfigError(f"an image for {platform} does not run in a machine for {arch}: leave out one of the two")
    return wanted, False


def _config(
    arch: str,
    *,
    rootfs_ro: bool = False,
    net: bool = False,
    scratch: int | str | None = None,
    vsock: bool = False,
    shares: Iterable[Share] = (),
    disks: Iterable[Disk] = (),
    kernel: str | os.PathLike[str] | None = None,
    initramfs: str | os.PathLike[str] | None = None,
    **others: Any,
) -> MachineConfig:
    """The configuration, but for its root, of the options that are those of the machine itself."""
    return MachineConfig(
        None,
        arch=arch,
        root_read_only=rootfs_ro,
        network=net,
        vsock=vsock and os.environ.get("VMETTE_VSOCK") != "relay",
        guest_helpers=vsock,
        scratch_mib=scratch_size(scratch) if isinstance(scratch, str) else scratch,
        shares=tuple(shares),
        disks=tuple(disks),
        kernel=None if kernel is None else Path(kernel),
        initramfs=None if initramfs is None else Path(initramfs),
        **others,
    )


def _services(
    *,
    secrets: Mapping[str, str | bytes] | None = None,
    secrets_user: str | None = None,
    ca_certs: str | os.PathLike[str] | None = None,
    allow_hosts: Iterable[str] = (),
    publish: Iterable[str] = (),
    vsock_port: int | None = None,
    guest_vsock_port: int | None = None,
) -> Services | None:
    """The services of these options; None, which costs nothing, if there are none."""
    ca_certs = ca_certs or os.environ.get("VMETTE_CA_CERTS") or _configured_certs()
    allow_hosts, publish = tuple(allow_hosts), tuple(publish)
    if not (secrets or ca_certs or allow_hosts or publish) and vsock_port is None and guest_vsock_port is None:
        return None
    from .process import encoded
    from .services import Publication, Services, allowed_hosts, read_ca_certs

    return Services(
        secrets={name: encoded(value) for name, value in (secrets or {}).items()},
        secrets_user=secrets_user,
        ca_certs=read_ca_certs(Path(ca_certs)) if ca_certs else b"",
        allow_hosts=allowed_hosts(allow_hosts),
        publish=tuple(map(Publication.parse, publish)),
        vsock_port=vsock_port,
        guest_vsock_port=guest_vsock_port,
    )


def _configured_certs() -> Path | None:
    root = assets.config_root()
    return root / "certs" if root is not None and (root / "certs").is_dir() else None


@contextmanager
def booted(
    machine: Machine,
    stopwatch: Stopwatch,
    *,
    deadline: float | None = None,
    debug: Callable[[str], None] | None = None,
    lasting: bool = False,
) -> Iterator[Guest]:
    """A guest of `machine`, with its services. It has just been started and may still have to say hello.

    One that is `lasting` has said it.

    Raises:
        VmmError: the VMM does not start.
        SandboxTimeout: `deadline`, a time of `time.monotonic`, passed before its services were there.
        ConfigError, GuestError: see :func:`vmette.services.running`.
    """
    config = machine.config
    with ExitStack() as stack:
        if config.root is not None:
            stack.callback(os.close, held(config.root.path))  # nobody clears the cache of it while the VM lives
        guest = template = None
        if machine.template and config.saved is None:
            from . import templates

            template = templates.find(config, stopwatch)
        if template is not None and template.ready:
            guest = _woken(machine, template, stopwatch, stack, debug, deadline)
            template = None
        if template is not None and not lasting:
            stack.callback(lambda: template.make_later() if guest is not None and guest.kernel is not None else None)
        if guest is None:
            guest = _started(machine, config, stopwatch, stack, debug)
        if lasting:
            guest.turn_until(lambda: guest.kernel is not None, deadline)
            if template is not None:
                template.make_later()
        if machine.services is not None:
            from .services import running

            stack.enter_context(running(guest, machine.services, guest.vsock, deadline))
        yield guest


def _started(
    machine: Machine,
    config: MachineConfig,
    stopwatch: Stopwatch,
    stack: ExitStack,
    debug: Callable[[str], None] | None,
) -> Guest:
    from . import vmm

    vm = stack.enter_context(vmm.start(config, partial(stopwatch.reached, "vmm")))
    # The VM comes first: what talks to it is imported while it boots.
    from .guest import Guest

    guest = stack.enter_context(Guest(vm, stopwatch, debug=debug, cancelled=machine.cancelled))
    if config.savable:
        from . import saved

        guest.facts = saved.facts(vmm.settled(config))
    return guest


def _woken(
    machine: Machine,
    template: Template,
    stopwatch: Stopwatch,
    stack: ExitStack,
    debug: Callable[[str], None] | None,
    deadline: float | None,
) -> Guest | None:
    """A guest that has woken from `template`; None if it does not, and then the template is gone."""
    with ExitStack() as inner:
        try:
            config = replace(template.config, saved=template.saved, savable=machine.config.savable)
            guest = _started(machine, config, stopwatch, inner, debug)
            end = time.monotonic() + WAKE_SECONDS
            guest.turn_until(lambda: guest.kernel is not None, end if deadline is None else min(end, deadline))
        except (VmmError, GuestError, ProtocolError, SandboxTimeout, OSError) as error:
            if isinstance(error, SandboxTimeout) and time.monotonic() < end:
                raise
            logger.warning("a machine did not wake, and boots: %s", str(error) or "it took too long")
            stopwatch.way = "booted: the template was of no use"
            if not isinstance(error, OSError):  # which would be this process's trouble
                template.give_up(error)
            return None
        stack.push(inner.pop_all())
        return guest


def execute(
    machine: Machine,
    command: Command,
    stdin: Source,
    stdout: Sink,
    stderr: Sink,
    *,
    stopwatch: Stopwatch,
    timeout: float | None = None,
    debug: Callable[[str], None] | None = None,
    attach: Callable[[Guest], AbstractContextManager[Callable[[Stream], None]]] | None = None,
) -> Exited:
    """Boots `machine`, runs `command` in it, and ends it.

    `attach` surrounds the command once the guest is up; what it yields is given the command's stream.

    Raises:
        SandboxTimeout: `timeout` seconds have passed.
        VmetteError: see :meth:`vmette.guest.Guest.run`.
    """
    if timeout is not None and not (math.isfinite(timeout) and timeout >= 0):
        raise ConfigError(f"a time-out of {timeout} seconds cannot be kept")
    deadline = None if timeout is None else time.monotonic() + timeout
    with booted(machine, stopwatch, deadline=deadline, debug=debug) as guest:
        if attach is not None:
            guest.turn_until(lambda: guest.kernel is not None, deadline)
        with attach(guest) if attach is not None else nullcontext() as started:
            exited = guest.run(command, stdin, stdout, stderr, deadline=deadline, started=started)
        guest.finish(deadline)
    return exited
