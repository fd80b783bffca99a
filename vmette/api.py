"""Running one command in a microVM, from Python: the shape of :mod:`subprocess`."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, overload

from .config import Command, MachineConfig, Share
from .errors import CalledProcessError, ConfigError, SandboxTimeout, TimeoutExpired
from .locks import held
from .providers.base import Context, Progress
from .streams import Buffer, BytesSource, Sink, Source
from .timings import Stopwatch, Timing

if TYPE_CHECKING:
    from .protocol import Exited
    from .providers.registry import Registry

MAX_OUTPUT = 256 << 20

Text = TypeVar("Text", bytes, str)


@dataclass(frozen=True)
class CompletedProcess(Generic[Text]):
    """A command that has ended, as :class:`subprocess.CompletedProcess` has it."""

    args: tuple[str, ...]
    returncode: int
    """The exit status, or minus the number of the signal that ended the command."""
    stdout: Text
    stderr: Text
    timings: tuple[Timing, ...] = field(default=(), compare=False)
    """The milestones of the run, in seconds since its start."""

    def check_returncode(self) -> None:
        """Does nothing if the command succeeded.

        Raises:
            CalledProcessError: its status is not 0.
        """
        if self.returncode:
            raise CalledProcessError(self.returncode, self.args, self.stdout, self.stderr)


def execute(
    config: MachineConfig,
    command: Command,
    stdin: Source,
    stdout: Sink,
    stderr: Sink,
    *,
    stopwatch: Stopwatch,
    timeout: float | None = None,
    debug: Callable[[str], None] | None = None,
) -> Exited:
    """Boots a VM of `config`, runs `command` in it, and ends it.

    Raises:
        SandboxTimeout: `timeout` seconds have passed.
        VmetteError: see :meth:`vmette.sandbox.Sandbox.run`.
    """
    if timeout is not None and not (math.isfinite(timeout) and timeout >= 0):
        raise ConfigError(f"a time-out of {timeout} seconds cannot be kept")
    deadline = None if timeout is None else time.monotonic() + timeout
    from .vmm.qemu import QemuMachine, choose_accel

    with ExitStack() as stack:
        if config.root is not None:
            stack.callback(os.close, held(config.root.path))  # nobody clears the cache of it while the VM lives
        accel = choose_accel(config)
        stopwatch.reached("vmm")
        machine = stack.enter_context(QemuMachine(config, accel))
        # The VM comes first: what talks to it is imported while it boots.
        from .sandbox import Sandbox

        with Sandbox(machine, stopwatch, deadline=deadline, debug=debug) as sandbox:
            exited = sandbox.run(command, stdin, stdout, stderr)
            sandbox.finish()
    return exited


@overload
def run(
    rootfs: str | os.PathLike[str],
    argv: Sequence[str] = ...,
    *,
    text: Literal[False] = ...,
    env: Mapping[str, str] | None = ...,
    cwd: str | None = ...,
    user: str | None = ...,
    input: bytes | None = ...,
    timeout: float | None = ...,
    check: bool = ...,
    shares: Iterable[Share] = ...,
    vcpus: int = ...,
    mem_mib: int = ...,
    rootfs_ro: bool = ...,
    offline: bool = ...,
    pull: str = ...,
    platform: str | None = ...,
    rootfs_form: str = ...,
    entrypoint: Sequence[str] | None = ...,
    progress: Callable[[Progress], None] | None = ...,
    kernel: str | os.PathLike[str] | None = ...,
    initramfs: str | os.PathLike[str] | None = ...,
    cmdline: str = ...,
    arch: str | None = ...,
    accel: str = ...,
    max_output: int = ...,
    registry: Registry | None = ...,
) -> CompletedProcess[bytes]: ...


@overload
def run(
    rootfs: str | os.PathLike[str],
    argv: Sequence[str] = ...,
    *,
    text: Literal[True],
    env: Mapping[str, str] | None = ...,
    cwd: str | None = ...,
    user: str | None = ...,
    input: str | None = ...,
    timeout: float | None = ...,
    check: bool = ...,
    shares: Iterable[Share] = ...,
    vcpus: int = ...,
    mem_mib: int = ...,
    rootfs_ro: bool = ...,
    offline: bool = ...,
    pull: str = ...,
    platform: str | None = ...,
    rootfs_form: str = ...,
    entrypoint: Sequence[str] | None = ...,
    progress: Callable[[Progress], None] | None = ...,
    kernel: str | os.PathLike[str] | None = ...,
    initramfs: str | os.PathLike[str] | None = ...,
    cmdline: str = ...,
    arch: str | None = ...,
    accel: str = ...,
    max_output: int = ...,
    registry: Registry | None = ...,
) -> CompletedProcess[str]: ...


def run(
    rootfs: str | os.PathLike[str],
    argv: Sequence[str] = (),
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    user: str | None = None,
    input: bytes | str | None = None,  # noqa: A002 (the name that subprocess.run has)
    timeout: float | None = None,
    check: bool = False,
    text: bool = False,
    shares: Iterable[Share] = (),
    vcpus: int = 1,
    mem_mib: int = 512,
    rootfs_ro: bool = False,
    offline: bool = False,
    pull: str = "missing",
    platform: str | None = None,
    rootfs_form: str = "block",
    entrypoint: Sequence[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    kernel: str | os.PathLike[str] | None = None,
    initramfs: str | os.PathLike[str] | None = None,
    cmdline: str = "",
    arch: str | None = None,
    accel: str = "auto",
    max_output: int = MAX_OUTPUT,
    registry: Registry | None = None,
) -> CompletedProcess[bytes] | CompletedProcess[str]:
    """Runs `argv` in a fresh microVM whose root filesystem is `rootfs`, and returns what it wrote.

    Args:
        rootfs: A spec that a provider claims: a directory, `builtin://base`, ….
        argv: The program, looked up in the guest's PATH, and its arguments. There is no shell in between. An image's
            Entrypoint comes before it, and its Cmd in place of an empty one.
        env: The command's environment, added to the image's; PATH and HOME are added where they are missing. There is
            nothing of the host's.
        cwd: An absolute path of the guest; the image's WorkingDir or `/` by default.
        user: `user[:group]`, names of the guest or numbers; the image's User or root by default.
        input: The command's stdin, which is empty otherwise.
        timeout: Seconds for the whole run, boot included, once the root filesystem is at hand.
        check: Raise if the status is not 0.
        text: `input`, `stdout` and `stderr` are text in UTF-8 (undecodable bytes become U+FFFD), not bytes.
        shares: Directories of the host at /mnt/TAG.
        vcpus: Virtual processors.
        mem_mib: Memory in MiB.
        rootfs_ro: The root filesystem cannot be written to. (What is written otherwise goes with the VM.)
        offline: Providers use what their caches hold and no network.
        pull: When a registry is asked: `missing` (the cache has it not, or had it checked over an hour ago), `always`
            or `never`.
        platform: Of the image, `os/arch[/variant]`; linux on `arch` by default.
        rootfs_form: What layers are made into: a `block` image, or a `directory`.
        entrypoint: In place of the image's Entrypoint; empty is none.
        progress: Is told how long work goes, from several threads.
        kernel: Another kernel.
        initramfs: Another initramfs.
        cmdline: More kernel parameters.
        arch: `x86_64` or `aarch64`; the host's by default.
        accel: `auto`, `kvm` or `tcg`.
        max_output: The most bytes of each of stdout and stderr that are taken.
        registry: Other providers than the default ones.

    Raises:
        CalledProcessError: `check` is set and the status is not 0.
        TimeoutExpired: the time is over. It carries the output so far.
        OutputTooLarge: there is more output than `max_output`.
        CommandNotStarted: there is no such command, or it cannot be executed.
        ConfigError, ProviderError, PayloadError, VmmError, GuestError, ProtocolError: the run failed.
    """
    from . import assets
    from .providers.registry import default_registry

    stopwatch = Stopwatch()
    Command.of(argv or ["-"], env, cwd, user)  # what is wrong with it is said before all else
    arch = assets.canonical_arch(arch) if arch else assets.host_arch()
    context = Context(
        assets.cache_root(),
        offline,
        arch=arch,
        pull=pull,
        platform=platform,
        form=rootfs_form,
        progress=progress or (lambda _: None),
    )
    artifact = (registry or default_registry()).resolve(os.fspath(rootfs), context)
    command = Command.of(argv, env, cwd, user, image=artifact.config, entrypoint=entrypoint)
    config = MachineConfig(
        artifact,
        shares=tuple(shares),
        vcpus=vcpus,
        mem_mib=mem_mib,
        root_read_only=rootfs_ro,
        kernel=None if kernel is None else Path(kernel),
        initramfs=None if initramfs is None else Path(initramfs),
        cmdline=cmdline,
        arch=arch,
        accel=accel,
    )
    words = tuple(map(os.fsdecode, command.argv))
    stopwatch.reached("rootfs")
    stdout, stderr = Buffer(max_output), Buffer(max_output)
    stdin = BytesSource(input.encode() if isinstance(input, str) else input or b"")
    try:
        exited = execute(config, command, stdin, stdout, stderr, stopwatch=stopwatch, timeout=timeout)
    except SandboxTimeout:
        assert timeout is not None
        output = [_text(b.data) if text else bytes(b.data) for b in (stdout, stderr)]
        raise TimeoutExpired(words, timeout, *output) from None
    status = -exited.signal if exited.signal is not None else exited.code or 0
    completed: CompletedProcess[bytes] | CompletedProcess[str]
    if text:
        output_text = _text(stdout.data), _text(stderr.data)
        completed = CompletedProcess(words, status, *output_text, stopwatch.timings)
    else:
        completed = CompletedProcess(words, status, bytes(stdout.data), bytes(stderr.data), stopwatch.timings)
    if check:
        completed.check_returncode()
    return completed


def _text(data: bytearray) -> str:
    return data.decode(errors="replace")
