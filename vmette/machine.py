"""A microVM as a caller asks for it, and its start: what `vmette.run`, `vmette.Sandbox` and the command line share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from . import assets
from .config import Command, MachineConfig, Share
from .locks import held
from .providers.base import Context, ImageConfig, Progress
from .timings import Stopwatch

if TYPE_CHECKING:
    from .guest import Guest
    from .providers.registry import Registry


class RootfsOptions(TypedDict, total=False):
    """How a root filesystem is found."""

    offline: bool
    """Providers use what their caches hold and no network."""
    pull: str
    """When a registry is asked: `missing` (the cache has it not, or checked it over an hour ago), `always`, `never`."""
    platform: str | None
    """Of the image, `os/arch[/variant]`; linux on `arch` by default."""
    rootfs_form: str
    """What layers are made into: a `block` image, or a `directory`."""
    arch: str | None
    """`x86_64` or `aarch64`; the host's by default."""
    progress: Callable[[Progress], None] | None
    """Is told how long work goes, from several threads."""
    registry: Registry | None
    """Other providers than the default ones."""


class MachineOptions(RootfsOptions, total=False):
    """All that can be said of a machine."""

    shares: Iterable[Share]
    """Directories of the host at /mnt/TAG."""
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
    cmdline: str
    """More kernel parameters."""
    accel: str
    """`auto`, `kvm` or `tcg`."""


@dataclass(frozen=True)
class Machine:
    """A microVM that can be started: its devices, and what the image of its root says."""

    config: MachineConfig
    image: ImageConfig | None = None

    def command(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        entrypoint: Sequence[str] | None = None,
    ) -> Command:
        """What a caller asks to be run, and the image where the caller says nothing. See :meth:`Command.of`."""
        return Command.of(argv, env, cwd, user, image=self.image, entrypoint=entrypoint)


def prepare(rootfs: str | os.PathLike[str], options: MachineOptions) -> Machine:
    """Finds the root filesystem, fetching it if need be, and checks all the rest.

    Raises:
        ConfigError, PayloadError: the options cannot be used.
        ProviderError: there is no such root filesystem.
    """
    from .providers.registry import default_registry

    options = options.copy()
    arch = assets.canonical_arch(given) if (given := options.pop("arch", None)) else assets.host_arch()
    context = Context(
        assets.cache_root(),
        options.pop("offline", False),
        arch=arch,
        pull=options.pop("pull", "missing"),
        platform=options.pop("platform", None),
        form=options.pop("rootfs_form", "block"),
        progress=options.pop("progress", None) or (lambda _: None),
    )
    registry = options.pop("registry", None) or default_registry()
    fields: dict[str, Any] = dict(options)  # of MachineConfig, which takes no others
    for name in ("kernel", "initramfs"):
        if fields.get(name) is not None:
            fields[name] = Path(fields[name])
    if "shares" in fields:
        fields["shares"] = tuple(fields["shares"])
    if "rootfs_ro" in fields:
        fields["root_read_only"] = fields.pop("rootfs_ro")
    config = MachineConfig(None, arch=arch, **fields)  # what is wrong with it is said before anything is fetched
    artifact = registry.resolve(os.fspath(rootfs), context)
    return Machine(replace(config, root=artifact), artifact.config)


@contextmanager
def booted(machine: Machine, stopwatch: Stopwatch, *, debug: Callable[[str], None] | None = None) -> Iterator[Guest]:
    """A guest of `machine`, which has just been started and says hello later. It is gone at the end.

    Raises:
        VmmError: the VMM does not start.
    """
    from .vmm.qemu import QemuMachine, choose_accel

    config = machine.config
    with ExitStack() as stack:
        if config.root is not None:
            stack.callback(os.close, held(config.root.path))  # nobody clears the cache of it while the VM lives
        accel = choose_accel(config)
        stopwatch.reached("vmm")
        vm = stack.enter_context(QemuMachine(config, accel))
        # The VM comes first: what talks to it is imported while it boots.
        from .guest import Guest

        yield stack.enter_context(Guest(vm, stopwatch, debug=debug))
